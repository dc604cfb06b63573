"""Process pool that validates images on all CPUs and survives images that crash or hang the decoder."""

import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self, TypeVar

from topwork.data.images.image_validation import CRASHED, HUNG, Rejection, ValidatedImage, validate_image
from topwork.errors import DataError, UnavailableError

# Spawn, not fork: the threads of TensorFlow do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")

IMAGE_TIMEOUT_SECONDS = 300.0
"""Time limit for one image. The largest allowed image took two minutes on a CPU shared with ten other processes."""

IMAGE_CPU_SECONDS = 150
"""An image that takes this much CPU time hangs its decoder. Unlike the elapsed time, it does not depend on the load of
the machine, so that every machine rejects the same images."""

ISOLATED_TIMEOUT_SECONDS = 600.0
"""Time limit for one image at the second attempt, on its own. It is long enough to use up the CPU time."""

MAX_TIMEOUTS = 10
"""Number of timeouts that are tolerated before the pull fails. Each costs up to twice `IMAGE_TIMEOUT_SECONDS`."""

WORKER_MEMORY_BYTES = 4 * 2**30
"""Address space limit of a worker; the largest allowed image takes 1.7 GB. Such a limit works because workers import
only Pillow: the threads of NumPy or TensorFlow reserve far more address space than they use."""

T = TypeVar("T")


class DecoderLostError(UnavailableError):
    """An image could not be decoded for a reason that depends on this machine: lack of memory or CPU time.

    The image must not be rejected: another machine would store it, and the dataset would depend on the machine.
    """


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, from its affinity and its cgroup v2 CPU limit."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, -(-int(quota) // int(period)))
    return max(1, cpus)


class DecodePool:
    """A pool of worker processes that validate images. An image that crashes or hangs a worker is rejected.

    Example:
        >>> with DecodePool() as pool:
        ...     for path, result in pool.validate_all(paths, Path.read_bytes):
        ...         print(path, result)
    """

    def __init__(
        self,
        validate: Callable[..., ValidatedImage] = validate_image,
        is_decodable: Callable[[bytes], bool] = bool,
        workers: int | None = None,
    ) -> None:
        """Create the pool. Worker processes start with the first image.

        Args:
            validate: Function that runs in the workers, with the signature of `validate_image`. Must be importable.
            is_decodable: Whether the training code can decode a file that would be stored unchanged. A file that it
                cannot decode is re-encoded. Called from several threads of this process.
            workers: Number of worker processes. None starts one per CPU.
        """
        self._is_decodable = is_decodable
        self._validate_image = validate
        self._workers = workers or available_cpus()
        self._lock = threading.Lock()
        self._timeouts = 0
        self._pool = self._start(self._workers)

    @staticmethod
    def _start(workers: int, cpu_seconds: int | None = None) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers, mp_context=_CONTEXT, initializer=_initialize_worker, initargs=(cpu_seconds,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def validate(self, data: bytes) -> ValidatedImage:
        """Validate one image. Safe to call from several threads.

        Decoders tolerate different kinds of damage, so a file that Pillow accepts is stored unchanged only if
        `is_decodable` accepts it too.

        Args:
            data: Bytes of the image file.

        Returns:
            The normalized image.

        Raises:
            Rejection: If the image is invalid, crashes its worker, or exceeds the limit of CPU time.
            DataError: If more than `MAX_TIMEOUTS` images exceeded that limit.
            DecoderLostError: If the worker was killed or got too little CPU time, also at a second attempt on its own.
        """
        image = self._run(data, keep_encoding=True)
        if image.encoded == data:
            if self._is_decodable(data):
                return image
            image = self._run(data, keep_encoding=False)
        return replace(image, original=data)

    def _run(self, data: bytes, *, keep_encoding: bool) -> ValidatedImage:
        pool = self._pool
        try:
            return pool.submit(self._validate_image, data, keep_encoding=keep_encoding).result(IMAGE_TIMEOUT_SECONDS)
        except TimeoutError:
            # The image may only have been queued behind one that hangs. Running it in its own process shows which.
            _kill(pool)
            return self._run_isolated(pool, data, keep_encoding=keep_encoding)
        except (BrokenProcessPool, CancelledError):
            return self._run_isolated(pool, data, keep_encoding=keep_encoding)

    def _run_isolated(self, broken: ProcessPoolExecutor, data: bytes, *, keep_encoding: bool) -> ValidatedImage:
        """Validate an image in its own process. Identifies which image of a broken pool crashed its worker."""
        with self._lock:
            if self._pool is broken:
                self._pool = self._start(self._workers)
            with self._start(1, IMAGE_CPU_SECONDS) as isolated:
                started = isolated.submit(os.getpid)
                (worker,) = (isolated._processes or {}).values()
                try:
                    # Wait for the process to start, so that its start does not count towards the time limit.
                    started.result()
                    future = isolated.submit(self._validate_image, data, keep_encoding=keep_encoding)
                    return future.result(ISOLATED_TIMEOUT_SECONDS)
                except BrokenProcessPool as error:
                    raise self._explain_death(_wait_for_exit(worker)) from error
                except TimeoutError as error:
                    _kill(isolated)
                    raise DecoderLostError(
                        f"An image was not decoded within {ISOLATED_TIMEOUT_SECONDS:g} seconds, although it used "
                        "little CPU time. This machine is overloaded. Try again later, or on another machine."
                    ) from error

    def _explain_death(self, exit_code: int | None) -> Exception:
        """Return the error for an image whose worker died."""
        if exit_code == -signal.SIGKILL:
            return DecoderLostError(
                "The decoder of an image was killed twice, most likely because the machine or container ran out of "
                "memory. Provide more memory (spec.compute.memory in a cluster)."
            )
        if exit_code != -signal.SIGXCPU:
            return Rejection(CRASHED, "the decoder process died")
        self._timeouts += 1
        limit = f"{IMAGE_CPU_SECONDS} seconds"
        if self._timeouts > MAX_TIMEOUTS:
            return DataError(
                f"More than {MAX_TIMEOUTS} images each took longer than {limit} to decode. Valid images are much "
                "faster, so these files may be malicious. Remove them from the source."
            )
        return Rejection(HUNG, f"not decoded after {limit} of CPU time")

    def validate_all(
        self, items: Iterable[T], read: Callable[[T], bytes]
    ) -> Iterator[tuple[T, ValidatedImage | Rejection]]:
        """Read and validate many images in parallel, in order.

        Keeps only a few images per CPU in memory, regardless of their total number.

        Args:
            items: Items to pass to `read`.
            read: Returns the image file of an item, or raises `Rejection`. Called from several threads.

        Yields:
            Each item with its normalized image or rejection, in the order of `items`.
        """

        def outcome(item: T) -> ValidatedImage | Rejection:
            try:
                return self.validate(read(item))
            except Rejection as rejection:
                return rejection
            except DecoderLostError as error:
                raise DecoderLostError(f"{getattr(item, 'name', item)}: {error}") from error

        # More threads than processes, so that reads from storage overlap with decoding.
        threads = 2 * self._workers + 2
        pending: deque[tuple[T, Future[ValidatedImage | Rejection]]] = deque()
        with ThreadPoolExecutor(threads, "read") as readers:
            try:
                for item in items:
                    pending.append((item, readers.submit(outcome, item)))
                    if len(pending) > 2 * threads:
                        first, future = pending.popleft()
                        yield first, future.result()
                while pending:
                    first, future = pending.popleft()
                    yield first, future.result()
            finally:
                readers.shutdown(wait=False, cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kill the processes of a pool, which marks it as broken. There is no other way to stop a decoder that hangs."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def _wait_for_exit(worker: BaseProcess) -> int | None:
    """Return the exit code of a process that is ending; None if it does not end within five seconds.

    The pool waits for the process too. While it does so, the exit code is not available here.
    """
    deadline = time.monotonic() + 5.0
    while worker.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return worker.exitcode


def _initialize_worker(cpu_seconds: int | None) -> None:
    # Some platforms don't support this limit, and a lower hard limit may already be set.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
        if cpu_seconds is not None:
            _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
            # The start of the process does not count.
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + cpu_seconds, hard_limit))
    # Ctrl-C interrupts every process in the terminal. The parent process shuts down its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process is gone: nothing else stops a worker whose parent was killed."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
