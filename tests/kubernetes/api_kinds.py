"""Kinds of the API server used in tests, built in or defined by a CustomResourceDefinition."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

Object = dict[str, Any]
Path = tuple[str, ...]
ListKeys = tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of object and its place in the API.

    Attributes:
        name: Kind, such as Job.
        plural: Plural, as in paths.
        group: API group; empty for the core group.
        version: API version.
        namespaced: Whether its objects belong to a namespace.
        short_names: Short names for kubectl.
        categories: Categories for kubectl, such as `all`.
        has_status: Whether it has a `status` subresource.
        has_generation: Whether changes of the spec increase metadata.generation.
        definition: Its CustomResourceDefinition, if it has one.
    """

    name: str
    plural: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    has_status: bool = False
    has_generation: bool = False
    definition: Object | None = field(default=None, compare=False)

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full(self) -> str:
        """Plural and group, as in error messages: jobs.batch."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def schema(self) -> Object:
        """OpenAPI schema of a custom resource; empty for built-in kinds."""
        return self.served_version.get("schema", {}).get("openAPIV3Schema", {})

    @property
    def served_version(self) -> Object:
        """The entry of `spec.versions` of the CustomResourceDefinition; empty for built-in kinds."""
        versions = self.definition["spec"]["versions"] if self.definition else []
        return next((version for version in versions if version["name"] == self.version), {})

    def list_keys(self, path: Path) -> ListKeys | None:
        """Return how a list merges: by these keys, as a set (no keys), or not at all (None)."""
        if path == ("metadata", "ownerReferences"):
            return ("uid",)
        if path == ("metadata", "finalizers"):
            return ()
        schema = self._schema_at(path)
        list_type = schema.get("x-kubernetes-list-type")
        if list_type == "map":
            return tuple(schema["x-kubernetes-list-map-keys"])
        return () if list_type == "set" else None

    def is_atomic(self, path: Path) -> bool:
        """Return whether a mapping is one field."""
        return self._schema_at(path).get("x-kubernetes-map-type") == "atomic"

    def _schema_at(self, path: Path) -> Object:
        schema = self.schema
        for name in path:
            if name.startswith(("k:", "v:")):
                schema = schema.get("items", {})
            else:
                additional = schema.get("additionalProperties")
                schema = schema.get("properties", {}).get(name, additional if isinstance(additional, dict) else {})
        return schema


class Key(NamedTuple):
    kind: str
    namespace: str
    name: str


def kind_of_definition(definition: Object) -> Kind:
    """Return the kind that a CustomResourceDefinition defines, in its stored version."""
    spec = definition["spec"]
    version = next(version for version in spec["versions"] if version.get("storage"))
    names = spec["names"]
    return Kind(
        names["kind"],
        names["plural"],
        spec["group"],
        version["name"],
        spec["scope"] == "Namespaced",
        tuple(names.get("shortNames", ())),
        tuple(names.get("categories", ())),
        has_status="status" in version.get("subresources", {}),
        has_generation=True,
        definition=definition,
    )


KINDS = {
    kind.name: kind
    for kind in (
        Kind("Job", "jobs", "batch", categories=("all",), has_status=True, has_generation=True),
        Kind("ConfigMap", "configmaps", short_names=("cm",)),
        Kind("Pod", "pods", short_names=("po",), categories=("all",), has_status=True),
        Kind("Event", "events", short_names=("ev",)),
        Kind("ResourceQuota", "resourcequotas", short_names=("quota",), has_status=True),
        Kind("Secret", "secrets"),
        Kind("ServiceAccount", "serviceaccounts", short_names=("sa",)),
        Kind("Namespace", "namespaces", namespaced=False, short_names=("ns",), has_status=True),
        Kind("Node", "nodes", namespaced=False, short_names=("no",), has_status=True),
        Kind("Lease", "leases", "coordination.k8s.io"),
        Kind("Service", "services", short_names=("svc",), categories=("all",), has_status=True),
        Kind("Deployment", "deployments", "apps", has_status=True, has_generation=True),
        Kind("StatefulSet", "statefulsets", "apps", has_status=True, has_generation=True),
        Kind("Role", "roles", "rbac.authorization.k8s.io"),
        Kind("RoleBinding", "rolebindings", "rbac.authorization.k8s.io"),
        Kind("ClusterRole", "clusterroles", "rbac.authorization.k8s.io", namespaced=False),
        Kind("ClusterRoleBinding", "clusterrolebindings", "rbac.authorization.k8s.io", namespaced=False),
        Kind("NetworkPolicy", "networkpolicies", "networking.k8s.io", short_names=("netpol",), has_generation=True),
        Kind("PodDisruptionBudget", "poddisruptionbudgets", "policy", has_status=True, has_generation=True),
        Kind(
            "CustomResourceDefinition",
            "customresourcedefinitions",
            "apiextensions.k8s.io",
            namespaced=False,
            short_names=("crd", "crds"),
            has_status=True,
            has_generation=True,
        ),
        Kind(
            "ValidatingWebhookConfiguration",
            "validatingwebhookconfigurations",
            "admissionregistration.k8s.io",
            namespaced=False,
            has_generation=True,
        ),
    )
}
