"""Objects stored by the API server used in tests: kinds, resource versions and history."""

import copy
import json
import threading
import uuid
from dataclasses import dataclass
from typing import NamedTuple

from api_apply import Object, Path, leaves, merge_applied, timestamp
from api_statuses import ApiError, invalid, namespace_not_found


@dataclass(frozen=True)
class Kind:
    """A kind of object and its place in the API."""

    name: str
    plural: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full(self) -> str:
        """Plural and group, as in error messages: jobs.batch."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Job", "jobs", "batch"),
        Kind("ConfigMap", "configmaps"),
        Kind("Pod", "pods"),
        Kind("Event", "events"),
        Kind("ResourceQuota", "resourcequotas"),
        Kind("Secret", "secrets"),
        Kind("ServiceAccount", "serviceaccounts"),
        Kind("Namespace", "namespaces", namespaced=False),
        Kind("Node", "nodes", namespaced=False),
    )
}


class Key(NamedTuple):
    kind: str
    namespace: str
    name: str


class ObjectChange(NamedTuple):
    """A change in the history; `before` is the previous state of the object, None if it was created."""

    version: int
    type: str
    kind: str
    object: Object
    before: Object | None


class Objects:
    """All objects and their history. Thread-safe; `changed` is notified of every change."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 1000
        self.oldest = 0
        self.history: list[ObjectChange] = []
        self._objects: dict[Key, Object] = {}
        self._owned: dict[Key, dict[str, set[Path]]] = {}

    def get(self, key: Key) -> Object | None:
        with self.changed:
            return copy.deepcopy(self._objects.get(key))

    def list_objects(self, kind: str, namespace: str = "") -> list[Object]:
        """Return the objects of a kind in a namespace (default: in all), sorted by namespace and name."""
        with self.changed:
            keys = [key for key in sorted(self._objects) if key.kind == kind and namespace in {"", key.namespace}]
            return [copy.deepcopy(self._objects[key]) for key in keys]

    def store(self, key: Key, new: Object) -> Object:
        """Store an object and notify watches; an unchanged object keeps its resourceVersion."""
        with self.changed:
            old = self._objects.get(key)
            new = self._with_metadata(key, new, old)
            if old is not None and _without_version(old) == _without_version(new):
                return copy.deepcopy(old)
            self._record("MODIFIED" if old else "ADDED", key, new, old)
            self._objects[key] = new
            return copy.deepcopy(new)

    def remove(self, key: Key) -> Object | None:
        with self.changed:
            old = self._objects.pop(key, None)
            self._owned.pop(key, None)
            if old is not None:
                deleted = copy.deepcopy(old)
                self._record("DELETED", key, deleted, old)
            return old

    def apply(self, key: Key, body: Object, manager: str, *, force: bool = False, dry_run: bool = False) -> Object:
        """Create or merge an object with server-side apply."""
        with self.changed:
            self._require_namespace(key)
            old = self._objects.get(key)
            new, owned = merge_applied(old, body, self._owned.get(key, {}), manager, force=force)
            self._validate(key, new, old)
            if dry_run:
                return self._with_metadata(key, new, old)
            stored = self.store(key, new)
            self._owned[key] = owned
            return stored

    def set_owner(self, key: Key, manager: str, obj: Object) -> None:
        """Make a field manager own all fields of an object, as after `kubectl apply`."""
        with self.changed:
            self._owned.setdefault(key, {})[manager] = set(leaves(obj))

    def compact(self) -> None:
        """Discard the history: a watch from an older version fails with 410."""
        with self.changed:
            self.oldest = self.version
            self.changed.notify_all()

    def changes_since(self, version: int) -> list[ObjectChange]:
        with self.changed:
            return [change for change in self.history if change.version > version]

    def _record(self, type_: str, key: Key, new: Object, old: Object | None) -> None:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self.history.append(ObjectChange(self.version, type_, key.kind, copy.deepcopy(new), copy.deepcopy(old)))
        self.changed.notify_all()

    def _require_namespace(self, key: Key) -> None:
        if key.namespace and Key("Namespace", "", key.namespace) not in self._objects:
            raise ApiError(namespace_not_found(key.namespace))

    @staticmethod
    def _with_metadata(key: Key, new: Object, old: Object | None) -> Object:
        new = copy.deepcopy(new)
        metadata = new.setdefault("metadata", {})
        metadata["name"] = key.name
        if key.namespace:
            metadata["namespace"] = key.namespace
        before = (old or {}).get("metadata", {})
        metadata.setdefault("uid", before.get("uid") or str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", before.get("creationTimestamp") or timestamp())
        if old:
            metadata["resourceVersion"] = before["resourceVersion"]
        if key.kind == "Job":
            _set_job_defaults(new)
        return new

    @staticmethod
    def _validate(key: Key, new: Object, old: Object | None) -> None:
        if key.kind != "Job" or old is None:
            return
        for field in ("template", "completions", "selector"):
            before, after = old["spec"].get(field), new["spec"].get(field)
            if before != after:
                reason = f"Invalid value: {json.dumps(after)}: field is immutable"
                raise ApiError(invalid("Job", key.name, f"spec.{field}", reason, group="batch"))


def _without_version(obj: Object) -> Object:
    metadata = {key: value for key, value in obj["metadata"].items() if key not in {"resourceVersion", "managedFields"}}
    return obj | {"metadata": metadata}


def _set_job_defaults(job: Object) -> None:
    """Set the fields that the API server adds to every Job."""
    uid = job["metadata"]["uid"]
    labels = {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
        "controller-uid": uid,
        "job-name": job["metadata"]["name"],
    }
    spec = job.setdefault("spec", {})
    for name, value in {"completionMode": "NonIndexed", "suspend": False, "manualSelector": False}.items():
        spec.setdefault(name, value)
    spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})
    spec.setdefault("template", {}).setdefault("metadata", {}).setdefault("labels", {}).update(labels)
    job.setdefault("status", {})
