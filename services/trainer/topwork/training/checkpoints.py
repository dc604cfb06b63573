"""Checkpoints of a stage in storage, written beside training: only the newest matters."""

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
from pydantic import ValidationError

from topwork.artifacts import NAME as MANIFEST
from topwork.artifacts import fetch_whole, write_whole
from topwork.errors import DamagedError, DataError, FormatError, TopworkError
from topwork.training.train_state import Course
from topwork.workspace import Workspace

FORMAT = 1
"""Version of what a checkpoint holds; another one where an older topwork would go on wrongly from it."""

# Values of the variables of a group, in the order of the model's variables.
Values = dict[str, list[np.ndarray]]
GROUPS = frozenset({"model", "optimizer"})
_ARRAYS = "state.npz"


@dataclass(frozen=True)
class Checkpoint:
    """All that a stage needs to go on exactly where it was.

    Attributes:
        course: How far the stage is.
        values: Values of the variables in the groups model, optimizer, metrics and best.
    """

    course: Course
    values: Values

    @property
    def name(self) -> str:
        """Folder of the checkpoint: complete epochs and, within an epoch, the steps done of the next."""
        step = f"-{self.course.step:07}" if self.course.step else ""
        return f"{self.course.epoch:05}{step}"


def write(checkpoint: Checkpoint, prefix: str, workspace: Workspace) -> None:
    """Store a checkpoint.

    Args:
        checkpoint: The checkpoint.
        prefix: Key of its folder.
        workspace: Storage and scratch.

    Raises:
        UnavailableError: If storage can't be reached.
    """
    with tempfile.TemporaryDirectory(dir=workspace.scratch, prefix="checkpoint-") as folder:
        arrays = {
            f"{group}/{index:05}": value
            for group, values in checkpoint.values.items()
            for index, value in enumerate(values)
        }
        with (Path(folder) / _ARRAYS).open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes the names for its options
        facts = {"format": FORMAT, **checkpoint.course.model_dump(mode="json")}
        write_whole(workspace.storage, prefix, Path(folder), facts)


def read(prefix: str, workspace: Workspace) -> Checkpoint:
    """Fetch a checkpoint.

    Args:
        prefix: Key of its folder.
        workspace: Storage and scratch.

    Returns:
        The checkpoint.

    Raises:
        FormatError: If another topwork wrote it.
        DataError: If a part of it is missing, or it is none.
        DamagedError: If its bytes aren't those that its manifest names.
        UnavailableError: If storage can't be reached.
    """
    folder = workspace.scratch / f"restored-{Path(prefix).name}"
    try:
        facts = fetch_whole(workspace.storage, prefix, folder).facts
        if (found := facts.pop("format", FORMAT)) != FORMAT:
            raise FormatError(
                f"The checkpoint {workspace.storage.uri_of(prefix)} has format {found}, and this topwork reads format "
                f"{FORMAT}. Go on with the topwork that the run was begun with, or start over with --restart."
            )
        values: Values = {}
        with np.load(folder / _ARRAYS) as arrays:
            for key in sorted(arrays.files):
                values.setdefault(key.split("/")[0], []).append(arrays[key])
        if missing := GROUPS - values.keys():
            raise DataError(f"{workspace.storage.uri_of(prefix)} lacks the values of {', '.join(sorted(missing))}.")
        return Checkpoint(Course.model_validate(facts), values)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{workspace.storage.uri_of(prefix)} is no checkpoint of topwork: {reason}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_FOLDER = re.compile(r"(\d{5})(?:-(\d{7}))?$")
KEPT = 2
"""The newest, and one more should the newest be damaged. A third would not help: the one before is only deleted when
the newest stands whole, so two are lost only where a store loses what it has confirmed time and again."""


class Checkpoints:
    """Writes checkpoints from a thread of its own and finds the newest; a context manager that waits at its end."""

    def __init__(self, workspace: Workspace, prefix: str, minutes: float) -> None:
        """Prepare the writer.

        Args:
            workspace: Storage, scratch, metrics and progress.
            prefix: Key of the stage in storage; the checkpoints lie in `checkpoints/` below it.
            minutes: Age at which the last one calls for another, in the middle of an epoch.
        """
        self._seconds, self._saved = 60 * minutes, time.monotonic()
        self._workspace = workspace
        self._prefix = f"{prefix}/checkpoints"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._lock = threading.Lock()
        self._waiting: Checkpoint | None = None
        self._running: Future[None] | None = None
        # What can't be read is in the way of what is written anew, and lies there until then.
        self._unreadable: set[str] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def newest(self) -> Checkpoint | None:
        """Fetch the newest checkpoint that can be read, and clear away what killed processes left half-written.

        One that is damaged or lacks a file is passed over, and deleted when another is stored.

        Returns:
            The checkpoint; None if there is none.

        Raises:
            FormatError: If another topwork wrote it.
            UnavailableError: If storage can't be reached: a checkpoint may be there all the same.
        """
        folders = self._folders()
        whole = [name for name, keys in folders.items() if _is_whole(keys)]
        self._delete(folders.keys() - set(whole))
        for name in sorted(whole, reverse=True):
            try:
                return read(f"{self._prefix}/{name}", self._workspace)
            except FormatError:
                raise
            except (DataError, DamagedError) as error:
                self._workspace.progress.note("checkpoint can't be read", checkpoint=name, reason=str(error))
                self._unreadable.add(name)
        return None

    @property
    def is_due(self) -> bool:
        """Whether the last one is older than the spec lets it become; an epoch has its own at its end."""
        return time.monotonic() - self._saved >= self._seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint beside training. One that still waits is replaced: only the newest matters."""
        self._saved = time.monotonic()
        with self._lock:
            self._waiting = checkpoint
            if self._running is None:
                self._running = self._thread.submit(self._drain)

    def save_now(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint and wait for it.

        Raises:
            UnavailableError: If storage can't be reached.
        """
        with self._lock:
            self._waiting = None
        self._thread.submit(self._write, checkpoint).result()

    def wait(self) -> None:
        """Wait until the newest checkpoint is stored."""
        with self._lock:
            running = self._running
        if running is not None:
            running.result()

    def clear(self) -> None:
        """Delete all checkpoints of a stage that is done."""
        self.wait()
        self._workspace.storage.delete([stored.key for stored in self._workspace.storage.list(f"{self._prefix}/")])

    def _drain(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._waiting = self._waiting, None
                if checkpoint is None:
                    self._running = None
                    return
            try:
                self._write(checkpoint)
            except TopworkError as error:
                # Training goes on: the next checkpoint may get through.
                self._workspace.progress.note("checkpoint not stored", checkpoint=checkpoint.name, reason=str(error))

    def _write(self, checkpoint: Checkpoint) -> None:
        self._delete({checkpoint.name} & self._unreadable)
        began = time.monotonic()
        write(checkpoint, f"{self._prefix}/{checkpoint.name}", self._workspace)
        self._workspace.metrics.checkpoint_saved(time.monotonic() - began)
        whole = {name for name, keys in self._folders().items() if _is_whole(keys)}
        old = sorted(whole - self._unreadable | {checkpoint.name})[:-KEPT]
        self._delete({*old, *self._unreadable} - {checkpoint.name})
        self._unreadable.clear()

    def _folders(self) -> dict[str, list[str]]:
        """Keys of each checkpoint, whole or not, its manifest first: what lacks that is no checkpoint."""
        folders: dict[str, list[str]] = {}
        for stored in self._workspace.storage.list(f"{self._prefix}/"):
            folder, _, _ = stored.key.removeprefix(f"{self._prefix}/").partition("/")
            if _FOLDER.match(folder):
                folders.setdefault(folder, []).append(stored.key)
        return {name: sorted(keys, key=lambda key: not key.endswith(MANIFEST)) for name, keys in folders.items()}

    def _delete(self, names: Collection[str]) -> None:
        if names:
            folders = self._folders()
            self._workspace.storage.delete([key for name in sorted(names) for key in folders.get(name, ())])


def _is_whole(keys: list[str]) -> bool:
    return keys[0].endswith(f"/{MANIFEST}")
