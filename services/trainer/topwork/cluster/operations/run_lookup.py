"""Finding the run that a name refers to, among plain Jobs and TransferJobs."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ForbiddenError
from topwork.cluster.names import JOB_LABEL, RUN_LABEL, RunKind
from topwork.cluster.operations.runs import TOPWORK_SELECTOR, newest_first, read_run_objects
from topwork.cluster.operations.transfer_jobs import (
    find_transfer_job_of_run,
    get_transfer_job,
    list_transfer_jobs,
    owner_transfer_job,
)
from topwork.cluster.status.objects import RunObjects, get_label, name_of, node_count
from topwork.cluster.status.run_status import RunStatus, read_run_status
from topwork.cluster.status.transfer_job_run import read_transfer_job_run, read_transfer_job_status
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

KIND_PREFIXES = {
    **dict.fromkeys(("transferjob", "transferjobs", "transferjob.topwork.dev", "transferjobs.topwork.dev", "tj"), None),
    **dict.fromkeys(("job", "jobs", "job.batch", "jobs.batch"), RunKind.job),
}
"""Kinds that may precede a name, as in kubectl. `transferjob/NAME` also finds the plain Jobs of a job."""
NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
MAX_LISTED_RUNS = 8


class RunMatch(NamedTuple):
    """The run that a name refers to.

    Attributes:
        run: Name of the run; empty if the controller has not yet given the TransferJob one.
        others: Number of other runs of the same job.
        transfer_job: The TransferJob that it belongs to; None for plain Jobs.
    """

    run: str
    others: int
    transfer_job: KubernetesObject | None = None


def find_run(cluster: "Cluster", name: str, kind: RunKind | None = None) -> RunMatch:
    """Find the run that a name refers to.

    Args:
        cluster: The cluster.
        name: Name of a TransferJob, of a run, or of a job, for its newest run; after `transferjob/` or `tj/`, and after
            `job/`, only of that kind if the cluster serves both.
        kind: Kind of object that represents the run; None for both kinds.

    Returns:
        The run.

    Raises:
        SettingError: If there is no such run; the message lists the existing runs.
    """
    prefix, _, plain = name.rpartition("/")
    is_valid = bool(NAME.fullmatch(plain)) and (not prefix or prefix in KIND_PREFIXES)
    named_kind = kind or KIND_PREFIXES.get(prefix)
    match, denial = None, None
    try:
        if is_valid and named_kind is not RunKind.job:
            match = _find_transfer_job(cluster, plain)
    except ForbiddenError as error:
        # An account that may not read TransferJobs can still read Jobs.
        denial = error
    if is_valid and match is None and named_kind is not RunKind.transferjob:
        match = _find_jobs(cluster, plain, with_transfer_job=kind is None and denial is None)
    if match:
        return match
    if denial:
        raise denial
    runs = _existing_runs(cluster, named_kind)
    more = f" and {len(runs) - MAX_LISTED_RUNS} more" if len(runs) > MAX_LISTED_RUNS else ""
    existing = f"Existing runs: {', '.join(runs[:MAX_LISTED_RUNS])}{more}."
    hint = existing if runs else "It has no runs yet: start one with topwork submit FILE."
    raise SettingError(f"no job or run {name} in namespace {cluster.namespace}. {hint}")


def _find_transfer_job(cluster: "Cluster", name: str) -> RunMatch | None:
    """Find a TransferJob by its name, or by the name of its current run."""
    obj = get_transfer_job(cluster, name) or find_transfer_job_of_run(cluster, name.removesuffix("-pull"))
    return RunMatch(read_transfer_job_status(obj).run or "", 0, obj) if obj else None


def _find_jobs(cluster: "Cluster", name: str, *, with_transfer_job: bool) -> RunMatch | None:
    """Find the Jobs of a job, of a run, or with this name, and the TransferJob that owns them."""
    match, found = None, []
    for key in (JOB_LABEL, RUN_LABEL):
        found = [job for job in cluster.list("Job", labels=f"{key}={name}") if get_label(job, RUN_LABEL)]
        if found:
            runs = _run_names(found)
            match = RunMatch(runs[0], len(runs) - 1)
            break
    run = name.removesuffix("-pull")
    if match is None and run != name:
        found = cluster.list("Job", labels=f"{RUN_LABEL}={run}")
        match = RunMatch(run, 0) if found else None
    if match is None or not with_transfer_job:
        return match
    owner = next((owner_transfer_job(job) for job in found if get_label(job, RUN_LABEL) == match.run), None)
    return match._replace(transfer_job=get_transfer_job(cluster, owner) if owner else None)


def _existing_runs(cluster: "Cluster", kind: RunKind | None) -> list[str]:
    runs: list[str] = []
    if kind is not RunKind.transferjob:
        runs += _run_names(cluster.list("Job", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}"))
    if kind is not RunKind.job:
        objects = newest_first(list_transfer_jobs(cluster))
        runs += [read_transfer_job_status(obj).run or f"transferjob/{name_of(obj)}" for obj in objects]
    return list(dict.fromkeys(runs))


def _run_names(jobs: Iterable[KubernetesObject]) -> list[str]:
    """Return the names of the runs of some Jobs, newest first."""
    return list(dict.fromkeys(str(get_label(job, RUN_LABEL)) for job in newest_first(jobs)))


def read_node_count(cluster: "Cluster", match: RunMatch) -> int:
    """Read the number of nodes of a run.

    Args:
        cluster: The cluster.
        match: The run, from `find_run`.

    Returns:
        The number from its Job; from its TransferJob if it has none.
    """
    job = RunObjects(cluster.list("Job", labels=f"{RUN_LABEL}={match.run}")).job("training") if match.run else None
    if job is not None:
        return node_count(job)
    spec = (match.transfer_job or {}).get("spec") or {}
    return int((spec.get("compute") or {}).get("nodes") or 1)


def read_run(cluster: "Cluster", match: RunMatch) -> RunStatus:
    """Read the status of a run, without progress from its logs.

    Args:
        cluster: The cluster.
        match: The run, from `find_run`.

    Returns:
        The status from its Jobs and its TransferJob.

    Raises:
        SettingError: If it was deleted in the meantime.
    """
    objects = read_run_objects(cluster, match.run) if match.run else RunObjects(())
    from_jobs = read_run_status(objects) if objects.jobs else None
    if match.transfer_job is not None:
        return read_transfer_job_run(match.transfer_job, from_jobs)
    if from_jobs is None:
        raise SettingError(f"{match.run} has just been deleted from namespace {cluster.namespace}.")
    return from_jobs
