"""Server-side apply of the API server used in tests: merges objects and tracks the fields of each manager."""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from api_statuses import ApiError, field_conflict

Object = dict[str, Any]
Path = tuple[str, ...]


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def merge_applied(
    old: Object | None, body: Object, owned: dict[str, set[Path]], manager: str, *, force: bool
) -> tuple[Object, dict[str, set[Path]]]:
    """Merge an applied object into the stored one.

    Args:
        old: The stored object; None if it does not exist.
        body: The applied object.
        owned: Fields by the manager that owns them.
        manager: The manager that applies the object.
        force: Whether to take ownership of fields from other managers.

    Returns:
        The merged object, and its fields by manager.
    """
    applied = leaves(body)
    if old is not None and not force:
        _reject_conflicts(body["apiVersion"], old, applied, owned, manager)
    new = copy.deepcopy(old or {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": {}})
    others = set().union(*(paths for name, paths in owned.items() if name != manager))
    for path in owned.get(manager, set()) - applied.keys() - others:
        _remove_field(new, path)
    for path, value in applied.items():
        _set_field(new, path, value)
    new_owned = owned | {manager: set(applied)}
    new["metadata"]["managedFields"] = _managed_fields(body["apiVersion"], new_owned, old)
    return new, new_owned


def leaves(obj: Object) -> dict[Path, Any]:
    """Return the fields of an object. A list is one field, except ownerReferences, which merge by uid."""

    def walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        if isinstance(value, dict) and value:
            for key, child in value.items():
                yield from walk(child, (*path, key))
        elif path == ("metadata", "ownerReferences"):
            for owner in value:
                yield (*path, owner["uid"]), owner
        else:
            yield path, value

    skipped = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
    return {path: value for path, value in walk(obj, ()) if path not in skipped}


def value_at(value: Any, path: Path) -> Any:
    """Return the value of a field, or None."""
    for name in path:
        if isinstance(value, list):
            value = next((item for item in value if item.get("uid") == name), None)
        else:
            value = (value or {}).get(name)
    return value


def _set_field(obj: Object, path: Path, value: Any) -> None:
    if path[:2] == ("metadata", "ownerReferences"):
        owners = [owner for owner in obj["metadata"].get("ownerReferences", []) if owner["uid"] != path[2]]
        obj["metadata"]["ownerReferences"] = [*owners, value]
        return
    parent = obj
    for name in path[:-1]:
        child = parent.get(name)
        parent[name] = child if isinstance(child, dict) else {}
        parent = parent[name]
    if not (value == {} and isinstance(parent.get(path[-1]), dict)):  # an empty mapping must not replace another one
        parent[path[-1]] = copy.deepcopy(value)


def _remove_field(obj: Object, path: Path) -> None:
    if path[:2] == ("metadata", "ownerReferences"):
        owners = [owner for owner in obj["metadata"].get("ownerReferences", []) if owner["uid"] != path[2]]
        obj["metadata"]["ownerReferences"] = owners
        return
    parent = value_at(obj, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _reject_conflicts(
    version: str, old: Object, applied: dict[Path, Any], owned: dict[str, set[Path]], manager: str
) -> None:
    for other, paths in owned.items():
        conflicts = sorted(
            path for path in paths & applied.keys() if other != manager and value_at(old, path) != applied[path]
        )
        if conflicts:
            raise ApiError(field_conflict(other, version, *("." + ".".join(path) for path in conflicts)))


def _managed_fields(version: str, owned: dict[str, set[Path]], old: Object | None) -> list[Object]:
    old_entries = {entry["manager"]: entry for entry in (old or {}).get("metadata", {}).get("managedFields", [])}
    entries = []
    for manager, paths in owned.items():
        fields: Object = {}
        for path in sorted(paths):
            child = fields
            for name in path:
                child = child.setdefault(f"f:{name}", {})
        entry = {"manager": manager, "operation": "Apply", "apiVersion": version, "time": timestamp()}
        entry |= {"fieldsType": "FieldsV1", "fieldsV1": fields}
        is_unchanged = old_entries.get(manager, {}).get("fieldsV1") == fields
        entries.append(old_entries[manager] if is_unchanged else entry)
    return entries
