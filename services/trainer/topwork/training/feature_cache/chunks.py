"""Cached features in object storage, one object for each unit: for a resumed run, and for the other nodes."""

import io
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from topwork.clients.s3.storage import Storage
from topwork.training.checkpointing.write_failures import WriteFailures

# A single node does not store larger features but computes them again on resume: transferring them would take longer.
MAX_STORED_BYTES = 4 * 2**30
# Time between two attempts to store a unit that other nodes wait for.
RETRY_SECONDS = 10.0

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Chunk:
    """Features of a unit, or of its first batches."""

    unit: int
    values: Array


class FeatureChunks:
    """The stored units of one split. A background thread stores them; leaving the context waits for it.

    The units are stored in the order in which they were written. One that could not be stored is tried again before
    the next one.
    """

    def __init__(
        self, storage: Storage, prefix: str, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """List the stored units, and start the background thread.

        Args:
            storage: Storage of the job.
            prefix: Storage key prefix; it identifies everything that the features and the units depend on.
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
        self._stored: list[int] = []
        self._last_attempt = clock()
        self._found = frozenset(stored.key for stored in storage.list(f"{prefix}/"))

    def __enter__(self) -> "FeatureChunks":
        return self

    def __exit__(self, *_: object) -> None:
        self._start()
        self._thread.shutdown(wait=True)

    def find(self, unit: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """Read a unit, if an earlier process stored it or its first batches.

        Args:
            unit: Number of the unit.
            shape: Shape of one row.
            dtype: Type of the values.

        Returns:
            Array (rows, *shape); None if the unit was missing when the context was entered, or is damaged.
        """
        return self.read(unit, shape, dtype) if self._key(unit) in self._found else None

    def read(self, unit: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """Read a unit. Safe to call from any thread.

        Args:
            unit: Number of the unit.
            shape: Shape of one row.
            dtype: Type of the values.

        Returns:
            Array (rows, *shape); None if the unit is missing or damaged.
        """
        data = self._storage.read(self._key(unit))
        if data is None:
            return None
        try:
            values = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            return None
        return values if values.shape[1:] == shape and values.dtype == dtype else None

    def write(self, unit: int, values: Array) -> None:
        """Store a unit, or its first batches, in the background, after all previous ones.

        Waits for the previous ones, unless they cannot be stored.

        Args:
            unit: Number of the unit.
            values: Array (rows, *shape); the caller must not change it afterwards.

        Raises:
            TopworkError: If units could not be stored for too long; see `WriteFailures`.
        """
        self._failures.check()
        running = self._running
        if running is not None and not self._failures.is_failing:
            running.result()
        with self._lock:
            self._waiting.append(_Chunk(unit, values))
        self._start()

    def retry(self) -> None:
        """Try again to store what could not be stored, unless the last attempt is recent.

        Raises:
            TopworkError: If units could not be stored for too long; see `WriteFailures`.
        """
        self._failures.check()
        if self._clock() - self._last_attempt >= RETRY_SECONDS:
            self._start()

    def take_stored(self) -> list[int]:
        """Return the units that were stored since the last call."""
        with self._lock:
            stored, self._stored = self._stored, []
        return stored

    def _start(self) -> None:
        """Start to store the waiting units, unless the thread does so already."""
        with self._lock:
            if self._waiting and self._running is None:
                self._running = self._thread.submit(self._write_waiting)

    def _write_waiting(self) -> None:
        """Store the waiting units, up to the first one that cannot be stored."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = None
                    return
                chunk = self._waiting[0]
            start = self._last_attempt = self._clock()
            try:
                self._write(chunk)
            except BaseException as error:  # whatever it is, the unit is tried again with the next one
                with self._lock:
                    self._running, waiting = None, len(self._waiting)
                self._failures.record_failure(error, start, unit=chunk.unit, waiting_units=waiting)
                return
            self._failures.record_success()
            with self._lock:
                self._waiting.popleft()
                self._stored.append(chunk.unit)

    def _write(self, chunk: _Chunk) -> None:
        data = io.BytesIO()
        np.save(data, chunk.values, allow_pickle=False)
        self._storage.write(self._key(chunk.unit), data.getvalue())

    def _key(self, unit: int) -> str:
        return f"{self._prefix}/{unit:06}.npy"
