"""TransferJobs in a cluster whose controller runs them: discovery, reading, waiting for changes, and cancellation."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import KINDS
from topwork.clients.kubernetes.errors import ForbiddenError, NotFoundError, UnknownApiError
from topwork.cluster.names import CANCEL_ANNOTATION, RunKind
from topwork.cluster.status.objects import get_controller, name_of
from topwork.cluster.status.transfer_job_run import read_transfer_job_status
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

TRANSFER_JOB = "TransferJob"
CANCEL_MANAGER = "topwork-cancel"
"""Field manager of the annotation that cancels a run: other managers, such as GitOps tools, do not remove it."""
POLL_SECONDS = 5.0
"""A TransferJob is read at least this often: its Job may change before its status does."""
NOT_SERVED = (
    "The cluster does not serve TransferJobs: their CustomResourceDefinition is not installed. An administrator "
    "installs it and the controller with the Helm chart or k8s/controller"
)


def choose_run_kind(cluster: "Cluster", requested: RunKind | None) -> RunKind:
    """Choose the kind of object that is submitted.

    Args:
        cluster: The cluster.
        requested: The kind that the user requests; None for TransferJobs if the cluster serves them.

    Returns:
        The kind.

    Raises:
        SettingError: If TransferJobs are requested but not served, or if the account may not read which kinds are.
        UnavailableError: If the API server does not respond.
    """
    if requested is RunKind.job:
        return RunKind.job
    try:
        is_served = cluster.serves(TRANSFER_JOB)
    except ForbiddenError as error:
        if requested:
            return requested
        raise SettingError(
            f"Cannot read whether the cluster serves TransferJobs: {error} Choose with --as job or --as transferjob."
        ) from error
    if requested is RunKind.transferjob and not is_served:
        raise SettingError(f"{NOT_SERVED}. To submit plain Jobs, use --as job.")
    return RunKind.transferjob if is_served else RunKind.job


def get_transfer_job(cluster: "Cluster", name: str) -> KubernetesObject | None:
    """Return a TransferJob; None if it does not exist, or if the cluster does not serve the kind."""
    try:
        return cluster.get(TRANSFER_JOB, name)
    except UnknownApiError:
        return None


def list_transfer_jobs(cluster: "Cluster", *, all_namespaces: bool = False) -> list[KubernetesObject]:
    """List TransferJobs; none if the cluster does not serve the kind."""
    try:
        return cluster.list(TRANSFER_JOB, all_namespaces=all_namespaces)
    except UnknownApiError:
        return []


def require_transfer_job(cluster: "Cluster", name: str) -> KubernetesObject:
    """Return a TransferJob.

    Raises:
        NotFoundError: If it does not exist.
        SettingError: If the cluster does not serve the kind, or rejects the request.
    """
    return require_custom_resource(cluster, TRANSFER_JOB, name, NOT_SERVED)


def require_custom_resource(cluster: "Cluster", kind: str, name: str, not_served: str) -> KubernetesObject:
    """Return a custom resource.

    Args:
        cluster: The cluster.
        kind: Its kind.
        name: Its name.
        not_served: What to report if the cluster does not serve the kind, without the period.

    Raises:
        NotFoundError: If it does not exist.
        SettingError: If the cluster does not serve the kind, or rejects the request.
    """
    try:
        obj = cluster.get(kind, name)
    except UnknownApiError:
        raise SettingError(f"{not_served}.") from None
    if obj is None:
        raise NotFoundError(f"{kind.lower()}/{name} does not exist in namespace {cluster.namespace}.")
    return obj


def find_transfer_job_of_run(cluster: "Cluster", run: str) -> KubernetesObject | None:
    """Return the TransferJob whose current run has this name, `<name>-<8 hex digits>`; None if there is none."""
    obj = get_transfer_job(cluster, run.rpartition("-")[0]) if "-" in run else None
    return obj if obj and read_transfer_job_status(obj).run == run else None


def owner_transfer_job(obj: KubernetesObject) -> str | None:
    """Return the name of the TransferJob whose controller manages an object; None if it has none."""
    owner = get_controller(obj)
    is_transfer_job = owner is not None and (owner["kind"], owner["apiVersion"]) == (
        TRANSFER_JOB,
        KINDS[TRANSFER_JOB].api_version,
    )
    return str(owner["name"]) if owner and is_transfer_job else None


def watch_transfer_job(cluster: "Cluster", name: str, poll_seconds: float = POLL_SECONDS) -> Iterator[KubernetesObject]:
    """Read a TransferJob now, after each change, and at least every `poll_seconds`, without end.

    Args:
        cluster: The cluster.
        name: Name of the TransferJob.
        poll_seconds: Maximum interval in seconds.

    Yields:
        The TransferJob.

    Raises:
        NotFoundError: If it does not exist, or is deleted.
        SettingError: If the cluster rejects a request.
        UnavailableError: If the API server does not respond; call again to continue.
    """
    while True:
        obj = require_transfer_job(cluster, name)
        yield obj
        _wait_for_change(cluster, obj, poll_seconds)


def _wait_for_change(cluster: "Cluster", obj: KubernetesObject, seconds: float) -> None:
    version, deadline = obj["metadata"]["resourceVersion"], time.monotonic() + seconds
    # An account that may get but not watch TransferJobs polls.
    with suppress(ForbiddenError):
        for change in cluster.watch(TRANSFER_JOB, fields=f"metadata.name={name_of(obj)}", seconds=seconds):
            if change.type == "DELETED" or change.object["metadata"]["resourceVersion"] != version:
                return
    time.sleep(max(0.0, deadline - time.monotonic()))


def request_cancellation(cluster: "Cluster", name: str, run: str) -> None:
    """Ask the controller to cancel the run of a TransferJob with a checkpoint; returns immediately.

    Args:
        cluster: The cluster.
        name: Name of the TransferJob.
        run: Name of the run; another run of the TransferJob is not affected.

    Raises:
        SettingError: If the cluster rejects the request.
        UnavailableError: If the API server does not respond.
    """
    metadata = {"name": name, "annotations": {CANCEL_ANNOTATION: run}}
    request = {"apiVersion": KINDS[TRANSFER_JOB].api_version, "kind": TRANSFER_JOB, "metadata": metadata}
    cluster.apply(request, manager=CANCEL_MANAGER, force=True)
