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
        version: API version.
    """

    name: str
    plural: str
    group: str = ""
    namespaced: bool = True
    version: str = "v1"

    @property
    def api_version(self) -> str:
        """The apiVersion of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        """Path of its API version in URLs, such as `/apis/batch/v1`."""
        return f"/apis/{self.api_version}" if self.group else f"/api/{self.version}"


KINDS = {
    kind.name: kind
    for kind in (
        Kind("ConfigMap", "configmaps"),
        Kind("CustomResourceDefinition", "customresourcedefinitions", "apiextensions.k8s.io", namespaced=False),
        Kind("Event", "events"),
        Kind("Job", "jobs", "batch"),
        Kind("Lease", "leases", "coordination.k8s.io"),
        Kind("Namespace", "namespaces", namespaced=False),
        Kind("Node", "nodes", namespaced=False),
        Kind("NetworkPolicy", "networkpolicies", "networking.k8s.io"),
        Kind("Pod", "pods"),
        Kind("ResourceQuota", "resourcequotas"),
        Kind("Secret", "secrets"),
        Kind("Service", "services"),
        Kind("ServiceAccount", "serviceaccounts"),
        Kind("TransferJob", "transferjobs", "topwork.dev", version="v1alpha1"),
        Kind("TransferSearch", "transfersearches", "topwork.dev", version="v1alpha1"),
        Kind(
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
            "admissionregistration.k8s.io",
            namespaced=False,
        ),
    )
}


@dataclass(frozen=True)
class ApiRequest:
    """A request to the API server.

    Attributes:
        verb: Verb for messages: apply, create, update, read, list, watch or delete.
        kind: Kind of object.
        namespace: Namespace; empty for all namespaces.
        name: Name of the object; empty for a list.
        method: HTTP method.
        subresource: Subresource of the object, such as `log`, or a path below one, such as `proxy/metrics`.
        query: Query parameters; None and empty values are omitted.
        body: Body of the request.
        discovery: Whether to read the kinds that the API version serves, instead of objects.
    """

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    method: str = "GET"
    subresource: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: KubernetesObject | None = None
    discovery: bool = False

    @property
    def action(self) -> str:
        """Description of the request, such as `apply Job cats in team-a`."""
        if self.discovery:
            return f"{self.verb} the kinds of {self.kind.api_version}"
        part = f"the {self.subresource.rpartition('/')[2]} of " if self.subresource else ""
        namespace = f" in {self.namespace}" if self.kind.namespaced and self.namespace else ""
        target = f"{part}{self.kind.name} {self.name}" if self.name else self.kind.plural
        return f"{self.verb} {target}{namespace}"

    @property
    def path(self) -> str:
        """Path of the URL, with placeholders for `path_params`."""
        if self.discovery:
            return self.kind.path
        namespace = "/namespaces/{namespace}" if self.kind.namespaced and self.namespace else ""
        name = "/{name}" if self.name else ""
        subresource = f"/{self.subresource}" if self.subresource else ""
        return f"{self.kind.path}{namespace}/{self.kind.plural}{name}{subresource}"

    @property
    def path_params(self) -> dict[str, str]:
        """Values of the placeholders in `path`, not yet quoted."""
        return {"namespace": self.namespace, "name": self.name}

    @property
    def query_params(self) -> list[tuple[str, Any]]:
        """Query parameters that have a value."""
        return [(key, value) for key, value in self.query.items() if value not in (None, "")]
