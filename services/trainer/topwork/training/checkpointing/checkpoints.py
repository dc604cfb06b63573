"""Checkpoints of a training stage: stored in the background, pruned to the newest two, and read on resume.

With several nodes, the chief stores, selects and deletes them; all nodes read the one that it selected.
"""

import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from pydantic import ValidationError

from topwork.artifacts import MANIFEST_NAME, download_artifact, write_artifact
from topwork.errors import DamagedError, DataError, FormatError, UnavailableError
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.checkpointing.write_failures import WriteFailures
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

FORMAT = 1
"""Version of the checkpoint format. Increase it when an older topwork would resume incorrectly from a checkpoint."""

CHECKPOINTS_TO_KEEP = 2
"""The newest checkpoint, and the one before in case the newest is damaged. The older one is deleted only after a newer
one is stored completely."""

EPOCH_SECONDS = 60.0
"""Minimum time between two checkpoints at the ends of epochs, unless `spec.compute.checkpointMinutes` is shorter."""

RETRY_SECONDS = 60.0
"""Time after a failed checkpoint at which the next one is due, unless `spec.compute.checkpointMinutes` is shorter."""

# Values of the variables in each group, in the order of the model's variables.
Values = dict[str, list[np.ndarray]]
REQUIRED_GROUPS = frozenset({"model", "optimizer"})
_ARRAYS_FILE = "state.npz"
_TEMPORARY_PREFIX = "checkpoint-"
_CHECKPOINT_NAME = re.compile(r"(\d{5})(?:-(\d{7}))?$")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a stage needs to resume exactly where it stopped.

    Attributes:
        state: Progress and history of the stage.
        values: Values of the variables in the groups model, optimizer, metrics and best.
    """

    state: TrainState
    values: Values

    @property
    def name(self) -> str:
        """Directory of the checkpoint: completed epochs and, within an epoch, completed steps of the next one."""
        step = f"-{self.state.step:07}" if self.state.step else ""
        return f"{self.state.epoch:05}{step}"


def write_checkpoint(checkpoint: Checkpoint, prefix: str, workspace: Workspace) -> None:
    """Store a checkpoint.

    Args:
        checkpoint: The checkpoint.
        prefix: Storage key prefix of the checkpoint.
        workspace: Storage and scratch directory.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    with tempfile.TemporaryDirectory(dir=workspace.scratch, prefix=_TEMPORARY_PREFIX) as directory:
        arrays = {
            f"{group}/{index:05}": value
            for group, values in checkpoint.values.items()
            for index, value in enumerate(values)
        }
        with (Path(directory) / _ARRAYS_FILE).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # NumPy's stub mistakes the names for options
        facts = {"format": FORMAT, **checkpoint.state.model_dump(mode="json")}
        write_artifact(workspace.storage, prefix, Path(directory), facts)


def read_checkpoint(prefix: str, workspace: Workspace) -> Checkpoint:
    """Download a checkpoint and verify it.

    Args:
        prefix: Storage key prefix of the checkpoint.
        workspace: Storage and scratch directory.

    Returns:
        The checkpoint.

    Raises:
        FormatError: If a topwork version with a different checkpoint format wrote it.
        DataError: If a part of it is missing, or it is not a checkpoint.
        DamagedError: If a file does not match the digest in the manifest.
        UnavailableError: If storage cannot be reached.
    """
    uri = workspace.storage.uri_of(prefix)
    directory = workspace.scratch / f"restored-{Path(prefix).name}"
    try:
        facts = download_artifact(workspace.storage, prefix, directory).facts
        if (stored_format := facts.pop("format", FORMAT)) != FORMAT:
            raise FormatError(
                f"The checkpoint {uri} has format {stored_format}, but this topwork reads format {FORMAT}. Resume with "
                "the topwork version that started the run, or start over with --restart."
            )
        values: Values = {}
        with np.load(directory / _ARRAYS_FILE) as arrays:
            for key in sorted(arrays.files):
                values.setdefault(key.split("/")[0], []).append(arrays[key])
        if missing := REQUIRED_GROUPS - values.keys():
            raise DataError(f"{uri} lacks the values of {', '.join(sorted(missing))}.")
        return Checkpoint(TrainState.model_validate(facts), values)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{uri} is not a topwork checkpoint: {reason}.") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a stage. A background thread stores them; leaving the context waits for it."""

    def __init__(
        self, workspace: Workspace, prefix: str, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the background thread.

        Args:
            workspace: Storage, metrics and scratch directory.
            prefix: Storage key prefix of the stage; checkpoints are stored in `checkpoints/` below it.
            minutes: Interval after which a checkpoint is due in the middle of an epoch.
            clock: Returns the time in seconds.
        """
        self._interval_seconds, self._clock, self._last_save = 60 * minutes, clock, clock()
        self._failures = WriteFailures("checkpoint", minutes, clock)
        self._workspace = workspace
        self._prefix = f"{prefix}/checkpoints"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._lock = threading.Lock()
        self._pending: Checkpoint | None = None
        self._running: Future[None] | None = None
        # Unreadable checkpoints are kept until a new checkpoint is stored, and deleted before their name is reused.
        self._unreadable: set[str] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def newest(self) -> Checkpoint | None:
        """Read the newest readable checkpoint, and delete incomplete ones that killed processes left behind.

        A damaged checkpoint is skipped; it is deleted after the next one is stored.

        Returns:
            The checkpoint, which is the same on all nodes; None if there is none.

        Raises:
            FormatError: If a topwork version with a different checkpoint format wrote it.
            UnavailableError: If storage cannot be reached: a checkpoint may still exist.
        """
        nodes = self._workspace.nodes
        self._last_save = self._clock()  # training starts now
        for leftover in self._workspace.scratch.glob(f"{_TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint = self._select_newest() if nodes.is_chief else None
        name = nodes.broadcast(checkpoint.name if checkpoint else None)
        if nodes.is_chief or name is None:
            return checkpoint
        return read_checkpoint(f"{self._prefix}/{name}", self._workspace)

    def _select_newest(self) -> Checkpoint | None:
        stored = self._list()
        complete = [name for name, keys in stored.items() if _is_complete(keys)]
        with self._tolerating_failures("incomplete checkpoints"):
            self._delete(stored.keys() - set(complete))
        for name in sorted(complete, reverse=True):
            try:
                return read_checkpoint(f"{self._prefix}/{name}", self._workspace)
            except FormatError:
                raise
            except (DataError, DamagedError) as error:
                log.warning("checkpoint is unreadable", checkpoint=name, reason=str(error))
                self._unreadable.add(name)
        return None

    @property
    def is_due(self) -> bool:
        """Whether a checkpoint is due in the middle of an epoch: after the interval, or soon after a failure."""
        is_retry = self._failures.is_failing and self._running is None
        return self._is_older_than(RETRY_SECONDS if is_retry else self._interval_seconds)

    @property
    def is_due_after_epoch(self) -> bool:
        """Whether a checkpoint is due at the end of an epoch. The last epoch of a stage always stores one."""
        return self._is_older_than(EPOCH_SECONDS)

    def _is_older_than(self, seconds: float) -> bool:
        return self._clock() - self._last_save >= min(seconds, self._interval_seconds)

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint in the background, on the chief. It replaces a checkpoint that is still waiting.

        A failure is logged. The next checkpoint is the next attempt; it contains all of the work.

        Raises:
            TopworkError: If checkpoints could not be stored for too long; see `WriteFailures`.
        """
        if not self._workspace.nodes.is_chief:
            return
        self._failures.check()
        self._last_save = self._clock()
        with self._lock:
            self._pending = checkpoint
            if self._running is None:
                self._running = self._thread.submit(self._write_pending)

    def save_now(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint on the chief, and wait for it on all nodes. A failed attempt is repeated once.

        Raises:
            UnavailableError: If the checkpoint could not be stored.
        """
        if self._workspace.nodes.is_chief:
            self._write_now(checkpoint)
        self._workspace.nodes.broadcast(None)

    def _write_now(self, checkpoint: Checkpoint) -> None:
        with self._lock:
            self._pending = None
        if self._thread.submit(self._try_to_write, checkpoint).result() is None:
            return
        if (error := self._thread.submit(self._try_to_write, checkpoint).result()) is not None:
            raise UnavailableError(
                f"The checkpoint could not be stored: {type(error).__name__}: {error} Earlier checkpoints are kept: "
                "start the same job again to resume from the last one."
            ) from error

    def wait(self) -> None:
        """Wait for the last attempt to store a checkpoint in the background."""
        with self._lock:
            running = self._running
        if running is not None:
            running.result()

    def clear(self) -> None:
        """Delete all checkpoints of a completed stage. A failure is logged: the next run deletes them."""
        self.wait()
        with self._tolerating_failures("checkpoints"):
            self._workspace.storage.delete([stored.key for stored in self._workspace.storage.list(f"{self._prefix}/")])

    def _write_pending(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._pending = self._pending, None
                if checkpoint is None:
                    self._running = None
                    return
            self._try_to_write(checkpoint)

    def _try_to_write(self, checkpoint: Checkpoint) -> BaseException | None:
        """Store a checkpoint; returns the error if it could not be stored."""
        start = self._clock()
        try:
            self._write(checkpoint)
        except BaseException as error:  # whatever it is, training continues, and the next checkpoint may succeed
            self._failures.record_failure(error, start, checkpoint=checkpoint.name)
            return error
        self._failures.record_success()
        with self._tolerating_failures("old checkpoints"):
            self._delete_old(checkpoint)
        return None

    def _write(self, checkpoint: Checkpoint) -> None:
        self._delete({checkpoint.name} & self._unreadable)
        start = time.monotonic()
        write_checkpoint(checkpoint, f"{self._prefix}/{checkpoint.name}", self._workspace)
        self._workspace.metrics.record_checkpoint(time.monotonic() - start)

    def _delete_old(self, newest: Checkpoint) -> None:
        complete = {name for name, keys in self._list().items() if _is_complete(keys)}
        old = sorted(complete - self._unreadable | {newest.name})[:-CHECKPOINTS_TO_KEEP]
        self._delete({*old, *self._unreadable} - {newest.name})
        self._unreadable.clear()

    @contextmanager
    def _tolerating_failures(self, what: str) -> Iterator[None]:
        """Log a failure to delete files: they only take space, and a later attempt or `topwork gc` deletes them."""
        try:
            yield
        except Exception as error:  # cleanup never fails a stage
            log.warning(f"{what} not deleted", prefix=self._prefix, reason=f"{type(error).__name__}: {error}")

    def _list(self) -> dict[str, list[str]]:
        """List the keys of each checkpoint, complete or not, manifest first, because it must be deleted first."""
        checkpoints: dict[str, list[str]] = {}
        for stored in self._workspace.storage.list(f"{self._prefix}/"):
            name, _, _ = stored.key.removeprefix(f"{self._prefix}/").partition("/")
            if _CHECKPOINT_NAME.match(name):
                checkpoints.setdefault(name, []).append(stored.key)
        return {
            name: sorted(keys, key=lambda key: not key.endswith(MANIFEST_NAME)) for name, keys in checkpoints.items()
        }

    def _delete(self, names: Collection[str]) -> None:
        if names:
            stored = self._list()
            self._workspace.storage.delete([key for name in sorted(names) for key in stored.get(name, ())])


def _is_complete(keys: list[str]) -> bool:
    return keys[0].endswith(f"/{MANIFEST_NAME}")
