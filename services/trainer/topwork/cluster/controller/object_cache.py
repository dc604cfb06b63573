"""The TransferJobs, Jobs and pods that the controller watches, and which TransferJob a Job or pod belongs to."""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_LABEL
from topwork.cluster.status.objects import get_label, is_pod_unfinished, name_of, node_index
from topwork.cluster.transfer_job_status import MAX_ATTEMPTS


class Key(NamedTuple):
    """Namespace and name of a TransferJob."""

    namespace: str
    name: str


class CachedObjects(NamedTuple):
    """A TransferJob with the Jobs and pods that carry its name in their label `topwork.dev/job`.

    Attributes:
        transfer_job: The TransferJob.
        jobs: The Jobs.
        pods: The pods.
        ended_pods: The last states of pods that ended and were deleted since the last call of `forget_ended_pods`.
    """

    transfer_job: KubernetesObject
    jobs: list[KubernetesObject]
    pods: list[KubernetesObject]
    ended_pods: list[KubernetesObject]


class ObjectCache:
    """The latest known objects; thread-safe. Objects are shared with callers, who must not change them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfer_jobs: dict[Key, KubernetesObject] = {}
        # Jobs and pods by UID, because an object can be created again while the events of the old one still arrive.
        self._dependents: dict[Key, dict[str, KubernetesObject]] = {}
        self._ended_pods: dict[Key, dict[str, KubernetesObject]] = {}

    def update(self, event_type: str, obj: KubernetesObject) -> Key | None:
        """Record a change.

        Args:
            event_type: ADDED, MODIFIED or DELETED.
            obj: The TransferJob, Job or pod after the change.

        Returns:
            The TransferJob concerned; None if the object belongs to none.
        """
        key = _key_of(obj)
        if key is None:
            return None
        slim = _without_managed_fields(obj)
        with self._lock:
            if obj["kind"] == "TransferJob":
                self._update_transfer_job(key, event_type, slim)
            else:
                self._update_dependent(key, event_type, slim)
        return key

    def store_written(self, obj: KubernetesObject) -> None:
        """Record a TransferJob as returned by a write, unless it was deleted or a newer state is known."""
        key = Key(str(obj["metadata"]["namespace"]), name_of(obj))
        with self._lock:
            current = self._transfer_jobs.get(key)
            if current is not None and current["metadata"]["uid"] == obj["metadata"]["uid"]:
                self._update_transfer_job(key, "MODIFIED", _without_managed_fields(obj))

    def transfer_jobs(self) -> list[KubernetesObject]:
        """Return all TransferJobs."""
        with self._lock:
            return list(self._transfer_jobs.values())

    def get(self, key: Key) -> CachedObjects | None:
        """Return a TransferJob with its Jobs and pods; None if it does not exist."""
        with self._lock:
            transfer_job = self._transfer_jobs.get(key)
            dependents = list(self._dependents.get(key, {}).values())
            ended_pods = list(self._ended_pods.get(key, {}).values())
        if transfer_job is None:
            return None
        return CachedObjects(transfer_job, _of_kind(dependents, "Job"), _of_kind(dependents, "Pod"), ended_pods)

    def forget_ended_pods(self, key: Key, uids: Iterable[str]) -> None:
        """Drop the last states of deleted pods, once they are in the status of their TransferJob."""
        with self._lock:
            ended_pods = self._ended_pods.get(key, {})
            for uid in uids:
                ended_pods.pop(uid, None)
            if not ended_pods:
                self._ended_pods.pop(key, None)

    def _update_transfer_job(self, key: Key, event_type: str, obj: KubernetesObject) -> None:
        current = self._transfer_jobs.get(key)
        is_same = current is not None and current["metadata"]["uid"] == obj["metadata"]["uid"]
        if event_type == "DELETED":
            if is_same:
                del self._transfer_jobs[key]
                self._ended_pods.pop(key, None)
        # The controller's own write may be recorded before the watch delivers earlier changes.
        elif current is None or not is_same or _version(obj) >= _version(current):
            self._transfer_jobs[key] = obj

    def _update_dependent(self, key: Key, event_type: str, obj: KubernetesObject) -> None:
        dependents = self._dependents.setdefault(key, {})
        if event_type == "DELETED":
            dependents.pop(obj["metadata"]["uid"], None)
            if key in self._transfer_jobs and not is_pod_unfinished(obj):
                self._keep_ended_pod(key, obj)
        else:
            dependents[obj["metadata"]["uid"]] = obj
        if not dependents:
            del self._dependents[key]

    def _keep_ended_pod(self, key: Key, pod: KubernetesObject) -> None:
        ended_pods = self._ended_pods.setdefault(key, {})
        ended_pods[pod["metadata"]["uid"]] = pod
        nodes = 1 + max(map(node_index, ended_pods.values()))
        while len(ended_pods) > max(MAX_ATTEMPTS, 2 * nodes):
            del ended_pods[next(iter(ended_pods))]


def _key_of(obj: KubernetesObject) -> Key | None:
    name = name_of(obj) if obj["kind"] == "TransferJob" else get_label(obj, JOB_LABEL)
    return Key(str(obj["metadata"]["namespace"]), name) if name else None


def _of_kind(objects: Iterable[KubernetesObject], kind: str) -> list[KubernetesObject]:
    return [obj for obj in objects if obj["kind"] == kind]


def _version(obj: KubernetesObject) -> int:
    """Return the resourceVersion, which Kubernetes 1.35 documents as comparable; etcd has always counted it up."""
    return int(obj["metadata"]["resourceVersion"])


def _without_managed_fields(obj: KubernetesObject) -> KubernetesObject:
    """Drop the managed fields, which are about half of an object's size."""
    metadata = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    return obj | {"metadata": metadata}
