"""Reconciles a TransferJob: creates, changes and deletes its Jobs, and reports its status.

Every call starts from what the cluster contains, so the controller can be killed and started again at any time. Before
an action, the objects are read from the API server, because the cache can be out of date. The order is: ConfigMap,
Service and NetworkPolicy of several nodes, Job, event, status, TTL of the Job.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from topwork.clients.kubernetes.errors import NamespaceTerminatingError, UidConflictError
from topwork.cluster.controller.decision import CreateRun, DeleteJob, Plan, UpdateRun, decide
from topwork.cluster.controller.events import Report, build_event, describe_changes
from topwork.cluster.controller.interruptions import (
    AGAIN_SECONDS,
    CHANGED_ERRORS,
    GONE_ERRORS,
    UNAVAILABLE_SECONDS,
)
from topwork.cluster.controller.node_network import delete_network, has_network
from topwork.cluster.controller.object_cache import Key, ObjectCache
from topwork.cluster.controller.observation import Observation
from topwork.cluster.controller.progress import ProgressReader
from topwork.cluster.controller.spec_resolution import Rejection, Target, resolve
from topwork.cluster.controller.status_update import MAX_TEXT_CHARACTERS
from topwork.cluster.controller.status_writer import write_status
from topwork.cluster.names import CONTROLLER_MANAGER, JOB_LABEL
from topwork.cluster.operations.runs import read_events
from topwork.cluster.status.objects import is_being_deleted, name_of, pods_of_job
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import SettingError, shorten

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = logging.getLogger(__name__)

MAX_PENDING_SECONDS = 300.0
"""Maximum time between two updates of the reason why a run is pending."""
PENDING_FRACTION = 0.1
"""This fraction of the time that a run has been pending passes between two updates of the reason."""
MAX_STEPS = 3
"""Maximum number of creations and updates in one reconciliation; each is followed by a new decision."""
PROGRESS_FIELDS = ("progress", "eta", "metric", "stage", "waiting_for", "gpu_seconds", "attempt_history")


def _utc_now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class ReconcilerSettings:
    """Settings of the reconciler.

    Attributes:
        status_interval_seconds: Minimum time between two updates of the progress of a run.
        metrics_timeout_seconds: Timeout for reading the metrics page of a pod.
        now: Returns the current time, in whole seconds.
    """

    status_interval_seconds: float = 15.0
    metrics_timeout_seconds: float = 2.0
    now: Callable[[], datetime] = _utc_now


class Reconciler:
    """Makes the objects of a TransferJob match its spec. Thread-safe for different TransferJobs.

    Args:
        cluster: The cluster.
        cache: The watched objects.
        settings: Intervals and timeouts.
    """

    def __init__(self, cluster: "Cluster", cache: ObjectCache, settings: ReconcilerSettings) -> None:
        self._cluster, self._cache, self._settings = cluster, cache, settings
        self._progress = ProgressReader(settings.metrics_timeout_seconds)
        self._refreshes = RefreshTimes(settings.status_interval_seconds)

    def reconcile(self, key: Key) -> float | None:
        """Bring the objects and the status of a TransferJob up to date.

        Args:
            key: The TransferJob.

        Returns:
            Seconds after which it must be reconciled again even without a change; None to wait for a change.

        Raises:
            TopworkError: If a request failed, or the cluster rejects the run. Try again with back-off.
        """
        cached = self._cache.get(key)
        if cached is None:
            self._refreshes.forget(key)
            return None
        seen = Observation(*cached, now=self._settings.now())
        if is_being_deleted(seen.transfer_job):
            return None
        try:
            return _Reconciliation(
                self._cluster.in_namespace(key.namespace), self._cache, self._progress, self._refreshes, key
            ).run(seen, self._settings)
        except GONE_ERRORS:
            return UNAVAILABLE_SECONDS
        except CHANGED_ERRORS:
            log.debug("an object of %s was changed or deleted while it was reconciled", key)
            return AGAIN_SECONDS


class RefreshTimes:
    """When the progress of each running TransferJob, or the reason of each pending one, was read last."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval_seconds = interval_seconds
        self._times: dict[Key, float] = {}
        self._lock = threading.Lock()

    def seconds_left(self, key: Key) -> float:
        """Return the seconds until the next reading is due; 0 if it is due."""
        with self._lock:
            last = self._times.get(key)
        return 0.0 if last is None else max(0.0, last + self._interval_seconds - time.monotonic())

    def record(self, key: Key) -> None:
        """Record a reading."""
        with self._lock:
            self._times[key] = time.monotonic()

    def forget(self, key: Key) -> None:
        """Forget a TransferJob that is finished or deleted."""
        with self._lock:
            self._times.pop(key, None)


@dataclass(frozen=True)
class _Reconciliation:
    """One reconciliation of one TransferJob."""

    cluster: "Cluster"
    cache: ObjectCache
    progress: ProgressReader
    refreshes: RefreshTimes
    key: Key

    def run(self, seen: Observation, settings: ReconcilerSettings) -> float | None:
        plan = decide(seen)
        if not self._is_refresh(plan, seen):
            live = self._read_live(seen)
            if live is None:
                return None
            seen, plan = self._act(live)
        elif not self.refreshes.seconds_left(self.key):
            seen, plan = self._refresh(seen, plan)
        else:
            return self._next_run(plan.status, settings, seen)
        self._store(seen, plan)
        return self._next_run(plan.status, settings, seen)

    def _is_refresh(self, plan: Plan, seen: Observation) -> bool:
        """Return whether there is nothing to do, or only progress to report, so that the cache is good enough."""
        if plan.needs_target or plan.actions or plan.ttl_jobs or plan.rejection:
            return False
        if plan.status.is_final or plan.status.state == "Suspended":
            return plan.status == seen.previous
        return _without_progress(plan.status) == _without_progress(seen.previous)

    def _read_live(self, seen: Observation) -> Observation | None:
        transfer_job = self.cluster.get("TransferJob", self.key.name)
        if transfer_job is None or is_being_deleted(transfer_job):
            return None
        labels = f"{JOB_LABEL}={self.key.name}"
        jobs, pods = self.cluster.list("Job", labels=labels), self.cluster.list("Pod", labels=labels)
        return Observation(transfer_job, jobs, pods, seen.ended_pods, seen.now)

    def _act(self, seen: Observation) -> tuple[Observation, Plan]:
        """Decide from live objects and act, until the status follows from what the cluster contains."""
        target: Target | Rejection | None = None
        for _ in range(MAX_STEPS):
            plan = decide(seen, target)
            if plan.needs_target:
                target = resolve(self.cluster, seen)
                plan = decide(seen, target)
            self._execute(seen, plan)
            if not any(isinstance(action, CreateRun | UpdateRun) for action in plan.actions):
                break
            seen = self._read_live(seen) or seen
            if isinstance(target, Target):
                target = replace(target, unowned_job=None)
        return self._refresh(seen, plan, target)

    def _refresh(
        self, seen: Observation, plan: Plan, target: Target | Rejection | None = None
    ) -> tuple[Observation, Plan]:
        """Add the reason why the run is pending, or its progress."""
        if plan.status.state == "Pending" and not plan.actions and not plan.rejection:
            jobs = [job for job in seen.jobs if seen.owns(job)]
            pods = [pod for job in jobs for pod in pods_of_job(seen.pods, job)]
            seen = replace(seen, events=read_events(self.cluster, jobs, pods))
            plan = decide(seen, target)
        elif plan.status.state == "Running":
            self._restore_network(seen, plan)
            pods = list(seen.own_training_pods)
            plan = replace(plan, status=self.progress.add_progress(seen.uid, pods, plan.status))
        self.refreshes.record(self.key)
        return seen, plan

    def _restore_network(self, seen: Observation, plan: Plan) -> None:
        """Create the Service and the NetworkPolicy of a run on several nodes again if they were deleted."""
        job = seen.own_job(plan.status.run)
        if job is None or is_being_deleted(job) or has_network(self.cluster, job):
            return
        target = resolve(self.cluster, seen)
        if isinstance(target, Target) and target.objects and target.run == plan.status.run:
            for obj in target.objects.network:
                self._apply(obj)

    # ── Actions ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _execute(self, seen: Observation, plan: Plan) -> None:
        for action in plan.actions:
            if isinstance(action, DeleteJob):
                self._delete(action)
            else:
                self._apply_run(seen, plan, action)

    def _delete(self, action: DeleteJob) -> None:
        # The Job last: if the controller is killed in between, the Job shows that the ConfigMap is to be deleted.
        if action.with_dependencies:
            delete_network(self.cluster, action.job)
            self.cluster.delete("ConfigMap", name_of(action.job))
        # Foreground deletion: as long as the Job exists, its pods may still be running.
        uid = action.job["metadata"]["uid"]
        self.cluster.delete("Job", name_of(action.job), uid=uid, propagation="Foreground")

    def _apply_run(self, seen: Observation, plan: Plan, action: CreateRun | UpdateRun) -> None:
        """Create or change a Job; if the cluster rejects it, report why and raise the error."""
        try:
            if isinstance(action, CreateRun) and action.stale_config_map:
                self.cluster.delete("ConfigMap", name_of(action.config_map), uid=action.stale_config_map)
            for obj in action.stale_network if isinstance(action, CreateRun) else ():
                self.cluster.delete(obj["kind"], name_of(obj), uid=obj["metadata"]["uid"])
            for obj in (action.config_map, *action.network, action.job):
                self._apply(obj)
        except (NamespaceTerminatingError, UidConflictError):
            raise
        except SettingError as error:
            reason = shorten(str(error), MAX_TEXT_CHARACTERS)
            if reason != seen.previous.waiting_for:
                self._report(seen, plan.status, Report("JobRejected", reason, is_warning=True))
            if plan.status.is_final:  # the outcome counts, whatever the labels and the TTL of the finished Job are
                return
            # Until a change of an existing Job succeeds, the status keeps describing the earlier generation.
            kept = plan.status if isinstance(action, CreateRun) else seen.previous
            self._store(seen, Plan(kept.model_copy(update={"waiting_for": reason})))
            raise

    def _apply(self, obj: dict[str, object]) -> None:
        self.cluster.apply(obj, manager=CONTROLLER_MANAGER, force=True)

    # ── Status ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _store(self, seen: Observation, plan: Plan) -> None:
        """Report changes, store the status, and then let finished Jobs expire."""
        if plan.status != seen.previous:
            for report in describe_changes(seen.previous, plan.status):
                self._report(seen, plan.status, report)
            self.cache.store_written(write_status(self.cluster, seen.transfer_job, plan.status))
        self.cache.forget_ended_pods(self.key, [pod["metadata"]["uid"] for pod in seen.ended_pods])
        for job in plan.ttl_jobs:
            delete_network(self.cluster, job)
            self._apply(job)
        if plan.rejection and plan.status.state == "Pending":
            message = shorten(plan.rejection.message, MAX_TEXT_CHARACTERS)
            raise SettingError(f"TransferJob {self.key.name} in {self.key.namespace} is not accepted: {message}")

    def _report(self, seen: Observation, status: TransferJobStatus, report: Report) -> None:
        # Like other controllers, this one works without the permission to create events.
        with suppress(SettingError):
            self._apply(build_event(seen, status, report))

    def _next_run(self, status: TransferJobStatus, settings: ReconcilerSettings, seen: Observation) -> float | None:
        interval = settings.status_interval_seconds
        if status.state == "Running":
            return max(self.refreshes.seconds_left(self.key), 0.1)
        self.progress.forget(seen.uid)
        if status.state == "Pending" or status.waiting_for:
            accepted = status.condition("Accepted")
            since = accepted.last_transition_time if accepted else seen.now
            age = (seen.now - max(since, status.start_time or since)).total_seconds()
            return min(max(interval, PENDING_FRACTION * age), MAX_PENDING_SECONDS)
        self.refreshes.forget(self.key)
        return None


def _without_progress(status: TransferJobStatus) -> TransferJobStatus:
    records = tuple(record.model_copy(update={"gpu_seconds": 0.0}) for record in status.attempt_history)
    return status.model_copy(update={**dict.fromkeys(PROGRESS_FIELDS), "attempt_history": records})
