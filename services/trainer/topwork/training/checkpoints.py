"""Checkpoints of a stage in storage, written beside training: only the newest matters."""

import re
import shutil
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topwork.errors import DataError, TopworkError
from topwork.manifest import NAME as MANIFEST
from topwork.manifest import fetch_whole, write_whole
from topwork.training.course import Course
from topwork.workspace import Workspace

# Values of the variables of a group, in the order of the model's variables.
Values = dict[str, list[np.ndarray]]
_FOLDER = re.compile(r"(\d{5})(?:-(\d{7}))?$")
_ARRAYS = "state.npz"
KEPT = 2


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


class Checkpoints:
    """Writes checkpoints from a thread of its own and finds the newest; a context manager that waits at its end."""

    def __init__(self, workspace: Workspace, prefix: str) -> None:
        """Prepare the writer.

        Args:
            workspace: Storage, scratch, metrics and progress.
            prefix: Key of the stage in storage; the checkpoints lie in `checkpoints/` below it.
        """
        self._workspace = workspace
        self._prefix = f"{prefix}/checkpoints"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._lock = threading.Lock()
        self._waiting: Checkpoint | None = None
        self._running: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def newest(self) -> Checkpoint | None:
        """Fetch the newest whole checkpoint; one that can't be read is deleted, and the one before it is taken.

        Returns:
            The checkpoint; None if there is none.
        """
        for name in sorted(self._whole(), reverse=True):
            try:
                return self._read(name)
            except DataError as error:
                self._workspace.progress.note("checkpoint can't be read", checkpoint=name, reason=str(error))
                self._delete(name)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Store a checkpoint beside training. One that still waits is replaced: only the newest matters."""
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
                # Training goes on: the next epoch's checkpoint may get through.
                self._workspace.progress.note("checkpoint not stored", checkpoint=checkpoint.name, reason=str(error))

    def _write(self, checkpoint: Checkpoint) -> None:
        with tempfile.TemporaryDirectory(dir=self._workspace.scratch, prefix="checkpoint-") as folder:
            arrays = {
                f"{group}/{index:05}": value
                for group, values in checkpoint.values.items()
                for index, value in enumerate(values)
            }
            with (Path(folder) / _ARRAYS).open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type] # numpy's stub takes the names for its options
            facts = checkpoint.course.model_dump(mode="json")
            write_whole(self._workspace.storage, f"{self._prefix}/{checkpoint.name}", Path(folder), facts)
        self._workspace.metrics.checkpoint_saved()
        for name in sorted(self._whole())[:-KEPT]:
            self._delete(name)

    def _whole(self) -> list[str]:
        names = []
        for stored in self._workspace.storage.list(f"{self._prefix}/"):
            folder, _, file = stored.key.removeprefix(f"{self._prefix}/").partition("/")
            if file == MANIFEST and _FOLDER.match(folder):
                names.append(folder)
        return names

    def _read(self, name: str) -> Checkpoint:
        folder = self._workspace.scratch / f"restored-{name}"
        try:
            manifest = fetch_whole(self._workspace.storage, f"{self._prefix}/{name}", folder)
            values: Values = {}
            with np.load(folder / _ARRAYS) as arrays:
                for key in sorted(arrays.files):
                    values.setdefault(key.split("/")[0], []).append(arrays[key])
            return Checkpoint(Course.model_validate(manifest.facts), values)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"checkpoint {name} isn't one of topwork: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _delete(self, name: str) -> None:
        keys = [stored.key for stored in self._workspace.storage.list(f"{self._prefix}/{name}/")]
        # The manifest first: what lacks it is no checkpoint.
        keys.sort(key=lambda key: not key.endswith(MANIFEST))
        self._workspace.storage.delete(keys)


def read_values(variables: list[Any]) -> list[np.ndarray]:
    """Copy the values of variables to memory that training doesn't touch."""
    import keras

    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def write_values(variables: list[Any], values: list[np.ndarray]) -> None:
    """Set variables to values.

    Raises:
        DataError: If they are not those of these variables.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise DataError(
            "A checkpoint of this run doesn't fit its model: it was written by another version of topwork or Keras. "
            "Start over with --restart."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
