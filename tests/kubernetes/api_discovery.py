"""What there is in the API, for the API server that tests use: kubectl asks before anything else."""

from api_apply import Object
from api_objects import KINDS

VERBS = ["create", "delete", "get", "list", "patch", "watch"]


def discovery(path: str) -> Object | None:
    """Answer to a question about groups, versions and resources; None if the path is no such question."""
    groups = sorted({kind.group for kind in KINDS.values() if kind.group})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(group) for group in groups]}
    if path == "/version":
        return {"kind": "Info", "major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    for group in ("", *groups):
        if path == (f"/apis/{group}/v1" if group else "/api/v1"):
            version = f"{group}/v1" if group else "v1"
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": _of(group)}
    return None


def _group(name: str) -> Object:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _of(group: str) -> list[Object]:
    resources: list[Object] = [
        {"name": kind.plural, "singularName": kind.name.lower(), "kind": kind.name, "namespaced": kind.namespaced}
        | {"verbs": VERBS}
        for kind in KINDS.values()
        if kind.group == group
    ]
    if not group:
        resources.append({"name": "pods/log", "singularName": "", "kind": "Pod", "namespaced": True, "verbs": ["get"]})
    return resources
