"""Checkpoints of a stage in storage, written beside training: only the newest matters."""

import re
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from topwork.errors import DamagedError, DataError, FormatError, TopworkError
from topwork.manifest import NAME as MANIFEST
from topwork.training.checkpoint_files import Checkpoint, read, write
from topwork.workspace import Workspace

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
