"""Canceling a run: deleting its Jobs, pods and ConfigMap, and waiting until its pods have written their checkpoint."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL
from topwork.cluster.operations.runs import (
    DELETION_TIMEOUT_SECONDS,
    FINISHED_POD_PHASES,
    MIN_PAUSE_SECONDS,
    NAME,
    TOPWORK_SELECTOR,
    find_run,
)
from topwork.cluster.status.objects import is_being_deleted, kubectl_name, name_of, owner_uids
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

MAX_PAUSE_SECONDS = 2.0


def find_run_to_cancel(cluster: "Cluster", name: str) -> str:
    """Find the run that a name refers to, even if only its ConfigMap still exists.

    Args:
        cluster: The cluster.
        name: Name of a run, or of a job, for its newest run.

    Returns:
        Name of the run.

    Raises:
        SettingError: If there is no such run; the message lists the existing runs.
    """
    try:
        return find_run(cluster, name).run
    except SettingError:
        if NAME.fullmatch(name) and cluster.list("ConfigMap", labels=f"{TOPWORK_SELECTOR},{RUN_LABEL}={name}"):
            return name
        raise


@dataclass
class Cancellation:
    """Cancels a run.

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

    def cancel(self) -> None:
        """Delete the Jobs, their pods and the ConfigMap, and wait until they are gone.

        Raises:
            SettingError: If the cluster rejects a request.
            UnavailableError: If an object is not deleted in time, or the API server does not respond.
        """
        objects = [*self._list("Job"), *self._list("ConfigMap")]
        for obj in objects:
            # Foreground deletion: as long as the Job exists, its pods may still be running.
            propagation = "Foreground" if obj["kind"] == "Job" else "Background"
            self.cluster.delete(obj["kind"], name_of(obj), uid=obj["metadata"]["uid"], propagation=propagation)
        uids = {obj["metadata"]["uid"] for obj in objects}
        self._wait(uids, job_uids={obj["metadata"]["uid"] for obj in objects if obj["kind"] == "Job"})

    def _wait(self, uids: set[str], job_uids: set[str]) -> None:
        """Wait for these objects only: the same run may be submitted again in the meantime."""
        reported, pause, deadline = "", MIN_PAUSE_SECONDS, 0.0
        while remaining := [*self._remaining_pods(job_uids), *self._remaining_objects(uids)]:
            deadline = deadline or time.monotonic() + _grace_seconds(remaining) + self.timeout_seconds
            if self.now:
                self._kill_pods(remaining)
            if (waiting := _describe_wait(remaining, now=self.now)) != reported:
                reported = waiting
                self.report(waiting)
            if time.monotonic() > deadline:
                namespace = self.cluster.namespace
                raise UnavailableError(
                    f"{kubectl_name(remaining[0])} in namespace {namespace} is still being deleted. Is its node down? "
                    f"See kubectl get pods -o wide -n {namespace}; --now does not wait for the node."
                )
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)

    def _kill_pods(self, objects: list[KubernetesObject]) -> None:
        for pod in objects:
            if pod["kind"] == "Pod":
                self.cluster.delete("Pod", name_of(pod), uid=pod["metadata"]["uid"], grace_seconds=0)

    def _list(self, kind: str) -> list[KubernetesObject]:
        return self.cluster.list(kind, labels=f"{RUN_LABEL}={self.run}")

    def _remaining_objects(self, uids: set[str]) -> Iterator[KubernetesObject]:
        for kind in ("Job", "ConfigMap"):
            yield from (obj for obj in self._list(kind) if obj["metadata"]["uid"] in uids)

    def _remaining_pods(self, job_uids: set[str]) -> Iterator[KubernetesObject]:
        """Yield the pods of the Jobs, and terminating pods of Jobs that were deleted before."""
        for pod in self._list("Pod"):
            if owner_uids(pod) & job_uids or is_being_deleted(pod):
                yield pod


def _grace_seconds(objects: list[KubernetesObject]) -> float:
    """Return the longest termination grace period of the pods."""
    periods = [obj["spec"].get("terminationGracePeriodSeconds") or 30 for obj in objects if obj["kind"] == "Pod"]
    return float(max(periods, default=0))


def _describe_wait(remaining: list[KubernetesObject], *, now: bool) -> str:
    first = remaining[0]
    is_running = first["kind"] == "Pod" and (first.get("status") or {}).get("phase") not in FINISHED_POD_PHASES
    if is_running and not now:
        return f"waiting for {kubectl_name(first)} to write its checkpoint (at most {_grace_seconds(remaining):.0f} s)"
    return f"waiting for {kubectl_name(first)} to be deleted"
