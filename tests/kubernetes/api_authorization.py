"""Authorization (RBAC) of the API server used in tests."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import api_statuses
from api_kinds import Object
from api_paths import Target
from api_statuses import ApiError

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass
class User:
    """A user of the server; without grants, everything is allowed.

    Attributes:
        name: Name in messages, such as system:serviceaccount:team-a:topwork-controller.
        grants: Rules of roles, each with the namespace in which it applies (empty: in all namespaces).
    """

    name: str
    grants: list[tuple[str, Object]] | None = field(default=None)

    def allow(self, rules: Iterable[Object], namespace: str) -> None:
        """Add the rules of a role; everything else is denied from then on."""
        self.grants = (self.grants or []) + [(namespace, rule) for rule in rules]

    def authorize(self, verb: str, target: Target) -> None:
        """Raise a 403 `ApiError` if no rule allows the request."""
        if self.grants is None:
            return
        resource = target.kind.plural + (f"/{target.subresource.partition('/')[0]}" if target.subresource else "")
        name = target.name.partition(":")[0]
        for namespace, rule in self.grants:
            is_in_scope = namespace in {"", target.namespace}
            if is_in_scope and _matches(rule, verb, target.kind.group, resource, name):
                return
        raise ApiError(
            api_statuses.rbac_denied(verb, resource, target.namespace, name, group=target.kind.group, user=self.name)
        )


def verb_of(method: str, target: Target, *, is_watch: bool) -> str:
    """Return the verb of a request."""
    if method != "GET":
        return VERBS[method]
    return "get" if target.name else "watch" if is_watch else "list"


def _matches(rule: Object, verb: str, group: str, resource: str, name: str) -> bool:
    names = rule.get("resourceNames")
    return (
        {verb, "*"} & {*rule["verbs"]} != set()
        and {group, "*"} & {*rule["apiGroups"]} != set()
        and {resource, "*"} & {*rule["resources"]} != set()
        and (not names or name in names)
    )
