"""Accessors for Kubernetes objects: labels, conditions, containers, times and events."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import ROLE_LABEL, STAGES, StageName

COMPLETION_INDEX_KEY = "batch.kubernetes.io/job-completion-index"
"""Annotation of the pods of an Indexed Job: the index of their node."""
QUANTITY = re.compile(r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?P<unit>[numkMGTPE]|[KMGTPE]i)?")
QUANTITY_UNITS = {
    unit: Fraction(10) ** exponent
    for unit, exponent in zip("numkMGTPE", (-9, -6, -3, 3, 6, 9, 12, 15, 18), strict=True)
}
QUANTITY_UNITS |= {f"{prefix}i": Fraction(1024) ** exponent for exponent, prefix in enumerate("KMGTPE", 1)}


@dataclass(frozen=True)
class RunObjects:
    """The Kubernetes objects of a run.

    Attributes:
        jobs: Its Jobs.
        pods: Their pods, including pods that were seen before and are deleted.
        events: Known events about these objects.
        deleted: UIDs of the Jobs and pods that are deleted.
    """

    jobs: Sequence[KubernetesObject]
    pods: Sequence[KubernetesObject] = ()
    events: Sequence[KubernetesObject] = ()
    deleted: Collection[str] = field(default_factory=frozenset)

    def job(self, role: str) -> KubernetesObject | None:
        """Return the Job with a role, `training` or `prefetch`."""
        return next((job for job in self.jobs if get_label(job, ROLE_LABEL) == role), None)


class StageContainer(NamedTuple):
    """The container of a stage: its spec, and its status (empty before the pod is scheduled)."""

    stage: StageName
    spec: KubernetesObject
    status: KubernetesObject

    @property
    def has_started(self) -> bool:
        """Whether the container is running or has terminated."""
        return bool((self.status.get("state") or {}).keys() & {"running", "terminated"})


def name_of(obj: KubernetesObject) -> str:
    """Return the name of an object."""
    return str(obj["metadata"]["name"])


def kubectl_name(obj: KubernetesObject) -> str:
    """Return kind and name of an object as kubectl prints them, such as `job.batch/cats-1a2b3c4d`."""
    kind = str(obj.get("kind", "Job")).lower()
    return f"{'job.batch' if kind == 'job' else kind}/{name_of(obj)}"


def get_label(obj: KubernetesObject, key: str) -> str | None:
    """Return the value of a label."""
    value = (obj["metadata"].get("labels") or {}).get(key)
    return None if value is None else str(value)


def get_annotation(obj: KubernetesObject, key: str) -> str | None:
    """Return the value of an annotation."""
    value = (obj["metadata"].get("annotations") or {}).get(key)
    return None if value is None else str(value)


def parse_time(text: str | None) -> datetime | None:
    """Parse a Kubernetes timestamp."""
    return datetime.fromisoformat(text) if text else None


def creation_time(obj: KubernetesObject) -> datetime | None:
    """Return when an object was created."""
    return parse_time(obj["metadata"].get("creationTimestamp"))


def is_being_deleted(obj: KubernetesObject) -> bool:
    """Return whether an object has a deletion timestamp."""
    return bool(obj["metadata"].get("deletionTimestamp"))


def find_condition(obj: KubernetesObject, kind: str, status: str = "True") -> KubernetesObject | None:
    """Return the condition of a type if it has the given status."""
    for condition in (obj.get("status") or {}).get("conditions") or ():
        if condition.get("type") == kind and condition.get("status") == status:
            return dict(condition)
    return None


def node_count(job: KubernetesObject) -> int:
    """Return the number of nodes of a Job: that of its indexes if it is an Indexed Job, otherwise 1."""
    return int(job["spec"].get("completions") or 1) if job["spec"].get("completionMode") == "Indexed" else 1


def node_index(pod: KubernetesObject) -> int:
    """Return the index of the node that a pod is; 0 on a single node."""
    index = get_annotation(pod, COMPLETION_INDEX_KEY) or ""
    return int(index) if index.isdecimal() else 0


def is_job_finished(job: KubernetesObject) -> bool:
    """Return whether a Job is complete or failed."""
    return bool(find_condition(job, "Complete") or find_condition(job, "Failed"))


def stage_containers(pod: KubernetesObject) -> tuple[StageContainer, ...]:
    """Return the containers of the stages of a pod, in the order in which they run."""
    return tuple(sorted(_stage_containers(pod), key=lambda container: STAGES.index(container.stage)))


def _stage_containers(pod: KubernetesObject) -> Iterator[StageContainer]:
    status = pod.get("status") or {}
    for specs, statuses in (("initContainers", "initContainerStatuses"), ("containers", "containerStatuses")):
        status_by_name = {entry["name"]: entry for entry in status.get(statuses) or ()}
        for spec in pod["spec"].get(specs) or ():
            # A service mesh or a policy engine may have injected containers.
            if spec["name"] in STAGES:
                yield StageContainer(spec["name"], spec, status_by_name.get(spec["name"]) or {})


def has_started(pod: KubernetesObject) -> bool:
    """Return whether a container of a pod has started; a pod stays Pending until all init containers complete."""
    return any(container.has_started for container in stage_containers(pod))


def requested_amount(pod: KubernetesObject, resource: str) -> str | None:
    """Return how much of a resource a pod requests: the largest request of its containers."""
    amounts = [
        str(container.spec["resources"]["requests"][resource])
        for container in stage_containers(pod)
        if resource in ((container.spec.get("resources") or {}).get("requests") or {})
    ]
    return max(amounts, key=parse_quantity, default=None)


def parse_quantity(text: str) -> Fraction:
    """Parse any Kubernetes quantity: a number with an optional unit (`500m`, `32Gi`) or exponent (`1e9`).

    Args:
        text: The quantity. The API server may change the unit: `0.5` is stored as `500m`, `1.5Gi` as `1536Mi`.

    Returns:
        Its exact value; 0 if it is not a quantity.
    """
    match = QUANTITY.fullmatch(text)
    if not match:
        return Fraction(0)
    return Fraction(match["number"]) * (QUANTITY_UNITS[match["unit"]] if match["unit"] else 1)


def pods_of_job(pods: Iterable[KubernetesObject], job: KubernetesObject) -> list[KubernetesObject]:
    """Return the pods that a Job owns, oldest first."""
    uid = job["metadata"].get("uid")
    owned = [pod for pod in pods if uid in owner_uids(pod)]
    return sorted(owned, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), name_of(pod)))


def owner_uids(obj: KubernetesObject) -> set[str | None]:
    """Return the UIDs of the owners of an object."""
    return {owner.get("uid") for owner in obj["metadata"].get("ownerReferences") or ()}


def is_pod_unfinished(pod: KubernetesObject) -> bool:
    """Return whether containers of a pod run or may run."""
    return (pod.get("status") or {}).get("phase") not in {"Succeeded", "Failed"}


def get_controller(obj: KubernetesObject) -> KubernetesObject | None:
    """Return the owner reference of the object whose controller manages an object; None if there is none."""
    owners = obj["metadata"].get("ownerReferences") or ()
    return next((dict(owner) for owner in owners if owner.get("controller")), None)


def event_time(event: KubernetesObject) -> datetime | None:
    """Return when an event was last observed; the field differs between event sources."""
    series = event.get("series") or {}
    for text in (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")):
        if text:
            return parse_time(text)
    return parse_time(event.get("firstTimestamp")) or creation_time(event)


def newest_event(events: Iterable[KubernetesObject]) -> KubernetesObject | None:
    """Return the event that was observed last."""
    return max(events, key=lambda event: str(event_time(event) or ""), default=None)


def find_last_event(
    events: Iterable[KubernetesObject], obj: KubernetesObject, *reasons: str
) -> KubernetesObject | None:
    """Return the newest event about an object that has one of the given reasons."""
    uid = obj["metadata"].get("uid")
    return newest_event(
        event
        for event in events
        if event.get("reason") in reasons and (event.get("involvedObject") or {}).get("uid") == uid
    )


def one_line(text: str) -> str:
    """Join a Kubernetes message into one line, without the final period."""
    return " ".join(text.split()).rstrip(" .")
