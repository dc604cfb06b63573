"""Reading and listing the runs of a namespace or cluster."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ForbiddenError
from topwork.cluster.names import APP_NAME, PART_OF_LABEL, ROLE_LABEL, RUN_LABEL, RunKind
from topwork.cluster.operations.transfer_jobs import list_transfer_jobs
from topwork.cluster.status.objects import RunObjects, get_label, has_started, is_job_finished, name_of
from topwork.cluster.status.run_status import EpochProgress, RunStatus, parse_last_epoch, read_run_status
from topwork.cluster.status.transfer_job_run import read_transfer_job_run, read_transfer_job_status
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

# Not managed-by: Helm sets that label to its own value.
TOPWORK_SELECTOR = f"{PART_OF_LABEL}={APP_NAME}"

# Waiting for deleted objects of a run, when it is canceled or replaced.
MIN_PAUSE_SECONDS = 0.25
# How long deletion may take in addition to the grace period of the pods.
DELETION_TIMEOUT_SECONDS = 120.0

MAX_LOGS = 48
LOG_THREADS = 12
MAX_EVENT_PODS = 8
"""Maximum number of pending pods whose events are read: on many nodes, pods are pending for the same reasons."""
LOGS_TIMEOUT_SECONDS = 6.0
"""Timeout for all logs together: an unreachable node must not delay a list."""
TAIL_LINES = 200


def newest_first(objects: Iterable[KubernetesObject]) -> list[KubernetesObject]:
    """Sort objects by their creation, the newest first."""
    return sorted(objects, key=lambda obj: str(obj["metadata"].get("creationTimestamp")), reverse=True)


def read_run_objects(cluster: "Cluster", run: str) -> RunObjects:
    """Read the objects of a run: its Jobs, their pods, and events about them.

    Args:
        cluster: The cluster.
        run: Name of the run.

    Returns:
        The objects; no Jobs if the run was deleted.
    """
    jobs = cluster.list("Job", labels=f"{RUN_LABEL}={run}")
    pods = cluster.list("Pod", labels=f"{RUN_LABEL}={run}")
    return RunObjects(jobs, pods, read_events(cluster, jobs, pods))


def read_events(
    cluster: "Cluster", jobs: Sequence[KubernetesObject], pods: Sequence[KubernetesObject]
) -> list[KubernetesObject]:
    """Read the events that explain why Jobs and pods are pending.

    Args:
        cluster: The cluster.
        jobs: Jobs of a run.
        pods: Their pods.

    Returns:
        Events about unfinished Jobs and pods that have not started, except those that the account may not read.
    """
    events: list[KubernetesObject] = []
    unfinished = [job for job in jobs if not is_job_finished(job)]
    pending = [pod for pod in pods if _is_pending(pod)][:MAX_EVENT_PODS]
    try:
        for obj in (*unfinished, *pending):
            events += cluster.list("Event", fields=f"involvedObject.name={name_of(obj)}")
        if any(job["spec"].get("suspend") for job in jobs):
            events += cluster.list("Event", fields="involvedObject.kind=Workload")
    except SettingError:
        return events
    return events


def _is_pending(pod: KubernetesObject) -> bool:
    return (pod.get("status") or {}).get("phase") in {None, "Pending"} and not has_started(pod)


def list_runs(cluster: "Cluster", *, all_namespaces: bool = False, kind: RunKind | None = None) -> "RunList":
    """Read the status of all runs with four requests, without progress from their logs.

    Args:
        cluster: The cluster.
        all_namespaces: Whether to include the runs of all namespaces.
        kind: Only runs that this kind of object represents; None for all.

    Returns:
        The statuses, newest run first.

    Raises:
        SettingError: If the cluster rejects a request.
        UnavailableError: If the API server does not respond.
    """
    transfer_jobs, note = _list_transfer_jobs(cluster, kind, all_namespaces=all_namespaces)
    jobs = cluster.list("Job", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}", all_namespaces=all_namespaces)
    pods: list[KubernetesObject] = []
    events: list[KubernetesObject] = []
    if jobs:
        pods = cluster.list("Pod", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}", all_namespaces=all_namespaces)
        # An account that may not read events still gets the list.
        with suppress(SettingError):
            events = cluster.list("Event", fields="reason=FailedCreate", all_namespaces=all_namespaces)
    statuses = [read_run_status(objects) for objects in _group_by_run(jobs, pods, events)]
    if not transfer_jobs and kind is not RunKind.transferjob:
        return RunList(statuses, note)
    return RunList(_merge_runs(statuses, transfer_jobs, kind), note)


class RunList(NamedTuple):
    """The runs of a namespace or cluster.

    Attributes:
        statuses: Their statuses, newest run first.
        note: Why TransferJobs without a Job are missing; empty if none is.
    """

    statuses: list[RunStatus]
    note: str = ""


def _list_transfer_jobs(
    cluster: "Cluster", kind: RunKind | None, *, all_namespaces: bool
) -> tuple[list[KubernetesObject], str]:
    """List TransferJobs; an account that may not do so still gets the list of Jobs."""
    if kind is RunKind.job:
        return [], ""
    try:
        return list_transfer_jobs(cluster, all_namespaces=all_namespaces), ""
    except ForbiddenError as error:
        if kind:
            raise
        return [], f"only the Jobs of TransferJobs are listed: {error}"


def _merge_runs(
    statuses: list[RunStatus], transfer_jobs: Sequence[KubernetesObject], kind: RunKind | None
) -> list[RunStatus]:
    """Add the status of each TransferJob to that of its run, and runs of TransferJobs that have no Job."""
    by_run = {(status.namespace, status.run): status for status in statuses}
    merged = [
        read_transfer_job_run(
            obj, by_run.pop((str(obj["metadata"].get("namespace")), read_transfer_job_status(obj).run or ""), None)
        )
        for obj in transfer_jobs
    ]
    plain = by_run.values() if kind is not RunKind.transferjob else ()
    return sorted([*merged, *plain], key=lambda status: str(status.created), reverse=True)


def _group_by_run(
    jobs: Iterable[KubernetesObject], pods: Iterable[KubernetesObject], events: Sequence[KubernetesObject]
) -> list[RunObjects]:
    """Group Jobs and pods by namespace and run, newest run first."""
    groups: dict[tuple[str, str], tuple[list[KubernetesObject], list[KubernetesObject]]] = {}
    for job in newest_first(jobs):
        if get_label(job, ROLE_LABEL):
            groups.setdefault(_run_key(job), ([], []))[0].append(job)
    for pod in pods:
        if _run_key(pod) in groups:
            groups[_run_key(pod)][1].append(pod)
    return [RunObjects(run_jobs, run_pods, events) for run_jobs, run_pods in groups.values()]


def _run_key(obj: KubernetesObject) -> tuple[str, str]:
    return str(obj["metadata"].get("namespace")), str(get_label(obj, RUN_LABEL))


def add_epoch_progress(statuses: Sequence[RunStatus], connect_to: Callable[[str], "Cluster"]) -> list[RunStatus]:
    """Add progress in epochs from the logs of running containers.

    Args:
        statuses: Statuses; the logs of the first 48 running containers are read.
        connect_to: Returns the cluster client of a namespace.

    Returns:
        The statuses, with progress if their logs could be read in time.
    """
    running = [index for index, status in enumerate(statuses) if status.running_container][:MAX_LOGS]
    clusters = {namespace: connect_to(namespace) for namespace in {statuses[index].namespace for index in running}}
    epochs: dict[int, EpochProgress | None] = {}
    remaining = list(reversed(running))

    def read_logs() -> None:
        with suppress(IndexError):
            while True:
                index = remaining.pop()
                epochs[index] = _read_epoch(clusters[statuses[index].namespace], statuses[index])

    # Daemon threads: a node may never respond.
    threads = [threading.Thread(target=read_logs, daemon=True) for _ in range(min(LOG_THREADS, len(running)))]
    deadline = time.monotonic() + LOGS_TIMEOUT_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [_with_epoch(status, epochs.get(index)) for index, status in enumerate(statuses)]


def _with_epoch(status: RunStatus, epoch: EpochProgress | None) -> RunStatus:
    if epoch is None or epoch.stage != status.stage:
        return status
    if epoch.metric is None:
        return replace(status, epoch=epoch)
    return replace(status, epoch=epoch, metric=epoch.metric, value=epoch.best)


def _read_epoch(cluster: "Cluster", status: RunStatus) -> EpochProgress | None:
    if status.running_container is None:
        return None
    try:
        return parse_last_epoch(cluster.logs(*status.running_container, tail=TAIL_LINES))
    except (SettingError, UnavailableError):
        return None
