"""What the controller sees of a TransferJob: the object, its Jobs and pods, and its last status."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import CANCEL_ANNOTATION, ROLE_LABEL, RUN_LABEL
from topwork.cluster.status.objects import (
    get_annotation,
    get_controller,
    get_label,
    is_being_deleted,
    is_pod_unfinished,
    name_of,
    owner_uids,
)
from topwork.cluster.status.transfer_job_run import read_transfer_job_status
from topwork.cluster.transfer_job_status import TransferJobStatus

RETRIED_REASONS = {"InvalidDefaults", "NameConflict"}
"""Reasons of the condition Accepted that can end without a change of the spec."""


@dataclass(frozen=True)
class Observation:
    """A TransferJob and its dependents at one time.

    Attributes:
        transfer_job: The TransferJob.
        jobs: Jobs with its name in their labels, including those of others.
        pods: Pods with its name in their labels.
        ended_pods: Last states of such pods that were deleted.
        now: Current time, in whole seconds.
        events: Events that explain why Jobs and pods are pending; None if they were not read.
    """

    transfer_job: KubernetesObject
    jobs: Sequence[KubernetesObject]
    pods: Sequence[KubernetesObject]
    ended_pods: Sequence[KubernetesObject]
    now: datetime
    events: Sequence[KubernetesObject] | None = None

    @cached_property
    def previous(self) -> TransferJobStatus:
        """The status as last written; an empty one if there is none.

        Raises:
            SettingError: If a newer version of topwork wrote it: a run that it finished must not start again.
        """
        return read_transfer_job_status(self.transfer_job)

    @property
    def namespace(self) -> str:
        """Namespace of the TransferJob."""
        return str(self.transfer_job["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        """UID of the TransferJob."""
        return str(self.transfer_job["metadata"]["uid"])

    @property
    def generation(self) -> int:
        """Generation of the spec."""
        return int(self.transfer_job["metadata"]["generation"])

    @property
    def is_suspended(self) -> bool:
        """Whether the spec asks to stop; it counts even if the rest of the spec is invalid."""
        return (self.transfer_job.get("spec") or {}).get("suspend") is True

    @property
    def sets_image(self) -> bool:
        """Whether the spec sets the image."""
        return bool(((self.transfer_job.get("spec") or {}).get("compute") or {}).get("image"))

    @property
    def canceled_run(self) -> str | None:
        """Name of the run to cancel."""
        return get_annotation(self.transfer_job, CANCEL_ANNOTATION)

    @property
    def is_settled(self) -> bool:
        """Whether the last status describes this spec, so that the spec need not be validated again."""
        previous, accepted = self.previous, self.previous.condition("Accepted")
        if previous.observed_generation != self.generation or accepted is None:
            return False
        if accepted.status == "True":
            return previous.run is not None
        return accepted.reason not in RETRIED_REASONS and previous.state != "Pending"

    def owns(self, obj: KubernetesObject) -> bool:
        """Return whether the TransferJob is the controller of an object."""
        owner = get_controller(obj)
        return owner is not None and owner["uid"] == self.uid

    def is_of_earlier_transfer_job(self, obj: KubernetesObject) -> bool:
        """Return whether an object belongs to a deleted TransferJob with the same name."""
        owner = get_controller(obj)
        if owner is None or self.owns(obj):
            return False
        return (owner["kind"], owner["name"]) == ("TransferJob", name_of(self.transfer_job))

    def own_job(self, name: str | None) -> KubernetesObject | None:
        """Return the Job with this name if it belongs to the TransferJob."""
        return next((job for job in self.jobs if name_of(job) == name and self.owns(job)), None)

    def prefetch_job(self, run: str) -> KubernetesObject | None:
        """Return the Job that only pulls the dataset of a run, even if `submit` created it."""
        jobs = (job for job in self.jobs if name_of(job) == f"{run}-pull")
        return next((job for job in jobs if not self.is_of_earlier_transfer_job(job)), None)

    def stale_jobs(self, run: str | None) -> list[KubernetesObject]:
        """Return the Jobs of other runs, and of deleted TransferJobs with the same name."""
        return [
            job
            for job in self.jobs
            if self.is_of_earlier_transfer_job(job) or (self.owns(job) and get_label(job, RUN_LABEL) != run)
        ]

    @cached_property
    def own_training_pods(self) -> list[KubernetesObject]:
        """The pods that train for the TransferJob's present and last Jobs, deleted ones included, oldest first."""
        uids = {job["metadata"]["uid"] for job in self.jobs if self.owns(job)} | {self.previous.job_uid}
        existing = {pod["metadata"]["uid"] for pod in self.pods}
        ended = [pod for pod in self.ended_pods if pod["metadata"]["uid"] not in existing]
        pods = [pod for pod in (*self.pods, *ended) if _trains(pod) and owner_uids(pod) & uids]
        return sorted(pods, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), name_of(pod)))

    def blocking_pods(self, run: str | None) -> list[KubernetesObject]:
        """Return the pods that must end before a pod of the run may start."""
        job = self.own_job(run)
        ending = [*self.stale_jobs(run), *([job] if job and is_being_deleted(job) else [])]
        others = {item["metadata"]["uid"] for item in self.jobs} - {item["metadata"]["uid"] for item in ending}
        if job is None:
            # A Job of `submit` that is not adopted must not run next to another one of the same run.
            others -= {item["metadata"]["uid"] for item in self.jobs if name_of(item) == run}
        return [pod for pod in self.pods if _trains(pod) and is_pod_unfinished(pod) and not owner_uids(pod) & others]


def _trains(pod: KubernetesObject) -> bool:
    return get_label(pod, ROLE_LABEL) == "training"
