"""Server-side apply of the API server used in tests: merges objects and tracks the fields of each manager."""

import copy
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

from api_kinds import Kind, ListKeys, Object, Path
from api_statuses import ApiError, field_conflict

# Fields that the server sets; nobody owns them.
UNOWNED = {("apiVersion",), ("kind",)} | {
    ("metadata", name)
    for name in ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")
}


class Manager(NamedTuple):
    """A field manager: one that applies and one that updates are different, and so are those of subresources."""

    name: str
    operation: str = "Apply"
    subresource: str = ""


Owned = dict[Manager, set[Path]]


def timestamp(time: datetime | None = None) -> str:
    """Return a time, by default the current one, as in metadata and conditions."""
    return (time or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def merge_applied(
    kind: Kind, old: Object | None, body: Object, owned: Owned, manager: Manager, *, force: bool
) -> tuple[Object, Owned]:
    """Merge an applied object into the stored one.

    Args:
        kind: Kind of the object.
        old: The stored object; None if it does not exist.
        body: The applied object, with only the fields of the subresource.
        owned: Fields by the manager that owns them.
        manager: The manager that applies the object.
        force: Whether to take ownership of fields from other managers.

    Returns:
        The merged object, and its fields by manager.
    """
    applied = leaves(kind, body)
    if old is not None and not force:
        _reject_conflicts(kind, old, applied, owned, manager)
    new = copy.deepcopy(old or {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": {}})
    others = set().union(*(paths for other, paths in owned.items() if other != manager))
    for path in sorted(owned.get(manager, set()) - applied.keys() - others, key=len):
        _remove_field(new, path)
        _remove_empty_parents(new, path, kept=others | applied.keys())
    for path, value in applied.items():
        _set_field(new, path, value)
    taken = {path for path in applied if old is not None and value_at(old, path) != value_at(new, path)}
    new_owned = {other: paths - taken if other != manager else paths for other, paths in owned.items()}
    return new, _without_empty(new_owned | {manager: set(applied)})


def own_changes(kind: Kind, old: Object | None, new: Object, owned: Owned, manager: Manager) -> Owned:
    """Make a manager own the fields that it changed with an update or a patch; other managers lose them."""
    before, after = leaves(kind, old or {}), leaves(kind, new)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    new_owned = {other: (paths - changed) & after.keys() for other, paths in owned.items()}
    new_owned[manager] = new_owned.get(manager, set()) | changed
    return _without_empty(new_owned)


def managed_fields(version: str, owned: Owned, old: Object | None) -> list[Object]:
    """Return `metadata.managedFields`; entries whose fields are the same keep their time."""
    old_entries = {_manager_of(entry): entry for entry in (old or {}).get("metadata", {}).get("managedFields", [])}
    entries = []
    for manager, paths in owned.items():
        fields: Object = {}
        for path in sorted(paths):
            child = fields
            for name in path:
                child = child.setdefault(name if name.startswith(("k:", "v:")) else f"f:{name}", {})
            if path[-1].startswith("k:"):
                child["."] = {}
        entry = {"manager": manager.name, "operation": manager.operation, "apiVersion": version, "time": timestamp()}
        entry |= {"fieldsType": "FieldsV1", "fieldsV1": fields}
        entry |= {"subresource": manager.subresource} if manager.subresource else {}
        is_unchanged = old_entries.get(manager, {}).get("fieldsV1") == fields
        entries.append(old_entries[manager] if is_unchanged else entry)
    return entries


def owned_fields(entries: list[Object]) -> Owned:
    """Return the fields by manager of `metadata.managedFields`."""

    def walk(fields: Object, path: Path) -> Iterator[Path]:
        if path and (not fields or "." in fields):
            yield path
        for name, child in fields.items():
            if name != ".":
                yield from walk(child, (*path, name.removeprefix("f:")))

    return {_manager_of(entry): {*walk(entry["fieldsV1"], ())} for entry in entries if entry.get("fieldsV1")}


def leaves(kind: Kind, obj: Object) -> dict[Path, Any]:
    """Return the fields of an object. Items of lists that merge by key are fields; other lists are one field."""

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        keys = kind.list_keys(path) if isinstance(value, list) else None
        if isinstance(value, dict) and value and not (path and kind.is_atomic(path)):
            for key, child in value.items():
                yield from walk(child, (*path, key))
        elif keys == ():
            yield from (((*path, f"v:{_compact(item)}"), item) for item in value)
        elif keys and all(isinstance(item, dict) for item in value):
            for item in value:
                name = _item_name(item, keys)
                yield (*path, name), {key: item[key] for key in keys if key in item}
                yield from walk(item, (*path, name))
        else:
            yield path, value

    return {path: value for path, value in walk(obj, ()) if path and path not in UNOWNED}


def value_at(value: Any, path: Path) -> Any:
    """Return the value of a field, or None; for an item of a list that merges by keys, its keys."""
    for name in path:
        if isinstance(value, list):
            index = _index(value, name)
            value = value[index] if index is not None else None
        else:
            value = (value or {}).get(name)
    if path and path[-1].startswith("k:") and value is not None:
        return {key: value[key] for key in json.loads(path[-1][2:])}
    return value


def _item_name(item: Object, keys: ListKeys) -> str:
    return f"k:{_compact({key: item[key] for key in keys if key in item})}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _index(items: list[Any], name: str) -> int | None:
    """Return the index of an item named `k:{keys}` or `v:value`."""
    wanted = json.loads(name[2:])
    for index, item in enumerate(items):
        if item == wanted or (name.startswith("k:") and all(item.get(key) == wanted[key] for key in wanted)):
            return index
    return None


def _set_field(obj: Object, path: Path, value: Any) -> None:
    parent: Any = obj
    for name, following in itertools.pairwise(path):
        empty: Any = [] if following.startswith(("k:", "v:")) else {}
        if isinstance(parent, list):
            index = _index(parent, name)
            assert index is not None  # the item is set before its fields
            parent = parent[index]
        else:
            child = parent.get(name)
            parent[name] = child if isinstance(child, type(empty)) else empty
            parent = parent[name]
    if isinstance(parent, list):
        if _index(parent, path[-1]) is None:
            parent.append(copy.deepcopy(value))
    elif not (value == {} and isinstance(parent.get(path[-1]), dict)):  # an empty mapping must not replace another one
        parent[path[-1]] = copy.deepcopy(value)


def _remove_field(obj: Object, path: Path) -> None:
    parent: Any = obj
    for name in path[:-1]:
        if isinstance(parent, list):
            index = _index(parent, name)
            parent = parent[index] if index is not None else None
        else:
            parent = parent.get(name) if isinstance(parent, dict) else None
    if isinstance(parent, list) and (index := _index(parent, path[-1])) is not None:
        del parent[index]
    elif isinstance(parent, dict):
        parent.pop(path[-1], None)


def _remove_empty_parents(obj: Object, path: Path, kept: set[Path]) -> None:
    """Remove the objects around a removed field that contain nothing else, unless a manager keeps a field of them."""
    for length in range(len(path) - 1, 1, -1):
        parent = path[:length]
        if value_at(obj, parent) != {} or any(field[:length] == parent for field in kept):
            return
        _remove_field(obj, parent)


def _reject_conflicts(kind: Kind, old: Object, applied: dict[Path, Any], owned: Owned, manager: Manager) -> None:
    for other, paths in owned.items():
        conflicts = sorted(
            path for path in paths & applied.keys() if other != manager and value_at(old, path) != applied[path]
        )
        if conflicts:
            fields = map(_dotted, conflicts)
            raise ApiError(field_conflict(other.name, kind.api_version, *fields, subresource=other.subresource))


def _dotted(path: Path) -> str:
    """Return a path as in messages: `.status.conditions[type="Complete"].reason`."""
    text = ""
    for name in path:
        if name.startswith("k:"):
            text += "[" + ",".join(f"{key}={_compact(value)}" for key, value in json.loads(name[2:]).items()) + "]"
        else:
            text += f"[={name[2:]}]" if name.startswith("v:") else f".{name}"
    return text


def _without_empty(owned: Owned) -> Owned:
    return {manager: paths for manager, paths in owned.items() if paths}


def _manager_of(entry: Object) -> Manager:
    return Manager(entry["manager"], entry["operation"], entry.get("subresource", ""))
