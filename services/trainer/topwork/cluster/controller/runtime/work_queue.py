"""Queue of objects to reconcile: each object once at a time, with delays and exponential back-off.

The rules are those of client-go's work queues: an object that changes while it is reconciled is reconciled again
afterwards, and one that keeps failing waits longer each time while the workers continue with the others.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from topwork.errors import TopworkError, quote_error

log = structlog.get_logger(__name__)

Key = TypeVar("Key", bound=tuple[str, ...])
Observer = Callable[[bool, float], None]
"""Called after each reconciliation with its success and its duration in seconds."""


@dataclass(frozen=True)
class WorkQueueSettings:
    """Settings of a work queue.

    Attributes:
        workers: Number of threads.
        backoff_seconds: Delay after the first failure; it doubles with each further one.
        max_backoff_seconds: Upper bound of the delay.
        min_retry_seconds: A change never retries a failed object sooner: its own events would do so endlessly.
    """

    workers: int = 4
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 120.0
    min_retry_seconds: float = 1.0


@dataclass
class _Entry:
    """State of one object.

    Attributes:
        due: When to reconcile it (monotonic clock); None if it only waits for a change.
        running_since: When its reconciliation began; None if it is not being reconciled.
        changed: Whether it changed since then.
        failures: Consecutive failures.
        not_before: A change does not reconcile it sooner.
    """

    due: float | None = None
    running_since: float | None = None
    changed: bool = False
    failures: int = 0
    not_before: float = 0.0


class WorkQueue(Generic[Key]):
    """Calls a function for each key that is added, in several threads, but never twice at the same time for one key.

    Args:
        reconcile: Returns the seconds after which the key is due again without a change, or None. An exception is
            logged, and retried with back-off.
        settings: Number of threads, and delays.
        observe: Called after each reconciliation.
    """

    def __init__(
        self,
        reconcile: Callable[[Key], float | None],
        settings: WorkQueueSettings,
        observe: Observer = lambda _success, _seconds: None,
    ) -> None:
        self._reconcile, self._settings, self._observe = reconcile, settings, observe
        self._entries: dict[Key, _Entry] = {}
        self._condition = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []

    def add(self, key: Key) -> None:
        """Reconcile a key that changed, as soon as a worker is free."""
        with self._condition:
            entry = self._entries.setdefault(key, _Entry())
            entry.changed = True
            if entry.running_since is None:
                now = max(time.monotonic(), entry.not_before)
                entry.due = now if entry.due is None else min(entry.due, now)
                self._condition.notify()

    def start(self) -> None:
        """Start the workers."""
        for number in range(self._settings.workers):
            thread = threading.Thread(target=self._work, name=f"worker-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self, seconds: float) -> bool:
        """Start no further reconciliation, and wait for those in progress.

        Args:
            seconds: How long to wait.

        Returns:
            Whether all ended in time.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def depth(self) -> int:
        """Number of keys that are due and wait for a worker."""
        with self._condition:
            return len(self._waiting_since())

    @property
    def oldest_seconds(self) -> float:
        """How long the oldest of these keys has been waiting; 0 if there are none."""
        with self._condition:
            now = time.monotonic()
            return max(0.0, now - min(self._waiting_since(), default=now))

    def problem(self, max_seconds: float) -> str | None:
        """Return which worker is dead or has been busy with one key for too long; None if all work."""
        with self._condition:
            started = [(key, entry.running_since) for key, entry in self._entries.items()]
        for thread in self._threads:
            if not thread.is_alive() and not self._stopping:
                return f"thread {thread.name} is dead"
        for key, since in started:
            if since is not None and (seconds := time.monotonic() - since) > max_seconds:
                return f"{'/'.join(key)} has been reconciled for {seconds:.0f} s"
        return None

    def _waiting_since(self) -> list[float]:
        now = time.monotonic()
        return [entry.due for entry in self._entries.values() if entry.due is not None and entry.due <= now]

    def _work(self) -> None:
        while (key := self._take()) is not None:
            started = time.monotonic()
            try:
                delay = self._reconcile(key)
            except Exception as error:
                delay = self._finish_failed(key)
                known = isinstance(error, TopworkError)
                fields = {"namespace": key[0], "name": key[-1], "retry_seconds": round(delay, 1)}
                message = str(error) if known else f"{type(error).__name__}: {quote_error(error)}"
                (log.warning if known else log.error)(message, **fields, exc_info=None if known else error)
                self._observe(False, time.monotonic() - started)
            else:
                self._finish(key, delay)
                self._observe(True, time.monotonic() - started)

    def _take(self) -> Key | None:
        """Wait for the key that has been due for longest, and mark it as running; None when the queue stops."""
        with self._condition:
            while not self._stopping:
                key, due = self._next()
                if key is not None and due <= time.monotonic():
                    entry = self._entries[key]
                    entry.due, entry.changed, entry.running_since = None, False, time.monotonic()
                    return key
                self._condition.wait(None if key is None else max(0.0, due - time.monotonic()))
            return None

    def _next(self) -> tuple[Key | None, float]:
        scheduled = [(entry.due, key) for key, entry in self._entries.items() if entry.due is not None]
        due, key = min(scheduled, default=(0.0, None))
        return key, due

    def _finish(self, key: Key, delay: float | None) -> None:
        with self._condition:
            changed = self._entries[key].changed
            if not changed and delay is None:
                del self._entries[key]
                return
            due = time.monotonic() + (0.0 if changed else delay or 0.0)
            self._entries[key] = _Entry(due=due)
            self._condition.notify()

    def _finish_failed(self, key: Key) -> float:
        with self._condition:
            entry = self._entries[key]
            entry.failures += 1
            # The exponent is bounded, because a float overflows after a thousand failures.
            backoff = self._settings.backoff_seconds * 2.0 ** min(entry.failures - 1, 30)
            # Jitter, so that the objects that failed in an outage are not retried at the same moment.
            delay = min(backoff, self._settings.max_backoff_seconds) * random.uniform(0.75, 1.25)  # noqa: S311
            now = time.monotonic()
            entry.running_since, entry.not_before = None, now + self._settings.min_retry_seconds
            entry.due = min(now + delay, entry.not_before) if entry.changed else now + delay
            self._condition.notify()
            return entry.due - now
