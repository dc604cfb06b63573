"""Submitting a run: applying its objects unless it already runs, and replacing it if it failed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import RenderedObjects
from topwork.cluster.names import APP_NAME, DIGEST_ANNOTATION, PART_OF_LABEL, RUN_LABEL
from topwork.cluster.operations.diff import describe_diff
from topwork.cluster.operations.runs import DELETION_TIMEOUT_SECONDS, MIN_PAUSE_SECONDS
from topwork.cluster.status.objects import (
    find_condition,
    get_label,
    is_being_deleted,
    is_job_finished,
    is_pod_unfinished,
    kubectl_name,
    name_of,
    owner_uids,
)
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Outcome = Literal["submitted", "replaced", "running", "complete"]
MAX_PAUSE_SECONDS = 5.0


@dataclass(frozen=True)
class Submission:
    """Submits a run.

    Attributes:
        cluster: The cluster.
        rendered: The objects of the run.
        report: Callback for progress messages, one line each.
        timeout_seconds: How long deletion may take in addition to the grace period.
    """

    cluster: "Cluster"
    rendered: RenderedObjects
    report: Callable[[str], None]
    timeout_seconds: float = DELETION_TIMEOUT_SECONDS

    def submit(self, *, prefetch_only: bool = False, restart: bool = False) -> Outcome:
        """Apply the objects of the run, unless they exist already.

        Args:
            prefetch_only: Whether to apply only the Job that pulls the dataset, and not yet the Job that trains.
            restart: Whether to replace a Job that is complete, too.

        Returns:
            `submitted` if the run is new, `replaced` if it replaces a failed one; `running` or `complete` if the same
            run exists and nothing was done.

        Raises:
            SettingError: If a Job with that name runs with different settings or is not managed by topwork, or if the
                API server rejects an object.
            UnavailableError: If an object is not deleted in time, or the API server does not respond.
        """
        existing = self._get_settled_job(self.rendered.training)
        if existing is not None:
            if outcome := self._outcome_of(existing, restart=restart):
                return outcome
            resumes = "starts over" if restart else "resumes from its last checkpoint"
            state = "failed" if find_condition(existing, "Failed") else "is complete"
            self.report(f"{kubectl_name(existing)} {state} and is replaced: the run {resumes}")
            self._delete_job(existing)
        self._wait_for_pods()
        self._delete_stale_objects()
        jobs = [*self._prefetch_jobs(), *([] if prefetch_only else [self.rendered.training])]
        try:
            self._apply(jobs)
        except SettingError:
            # If another user submitted the same run concurrently, that Job is used.
            current = self.cluster.get("Job", name_of(self.rendered.training))
            if current is None or existing is not None or not is_managed_by_topwork(current):
                raise
            return self._outcome_of(current, restart=restart) or "submitted"
        return "submitted" if existing is None else "replaced"

    def preview(self, *, restart: bool = False) -> tuple[KubernetesObject | None, Outcome | None]:
        """Check the existing Job, without waiting or changing anything.

        Args:
            restart: See `submit`.

        Returns:
            The existing Job, and the outcome of `submit` if it would apply nothing; None if it would apply objects.

        Raises:
            SettingError: See `submit`.
        """
        existing = self._get_job(self.rendered.training)
        return existing, None if existing is None or is_being_deleted(existing) else self._outcome_of(
            existing, restart=restart
        )

    def _apply(self, jobs: list[KubernetesObject]) -> None:
        """Apply the ConfigMap, then the Jobs, and make the Jobs its owners, so that it is garbage-collected.

        The Service and the NetworkPolicy of several nodes are applied before the Job that trains, which owns them.
        """
        network = self.rendered.network if self.rendered.training in jobs else []
        for obj in (self.rendered.config_map, *network, *jobs):
            self.cluster.apply(obj)
        owners = [job for job in self._list("Job") if is_managed_by_topwork(job) and not is_being_deleted(job)]
        self._set_owners(self.rendered.config_map, owners)
        for obj in network:
            self._set_owners(obj, [job for job in owners if name_of(job) == name_of(self.rendered.training)])

    def _set_owners(self, obj: KubernetesObject, jobs: list[KubernetesObject]) -> None:
        references = [
            {"apiVersion": "batch/v1", "kind": "Job", "name": name_of(job), "uid": job["metadata"]["uid"]}
            for job in jobs
        ]
        if references:
            self.cluster.apply(obj | {"metadata": obj["metadata"] | {"ownerReferences": references}})

    def _list(self, kind: str) -> list[KubernetesObject]:
        return self.cluster.list(kind, labels=f"{RUN_LABEL}={get_label(self.rendered.training, RUN_LABEL)}")

    def _get_job(self, job: KubernetesObject) -> KubernetesObject | None:
        return self._require_managed(self.cluster.get("Job", name_of(job)))

    def _require_managed(self, obj: KubernetesObject | None) -> KubernetesObject | None:
        if obj is not None and not is_managed_by_topwork(obj):
            raise SettingError(
                f"{kubectl_name(obj)} in namespace {self.cluster.namespace} is not managed by topwork: it has no label "
                f"{PART_OF_LABEL}={APP_NAME}. Delete it, or change metadata.name of the spec."
            )
        return obj

    def _get_settled_job(self, job: KubernetesObject) -> KubernetesObject | None:
        """Return the existing Job; if it is about to end, wait until it has ended."""
        existing = self._get_job(job)
        if existing is None or not _is_ending(existing):
            return existing
        name = kubectl_name(existing)
        self.report(f"{name} is {'being deleted' if is_being_deleted(existing) else 'about to fail'}: waiting")
        self._wait(lambda: (current := self._get_job(job)) is None or not _is_ending(current), f"{name} has not ended")
        return self._get_job(job)

    def _outcome_of(self, existing: KubernetesObject, *, restart: bool) -> Outcome | None:
        """Return what an existing Job means for this submission; None if it is finished and can be replaced."""
        if find_condition(existing, "Complete") or find_condition(existing, "SuccessCriteriaMet"):
            return None if restart else "complete"
        if find_condition(existing, "Failed") or find_condition(existing, "FailureTarget"):
            return None
        if restart:
            raise SettingError(
                f"{kubectl_name(existing)} in namespace {self.cluster.namespace} is not finished, so --restart would "
                "delete results in use. Wait until it is finished, or stop it with: topwork cancel "
                f"{name_of(existing)} -n {self.cluster.namespace}"
            )
        if _get_digest(existing) == _get_digest(self.rendered.training):
            return "running"
        config_map = self.cluster.get("ConfigMap", name_of(self.rendered.config_map))
        diff = describe_diff((config_map, existing), (self.rendered.config_map, self.rendered.training))
        raise SettingError(
            f"{kubectl_name(existing)} in namespace {self.cluster.namespace} is not finished and has different "
            f"settings: {diff}. A running Job can't be changed. Wait until it is finished, or stop it with: "
            f"topwork cancel {name_of(existing)} -n {self.cluster.namespace}; if you submit it again, it resumes from "
            "its checkpoint."
        )

    def _prefetch_jobs(self) -> list[KubernetesObject]:
        """Return the prefetch Job, unless one exists and has not failed: with any settings, it pulls the same data."""
        prefetch = self.rendered.prefetch
        existing = self._get_settled_job(prefetch) if prefetch else None
        if prefetch is None or (existing is not None and not find_condition(existing, "Failed")):
            return []
        if existing is not None:
            self._delete_job(existing)
        return [prefetch]

    def _delete_job(self, job: KubernetesObject) -> None:
        """Delete a Job with its pods and wait until they are gone."""
        name, uid = name_of(job), job["metadata"]["uid"]
        self.cluster.delete("Job", name, uid=uid, propagation="Foreground")

        def is_gone() -> bool:
            current = self.cluster.get("Job", name)
            return current is None or current["metadata"]["uid"] != uid

        self._wait(is_gone, f"{kubectl_name(job)} has not been deleted")

    def _delete_stale_objects(self) -> None:
        """Delete the ConfigMap, and the Service and NetworkPolicy of several nodes, if their Job is gone.

        An object that kubectl applied can't be changed because of its field manager, and one without living owners
        will be garbage-collected at any time.
        """
        for desired in (self.rendered.config_map, *self.rendered.network):
            existing = self._require_managed(self.cluster.get(desired["kind"], name_of(desired)))
            if existing is None:
                continue
            owners = owner_uids(existing)
            has_owner = not owners or owners & {job["metadata"]["uid"] for job in self._list("Job")}
            if existing.get("data") != desired.get("data") or not has_owner:
                self.cluster.delete(desired["kind"], name_of(existing), uid=existing["metadata"]["uid"])

    def _wait_for_pods(self) -> None:
        """Wait for terminating pods of a deleted Job: two pods must never train the same run."""

        def terminating() -> list[KubernetesObject]:
            return [pod for pod in self._list("Pod") if is_being_deleted(pod) and is_pod_unfinished(pod)]

        if pods := terminating():
            name = kubectl_name(pods[0])
            self.report(f"{name} is still writing its checkpoint: waiting")
            self._wait(lambda: not terminating(), f"{name} has not terminated")

    def _wait(self, is_done: Callable[[], bool], problem: str) -> None:
        grace = self.rendered.training["spec"]["template"]["spec"].get("terminationGracePeriodSeconds") or 30
        timeout, pause = grace + self.timeout_seconds, MIN_PAUSE_SECONDS
        deadline = time.monotonic() + timeout
        while not is_done():
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{problem} after {timeout:.0f} s. Is its node down? See kubectl get pods -o wide "
                    f"-n {self.cluster.namespace}, and submit again."
                )
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)


def is_managed_by_topwork(obj: KubernetesObject) -> bool:
    """Return whether topwork rendered an object."""
    return get_label(obj, PART_OF_LABEL) == APP_NAME


def _get_digest(job: KubernetesObject) -> str | None:
    """Return the digest of the rendered Job and spec, from its annotation."""
    value = (job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION)
    return str(value) if value else None


def _is_ending(job: KubernetesObject) -> bool:
    is_failing = find_condition(job, "FailureTarget") is not None and not is_job_finished(job)
    return is_being_deleted(job) or is_failing
