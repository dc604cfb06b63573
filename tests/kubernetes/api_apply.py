"""Server-side apply, for the API server that tests use: the fields that each manager owns."""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from api_statuses import Refused, field_conflict

Object = dict[str, Any]
Path = tuple[str, ...]


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def applied(
    old: Object | None, manifest: Object, owned: dict[str, set[Path]], manager: str, *, force: bool
) -> tuple[Object, dict[str, set[Path]]]:
    """Merge a manifest into an object.

    Args:
        old: The object as it is; None if it is not there.
        manifest: What the manager wants.
        owned: The fields that each manager owns.
        manager: The manager.
        force: Take the fields of others.

    Returns:
        The object as it becomes, and who owns which of its fields then.
    """
    wanted = leaves(manifest)
    if old is not None and not force:
        _refuse_conflicts(manifest["apiVersion"], old, wanted, owned, manager)
    new = copy.deepcopy(old or {"apiVersion": manifest["apiVersion"], "kind": manifest["kind"], "metadata": {}})
    others = set().union(*(paths for name, paths in owned.items() if name != manager))
    for path in owned.get(manager, set()) - wanted.keys() - others:
        _drop(new, path)
    for path, value in wanted.items():
        _put(new, path, value)
    now = owned | {manager: set(wanted)}
    new["metadata"]["managedFields"] = _managed_fields(manifest["apiVersion"], now, old)
    return new, now


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


def value_at(found: Any, path: Path) -> Any:
    """Value of a field; None where there is none."""
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
    above = value_at(found, path[:-1])
    if isinstance(above, dict):
        above.pop(path[-1], None)


def _refuse_conflicts(
    version: str, old: Object, wanted: dict[Path, Any], owned: dict[str, set[Path]], manager: str
) -> None:
    for other, paths in owned.items():
        taken = sorted(
            path for path in paths & wanted.keys() if other != manager and value_at(old, path) != wanted[path]
        )
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
