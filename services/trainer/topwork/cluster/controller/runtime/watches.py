"""Watches of Jobs, pods and TransferSearches, each in a thread that survives every error of the API server."""

# kopf does not watch them: after an interruption it does not report which objects were deleted in the meantime.

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ForbiddenError, UnknownApiError
from topwork.cluster.controller.searches.search_cache import SEARCH
from topwork.cluster.names import APP_NAME, PART_OF_LABEL
from topwork.errors import TopworkError, quote_error

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = structlog.get_logger(__name__)

EventHandler = Callable[[str, KubernetesObject], None]
"""Called with ADDED, MODIFIED or DELETED and the object."""
ROUND_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 60.0
# A round, and all attempts of a request to an API server that accepts connections and never responds.
MAX_SILENCE_SECONDS = 600.0


class Watch(ABC):
    """A watch in a thread of its own.

    Args:
        kind: Kind of the objects.
        namespace: Their namespace; None for all namespaces.
        max_silence_seconds: Longest time without a sign of life of a healthy thread.

    Attributes:
        error: Why it does not work at the moment; empty if it works.
    """

    def __init__(self, kind: str, namespace: str | None, max_silence_seconds: float) -> None:
        self.name = f"watch-{kind}-{namespace or 'all'}"
        self.error = f"{kind}s are not listed yet"
        self._max_silence_seconds = max_silence_seconds
        self._synced = False
        self._stopping = threading.Event()
        self._last_sign = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop at the end of the current round or request, without waiting for the end of the thread."""
        self._stopping.set()

    @property
    def is_synced(self) -> bool:
        """Whether all existing objects were reported, or must not be read."""
        return self._synced

    def problem(self) -> str | None:
        """Return whether the thread is dead or stuck; None if it works, even if the API server does not."""
        return thread_problem(self._thread, self._last_sign, self._max_silence_seconds)

    @abstractmethod
    def _run(self) -> None:
        """Report objects until `_stopping` is set."""


class ObjectWatch(Watch):
    """Reports all topwork objects of a kind, and then their changes.

    Args:
        cluster: The cluster.
        kind: Kind of the objects.
        namespace: Their namespace; None for all namespaces.
        handle: Called for each change.
    """

    labels = f"{PART_OF_LABEL}={APP_NAME}"
    """Label selector of the objects."""

    def __init__(self, cluster: "Cluster", kind: str, namespace: str | None, handle: EventHandler) -> None:
        super().__init__(kind, namespace, MAX_SILENCE_SECONDS)
        scope = cluster.in_namespace(namespace) if namespace else cluster
        self._watcher = scope.watcher(kind, labels=self.labels, all_namespaces=namespace is None)
        self._handle = handle

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self._watch(0.0 if not self._synced else ROUND_SECONDS)
            except TopworkError as error:
                failures += 1
                report_once(self.name, str(error), self.error)
                self.error = str(error)
                # One namespace without permission, such as a deleted one, must not stop the others.
                self._synced |= isinstance(error, ForbiddenError)
            except Exception as error:
                failures += 1
                self.error = f"{type(error).__name__}: {quote_error(error)}"
                log.exception("unexpected error of a watch", watch=self.name)
            else:
                failures, self.error, self._synced = 0, "", True
            self._last_sign = time.monotonic()
            if failures:
                self._stopping.wait(backoff_seconds(failures))

    def _watch(self, seconds: float) -> None:
        for event in self._watcher.events(seconds):
            self._last_sign = time.monotonic()
            self.error = ""
            self._handle(event.type, event.object)


class SearchWatch(ObjectWatch):
    """Reports all TransferSearches. A cluster may have the CustomResourceDefinition of TransferJobs only."""

    labels = ""

    def __init__(self, cluster: "Cluster", namespace: str | None, handle: EventHandler) -> None:
        super().__init__(cluster, SEARCH, namespace, handle)
        self._is_missing = False

    def _watch(self, seconds: float) -> None:
        try:
            super()._watch(seconds)
        except UnknownApiError:
            if not self._is_missing:
                log.warning("TransferSearches are not served; install their definition with: topwork crd --apply")
            self._is_missing = True
            self._stopping.wait(ROUND_SECONDS if self._synced else 0.0)
        else:
            self._is_missing = False


def thread_problem(thread: threading.Thread, last_sign: float, max_seconds: float) -> str | None:
    """Return why a thread has to be considered dead or stuck; None if it works.

    Args:
        thread: The thread.
        last_sign: When it last showed a sign of life (monotonic clock).
        max_seconds: Longest silence of a healthy thread.
    """
    if not thread.is_alive():
        return f"thread {thread.name} is dead"
    seconds = time.monotonic() - last_sign
    return f"thread {thread.name} has been stuck for {seconds:.0f} s" if seconds > max_seconds else None


def backoff_seconds(failures: int) -> float:
    """Return the delay after consecutive failures."""
    return min(2.0 ** min(failures - 1, 10), MAX_BACKOFF_SECONDS)


def report_once(watch: str, error: str, previous: str) -> None:
    """Log an error of a watch, unless the previous attempt failed with the same one."""
    if error != previous:
        log.warning("watch interrupted; retrying", watch=watch, reason=error)
