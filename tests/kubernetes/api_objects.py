"""The objects of the API server that tests use: their kinds, their versions, and what happened when."""

import copy
import json
import threading
import uuid
from dataclasses import dataclass
from typing import NamedTuple

from api_apply import Object, Path, applied, leaves, timestamp
from api_statuses import Refused, invalid, no_namespace


@dataclass(frozen=True)
class Kind:
    """A kind of object: where it lies in the API."""

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
        """Plural with its group, as messages name it: jobs.batch."""
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


class Happened(NamedTuple):
    """One change, as a watch tells it; `before` is the object before it."""

    version: int
    type: str
    kind: str
    object: Object
    before: Object | None


class Objects:
    """All objects and their history. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 1000
        self.oldest = 0
        self.history: list[Happened] = []
        self._objects: dict[Key, Object] = {}
        self._owned: dict[Key, dict[str, set[Path]]] = {}

    def get(self, key: Key) -> Object | None:
        with self.changed:
            return copy.deepcopy(self._objects.get(key))

    def all(self, kind: str, namespace: str = "") -> list[Object]:
        """Objects of a kind by namespace and name, of all namespaces where none is given."""
        with self.changed:
            found = [key for key in sorted(self._objects) if key.kind == kind and namespace in {"", key.namespace}]
            return [copy.deepcopy(self._objects[key]) for key in found]

    def store(self, key: Key, new: Object) -> Object:
        """Keep an object and tell the watchers; nothing happens where nothing differs."""
        with self.changed:
            old = self._objects.get(key)
            new = self._with_metadata(key, new, old)
            if old is not None and _without_version(old) == _without_version(new):
                return copy.deepcopy(old)
            self._happened("MODIFIED" if old else "ADDED", key, new, old)
            self._objects[key] = new
            return copy.deepcopy(new)

    def remove(self, key: Key) -> Object | None:
        with self.changed:
            old = self._objects.pop(key, None)
            self._owned.pop(key, None)
            if old is not None:
                gone = copy.deepcopy(old)
                self._happened("DELETED", key, gone, old)
            return old

    def apply(self, key: Key, manifest: Object, manager: str, *, force: bool = False, dry_run: bool = False) -> Object:
        """Server-side apply: create or merge, with the fields that each manager owns."""
        with self.changed:
            self._require_namespace(key)
            old = self._objects.get(key)
            new, owned = applied(old, manifest, self._owned.get(key, {}), manager, force=force)
            self._validate(key, new, old)
            if dry_run:
                return self._with_metadata(key, new, old)
            stored = self.store(key, new)
            self._owned[key] = owned
            return stored

    def own(self, key: Key, manager: str, manifest: Object) -> None:
        """Say that a manager owns all fields of a manifest, as after `kubectl apply`."""
        with self.changed:
            self._owned.setdefault(key, {})[manager] = set(leaves(manifest))

    def compact(self) -> None:
        """Forget the history: a watch from an older version is answered 410."""
        with self.changed:
            self.oldest = self.version
            self.changed.notify_all()

    def since(self, version: int) -> list[Happened]:
        with self.changed:
            return [each for each in self.history if each.version > version]

    def _happened(self, type_: str, key: Key, new: Object, old: Object | None) -> None:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self.history.append(Happened(self.version, type_, key.kind, copy.deepcopy(new), copy.deepcopy(old)))
        self.changed.notify_all()

    def _require_namespace(self, key: Key) -> None:
        if key.namespace and Key("Namespace", "", key.namespace) not in self._objects:
            raise Refused(no_namespace(key.namespace))

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
            _complete_job(new)
        return new

    @staticmethod
    def _validate(key: Key, new: Object, old: Object | None) -> None:
        if key.kind != "Job" or old is None:
            return
        for field in ("template", "completions", "selector"):
            before, after = old["spec"].get(field), new["spec"].get(field)
            if before != after:
                why = f"Invalid value: {json.dumps(after)}: field is immutable"
                raise Refused(invalid("Job", key.name, f"spec.{field}", why, group="batch"))


def _without_version(found: Object) -> Object:
    metadata = {
        key: value for key, value in found["metadata"].items() if key not in {"resourceVersion", "managedFields"}
    }
    return found | {"metadata": metadata}


def _complete_job(job: Object) -> None:
    """Fill in what the API server adds to every Job."""
    uid = job["metadata"]["uid"]
    ours = {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": job["metadata"]["name"],
        "controller-uid": uid,
        "job-name": job["metadata"]["name"],
    }
    spec = job.setdefault("spec", {})
    for name, value in {"completionMode": "NonIndexed", "suspend": False, "manualSelector": False}.items():
        spec.setdefault(name, value)
    spec.setdefault("selector", {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}})
    spec.setdefault("template", {}).setdefault("metadata", {}).setdefault("labels", {}).update(ours)
    job.setdefault("status", {})
