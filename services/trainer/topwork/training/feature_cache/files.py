"""Features of a stage in storage, so that a run that was stopped computes none of them again."""

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from topwork.errors import TopworkError
from topwork.workspace import Workspace

# More than this is computed again after a stop rather than carried to storage and back.
MOST_BYTES = 4 * 2**30

Array = npt.NDArray[Any]


class FeatureFiles:
    """Pieces of the features of one split, each an object of its own; a context manager that waits at its end."""

    def __init__(self, workspace: Workspace, prefix: str) -> None:
        """Prepare to write and read.

        Args:
            workspace: Storage and progress.
            prefix: Key that stands for all that the features depend on.
        """
        self._workspace = workspace
        self._prefix = prefix
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "FeatureFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def read(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
        """Give the pieces that are stored, from the first row on, up to the first that is missing.

        Args:
            shape: Shape of one row.
            dtype: Type of the values.

        Yields:
            Arrays (rows, *shape).
        """
        row = 0
        while (data := self._workspace.storage.read(self._key(row))) is not None:
            try:
                piece = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError, OSError):
                return
            if piece.shape[1:] != shape or piece.dtype != dtype or not len(piece):
                return
            yield piece
            row += len(piece)

    def write(self, row: int, piece: Array) -> None:
        """Store a piece beside the computation; the one before it is stored first.

        Args:
            row: Its first row.
            piece: Array (rows, *shape), which is not changed afterwards.
        """
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, row, piece)

    def _write(self, row: int, piece: Array) -> None:
        data = io.BytesIO()
        np.save(data, piece, allow_pickle=False)
        try:
            self._workspace.storage.write(self._key(row), data.getvalue())
        except TopworkError as error:
            # They only save time: the run goes on without.
            self._workspace.progress.note("features not stored", row=row, reason=str(error))

    def _key(self, row: int) -> str:
        return f"{self._prefix}-{row:010}.npy"
