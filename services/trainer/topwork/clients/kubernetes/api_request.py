"""Requests to the API server: kinds of objects, URL paths and query parameters."""

from dataclasses import dataclass, field
from typing import Any

from topwork.clients.kubernetes import KubernetesObject


@dataclass(frozen=True)
class Kind:
    """A kind of object and its place in the API.

    Attributes:
        name: Kind, such as `Job`.
        plural: Resource name in URLs, such as `jobs`.
        group: API group; empty for the core group.
        namespaced: Whether its objects belong to a namespace.
    """

    name: str
    plural: str
    group: str = ""
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """The apiVersion of its objects."""
        return f"{self.group}/v1" if self.group else "v1"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ConfigMap", "configmaps"),
        Kind("Event", "events"),
        Kind("Job", "jobs", "batch"),
        Kind("Namespace", "namespaces", namespaced=False),
        Kind("Node", "nodes", namespaced=False),
        Kind("Pod", "pods"),
        Kind("ResourceQuota", "resourcequotas"),
        Kind("Secret", "secrets"),
        Kind("ServiceAccount", "serviceaccounts"),
    )
}


@dataclass(frozen=True)
class ApiRequest:
    """A request to the API server.

    Attributes:
        verb: Verb for messages: apply, read, list, watch or delete.
        kind: Kind of object.
        namespace: Namespace; empty for all namespaces.
        name: Name of the object; empty for a list.
        method: HTTP method.
        subresource: Subresource of the object, such as `log`, or a path below one, such as `proxy/metrics`.
        query: Query parameters; None and empty values are omitted.
        body: Body of the request.
    """

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    method: str = "GET"
    subresource: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: KubernetesObject | None = None

    @property
    def action(self) -> str:
        """Description of the request, such as `apply Job cats in team-a`."""
        part = f"the {self.subresource.rpartition('/')[2]} of " if self.subresource else ""
        namespace = f" in {self.namespace}" if self.kind.namespaced and self.namespace else ""
        target = f"{part}{self.kind.name} {self.name}" if self.name else self.kind.plural
        return f"{self.verb} {target}{namespace}"

    @property
    def path(self) -> str:
        """Path of the URL, with placeholders for `path_params`."""
        prefix = f"/apis/{self.kind.group}/v1" if self.kind.group else "/api/v1"
        namespace = "/namespaces/{namespace}" if self.kind.namespaced and self.namespace else ""
        name = "/{name}" if self.name else ""
        subresource = f"/{self.subresource}" if self.subresource else ""
        return f"{prefix}{namespace}/{self.kind.plural}{name}{subresource}"

    @property
    def path_params(self) -> dict[str, str]:
        """Values of the placeholders in `path`, not yet quoted."""
        return {"namespace": self.namespace, "name": self.name}

    @property
    def query_params(self) -> list[tuple[str, Any]]:
        """Query parameters that have a value."""
        return [(key, value) for key, value in self.query.items() if value not in (None, "")]
