"""Canceling a run, and waiting until its pods have written their checkpoint.

The Jobs and the ConfigMap of a plain run are deleted, and then the Service and NetworkPolicy between its nodes. The
controller cancels the run of a TransferJob.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ForbiddenError
from topwork.cluster.names import RUN_LABEL, RunKind, service_name_of_run
from topwork.cluster.operations.run_lookup import NAME, RunMatch, find_run
from topwork.cluster.operations.runs import (
    DELETION_TIMEOUT_SECONDS,
    MIN_PAUSE_SECONDS,
    TOPWORK_SELECTOR,
)
from topwork.cluster.operations.transfer_jobs import (
    get_transfer_job,
    owner_transfer_job,
    request_cancellation,
)
from topwork.cluster.status.objects import (
    get_label,
    is_being_deleted,
    is_pod_unfinished,
    kubectl_name,
    name_of,
    node_count,
    owner_uids,
)
from topwork.cluster.status.transfer_job_run import CONTROLLER_COMMAND, read_transfer_job_status
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

MAX_PAUSE_SECONDS = 2.0


def find_run_to_cancel(cluster: "Cluster", name: str, kind: RunKind | None = None) -> RunMatch:
    """Find the run that a name refers to, even if only its ConfigMap still exists.

    Args:
        cluster: The cluster.
        name: Name of a TransferJob, of a run, or of a job, for its newest run.
        kind: Kind of object that represents the run; None for both kinds.

    Returns:
        The run.

    Raises:
        SettingError: If there is no such run; the message lists the existing runs.
    """
    try:
        return find_run(cluster, name, kind)
    except SettingError:
        if NAME.fullmatch(name) and cluster.list("ConfigMap", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}={name}"):
            return RunMatch(name, 0)
        raise


@dataclass
class Cancellation:
    """Cancels a plain run: deletes its Jobs and its ConfigMap.

    Attributes:
        cluster: The cluster.
        run: Name of the run.
        now: Whether to kill its pods immediately, without time to write a checkpoint.
        report: Callback for progress messages, one line each.
        timeout_seconds: How long deletion may take in addition to the grace period.
    """

    cluster: "Cluster"
    run: str
    now: bool
    report: Callable[[str], None]
    timeout_seconds: float = DELETION_TIMEOUT_SECONDS
    _uids: set[str] = field(default_factory=set, init=False)
    _network: list[KubernetesObject] = field(default_factory=list, init=False)

    def cancel(self) -> None:
        """Cancel the run, and wait until its objects and pods are gone.

        Raises:
            SettingError: If the cluster rejects a request, or a Job belongs to a TransferJob.
            UnavailableError: If an object is not deleted in time, or the API server does not respond.
        """
        self._request()
        self._wait()
        # Only now: the nodes agree on their last step and on a checkpoint.
        with suppress(ForbiddenError):  # the garbage collector deletes them with their Job
            for obj in self._network:
                self.cluster.delete(obj["kind"], name_of(obj), uid=obj["metadata"]["uid"])

    def _request(self) -> None:
        objects = [*self._list("Job"), *self._list("ConfigMap")]
        if owner := next(filter(None, map(owner_transfer_job, objects)), None):
            raise SettingError(
                f"{self.run} in namespace {self.cluster.namespace} belongs to transferjob/{owner}, whose controller "
                f"would create its Job again. Cancel it with: topwork cancel {owner} -n {self.cluster.namespace}"
            )
        self._network = list(self._list_network(objects))
        for obj in objects:
            # Foreground deletion: as long as the Job exists, its pods may still be running.
            propagation = "Foreground" if obj["kind"] == "Job" else "Background"
            self.cluster.delete(obj["kind"], name_of(obj), uid=obj["metadata"]["uid"], propagation=propagation)
        # Wait for these objects only: the same run may be submitted again in the meantime.
        self._uids = {obj["metadata"]["uid"] for obj in objects}

    def _wait(self) -> None:
        reported, pause, deadline = "", MIN_PAUSE_SECONDS, 0.0
        while remaining := self._remaining():
            deadline = deadline or time.monotonic() + _grace_seconds(remaining) + self.timeout_seconds
            if self.now:
                self._kill_pods(remaining)
            if (waiting := _describe_wait(remaining, now=self.now)) != reported:
                reported = waiting
                self.report(waiting)
            if time.monotonic() > deadline:
                raise self._timeout_error(remaining[0])
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _kill_pods(self, objects: list[KubernetesObject]) -> None:
        for pod in objects:
            if pod["kind"] == "Pod":
                self.cluster.delete("Pod", name_of(pod), uid=pod["metadata"]["uid"], grace_seconds=0)

    def _list(self, kind: str) -> list[KubernetesObject]:
        return self.cluster.list(kind, labels=f"{RUN_LABEL}={self.run}")

    def _list_network(self, objects: list[KubernetesObject]) -> Iterator[KubernetesObject]:
        """List the Service and NetworkPolicy of a run on several nodes, or of one that was not submitted completely."""
        jobs = [obj for obj in objects if obj["kind"] == "Job"]
        if jobs and all(node_count(job) == 1 for job in jobs):
            return
        with suppress(ForbiddenError):
            for kind, name in (("Service", service_name_of_run(self.run)), ("NetworkPolicy", self.run)):
                if (obj := self.cluster.get(kind, name)) and get_label(obj, RUN_LABEL) == self.run:
                    yield obj

    def _remaining(self) -> list[KubernetesObject]:
        objects = [obj for kind in ("Job", "ConfigMap") for obj in self._list(kind)]
        return [*self._remaining_pods(self._uids), *(obj for obj in objects if obj["metadata"]["uid"] in self._uids)]

    def _remaining_pods(self, job_uids: set[str]) -> list[KubernetesObject]:
        """Return the pods of the Jobs, and terminating pods of Jobs that were deleted before."""
        return [pod for pod in self._list("Pod") if owner_uids(pod) & job_uids or is_being_deleted(pod)]

    def _timeout_error(self, obj: KubernetesObject) -> UnavailableError:
        namespace = self.cluster.namespace
        return UnavailableError(
            f"{kubectl_name(obj)} in namespace {namespace} is still being deleted. Is its node down? "
            f"See kubectl get pods -o wide -n {namespace}; --now does not wait for the node."
        )


@dataclass
class TransferJobCancellation(Cancellation):
    """Cancels the run of a TransferJob: its controller deletes the Job, and the TransferJob remains.

    Attributes:
        uid: UID of the TransferJob: another one with the same name may be submitted in the meantime.
        name: Name of the TransferJob.
    """

    uid: str = ""
    name: str = ""

    def cancel(self) -> None:
        """Cancel the run, and wait until it has ended and its pods are gone.

        Raises:
            SettingError: If the cluster rejects a request.
            UnavailableError: If a pod does not end in time, the controller does not cancel the run, or the API server
                does not respond.
        """
        super().cancel()

    def _request(self) -> None:
        request_cancellation(self.cluster, self.name, self.run)

    def _remaining(self) -> list[KubernetesObject]:
        jobs = [job for job in self._list("Job") if self.uid in owner_uids(job)]
        pods = self._remaining_pods({job["metadata"]["uid"] for job in jobs})
        obj = get_transfer_job(self.cluster, self.name)
        if obj is None or obj["metadata"]["uid"] != self.uid:
            return [*pods, *jobs]
        status = read_transfer_job_status(obj)
        if status.run == self.run and not status.is_final:
            return [*pods, *jobs, obj]
        # A run that was finished before it could be canceled keeps its Job.
        return [*pods, *jobs] if status.state == "Cancelled" else []

    def _kill_pods(self, objects: list[KubernetesObject]) -> None:
        # The Job controller would replace a pod that is killed before its Job is deleted.
        super()._kill_pods([obj for obj in objects if is_being_deleted(obj)])

    def _timeout_error(self, obj: KubernetesObject) -> UnavailableError:
        if is_being_deleted(obj):
            return super()._timeout_error(obj)
        return UnavailableError(
            f"The controller has not canceled {self.run} in namespace {self.cluster.namespace}. Does it run? See "
            f"{CONTROLLER_COMMAND}"
        )


def _grace_seconds(objects: list[KubernetesObject]) -> float:
    """Return the longest termination grace period of the pods."""
    periods = [obj["spec"].get("terminationGracePeriodSeconds") or 30 for obj in objects if obj["kind"] == "Pod"]
    return float(max(periods, default=0))


def _describe_wait(remaining: list[KubernetesObject], *, now: bool) -> str:
    first = remaining[0]
    if remaining[-1]["kind"] == "TransferJob" and not is_being_deleted(first):
        return f"waiting for the controller to cancel {kubectl_name(remaining[-1])}"
    is_running = first["kind"] == "Pod" and is_pod_unfinished(first)
    if is_running and not now:
        return f"waiting for {kubectl_name(first)} to write its checkpoint (at most {_grace_seconds(remaining):.0f} s)"
    return f"waiting for {kubectl_name(first)} to be deleted"
