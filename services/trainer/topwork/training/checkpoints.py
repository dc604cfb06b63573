"""Checkpoints of a training stage: stored in the background, pruned to the newest two, and read on resume."""

import re
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from pydantic import ValidationError

from topwork.artifacts import MANIFEST_NAME, download_artifact, write_artifact
from topwork.errors import DamagedError, DataError, FormatError, TopworkError
from topwork.training.train_state import TrainState
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

FORMAT = 1
"""Version of the checkpoint format. Increase it when an older topwork would resume incorrectly from a checkpoint."""

CHECKPOINTS_TO_KEEP = 2
"""The newest checkpoint, and the one before in case the newest is damaged. The older one is deleted only after a newer
one is stored completely."""

# Values of the variables in each group, in the order of the model's variables.
Values = dict[str, list[np.ndarray]]
REQUIRED_GROUPS = frozenset({"model", "optimizer"})
_ARRAYS_FILE = "state.npz"
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
    with tempfile.TemporaryDirectory(dir=workspace.scratch, prefix="checkpoint-") as directory:
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

    def __init__(self, workspace: Workspace, prefix: str, minutes: float) -> None:
        """Start the background thread.

        Args:
            workspace: Storage, metrics and scratch directory.
            prefix: Storage key prefix of the stage; checkpoints are stored in `checkpoints/` below it.
            minutes: Interval after which a checkpoint is due in the middle of an epoch.
        """
        self._interval_seconds, self._last_save = 60 * minutes, time.monotonic()
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
            The checkpoint; None if there is none.

        Raises:
            FormatError: If a topwork version with a different checkpoint format wrote it.
            UnavailableError: If storage cannot be reached: a checkpoint may still exist.
        """
        stored = self._list()
        complete = [name for name, keys in stored.items() if _is_complete(keys)]
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
        """Whether the interval since the last checkpoint has passed. The end of an epoch always stores one."""
        return time.monotonic() - self._last_save >= self._interval_seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint in the background. It replaces a checkpoint that is still waiting."""
        self._last_save = time.monotonic()
        with self._lock:
            self._pending = checkpoint
            if self._running is None:
                self._running = self._thread.submit(self._write_pending)

    def save_now(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint and wait for it.

        Raises:
            UnavailableError: If storage cannot be reached.
        """
        with self._lock:
            self._pending = None
        self._thread.submit(self._write, checkpoint).result()

    def wait(self) -> None:
        """Wait until the newest checkpoint is stored."""
        with self._lock:
            running = self._running
        if running is not None:
            running.result()

    def clear(self) -> None:
        """Delete all checkpoints of a completed stage."""
        self.wait()
        self._workspace.storage.delete([stored.key for stored in self._workspace.storage.list(f"{self._prefix}/")])

    def _write_pending(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._pending = self._pending, None
                if checkpoint is None:
                    self._running = None
                    return
            try:
                self._write(checkpoint)
            except TopworkError as error:
                # Training continues: the next checkpoint may succeed.
                log.warning("checkpoint not stored", checkpoint=checkpoint.name, reason=str(error))

    def _write(self, checkpoint: Checkpoint) -> None:
        self._delete({checkpoint.name} & self._unreadable)
        start = time.monotonic()
        write_checkpoint(checkpoint, f"{self._prefix}/{checkpoint.name}", self._workspace)
        self._workspace.metrics.record_checkpoint(time.monotonic() - start)
        complete = {name for name, keys in self._list().items() if _is_complete(keys)}
        old = sorted(complete - self._unreadable | {checkpoint.name})[:-CHECKPOINTS_TO_KEEP]
        self._delete({*old, *self._unreadable} - {checkpoint.name})
        self._unreadable.clear()

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
