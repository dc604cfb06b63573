"""URL paths and API discovery of the API server used in tests."""

import re
from typing import NamedTuple

import api_statuses
from api_apply import Object
from api_objects import KINDS, Key, Kind
from api_statuses import ApiError

PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<subresource>proxy/.+|[^/]+))?)?"
)
RFC_1123 = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
VERBS = ["create", "delete", "get", "list", "patch", "watch"]


class Target(NamedTuple):
    """The object or list that a path addresses."""

    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return Key(self.kind.name, self.namespace, self.name)


def parse_path(path: str) -> Target:
    """Parse a path; raises a 404 `ApiError` for an unknown kind."""
    match = PATH.fullmatch(path)
    group = (match["group"] or "") if match else ""
    version = (match["core"] or match["version"]) if match else ""
    for kind in KINDS.values():
        if match and (kind.group, kind.version, kind.plural) == (group, version, match["plural"]):
            return Target(kind, match["namespace"] or "", match["name"] or "", match["subresource"] or "")
    raise ApiError(api_statuses.unknown_api())


def validate_metadata(target: Target, body: Object) -> None:
    """Reject an invalid name, and a namespace that differs from that in the path."""
    if not NAME.fullmatch(target.name) or len(target.name) > 63:
        reason = f'Invalid value: "{target.name}": {RFC_1123}'
        raise ApiError(api_statuses.invalid(target.kind.name, target.name, "metadata.name", reason, target.kind.group))
    if body.get("metadata", {}).get("namespace", target.namespace) != target.namespace:
        message = "the namespace of the provided object does not match the namespace sent on the request"
        raise ApiError(api_statuses.bad_request(message))


def discovery_response(path: str) -> Object | None:
    """Return the response to a discovery request, which kubectl sends first; None for other paths."""
    groups = sorted({kind.group for kind in KINDS.values() if kind.group})
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_api_group(group) for group in groups]}
    if path == "/version":
        return {"kind": "Info", "major": "1", "minor": "36", "gitVersion": "v1.36.0"}
    for group in ("", *groups):
        if path == (f"/apis/{group}/v1" if group else "/api/v1"):
            version = f"{group}/v1" if group else "v1"
            resources = _api_resources(group)
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
    return None


def _api_group(name: str) -> Object:
    version = {"groupVersion": f"{name}/v1", "version": "v1"}
    return {"name": name, "versions": [version], "preferredVersion": version}


def _api_resources(group: str) -> list[Object]:
    resources: list[Object] = [
        {"name": kind.plural, "singularName": kind.name.lower(), "kind": kind.name, "namespaced": kind.namespaced}
        | {"verbs": VERBS}
        for kind in KINDS.values()
        if kind.group == group
    ]
    if not group:
        resources.append({"name": "pods/log", "singularName": "", "kind": "Pod", "namespaced": True, "verbs": ["get"]})
    return resources
