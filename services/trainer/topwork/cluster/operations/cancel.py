"""Cancelling a run: its Jobs go, its pods write their checkpoint, and nothing is left in the cluster."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import RUN_LABEL
from topwork.cluster.operations.find_runs import NAME, OURS, find_run
from topwork.cluster.status.objects import is_being_deleted, name_of
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 2.0
# What deletion may take beyond the grace period of the pods.
DELETION_SECONDS = 120.0
OVER = {"Succeeded", "Failed"}


def find_cancellable(cluster: "Cluster", name: str) -> str:
    """Find the run that a user names; a ConfigMap that was left alone is enough.

    Args:
        cluster: The cluster.
        name: Name of a job, for its newest run, or of a run.

    Returns:
        Name of the run.

    Raises:
        SettingError: If there is none; it names those that there are.
    """
    try:
        return find_run(cluster, name).run
    except SettingError:
        if NAME.fullmatch(name) and cluster.list("ConfigMap", labels=f"{OURS},{RUN_LABEL}={name}"):
            return name
        raise


@dataclass
class Cancelling:
    """A run that is being cancelled.

    Attributes:
        cluster: The cluster.
        run: Name of the run.
        now: Whether its pods get no time to write a checkpoint.
        tell: Gets a line for what is waited for.
        deletion_seconds: How long to wait, beyond the grace period.
    """

    cluster: "Cluster"
    run: str
    now: bool
    tell: Callable[[str], None]
    deletion_seconds: float = DELETION_SECONDS

    def cancel(self) -> None:
        """Delete the Jobs, their pods and the ConfigMap, and wait until they are gone.

        Raises:
            SettingError: If the cluster refuses.
            UnavailableError: If they do not go, or the API server does not answer.
        """
        things = [*self._all("Job"), *self._all("ConfigMap")]
        for thing in things:
            # In the foreground: a Job that can still be seen tells everybody that its pods are still at work.
            propagation = "Foreground" if thing["kind"] == "Job" else "Background"
            self.cluster.delete(thing["kind"], name_of(thing), uid=thing["metadata"]["uid"], propagation=propagation)
        self._wait({thing["metadata"]["uid"] for thing in things}, _jobs(things))

    def _wait(self, uids: set[str], jobs: set[str]) -> None:
        """Wait for what was there; the same run may be submitted again meanwhile."""
        told, pause, until = "", FIRST_PAUSE_SECONDS, 0.0
        while left := [*self._pods(jobs), *self._left(uids)]:
            until = until or time.monotonic() + _grace(left) + self.deletion_seconds
            if self.now:
                self._stop_at_once(left)
            if (what := _waited_for(left, now=self.now)) != told:
                told = what
                self.tell(what)
            if time.monotonic() > until:
                raise UnavailableError(
                    f"{_called(left[0])} in namespace {self.cluster.namespace} does not go. Is its node lost? "
                    f"See kubectl get pods -o wide -n {self.cluster.namespace}; --now does not wait for the node."
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _stop_at_once(self, left: list[KubernetesObject]) -> None:
        for pod in left:
            if pod["kind"] == "Pod":
                self.cluster.delete("Pod", name_of(pod), uid=pod["metadata"]["uid"], grace_seconds=0)

    def _all(self, kind: str) -> list[KubernetesObject]:
        return self.cluster.list(kind, labels=f"{RUN_LABEL}={self.run}")

    def _left(self, uids: set[str]) -> Iterator[KubernetesObject]:
        for kind in ("Job", "ConfigMap"):
            yield from (thing for thing in self._all(kind) if thing["metadata"]["uid"] in uids)

    def _pods(self, jobs: set[str]) -> Iterator[KubernetesObject]:
        """Pods of the Jobs, and those that a Job left behind which is gone."""
        for pod in self._all("Pod"):
            owners = {owner["uid"] for owner in pod["metadata"].get("ownerReferences") or ()}
            if owners & jobs or is_being_deleted(pod):
                yield pod


def _jobs(things: list[KubernetesObject]) -> set[str]:
    return {thing["metadata"]["uid"] for thing in things if thing["kind"] == "Job"}


def _grace(left: list[KubernetesObject]) -> float:
    """The longest time that a pod was given to stop."""
    stated = [thing["spec"].get("terminationGracePeriodSeconds") or 30 for thing in left if thing["kind"] == "Pod"]
    return float(max(stated, default=0))


def _waited_for(left: list[KubernetesObject], *, now: bool) -> str:
    first = left[0]
    at_work = first["kind"] == "Pod" and (first.get("status") or {}).get("phase") not in OVER
    if at_work and not now:
        return f"waiting for {_called(first)} to write its checkpoint (at most {_grace(left):.0f} s)"
    return f"waiting for {_called(first)} to go"


def _called(thing: KubernetesObject) -> str:
    """Name an object as kubectl does."""
    kind = {"Job": "job.batch", "ConfigMap": "configmap", "Pod": "pod"}[thing["kind"]]
    return f"{kind}/{name_of(thing)}"
