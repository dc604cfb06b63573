"""Submitting a run: what is there decides what is applied, and nothing that trains is ever changed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import Rendered
from topwork.cluster.names import DIGEST_ANNOTATION, MANAGER, PART_LABEL, RUN_LABEL
from topwork.cluster.operations.diff import differences
from topwork.cluster.status.objects import condition, is_being_deleted, label, name_of
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Outcome = Literal["submitted", "replaced", "running", "complete"]
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 5.0
# What deletion may take beyond the grace period of the pods.
DELETION_SECONDS = 120.0
OVER = {"Succeeded", "Failed"}


@dataclass(frozen=True)
class Submission:
    """A run that is to be submitted.

    Attributes:
        cluster: The cluster.
        rendered: The objects of the run.
        tell: Gets a line for what takes its time or is worth knowing.
        deletion_seconds: How long to wait, beyond the grace period, for what is being deleted.
    """

    cluster: "Cluster"
    rendered: Rendered
    tell: Callable[[str], None]
    deletion_seconds: float = DELETION_SECONDS

    def submit(self, *, ahead: bool = False) -> Outcome:
        """Apply the objects of the run, unless it is there already.

        Args:
            ahead: Whether to apply the Job that pulls ahead only, and not yet the one that trains.

        Returns:
            `submitted` if it was new, `replaced` if a failed one was replaced; `running` or `complete` if the same
            was there and nothing was done.

        Raises:
            SettingError: If a Job of that name runs with other settings or is not topwork's, or the server refuses.
            UnavailableError: If what is being deleted does not go, or the server does not answer.
        """
        there = self._settled(self.rendered.training)
        if there is not None:
            if outcome := self._standing(there):
                return outcome
            self.tell(f"{called(there)} failed and is replaced: the run goes on from its last checkpoint")
            self._remove(there)
        self._wait_for_pods()
        self._remove_leftover()
        jobs = [*self._prefetch(), *([] if ahead else [self.rendered.training])]
        try:
            self._apply(jobs)
        except SettingError:
            # Somebody else may have submitted the same run at this very moment: then theirs is it.
            now = self.cluster.get("Job", name_of(self.rendered.training))
            if now is None or there is not None or not is_ours(now):
                raise
            return self._standing(now) or "submitted"
        return "submitted" if there is None else "replaced"

    def preview(self) -> tuple[KubernetesObject | None, Outcome | None]:
        """Look, without waiting or changing anything.

        Returns:
            The Job that is there, and what `submit` would answer without applying; None where it would apply.

        Raises:
            SettingError: As `submit`.
        """
        there = self._look(self.rendered.training)
        return there, None if there is None or is_being_deleted(there) else self._standing(there)

    def _apply(self, jobs: list[KubernetesObject]) -> None:
        """Apply the ConfigMap, then the Jobs, and make them its owners, so that it goes when they do."""
        config_map = self.rendered.config_map
        self.cluster.apply(config_map)
        for job in jobs:
            self.cluster.apply(job)
        references = [
            {"apiVersion": "batch/v1", "kind": "Job", "name": name_of(job), "uid": job["metadata"]["uid"]}
            for job in self.cluster.list("Job", labels=f"{RUN_LABEL}={label(config_map, RUN_LABEL)}")
            if is_ours(job) and not is_being_deleted(job)
        ]
        if references:
            metadata = config_map["metadata"] | {"ownerReferences": references}
            self.cluster.apply(config_map | {"metadata": metadata})

    def _look(self, job: KubernetesObject) -> KubernetesObject | None:
        return self._checked(self.cluster.get("Job", name_of(job)))

    def _checked(self, there: KubernetesObject | None) -> KubernetesObject | None:
        if there is not None and not is_ours(there):
            kind = "configmap" if there.get("kind") == "ConfigMap" else "job.batch"
            raise SettingError(
                f"{kind}/{name_of(there)} in namespace {self.cluster.namespace} is not topwork's: it has no label "
                f"{PART_LABEL}={MANAGER}. Delete it, or give the spec another metadata.name."
            )
        return there

    def _settled(self, job: KubernetesObject) -> KubernetesObject | None:
        """Read the Job of that name, once it is no longer about to end."""
        there = self._look(job)
        if there is None or not _is_ending(there):
            return there
        self.tell(f"{called(there)} is {'being deleted' if is_being_deleted(there) else 'about to fail'}: waiting")
        self._wait(lambda: (now := self._look(job)) is None or not _is_ending(now), f"{called(there)} does not end")
        return self._look(job)

    def _standing(self, there: KubernetesObject) -> Outcome | None:
        """What a Job that is there means; None if it failed and can be replaced."""
        if condition(there, "Complete") or condition(there, "SuccessCriteriaMet"):
            return "complete"
        if condition(there, "Failed") or condition(there, "FailureTarget"):
            return None
        if digest(there) == digest(self.rendered.training):
            return "running"
        config_map = self.cluster.get("ConfigMap", name_of(self.rendered.config_map))
        differing = differences((config_map, there), (self.rendered.config_map, self.rendered.training))
        where = f"{name_of(there)} -n {self.cluster.namespace}"
        raise SettingError(
            f"{called(there)} in namespace {self.cluster.namespace} is not finished and has other settings: "
            f"{differing}. A Job is not changed while it runs. Wait for its end, or stop it with: topwork cancel "
            f"{where}; submitted again, it goes on from its checkpoint."
        )

    def _prefetch(self) -> list[KubernetesObject]:
        """The Job that pulls ahead, unless it is there and has not failed: whatever its settings, it pulls the same."""
        wanted = self.rendered.prefetch
        there = self._settled(wanted) if wanted else None
        if wanted is None or (there is not None and not condition(there, "Failed")):
            return []
        if there is not None:
            self._remove(there)
        return [wanted]

    def _remove(self, job: KubernetesObject) -> None:
        """Delete a Job with its pods and wait until they are gone; somebody else may have done so before."""
        name, uid = name_of(job), job["metadata"]["uid"]
        self.cluster.delete("Job", name, uid=uid, propagation="Foreground")

        def is_gone() -> bool:
            now = self.cluster.get("Job", name)
            return now is None or now["metadata"]["uid"] != uid

        self._wait(is_gone, f"{called(job)} is not deleted")

    def _remove_leftover(self) -> None:
        """Delete a ConfigMap whose Job is gone.

        One that kubectl applied could not be changed, and one whose owners are gone will be deleted by Kubernetes
        at a moment of its choice.
        """
        there = self._checked(self.cluster.get("ConfigMap", name_of(self.rendered.config_map)))
        if there is None:
            return
        jobs = self.cluster.list("Job", labels=f"{RUN_LABEL}={label(self.rendered.training, RUN_LABEL)}")
        owners = {owner["uid"] for owner in there["metadata"].get("ownerReferences") or ()}
        has_owner = not owners or owners & {job["metadata"]["uid"] for job in jobs}
        if there.get("data") != self.rendered.config_map["data"] or not has_owner:
            self.cluster.delete("ConfigMap", name_of(there), uid=there["metadata"]["uid"])

    def _wait_for_pods(self) -> None:
        """Wait for pods that a deleted Job left behind: two pods must never train the same run."""
        run = label(self.rendered.training, RUN_LABEL)

        def left() -> list[KubernetesObject]:
            pods = self.cluster.list("Pod", labels=f"{RUN_LABEL}={run}")
            return [pod for pod in pods if is_being_deleted(pod) and (pod.get("status") or {}).get("phase") not in OVER]

        if found := left():
            self.tell(f"pod/{name_of(found[0])} still writes its checkpoint: waiting")
            self._wait(lambda: not left(), f"pod/{name_of(found[0])} does not end")

    def _wait(self, is_done: Callable[[], bool], otherwise: str) -> None:
        grace = self.rendered.training["spec"]["template"]["spec"].get("terminationGracePeriodSeconds") or 30
        limit, pause = grace + self.deletion_seconds, FIRST_PAUSE_SECONDS
        until = time.monotonic() + limit
        while not is_done():
            if time.monotonic() > until:
                raise UnavailableError(
                    f"{otherwise}: {limit:.0f} s have passed. Is its node lost? See kubectl get pods -o wide "
                    f"-n {self.cluster.namespace}, and submit again."
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def is_ours(thing: KubernetesObject) -> bool:
    """Whether topwork has rendered an object."""
    return label(thing, PART_LABEL) == MANAGER


def digest(job: KubernetesObject) -> str | None:
    """Digest of what was rendered, as the Job keeps it."""
    value = (job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION)
    return str(value) if value else None


def called(job: KubernetesObject) -> str:
    """Name a Job as kubectl does."""
    return f"job.batch/{name_of(job)}"


def _is_ending(job: KubernetesObject) -> bool:
    over = condition(job, "Failed") or condition(job, "Complete")
    return is_being_deleted(job) or (condition(job, "FailureTarget") is not None and not over)
