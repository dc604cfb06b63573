"""API discovery of the API server used in tests."""

from collections.abc import Iterable

from api_kinds import Kind, Object

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
STATUS_VERBS = ["get", "patch", "update"]


def discovery_response(path: str, kinds: Iterable[Kind]) -> Object | None:
    """Return the response to a discovery request, which kubectl sends first; None for other paths."""
    kinds = [*kinds]
    versions = sorted({(kind.group, kind.version) for kind in kinds if kind.group})
    groups = [_api_group(group, version) for group, version in versions]
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/version":
        return {"kind": "Info", "major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    for group in groups:
        if path == f"/apis/{group['name']}":
            return {"kind": "APIGroup", "apiVersion": "v1"} | group
    for api_version in {kind.api_version for kind in kinds}:
        if path == (f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"):
            resources = [item for kind in kinds if kind.api_version == api_version for item in _api_resources(kind)]
            content = {"groupVersion": api_version, "resources": resources}
            return {"kind": "APIResourceList", "apiVersion": "v1"} | content
    return None


def _api_group(name: str, version: str) -> Object:
    entry = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def _api_resources(kind: Kind) -> list[Object]:
    entry: Object = {"name": kind.plural, "singularName": kind.name.lower(), "namespaced": kind.namespaced}
    entry |= {"kind": kind.name, "verbs": VERBS}
    entry |= {"shortNames": [*kind.short_names]} if kind.short_names else {}
    entry |= {"categories": [*kind.categories]} if kind.categories else {}
    subresources = [("status", STATUS_VERBS)] if kind.has_status else []
    subresources += [("log", ["get"])] if kind.name == "Pod" else []
    base = {"singularName": "", "namespaced": kind.namespaced, "kind": kind.name}
    return [entry, *({"name": f"{kind.plural}/{name}", **base, "verbs": verbs} for name, verbs in subresources)]
