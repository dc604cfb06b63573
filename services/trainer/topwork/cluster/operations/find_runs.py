"""Finding the runs of a namespace, and all that the cluster holds of one."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL, MANAGER, PART_LABEL, RUN_LABEL
from topwork.cluster.status.objects import RunObjects, condition, has_begun, label, name_of
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

# Not managed-by, which is Helm's own on what a chart makes.
OURS = f"{PART_LABEL}={MANAGER}"
KIND = re.compile(r"^(transferjob|transferjobs|job|jobs|job\.batch|jobs\.batch)/")
NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
MOST_NAMED = 8


class Found(NamedTuple):
    """The run that a name means, and how many others of the same job there are."""

    run: str
    others: int


def find_run(cluster: "Cluster", name: str) -> Found:
    """Find the run that a user names.

    Args:
        cluster: The cluster.
        name: Name of a job, for its newest run, or of a run; `job.batch/` before it is borne.

    Returns:
        The run.

    Raises:
        SettingError: If there is none; it names those that there are.
    """
    plain = KIND.sub("", name)
    if NAME.fullmatch(plain):
        for key in (JOB_LABEL, RUN_LABEL):
            jobs = [job for job in cluster.list("Job", labels=f"{key}={plain}") if label(job, RUN_LABEL)]
            if jobs:
                runs = newest_first(jobs)
                return Found(runs[0], len(runs) - 1)
        if plain.endswith("-pull") and cluster.list("Job", labels=f"{RUN_LABEL}={plain.removesuffix('-pull')}"):
            return Found(plain.removesuffix("-pull"), 0)
    there = newest_first(cluster.list("Job", labels=f"{OURS},{RUN_LABEL}"))
    named = ", ".join(there[:MOST_NAMED]) + (f" and {len(there) - MOST_NAMED} more" if len(there) > MOST_NAMED else "")
    known = f"There are: {named}." if there else "There is none at all: topwork submit FILE starts one."
    raise SettingError(f"no job or run {name} in namespace {cluster.namespace}. {known}")


def newest_first(jobs: Iterable[KubernetesObject]) -> list[str]:
    """Name the runs of some Jobs, the newest first."""
    ordered = sorted(jobs, key=lambda job: str(job["metadata"].get("creationTimestamp")), reverse=True)
    return list(dict.fromkeys(str(label(job, RUN_LABEL)) for job in ordered))


def read_run(cluster: "Cluster", run: str) -> RunObjects:
    """Read all that the cluster holds of a run: its Jobs, pods and the events about them.

    Args:
        cluster: The cluster.
        run: Name of the run.

    Returns:
        What there is; no Jobs if it's gone.
    """
    jobs = cluster.list("Job", labels=f"{RUN_LABEL}={run}")
    pods = cluster.list("Pod", labels=f"{RUN_LABEL}={run}")
    return RunObjects(jobs, pods, read_events(cluster, jobs, pods))


def read_events(
    cluster: "Cluster", jobs: Sequence[KubernetesObject], pods: Sequence[KubernetesObject]
) -> list[KubernetesObject]:
    """Read the events that tell why a Job or a pod waits.

    Args:
        cluster: The cluster.
        jobs: Jobs of a run.
        pods: Their pods.

    Returns:
        The events about what is not over and has not started; none where the account must not read events.
    """
    found: list[KubernetesObject] = []
    try:
        for thing in (*(job for job in jobs if _is_open(job)), *(pod for pod in pods if _is_waiting(pod))):
            found += cluster.list("Event", fields=f"involvedObject.name={name_of(thing)}")
        if any(job["spec"].get("suspend") for job in jobs):
            found += cluster.list("Event", fields="involvedObject.kind=Workload")
    except SettingError:
        return found
    return found


def _is_open(job: KubernetesObject) -> bool:
    return not (condition(job, "Complete") or condition(job, "Failed"))


def _is_waiting(pod: KubernetesObject) -> bool:
    return (pod.get("status") or {}).get("phase") in {None, "Pending"} and not has_begun(pod)
