"""The objects of the API server that tests use: kinds, selectors, server-side apply, and what happened when."""

import copy
import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from api_statuses import Refused, field_conflict, invalid, no_namespace

Object = dict[str, Any]
Path = tuple[str, ...]


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
            wanted = leaves(manifest)
            owned = self._owned.get(key, {})
            if old is not None and not force:
                _refuse_conflicts(manifest["apiVersion"], old, wanted, owned, manager)
            new = (
                copy.deepcopy(old) if old else {"apiVersion": manifest["apiVersion"], "kind": key.kind, "metadata": {}}
            )
            others = set().union(*(paths for name, paths in owned.items() if name != manager))
            for path in owned.get(manager, set()) - wanted.keys() - others:
                _drop(new, path)
            for path, value in wanted.items():
                _put(new, path, value)
            self._validate(key, new, old)
            now = dict(owned) | {manager: set(wanted)}
            new["metadata"]["managedFields"] = _managed_fields(manifest["apiVersion"], now, old)
            if dry_run:
                return self._with_metadata(key, new, old)
            stored = self.store(key, new)
            self._owned[key] = now
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


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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


# ── Server-side apply ───────────────────────────────────────────────────────────────────────────────────────────────


def leaves(manifest: Object) -> dict[Path, Any]:
    """Fields that a manifest states. Lists are whole fields, but for ownerReferences, which merge by uid."""

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, dict) and value:
            for key, each in value.items():
                yield from walk(each, (*path, key))
        elif path == ("metadata", "ownerReferences"):
            for each in value:
                yield (*path, each["uid"]), each
        else:
            yield path, value

    skipped = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
    return {path: value for path, value in walk(manifest, ()) if path not in skipped}


def _get(found: Any, path: Path) -> Any:
    for name in path:
        if isinstance(found, list):
            found = next((each for each in found if each.get("uid") == name), None)
        else:
            found = (found or {}).get(name)
    return found


def _put(found: Object, path: Path, value: Any) -> None:
    if path[:2] == ("metadata", "ownerReferences"):
        owners = [each for each in found["metadata"].get("ownerReferences", []) if each["uid"] != path[2]]
        found["metadata"]["ownerReferences"] = [*owners, value]
        return
    for name in path[:-1]:
        below = found.get(name)
        found[name] = below if isinstance(below, dict) else {}
        found = found[name]
    if not (value == {} and isinstance(found.get(path[-1]), dict)):  # an empty mapping adds nothing to a full one
        found[path[-1]] = copy.deepcopy(value)


def _drop(found: Object, path: Path) -> None:
    if path[:2] == ("metadata", "ownerReferences"):
        owners = [each for each in found["metadata"].get("ownerReferences", []) if each["uid"] != path[2]]
        found["metadata"]["ownerReferences"] = owners
        return
    above = _get(found, path[:-1])
    if isinstance(above, dict):
        above.pop(path[-1], None)


def _refuse_conflicts(
    version: str, old: Object, wanted: dict[Path, Any], owned: dict[str, set[Path]], manager: str
) -> None:
    for other, paths in owned.items():
        taken = sorted(path for path in paths & wanted.keys() if other != manager and _get(old, path) != wanted[path])
        if taken:
            raise Refused(field_conflict(other, version, *("." + ".".join(path) for path in taken)))


def _managed_fields(version: str, owned: dict[str, set[Path]], old: Object | None) -> list[Object]:
    times = {each["manager"]: each for each in (old or {}).get("metadata", {}).get("managedFields", [])}
    entries = []
    for manager, paths in owned.items():
        fields: Object = {}
        for path in sorted(paths):
            below = fields
            for name in path:
                below = below.setdefault(f"f:{name}", {})
        entry = {"manager": manager, "operation": "Apply", "apiVersion": version, "time": timestamp()}
        entry |= {"fieldsType": "FieldsV1", "fieldsV1": fields}
        same = times.get(manager, {}).get("fieldsV1") == fields
        entries.append(times[manager] if same else entry)
    return entries


# ── Selectors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def selected(found: Object, labels: str, fields: str) -> bool:
    """Whether an object meets a labelSelector (`a=b`, `a!=b`, `a in (b,c)`, `a`, `!a`) and a fieldSelector."""
    own = found.get("metadata", {}).get("labels", {}) or {}
    return all(_meets(own, part) for part in _parts(labels)) and all(
        _meets_field(found, part) for part in _parts(fields)
    )


def _parts(selector: str) -> list[str]:
    parts, depth = [""], 0
    for letter in selector:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _meets(labels: dict[str, str], part: str) -> bool:
    if " notin " in part or " in " in part:
        word = " notin " if " notin " in part else " in "
        name, _, values = part.partition(word)
        among = labels.get(name.strip()) in {each.strip() for each in values.strip(" ()").split(",")}
        return among != (word == " notin ")
    if "!=" in part:
        name, _, value = part.partition("!=")
        return labels.get(name) != value
    if "=" in part:
        name, _, value = part.replace("==", "=").partition("=")
        return labels.get(name) == value
    return part[1:] not in labels if part.startswith("!") else part in labels


def _meets_field(found: Object, part: str) -> bool:
    equal = "!=" not in part
    name, _, value = part.replace("!=", "=").replace("==", "=").partition("=")
    return (str(_get(found, tuple(name.split("."))) or "") == value) == equal
