"""Worker processes that prove images on all cores, a bounded number at a time."""

import multiprocessing
import os
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from topwork.data.image_validation import CRASHED, HUNG, Proved, Rejection, prove
from topwork.errors import DataError

# Spawned, not forked: TensorFlow's threads do not survive a fork.
_CONTEXT = multiprocessing.get_context("spawn")

IMAGE_SECONDS = 300.0
"""Time that one image may take: the largest that is allowed took two minutes on a core that ten others wanted."""

MAX_HUNG = 10
"""Images that took longer, after which the data is refused: each costs twice `IMAGE_SECONDS`."""

WORKER_BYTES = 4 * 2**30
"""Address space of a worker: the largest image that is allowed takes 1.7 GB. A worker imports Pillow alone; in a
process with numpy's or TensorFlow's threads such a limit would say nothing about memory."""

T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


class Provers:
    """A pool of processes, one a core, that survives an image which kills its decoder or never lets go of it."""

    def __init__(
        self,
        function: Callable[..., Proved] = prove,
        readable: Callable[[bytes], bool] = bool,
        workers: int | None = None,
    ) -> None:
        """Make the pool; processes start with the first image.

        Args:
            function: What a worker does with an image file, as `prove` does; importable from its module.
            readable: Whether an image that would keep its bytes can be read by those who train on it; where not, it is
                encoded anew. Called from several threads of this process.
            workers: Processes; None is one a core.
        """
        self._readable = readable
        self._function = function
        self._workers = workers or usable_cores()
        self._lock = threading.Lock()
        self._hung = 0
        self._pool = self._start(self._workers)

    @staticmethod
    def _start(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=_CONTEXT, initializer=_prepare_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prove(self, data: bytes) -> Proved:
        """Prove one image; may be called from several threads at once.

        Decoders differ in what damage they mend: what keeps its bytes must be readable by the other one, too.

        Args:
            data: The image file.

        Returns:
            What is stored.

        Raises:
            Rejection: If the image is left out; also when it kills the process that decodes it, or keeps it busy.
            DataError: If too many images keep their process busy.
        """
        proved = self._prove(data, keep=True)
        if proved.encoded == data and not self._readable(data):
            return self._prove(data, keep=False)
        return proved

    def _prove(self, data: bytes, *, keep: bool) -> Proved:
        pool = self._pool
        try:
            return pool.submit(self._function, data, keep=keep).result(IMAGE_SECONDS)
        except TimeoutError:
            # Perhaps it only waited behind one that hangs: in a process of its own that will show.
            _kill(pool)
            return self._prove_alone(pool, data, keep=keep)
        except (BrokenProcessPool, CancelledError):
            return self._prove_alone(pool, data, keep=keep)

    def _prove_alone(self, broken: ProcessPoolExecutor, data: bytes, *, keep: bool) -> Proved:
        """Prove an image in a process of its own: all that were in the broken pool come here, one is to blame."""
        with self._lock:
            if self._pool is broken:
                self._pool = self._start(self._workers)
            with self._start(1) as alone:
                try:
                    # The time of an image begins where its process runs.
                    alone.submit(os.getpid).result()
                    return alone.submit(self._function, data, keep=keep).result(IMAGE_SECONDS)
                except BrokenProcessPool as error:
                    raise Rejection(CRASHED, "the process that decoded it died") from error
                except TimeoutError as error:
                    _kill(alone)
                    self._hung += 1
                    if self._hung > MAX_HUNG:
                        raise DataError(
                            f"More than {MAX_HUNG} images each took longer than {IMAGE_SECONDS:g} seconds to decode. "
                            "No picture does: these files are made to keep a computer busy. Take them out."
                        ) from error
                    raise Rejection(HUNG, f"not decoded after {IMAGE_SECONDS:g} seconds") from error

    def each(self, items: Iterable[T], read: Callable[[T], bytes]) -> Iterator[tuple[T, Proved | Rejection]]:
        """Read and prove many images, several at a time, in their order.

        At most a few images a core are in memory, however many there are.

        Args:
            items: What `read` takes.
            read: Gives the file of an item; may raise `Rejection`. Called from several threads.

        Yields:
            Each item with what became of it.
        """

        def outcome(item: T) -> Proved | Rejection:
            try:
                return self.prove(read(item))
            except Rejection as rejection:
                return rejection

        # More threads than processes: reading waits for storage while others decode.
        threads = 2 * self._workers + 2
        waiting: deque[tuple[T, Future[Proved | Rejection]]] = deque()
        with ThreadPoolExecutor(threads, "read") as readers:
            try:
                for item in items:
                    waiting.append((item, readers.submit(outcome, item)))
                    if len(waiting) > 2 * threads:
                        first, future = waiting.popleft()
                        yield first, future.result()
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                readers.shutdown(wait=False, cancel_futures=True)


def _kill(pool: ProcessPoolExecutor) -> None:
    """Kill the processes of a pool, which then counts as broken: nothing else ends a decoder that hangs."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def _prepare_worker() -> None:
    # Not everywhere is there such a limit, and a lower one may stand already.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    # Ctrl-C goes to the whole terminal: the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent was killed: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
