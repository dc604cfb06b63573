"""What Kubernetes says of a Job, a pod or an event, taken out of its object."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import ROLE_LABEL, STAGES, StageName


@dataclass(frozen=True)
class RunObjects:
    """What the cluster holds of a run.

    Attributes:
        jobs: Its Jobs.
        pods: Their pods, those as well that are gone and were seen before.
        events: Events about them, as far as they are known.
        deleted: UIDs of the Jobs and pods that are gone.
    """

    jobs: Sequence[KubernetesObject]
    pods: Sequence[KubernetesObject] = ()
    events: Sequence[KubernetesObject] = ()
    deleted: Collection[str] = field(default_factory=frozenset)

    def job(self, role: str) -> KubernetesObject | None:
        """Give the Job of a role, `training` or `prefetch`."""
        return next((job for job in self.jobs if label(job, ROLE_LABEL) == role), None)


class ContainerFacts(NamedTuple):
    """A stage's container: what was asked for, and what Kubernetes tells of it (empty before the pod is on a node)."""

    stage: StageName
    spec: KubernetesObject
    status: KubernetesObject


def name_of(thing: KubernetesObject) -> str:
    """Name of an object."""
    return str(thing["metadata"]["name"])


def label(thing: KubernetesObject, key: str) -> str | None:
    """Value of a label."""
    value = (thing["metadata"].get("labels") or {}).get(key)
    return None if value is None else str(value)


def moment(text: str | None) -> datetime | None:
    """Read a time as Kubernetes writes it."""
    return datetime.fromisoformat(text) if text else None


def created(thing: KubernetesObject) -> datetime | None:
    """When an object was created."""
    return moment(thing["metadata"].get("creationTimestamp"))


def is_being_deleted(thing: KubernetesObject) -> bool:
    """Whether an object is on its way out."""
    return bool(thing["metadata"].get("deletionTimestamp"))


def condition(thing: KubernetesObject, kind: str, status: str = "True") -> KubernetesObject | None:
    """Find the condition of a kind that has a status; a condition that was taken back is none."""
    for found in (thing.get("status") or {}).get("conditions") or ():
        if found.get("type") == kind and found.get("status") == status:
            return dict(found)
    return None


def containers(pod: KubernetesObject) -> tuple[ContainerFacts, ...]:
    """Give the containers of the stages of a pod, in the order in which they run."""
    return tuple(sorted(_containers(pod), key=lambda found: STAGES.index(found.stage)))


def _containers(pod: KubernetesObject) -> Iterator[ContainerFacts]:
    status = pod.get("status") or {}
    for specs, statuses in (("initContainers", "initContainerStatuses"), ("containers", "containerStatuses")):
        told = {found["name"]: found for found in status.get(statuses) or ()}
        for spec in pod["spec"].get(specs) or ():
            # A mesh or a policy engine may have put containers of its own beside ours.
            if spec["name"] in STAGES:
                yield ContainerFacts(spec["name"], spec, told.get(spec["name"]) or {})


def has_begun(pod: KubernetesObject) -> bool:
    """Whether a container of a pod was started; its phase stays Pending until the last init container has ended."""
    return any(set(found.status.get("state") or {}) & {"running", "terminated"} for found in containers(pod))


def requested(pod: KubernetesObject, resource: str) -> str | None:
    """How much of a resource the pod asks for: the most that one of its containers does."""
    amounts = [
        str(found.spec["resources"]["requests"][resource])
        for found in containers(pod)
        if resource in ((found.spec.get("resources") or {}).get("requests") or {})
    ]
    return max(amounts, key=lambda amount: (len(amount), amount), default=None)


def of_job(pods: Iterable[KubernetesObject], job: KubernetesObject) -> list[KubernetesObject]:
    """Give the pods of a Job, the oldest first."""
    uid = job["metadata"].get("uid")
    found = [
        pod for pod in pods if any(owner.get("uid") == uid for owner in pod["metadata"].get("ownerReferences", ()))
    ]
    return sorted(found, key=lambda pod: (str(pod["metadata"].get("creationTimestamp")), name_of(pod)))


def event_time(event: KubernetesObject) -> datetime | None:
    """When an event happened last; each kind of sender writes it elsewhere."""
    series = event.get("series") or {}
    for text in (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime")):
        if text:
            return moment(text)
    return moment(event.get("firstTimestamp")) or created(event)


def last_event(events: Iterable[KubernetesObject], thing: KubernetesObject, *reasons: str) -> KubernetesObject | None:
    """Find the newest event about an object that has one of some reasons."""
    about = [
        event
        for event in events
        if event.get("reason") in reasons
        and (event.get("involvedObject") or {}).get("uid") == thing["metadata"].get("uid")
    ]
    return max(about, key=lambda event: str(event_time(event) or ""), default=None)


def one_line(text: str) -> str:
    """Bring a message of Kubernetes into one line."""
    return " ".join(text.split()).rstrip(" .")
