"""What a request to the API server of the tests is about."""

import re
from typing import NamedTuple

import api_statuses
from api_apply import Object
from api_objects import KINDS, Key, Kind
from api_statuses import Refused

PATH = re.compile(
    r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>proxy/.+|[^/]+))?)?"
)
RFC_1123 = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class Target(NamedTuple):
    kind: Kind
    namespace: str
    name: str
    sub: str

    @property
    def key(self) -> Key:
        return Key(self.kind.name, self.namespace, self.name)


def target_of(path: str) -> Target:
    """Read a path; a `Refused` 404 if nothing of that kind is served."""
    found = PATH.fullmatch(path)
    group = (found["group"] or "") if found else ""
    version = (found["core"] or found["version"]) if found else ""
    for kind in KINDS.values():
        if found and (kind.group, kind.version, kind.plural) == (group, version, found["plural"]):
            return Target(kind, found["namespace"] or "", found["name"] or "", found["sub"] or "")
    raise Refused(api_statuses.no_such_api())


def check(target: Target, body: Object) -> None:
    """Refuse a name that is none, and a namespace that is another one."""
    if not NAME.fullmatch(target.name) or len(target.name) > 63:
        why = f'Invalid value: "{target.name}": {RFC_1123}'
        raise Refused(api_statuses.invalid(target.kind.name, target.name, "metadata.name", why, target.kind.group))
    if body.get("metadata", {}).get("namespace", target.namespace) != target.namespace:
        message = "the namespace of the provided object does not match the namespace sent on the request"
        raise Refused(api_statuses.bad_request(message))
