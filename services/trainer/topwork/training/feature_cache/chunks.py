"""Chunks of cached features in object storage: a resumed run reads them instead of computing features again."""

import io
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from topwork.clients.s3.storage import Storage
from topwork.errors import TopworkError

log = structlog.get_logger(__name__)

# Larger features are not stored but computed again on resume: transferring them would take longer.
MAX_STORED_BYTES = 4 * 2**30

Array = npt.NDArray[Any]


class FeatureChunks:
    """The chunks of one split, one object each. A background thread stores them; leaving the context waits for it."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        """Start the background thread.

        Args:
            storage: Storage of the job.
            prefix: Storage key prefix; it identifies everything that the features depend on.
        """
        self._storage = storage
        self._prefix = prefix
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "FeatureChunks":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def read(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
        """Read the stored chunks in order, up to the first one that is missing or damaged.

        Args:
            shape: Shape of one row.
            dtype: Type of the values.

        Yields:
            Arrays (rows, *shape).
        """
        row = 0
        while (data := self._storage.read(self._key(row))) is not None:
            try:
                chunk = np.load(io.BytesIO(data), allow_pickle=False)
            except (ValueError, EOFError, OSError):
                return
            if chunk.shape[1:] != shape or chunk.dtype != dtype or not len(chunk):
                return
            yield chunk
            row += len(chunk)

    def write(self, row: int, chunk: Array) -> None:
        """Store a chunk in the background, after the previous chunk is stored.

        Args:
            row: Index of its first row.
            chunk: Array (rows, *shape); the caller must not change it afterwards.
        """
        if self._pending is not None:
            self._pending.result()
        self._pending = self._thread.submit(self._write, row, chunk)

    def _write(self, row: int, chunk: Array) -> None:
        data = io.BytesIO()
        np.save(data, chunk, allow_pickle=False)
        try:
            self._storage.write(self._key(row), data.getvalue())
        except TopworkError as error:
            # Stored chunks only save time: the run continues without them.
            log.warning("features not stored", row=row, reason=str(error))

    def _key(self, row: int) -> str:
        return f"{self._prefix}-{row:010}.npy"
