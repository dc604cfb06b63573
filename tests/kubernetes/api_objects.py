"""Objects stored by the API server used in tests: metadata, resource versions and history."""

import copy
import threading
import uuid
from collections import ChainMap
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from typing import NamedTuple

from api_apply import Owned, timestamp
from api_definitions import set_definition_status
from api_kinds import KINDS, Key, Kind, Object, kind_of_definition


class ObjectChange(NamedTuple):
    """A change in the history; `before` is the previous state of the object, None if it was created."""

    version: int
    type: str
    kind: str
    object: Object
    before: Object | None


class Objects:
    """All objects and their history. Thread-safe; `changed` is notified of every change.

    Attributes:
        kinds: Kinds by name; those of CustomResourceDefinitions come and go.
        owned: Fields of each object by the manager that owns them.
        now: Returns the time at which objects are created and deleted; simulated controllers set it to their clock.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 1000
        self.oldest = 0
        self.history: list[ObjectChange] = []
        self.kinds: MutableMapping[str, Kind] = ChainMap({}, KINDS)
        self.owned: dict[Key, Owned] = {}
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self._objects: dict[Key, Object] = {}

    def get(self, key: Key) -> Object | None:
        with self.changed:
            return copy.deepcopy(self._objects.get(key))

    def list_objects(self, kind: str, namespace: str = "") -> list[Object]:
        """Return the objects of a kind in a namespace (default: in all), sorted by namespace and name."""
        with self.changed:
            keys = [key for key in sorted(self._objects) if key.kind == kind and namespace in {"", key.namespace}]
            return [copy.deepcopy(self._objects[key]) for key in keys]

    def list_all(self) -> list[Object]:
        """Return all objects, unsorted and not copied."""
        with self.changed:
            return [*self._objects.values()]

    def store(self, key: Key, new: Object) -> Object:
        """Store an object and notify watches; an unchanged object keeps its resourceVersion."""
        with self.changed:
            old = self._objects.get(key)
            new = self.with_metadata(key, new, old)
            if old is not None and old == new:
                return copy.deepcopy(old)
            self._record("MODIFIED" if old else "ADDED", key, new, old)
            self._objects[key] = new
            if key.kind == "CustomResourceDefinition":
                kind = kind_of_definition(new)
                self.kinds[kind.name] = kind
            return copy.deepcopy(new)

    def remove(self, key: Key) -> Object | None:
        with self.changed:
            old = self._objects.pop(key, None)
            self.owned.pop(key, None)
            if old is not None:
                deleted = copy.deepcopy(old)
                self._record("DELETED", key, deleted, old)
                if key.kind == "CustomResourceDefinition":
                    self._remove_kind(old["spec"]["names"]["kind"])
            return old

    def _remove_kind(self, kind: str) -> None:
        for key in [key for key in self._objects if key.kind == kind]:
            self.remove(key)
        del self.kinds[kind]

    def compact(self) -> None:
        """Discard the history: a watch from an older version fails with 410."""
        with self.changed:
            self.oldest = self.version
            self.changed.notify_all()

    def changes_since(self, version: int) -> list[ObjectChange]:
        with self.changed:
            first = len(self.history)
            while first and self.history[first - 1].version > version:
                first -= 1
            return self.history[first:]

    def with_metadata(self, key: Key, new: Object, old: Object | None) -> Object:
        """Return an object with the metadata that the server sets."""
        new = copy.deepcopy(new)
        kind = self.kinds[key.kind]
        metadata = new.setdefault("metadata", {})
        metadata["name"] = key.name
        if key.namespace:
            metadata["namespace"] = key.namespace
        before = (old or {}).get("metadata", {})
        metadata.setdefault("uid", before.get("uid") or str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", before.get("creationTimestamp") or timestamp(self.now()))
        if "managedFields" in before:
            metadata.setdefault("managedFields", copy.deepcopy(before["managedFields"]))
        if old:
            metadata["resourceVersion"] = before["resourceVersion"]
        else:
            metadata.pop("resourceVersion", None)
        if key.kind == "Job":
            _set_job_defaults(new)
        if key.kind == "CustomResourceDefinition":
            set_definition_status(new, old)
        if kind.has_generation:
            is_changed = old is not None and _without_status(old) != _without_status(new)
            metadata["generation"] = before.get("generation", 0) + int(is_changed) if old else 1
        return new

    def _record(self, type_: str, key: Key, new: Object, old: Object | None) -> None:
        self.version += 1
        new["metadata"]["resourceVersion"] = str(self.version)
        self.history.append(ObjectChange(self.version, type_, key.kind, copy.deepcopy(new), copy.deepcopy(old)))
        self.changed.notify_all()


def _without_status(obj: Object) -> Object:
    return {key: value for key, value in obj.items() if key not in {"metadata", "status"}}


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
