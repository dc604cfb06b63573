"""Finding, reading and listing the runs of a namespace or cluster."""

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import APP_NAME, JOB_LABEL, PART_OF_LABEL, ROLE_LABEL, RUN_LABEL
from topwork.cluster.status.objects import RunObjects, get_label, has_started, is_job_finished, name_of
from topwork.cluster.status.run_status import EpochProgress, RunStatus, parse_last_epoch, read_run_status
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

# Not managed-by: Helm sets that label to its own value.
TOPWORK_SELECTOR = f"{PART_OF_LABEL}={APP_NAME}"
KIND_PREFIX = re.compile(r"^(transferjob|transferjobs|job|jobs|job\.batch|jobs\.batch)/")
NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
MAX_LISTED_RUNS = 8

# Waiting for deleted objects of a run, when it is canceled or replaced.
MIN_PAUSE_SECONDS = 0.25
# How long deletion may take in addition to the grace period of the pods.
DELETION_TIMEOUT_SECONDS = 120.0
FINISHED_POD_PHASES = {"Succeeded", "Failed"}

MAX_LOGS = 48
LOG_THREADS = 12
LOGS_TIMEOUT_SECONDS = 6.0
"""Timeout for all logs together: an unreachable node must not delay a list."""
TAIL_LINES = 200


class RunMatch(NamedTuple):
    """The run that a name refers to, and the number of other runs of the same job."""

    run: str
    others: int


def find_run(cluster: "Cluster", name: str) -> RunMatch:
    """Find the run that a name refers to.

    Args:
        cluster: The cluster.
        name: Name of a run, or of a job, for its newest run; a prefix such as `job.batch/` is ignored.

    Returns:
        The run.

    Raises:
        SettingError: If there is no such run; the message lists the existing runs.
    """
    plain = KIND_PREFIX.sub("", name)
    if NAME.fullmatch(plain):
        for key in (JOB_LABEL, RUN_LABEL):
            jobs = [job for job in cluster.list("Job", labels=f"{key}={plain}") if get_label(job, RUN_LABEL)]
            if jobs:
                runs = _run_names(jobs)
                return RunMatch(runs[0], len(runs) - 1)
        run = plain.removesuffix("-pull")
        if run != plain and cluster.list("Job", labels=f"{RUN_LABEL}={run}"):
            return RunMatch(run, 0)
    runs = _run_names(cluster.list("Job", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}"))
    more = f" and {len(runs) - MAX_LISTED_RUNS} more" if len(runs) > MAX_LISTED_RUNS else ""
    existing = f"Existing runs: {', '.join(runs[:MAX_LISTED_RUNS])}{more}."
    hint = existing if runs else "It has no runs yet: start one with topwork submit FILE."
    raise SettingError(f"no job or run {name} in namespace {cluster.namespace}. {hint}")


def _run_names(jobs: Iterable[KubernetesObject]) -> list[str]:
    """Return the names of the runs of some Jobs, newest first."""
    return list(dict.fromkeys(str(get_label(job, RUN_LABEL)) for job in _newest_first(jobs)))


def _newest_first(jobs: Iterable[KubernetesObject]) -> list[KubernetesObject]:
    return sorted(jobs, key=lambda job: str(job["metadata"].get("creationTimestamp")), reverse=True)


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
    pending = [pod for pod in pods if _is_pending(pod)]
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


def list_runs(cluster: "Cluster", *, all_namespaces: bool = False) -> list[RunStatus]:
    """Read the status of all runs with three requests, without progress from their logs.

    Args:
        cluster: The cluster.
        all_namespaces: Whether to include the runs of all namespaces.

    Returns:
        The statuses, newest run first.
    """
    jobs = cluster.list("Job", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}", all_namespaces=all_namespaces)
    if not jobs:
        return []
    pods = cluster.list("Pod", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}", all_namespaces=all_namespaces)
    events: list[KubernetesObject] = []
    # An account that may not read events still gets the list.
    with suppress(SettingError):
        events = cluster.list("Event", fields="reason=FailedCreate", all_namespaces=all_namespaces)
    return [read_run_status(objects) for objects in _group_by_run(jobs, pods, events)]


def _group_by_run(
    jobs: Iterable[KubernetesObject], pods: Iterable[KubernetesObject], events: Sequence[KubernetesObject]
) -> list[RunObjects]:
    """Group Jobs and pods by namespace and run, newest run first."""
    groups: dict[tuple[str, str], tuple[list[KubernetesObject], list[KubernetesObject]]] = {}
    for job in _newest_first(jobs):
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
