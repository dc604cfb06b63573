"""Watching a run from threads: its Jobs and pods, its events, and the logs of its containers, in one queue."""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL
from topwork.cluster.operations.runs import read_events
from topwork.cluster.status.objects import RunObjects
from topwork.cluster.status.run_status import EpochProgress, parse_epoch
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Kind = Literal["Job", "Pod"]
WATCHED_KINDS: tuple[Kind, Kind] = ("Job", "Pod")


@dataclass(frozen=True)
class FollowTimings:
    """Intervals and timeouts for following a run, in seconds.

    Attributes:
        list_seconds: Interval of the lists that find objects deleted between two watches.
        watch_seconds: Duration of a watch.
        events_seconds: First interval between two reads of the events of a pending run; doubled after each read.
        max_events_seconds: Upper bound of that interval.
        retry_seconds: Pause before a failed request is repeated.
        outage_seconds: How long the API server may be unavailable.
        last_lines_seconds: How long to wait for the last lines of a log.
    """

    list_seconds: float = 20.0
    watch_seconds: float = 600.0
    events_seconds: float = 1.0
    max_events_seconds: float = 10.0
    retry_seconds: float = 5.0
    outage_seconds: float = 1800.0
    last_lines_seconds: float = 3.0


@dataclass(frozen=True)
class ObjectsListed:
    """The result of a list: the objects of the first list, and UIDs that a later list no longer contains."""

    objects: dict[Kind, list[KubernetesObject]]
    deleted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ObjectChanged:
    """An object was added, modified or deleted."""

    kind: Kind
    object: KubernetesObject
    is_deleted: bool


@dataclass(frozen=True)
class EventsRead:
    """The events that explain why the run is pending."""

    events: list[KubernetesObject]


@dataclass(frozen=True)
class RequestFailed:
    """The API server did not respond, or rejected a request."""

    error: Exception


Update = ObjectsListed | ObjectChanged | EventsRead | EpochProgress | RequestFailed


class RunWatcher:
    """Watches the objects, events and logs of a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        timings: Intervals and timeouts.
        pending_objects: Returns the known objects of the run while it is pending, and None afterward; events are read
            only while it is pending.
        known_uids: Returns the UIDs of the objects of a kind that are known and not deleted.
    """

    def __init__(
        self,
        cluster: "Cluster",
        run: str,
        timings: FollowTimings,
        pending_objects: Callable[[], RunObjects | None],
        known_uids: Callable[[Kind], set[str]],
    ) -> None:
        self._cluster, self._selector, self._timings = cluster, f"{RUN_LABEL}={run}", timings
        self._pending_objects, self._known_uids = pending_objects, known_uids
        self._updates: SimpleQueue[Update] = SimpleQueue()
        self._stop = threading.Event()
        self._log_threads: dict[tuple[str, str], threading.Thread] = {}

    def updates(self) -> Iterator[Update]:
        """Yield updates as they arrive; the first one is a list or a failure."""
        self._start(self._list)
        self._start(self._read_events)
        while not self._stop.is_set():
            yield self._updates.get()

    def stop(self) -> None:
        """Ask all threads to stop; threads that wait for the API server end with the process."""
        self._stop.set()

    def has_log(self, pod: str, container: str) -> bool:
        """Return whether the log of a container is being read or has been read."""
        return (pod, container) in self._log_threads

    def read_log(self, pod: str, container: str) -> None:
        """Start reading epochs from the log of a container."""
        self._log_threads[pod, container] = self._start(lambda: self._read_log(pod, container))

    def last_updates(self) -> Iterator[Update]:
        """Yield the remaining updates of a finished run: the end of its logs, and the final state of its pods.

        The watch on Jobs may be ahead of the watch on pods.
        """
        for thread in self._log_threads.values():
            thread.join(self._timings.last_lines_seconds)
        with suppress(UnavailableError, SettingError):
            for pod in self._cluster.list("Pod", labels=self._selector):
                self._updates.put(ObjectChanged("Pod", pod, is_deleted=False))
        with suppress(Empty):
            while True:
                yield self._updates.get_nowait()

    def _start(self, target: Callable[[], None]) -> threading.Thread:
        # Daemon threads: an unresponsive server must not keep the process alive.
        thread = threading.Thread(target=self._report_errors, args=(target,), daemon=True)
        thread.start()
        return thread

    def _report_errors(self, target: Callable[[], None]) -> None:
        """Pass an unexpected error on to the reader of the updates, which would otherwise wait forever."""
        try:
            target()
        except Exception as error:
            self._updates.put(RequestFailed(error))

    def _list(self) -> None:
        """List all objects, start the watches, and list again periodically to find deleted objects.

        A watch reports deletions only while it runs. An object that was deleted between two watches is found because it
        was known before a list and is missing from it.
        """
        is_watching = False
        while not self._stop.is_set():
            try:
                known = {kind: self._known_uids(kind) for kind in WATCHED_KINDS}
                objects = {kind: self._cluster.list(kind, labels=self._selector) for kind in WATCHED_KINDS}
            except Exception as error:
                self._updates.put(RequestFailed(error))
                self._stop.wait(self._timings.retry_seconds)
                continue
            listed = {obj["metadata"]["uid"] for objects_of_kind in objects.values() for obj in objects_of_kind}
            deleted = frozenset(uid for uids in known.values() for uid in uids if uid not in listed)
            self._updates.put(ObjectsListed({} if is_watching else objects, deleted))
            if not is_watching:
                for kind in WATCHED_KINDS:
                    self._start(lambda kind=kind: self._watch(kind))  # type: ignore[misc]
            # List again soon after the watches start: an object may have been deleted between the two.
            self._stop.wait(self._timings.list_seconds if is_watching else min(1.0, self._timings.list_seconds))
            is_watching = True

    def _watch(self, kind: Kind) -> None:
        while not self._stop.is_set():
            try:
                for change in self._cluster.watch(kind, labels=self._selector, seconds=self._timings.watch_seconds):
                    self._updates.put(ObjectChanged(kind, change.object, change.type == "DELETED"))
                    if self._stop.is_set():
                        return
            except UnavailableError:
                # The periodic list reports the outage and its end.
                self._stop.wait(self._timings.retry_seconds)
            except Exception as error:
                self._updates.put(RequestFailed(error))
                return

    def _read_events(self) -> None:
        pause, previous_versions = 0.05, None
        while not self._stop.wait(pause):
            pending = self._pending_objects()
            if pending is None:
                continue
            try:
                pods = [pod for pod in pending.pods if pod["metadata"]["uid"] not in pending.deleted]
                self._updates.put(EventsRead(read_events(self._cluster, pending.jobs, pods)))
            except SettingError:
                return  # an account that may not read events can still follow the status
            except UnavailableError:
                pass  # the periodic list reports the outage
            versions = [obj["metadata"].get("resourceVersion") for obj in (*pending.jobs, *pending.pods)]
            has_changed = versions != previous_versions
            pause = self._timings.events_seconds if has_changed else min(2 * pause, self._timings.max_events_seconds)
            previous_versions = versions

    def _read_log(self, pod: str, container: str) -> None:
        last: EpochProgress | None = None
        while not self._stop.is_set():
            try:
                for line in self._cluster.logs(pod, container, follow=True):
                    epoch = parse_epoch(line, last)
                    # After a disconnect, the log is read from the start again.
                    if epoch and (last is None or epoch.epoch > last.epoch):
                        last = epoch
                        self._updates.put(epoch)
            except SettingError:
                return  # an account that may not read logs can still follow the status
            except UnavailableError:
                self._stop.wait(self._timings.retry_seconds)
            else:
                return
