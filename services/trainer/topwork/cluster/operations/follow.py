"""Following a run: its status after each change, until it is finished."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import Role
from topwork.cluster.operations.run_watcher import (
    WATCHED_KINDS,
    EventsRead,
    FollowTimings,
    Kind,
    ObjectChanged,
    ObjectsListed,
    RequestFailed,
    RunWatcher,
    Update,
)
from topwork.cluster.status.objects import RunObjects, has_started, is_job_finished, node_count, node_index
from topwork.cluster.status.run_status import EpochProgress, RunStatus, read_run_status, read_status_of_job
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


@dataclass(frozen=True)
class ConnectionStatus:
    """The API server stopped responding, with the error; or responds again, if the error is None."""

    error: str | None


class RunGoneError(SettingError):
    """The run has no Job: it never existed, or was deleted before it was seen."""


@dataclass
class _ObjectCache:
    """All objects of the run seen so far, by kind and UID, and the UIDs of deleted ones."""

    objects: dict[Kind, dict[str, KubernetesObject]] = field(
        default_factory=lambda: {kind: {} for kind in WATCHED_KINDS}
    )
    deleted: set[str] = field(default_factory=set)
    events: list[KubernetesObject] = field(default_factory=list)

    def apply(self, update: Update) -> None:
        if isinstance(update, ObjectsListed):
            for kind, objects in update.objects.items():
                self.objects[kind] |= {obj["metadata"]["uid"]: obj for obj in objects}
            self.deleted |= update.deleted
        elif isinstance(update, ObjectChanged):
            uid = update.object["metadata"]["uid"]
            self.objects[update.kind][uid] = update.object
            if update.is_deleted:
                self.deleted.add(uid)
        elif isinstance(update, EventsRead):
            self.events = update.events

    def known_uids(self, kind: Kind) -> set[str]:
        return set(self.objects[kind]) - self.deleted


class RunFollower:
    """Follows a run.

    Args:
        cluster: The cluster.
        run: Name of the run.
        role: The Job to follow to its end.
        timings: Intervals and timeouts.

    Example:
        >>> for status in RunFollower(cluster, "cats-1a2b3c4d").statuses():
        ...     print(status)
    """

    def __init__(
        self, cluster: "Cluster", run: str, role: Role = "training", timings: FollowTimings | None = None
    ) -> None:
        self._run, self._namespace, self._role = run, cluster.namespace, role
        self._timings = timings or FollowTimings()
        self._cache = _ObjectCache()
        self._objects: RunObjects | None = None
        self._epoch: EpochProgress | None = None
        self._outage_start: float | None = None
        self._watcher = RunWatcher(cluster, run, self._timings, self._pending_objects, self._cache.known_uids)

    def statuses(self) -> Iterator[RunStatus | ConnectionStatus]:
        """Yield the status of the run whenever it changes; the last one is final.

        Yields:
            Statuses of the run, and of the connection when the API server stops responding or responds again.

        Raises:
            RunGoneError: If the run does not exist.
            SettingError: If the API server rejects a request.
            UnavailableError: If the API server does not respond for too long.
        """
        previous: RunStatus | None = None
        try:
            for update in self._watcher.updates():
                yield from self._check_connection(update)
                if isinstance(update, RequestFailed):
                    continue
                status = self._apply(update)
                if status == previous:
                    continue
                if status.is_finished:
                    yield from self._last_statuses(previous)
                    return
                yield status
                previous = status
        finally:
            self._watcher.stop()

    def _apply(self, update: Update) -> RunStatus:
        self._cache.apply(update)
        if isinstance(update, EpochProgress):
            self._epoch = update
        status = self._read_status()
        if status.running_container and not self._watcher.has_log(*status.running_container):
            # The progress of an earlier attempt is out of date.
            self._epoch = None
            self._watcher.read_log(*status.running_container)
            status = self._read_status()
        return status

    def _read_status(self) -> RunStatus:
        cache = self._cache
        # The first Job seen in a role is followed: a later Job with the same name is another submission.
        jobs = list(cache.objects["Job"].values())
        if not jobs:
            raise RunGoneError(
                f"{self._run} has no Job in namespace {self._namespace}: it does not exist or was deleted."
            )
        self._objects = RunObjects(jobs, list(cache.objects["Pod"].values()), cache.events, frozenset(cache.deleted))
        if self._role == "prefetch":
            return read_status_of_job(self._objects, self._objects.job("prefetch") or jobs[0], self._epoch)
        return read_run_status(self._objects, self._epoch)

    def _last_statuses(self, previous: RunStatus | None) -> Iterator[RunStatus]:
        for update in self._watcher.last_updates():
            self._cache.apply(update)
            if previous is not None and isinstance(update, EpochProgress):
                yield replace(previous, epoch=update, stage=update.stage, metric=update.metric, value=update.best)
        yield self._read_status()

    def _check_connection(self, update: Update) -> Iterator[ConnectionStatus]:
        """Report the start and end of an outage once; raise the error if it lasts too long."""
        if isinstance(update, RequestFailed):
            if not isinstance(update.error, UnavailableError):
                raise update.error
            if self._outage_start is None:
                self._outage_start = time.monotonic()
                yield ConnectionStatus(str(update.error))
            if time.monotonic() - self._outage_start > self._timings.outage_seconds:
                raise update.error
        elif isinstance(update, ObjectsListed) and self._outage_start is not None:
            self._outage_start = None
            yield ConnectionStatus(None)

    def _pending_objects(self) -> RunObjects | None:
        """Return the known objects of the run if a Job is unfinished and a node has no started pod; otherwise None."""
        objects = self._objects
        if objects is None:
            return None
        pods = [pod for pod in objects.pods if pod["metadata"]["uid"] not in objects.deleted]
        started = {
            node_index(pod) for pod in pods if has_started(pod) and (pod.get("status") or {}).get("phase") != "Failed"
        }
        training = objects.job("training")
        if len(started) >= (node_count(training) if training and self._role == "training" else 1):
            return None
        return None if all(is_job_finished(job) for job in objects.jobs) else objects
