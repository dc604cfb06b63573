"""The defaults of the namespaces that jobs are submitted to."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from topwork.cluster.manifests.defaults import DEFAULTS_SOURCE, NamespaceDefaults, read_defaults
from topwork.spec.kubernetes_types import NAMESPACE
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import Spec
from topwork.spec.loading.overrides import parse_overrides
from topwork.spec.loading.problems import format_path
from topwork.spec.loading.yaml_document import Path
from topwork.spec.messages import format_value

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


class DefaultsByNamespace(SpecDefaults):
    """Fills in the defaults of the namespace that each document is submitted to, and reads them once.

    Args:
        cluster: The cluster.
        namespace: Namespace of all documents; None for that in their metadata, or that of the cluster.
        report: Called with a note if the account may not read the defaults of a namespace.
    """

    def __init__(
        self, cluster: "Cluster", namespace: str | None, report: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(DEFAULTS_SOURCE, {})
        self._filled: list[set[Path]] = []
        self._report = report
        self._cluster, self._namespace = cluster, namespace
        self._defaults: dict[str, NamespaceDefaults | None] = {}

    def fill(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], set[Path]]:
        """See `SpecDefaults.fill`."""
        metadata = data.get("metadata")
        namespace = metadata.get("namespace") if isinstance(metadata, dict) else None
        defaults = self.of(namespace if isinstance(namespace, str) and re.fullmatch(NAMESPACE, namespace) else None)
        result, filled = defaults.spec.fill(data) if defaults else (deepcopy(dict(data)), set())
        self._filled.append(filled)
        return result, filled

    def filled_paths(self, overrides: Sequence[str], specs: Sequence[Spec]) -> list[frozenset[Path]]:
        """Return the paths that were filled into each document, and that no override replaces.

        Args:
            overrides: The overrides that were applied to all documents.
            specs: The documents that were read, in order.
        """

        def kept(filled: set[Path], spec: Spec) -> frozenset[Path]:
            replaced = [override.path for override in parse_overrides(overrides, type(spec))]
            return frozenset(
                path for path in filled if not any(path[: len(other)] == other[: len(path)] for other in replaced)
            )

        return [kept(filled, spec) for filled, spec in zip(self._filled, specs, strict=True)]

    def of(self, namespace: str | None) -> NamespaceDefaults | None:
        """Return the defaults of a namespace; None without any, or if the account may not read them."""
        namespace = self._namespace or namespace or self._cluster.namespace
        if namespace not in self._defaults:
            self._defaults[namespace] = self._read(namespace)
        return self._defaults[namespace]

    def image_of(self, namespace: str | None) -> str | None:
        """Return the image that is the default of a namespace."""
        defaults = self.of(namespace)
        return defaults.image if defaults else None

    def describe_used(self, *, with_image: bool) -> list[str]:
        """Describe the values that come from the defaults of each namespace."""
        lines = []
        for defaults in filter(None, self._defaults.values()):
            used = [f"image {defaults.image}"] if defaults.image and with_image else []
            for path, value in defaults.spec.values.items():
                if path in defaults.spec.used:
                    used.append(f"{format_path(path)} {format_value(value)}")
            if used:
                lines.append(f"from {DEFAULTS_SOURCE}: {', '.join(used)}")
        return lines

    def _read(self, namespace: str) -> NamespaceDefaults | None:
        from topwork.clients.kubernetes.errors import ForbiddenError

        try:
            return read_defaults(self._cluster.in_namespace(namespace))
        except ForbiddenError as error:
            self._report(f"{DEFAULTS_SOURCE} is ignored: {error}")
            return None
