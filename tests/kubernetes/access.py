"""Permissions that requests to the API server need, to compare them with the rules of roles."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from api_server import Request

PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v[^/]+(?:/namespaces/[^/]+)?/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?"
    r"(?:/(?P<subresource>[a-z]+))?(?:/.*)?"
)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Access(NamedTuple):
    """A verb on a resource, such as patch on transferjobs/status of topwork.dev."""

    verb: str
    group: str
    resource: str


def required_access(requests: Iterable[Request]) -> set[Access]:
    """Return the permissions that requests need; discovery, which everyone may read, needs none."""
    return {access for request in requests for access in _access_of(request)}


def _access_of(request: Request) -> Iterable[Access]:
    match = PATH.fullmatch(request.path)
    if not match or request.path.count("/") < 3 or (match["group"] and request.path.count("/") < 4):
        return
    resource = match["resource"] + (f"/{match['subresource']}" if match["subresource"] else "")
    verb = VERBS.get(request.method) or ("get" if match["name"] else "list")
    if verb == "list" and request.query.get("watch") in {"1", "true", "True"}:
        verb = "watch"
    yield Access(verb, match["group"] or "", resource)
    if request.method == "PATCH" and request.code == 201:
        # Server-side apply of an object that does not exist.
        yield Access("create", match["group"] or "", resource)


def granted_access(rules: Iterable[dict[str, Any]]) -> set[Access]:
    """Return the permissions that the rules of a role grant."""
    return {
        Access(verb, group, resource)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
