"""Writes to the API server used in tests: create, update, patch and apply, with validation and field ownership."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import api_statuses
from api_apply import UNOWNED, Manager, leaves, managed_fields, merge_applied, own_changes, owned_fields
from api_custom_resources import Decoded, decode, validate, validate_definition
from api_kinds import Key, Kind, Object
from api_objects import Objects
from api_statuses import ApiError

# Kinds whose objects can be replaced without their resourceVersion.
UNCONDITIONAL = {"ConfigMap", "Job", "Pod", "Secret", "Event", "Namespace", "Node", "ServiceAccount", "ResourceQuota"}
MISMATCH = "does not match the"


@dataclass(frozen=True)
class WriteOptions:
    """Query parameters of a write."""

    manager: str = "unknown"
    force: bool = False
    dry_run: bool = False
    field_validation: str = "Strict"


@dataclass(frozen=True)
class Written:
    """The stored object, whether it was created, and warnings about unknown fields."""

    object: Object
    is_created: bool = False
    warnings: tuple[str, ...] = ()


class Writes:
    """Writes objects as the API server does: a `status` subresource and the rest of its object change separately."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def create(self, key: Key, body: Object, options: WriteOptions) -> Written:
        """Create an object; its name may be generated from metadata.generateName."""
        kind = self._objects.kinds[key.kind]
        metadata = body.setdefault("metadata", {})
        if not metadata.get("name") and (prefix := metadata.get("generateName")):
            metadata["name"] = prefix + "".join(random.choices("bcdfghjklmnpqrstvwxz2456789", k=5))
        if not metadata.get("name"):
            message = "Required value: name or generateName is required"
            raise ApiError(api_statuses.invalid(kind.name, "", "metadata.name", message, kind.group))
        if metadata.get("resourceVersion"):
            message = "resourceVersion should not be set on objects to be created"
            raise ApiError(api_statuses.status(500, "InternalError", message))
        key = key._replace(name=metadata["name"])
        with self._objects.changed:
            decoded = _decode(kind, key, body, options)
            if self._objects.get(key):
                raise ApiError(api_statuses.already_exists(kind.full, key.name))
            new = _reset(kind, decoded.object, None, "")
            return self._store(key, new, None, options, "", decoded.warnings)

    def update(self, key: Key, body: Object, options: WriteOptions, subresource: str = "") -> Written:
        """Replace an object."""
        kind = self._objects.kinds[key.kind]
        with self._objects.changed:
            old = self._existing(key)
            if not body.get("metadata", {}).get("resourceVersion") and key.kind not in UNCONDITIONAL:
                message = "Invalid value: 0: must be specified for an update"
                error = api_statuses.invalid(kind.name, key.name, "metadata.resourceVersion", message, kind.group)
                raise ApiError(error)
            decoded = _decode(kind, key, body, options)
            self._check_preconditions(key, decoded.object, old, subresource, is_patch=False)
            new = _reset(kind, decoded.object, old, subresource)
            return self._store(key, new, old, options, subresource, decoded.warnings)

    def patch(
        self, key: Key, change: Callable[[Object], Object], options: WriteOptions, subresource: str = ""
    ) -> Written:
        """Change an object with a function, such as a merge patch."""
        kind = self._objects.kinds[key.kind]
        with self._objects.changed:
            old = self._existing(key)
            decoded = _decode(kind, key, change(copy.deepcopy(old)), options)
            self._check_preconditions(key, decoded.object, old, subresource, is_patch=True)
            new = _reset(kind, decoded.object, old, subresource)
            return self._store(key, new, old, options, subresource, decoded.warnings)

    def apply(self, key: Key, body: Object, options: WriteOptions, subresource: str = "") -> Written:
        """Create or merge an object with server-side apply."""
        kind = self._objects.kinds[key.kind]
        with self._objects.changed:
            old = self._existing(key) if subresource else self._objects.get(key)
            decoded = _decode(kind, key, body, options, is_apply=True)
            self._check_preconditions(key, decoded.object, old, subresource, is_patch=True)
            manager = Manager(options.manager, "Apply", subresource)
            own = _fields_of(kind, decoded.object, subresource)
            owned = self._objects.owned.get(key, {})
            merged, new_owned = merge_applied(kind, old, own, owned, manager, force=options.force)
            merged["metadata"] |= {"name": key.name} | ({"namespace": key.namespace} if key.namespace else {})
            new = decode(kind, merged).object
            self._validate(key, new, old, subresource)
            new["metadata"]["managedFields"] = managed_fields(kind.api_version, new_owned, old)
            stored = self._finish(key, new, old, options)
            if not options.dry_run:
                self._objects.owned[key] = new_owned
            return Written(stored, old is None, decoded.warnings)

    def set_owner(self, key: Key, manager: str, obj: Object) -> None:
        """Make a field manager own all fields of an object, as if it had applied them."""
        with self._objects.changed:
            kind = self._objects.kinds[key.kind]
            self._objects.owned.setdefault(key, {})[Manager(manager)] = set(leaves(kind, obj))

    def _store(
        self,
        key: Key,
        new: Object,
        old: Object | None,
        options: WriteOptions,
        subresource: str,
        warnings: tuple[str, ...],
    ) -> Written:
        kind = self._objects.kinds[key.kind]
        self._validate(key, new, old, subresource)
        manager = Manager(options.manager, "Update", subresource)
        owned = self._objects.owned.get(key, {})
        entries = new["metadata"].get("managedFields")
        if old and entries is not None and entries != old["metadata"].get("managedFields"):
            owned = owned_fields(entries)  # kubectl moves its fields to server-side apply in this way
        owned = own_changes(kind, old, new, owned, manager)
        new["metadata"]["managedFields"] = managed_fields(kind.api_version, owned, old)
        stored = self._finish(key, new, old, options)
        if not options.dry_run:
            self._objects.owned[key] = owned
        return Written(stored, old is None, warnings)

    def _finish(self, key: Key, new: Object, old: Object | None, options: WriteOptions) -> Object:
        """Store an object, or remove it if its last finalizer is gone."""
        if options.dry_run:
            return self._objects.with_metadata(key, new, old)
        stored = self._objects.store(key, new)
        metadata = stored["metadata"]
        if old and "deletionTimestamp" in metadata and old["metadata"].get("finalizers") and not metadata["finalizers"]:
            self._objects.remove(key)
        return stored

    def _existing(self, key: Key) -> Object:
        obj = self._objects.get(key)
        if obj is None:
            raise ApiError(api_statuses.not_found(self._objects.kinds[key.kind].full, key.name))
        return obj

    def _check_preconditions(
        self, key: Key, body: Object, old: Object | None, subresource: str, *, is_patch: bool
    ) -> None:
        kind = self._objects.kinds[key.kind]
        metadata = body.get("metadata", {})
        if old is None:
            if uid := metadata.get("uid"):
                reason = f"uid mismatch: the provided object specified uid {uid}, and no existing object was found"
                message = f'Operation cannot be fulfilled on {kind.full} "{key.name}": {reason}'
                raise ApiError(api_statuses.status(409, "Conflict", message))
            return
        actual = old["metadata"]["uid"]
        # The status of a custom resource: everything else is copied from the stored object before it is validated.
        is_ignored = is_patch and subresource == "status" and kind.definition
        if metadata.get("uid", actual) != actual and is_patch and not is_ignored:
            reason = f'Invalid value: "{metadata["uid"]}": field is immutable'
            raise ApiError(api_statuses.invalid(kind.name, key.name, "metadata.uid", reason, kind.group))
        if metadata.get("uid", actual) != actual and not is_patch:
            path = f"/{kind.group or 'core'}/{kind.plural}/{key.namespace}/{key.name}"
            raise ApiError(api_statuses.uid_precondition(kind.full, path, key.name, metadata["uid"], actual))
        if metadata.get("resourceVersion", "") not in {"", old["metadata"]["resourceVersion"]}:
            raise ApiError(api_statuses.modified(kind.full, key.name))

    def _validate(self, key: Key, new: Object, old: Object | None, subresource: str) -> None:
        kind = self._objects.kinds[key.kind]
        self._validate_namespace(kind, key, old)
        if kind.definition:
            validate(kind, key, new, old)
        if key.kind == "CustomResourceDefinition":
            validate_definition(key, new)
        if key.kind == "Job" and old is not None and not subresource:
            _reject_immutable_fields(key, new, old)

    def _validate_namespace(self, kind: Kind, key: Key, old: Object | None) -> None:
        if not key.namespace:
            return
        namespace = self._objects.get(Key("Namespace", "", key.namespace))
        if namespace is None:
            raise ApiError(api_statuses.namespace_not_found(key.namespace))
        if old is None and "deletionTimestamp" in namespace["metadata"]:
            reason = f"unable to create new content in namespace {key.namespace} because it is being terminated"
            raise ApiError(api_statuses.forbidden(kind.full, key.name, reason))


def _decode(kind: Kind, key: Key, body: Object, options: WriteOptions, *, is_apply: bool = False) -> Decoded:
    """Check the type and name of a body, and its fields if its kind has a schema."""
    for field, expected in (("apiVersion", kind.api_version), ("kind", kind.name)):
        if body.setdefault(field, expected) != expected:
            text = "API version" if field == "apiVersion" else "kind"
            message = f"the {text} in the data ({body[field]}) {MISMATCH} expected {text} ({expected})"
            raise ApiError(api_statuses.bad_request(message))
    name = body.setdefault("metadata", {}).setdefault("name", key.name)
    if name != key.name:
        message = f"the name of the object ({name}) {MISMATCH} name on the URL ({key.name})"
        raise ApiError(api_statuses.bad_request(message))
    if body["metadata"].get("namespace", key.namespace) != key.namespace:
        message = "the namespace of the provided object does not match the namespace sent on the request"
        raise ApiError(api_statuses.bad_request(message))
    return decode(kind, body, options.field_validation, is_apply=is_apply)


def _fields_of(kind: Kind, body: Object, subresource: str) -> Object:
    """Return the fields of an applied object that its subresource stores."""
    if subresource == "status":
        metadata = {name: body["metadata"][name] for name in ("name", "namespace") if name in body["metadata"]}
        return {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": metadata} | {
            "status": body.get("status", {})
        }
    own = {name: value for name, value in body.items() if name != "status" or not kind.has_status}
    unowned = {path[1] for path in UNOWNED if path[0] == "metadata" and len(path) == 2} - {"name", "namespace"}
    return own | {"metadata": {name: value for name, value in body["metadata"].items() if name not in unowned}}


def _reset(kind: Kind, new: Object, old: Object | None, subresource: str) -> Object:
    """Undo changes of fields that a write through this subresource does not store."""
    if subresource == "status":
        assert old is not None
        new = {name: value for name, value in old.items() if name != "status"} | (
            {"status": new["status"]} if "status" in new else {}
        )
    elif kind.has_status:
        status = {"status": old["status"]} if old and "status" in old else {}
        new = {name: value for name, value in new.items() if name != "status"} | status
    new = copy.deepcopy(new)
    before = (old or {}).get("metadata", {})
    for name in ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
        new["metadata"].pop(name, None)
        new["metadata"] |= {name: before[name]} if name in before else {}
    return new


def _reject_immutable_fields(key: Key, new: Object, old: Object) -> None:
    spec = new.setdefault("spec", {})
    fields = ("template", "completions", "selector", "completionMode", "successPolicy", "podFailurePolicy")
    for field in fields:
        before, after = old["spec"].get(field), spec.get(field)
        if field == "completions" and _is_elastic(old) and _is_elastic(new):
            continue
        if before != after:
            reason = f"Invalid value: {json.dumps(after)}: field is immutable"
            raise ApiError(api_statuses.invalid("Job", key.name, f"spec.{field}", reason, group="batch"))


def _is_elastic(job: Object) -> bool:
    """Return whether the completions of an Indexed Job may change: only together with its parallelism."""
    job_spec = job["spec"]
    return job_spec.get("completionMode") == "Indexed" and job_spec.get("completions") == job_spec.get("parallelism")
