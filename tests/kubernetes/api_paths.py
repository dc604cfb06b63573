"""URL paths of the API server used in tests."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import api_statuses
from api_kinds import Key, Kind, Object
from api_statuses import ApiError

PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<subresource>proxy/.+|[^/]+))?)?"
)
RFC_1123 = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class Target(NamedTuple):
    """The object or list that a path addresses."""

    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return Key(self.kind.name, self.namespace, self.name)


def parse_path(path: str, kinds: Iterable[Kind]) -> Target:
    """Parse a path; raises a 404 `ApiError` for an unknown kind."""
    match = PATH.fullmatch(path)
    group = (match["group"] or "") if match else ""
    version = (match["core"] or match["version"]) if match else ""
    for kind in kinds:
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
