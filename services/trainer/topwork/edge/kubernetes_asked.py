"""What can be asked of an API server: kinds of objects, and requests about them."""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind lie in the API."""

    name: str
    plural: str
    group: str = ""
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As manifests name it."""
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
class Asked:
    """What is asked of the API server.

    Attributes:
        verb: In words: apply, read, list, watch, delete.
        kind: Kind of object.
        namespace: Namespace; empty: all.
        name: Name of the object; empty: all.
        method: HTTP method.
        part: Part of the object, such as `log`, or a path below it, such as `proxy/metrics`.
        query: Parameters; those that are None or empty are left out.
        body: Body, as a plain object.
    """

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    method: str = "GET"
    part: str = ""
    query: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None

    @property
    def what(self) -> str:
        """In words, to follow `could not`."""
        of = f"the {self.part.rpartition('/')[2]} of {self.kind.name}" if self.part else self.kind.name
        where = f" in {self.namespace}" if self.kind.namespaced and self.namespace else ""
        return f"{self.verb} {of} {self.name}{where}" if self.name else f"{self.verb} {self.kind.plural}{where}"

    @property
    def path(self) -> str:
        """Path and query of the URL."""
        kind = self.kind
        parts = ["apis", kind.group, "v1"] if kind.group else ["api", "v1"]
        if kind.namespaced and self.namespace:
            parts += ["namespaces", self.namespace]
        parts += [each for each in (kind.plural, self.name, *self.part.split("/")) if each]
        query = urlencode({key: value for key, value in self.query.items() if value not in (None, "")})
        return "/" + "/".join(quote(part, safe="") for part in parts) + (f"?{query}" if query else "")
