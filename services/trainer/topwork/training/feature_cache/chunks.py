"""Chunks of cached features in object storage: a resumed run reads them instead of computing features again."""

import io
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topwork.clients.s3.storage import Storage
from topwork.training.checkpointing.write_failures import WriteFailures

# Larger features are not stored but computed again on resume: transferring them would take longer.
MAX_STORED_BYTES = 4 * 2**30

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Chunk:
    """Features of consecutive rows; `row` is the index of the first one."""

    row: int
    values: Array


class FeatureChunks:
    """The chunks of one split, one object each. A background thread stores them; leaving the context waits for it.

    The chunks are stored in order, because a resumed run reads them up to the first one that is missing. A chunk that
    could not be stored is tried again before the next one.
    """

    def __init__(
        self, storage: Storage, prefix: str, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the background thread.

        Args:
            storage: Storage of the job.
            prefix: Storage key prefix; it identifies everything that the features depend on.
            minutes: `spec.compute.checkpointMinutes`; for how long failures are tolerated depends on it.
            clock: Returns the time in seconds.
        """
        self._storage = storage
        self._prefix = prefix
        self._clock = clock
        self._failures = WriteFailures("features", minutes, clock)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._lock = threading.Lock()
        self._waiting: deque[_Chunk] = deque()
        self._running: Future[None] | None = None

    def __enter__(self) -> "FeatureChunks":
        return self

    def __exit__(self, *_: object) -> None:
        self._start()
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
        """Store a chunk in the background, after all previous chunks.

        Waits for the previous chunks, unless they cannot be stored.

        Args:
            row: Index of its first row.
            chunk: Array (rows, *shape); the caller must not change it afterwards.

        Raises:
            TopworkError: If chunks could not be stored for too long; see `WriteFailures`.
        """
        self._failures.check()
        running = self._running
        if running is not None and not self._failures.is_failing:
            running.result()
        with self._lock:
            self._waiting.append(_Chunk(row, chunk))
        self._start()

    def _start(self) -> None:
        """Start to store the waiting chunks, unless the thread does so already."""
        with self._lock:
            if self._waiting and self._running is None:
                self._running = self._thread.submit(self._write_waiting)

    def _write_waiting(self) -> None:
        """Store the waiting chunks, up to the first one that cannot be stored."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = None
                    return
                chunk = self._waiting[0]
            start = self._clock()
            try:
                self._write(chunk)
            except BaseException as error:  # whatever it is, the chunk is tried again with the next one
                with self._lock:
                    self._running, waiting = None, len(self._waiting)
                self._failures.record_failure(error, start, row=chunk.row, waiting_chunks=waiting)
                return
            self._failures.record_success()
            with self._lock:
                self._waiting.popleft()

    def _write(self, chunk: _Chunk) -> None:
        data = io.BytesIO()
        np.save(data, chunk.values, allow_pickle=False)
        self._storage.write(self._key(chunk.row), data.getvalue())

    def _key(self, row: int) -> str:
        return f"{self._prefix}-{row:010}.npy"
