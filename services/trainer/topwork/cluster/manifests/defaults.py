"""Default values for the job specs of a namespace, from the ConfigMap that the Helm chart creates."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from topwork.cluster.names import DEFAULTS_CONFIG_MAP, DEFAULTS_FILE
from topwork.errors import SettingError
from topwork.spec.loading.defaults import SECTIONS, STORAGE, SpecDefaults, flatten_defaults
from topwork.spec.loading.yaml_document import read_documents
from topwork.spec.messages import did_you_mean, format_value

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

DEFAULTS_SOURCE = f"configmap/{DEFAULTS_CONFIG_MAP}"
KEYS = ("image", "spec")


@dataclass(frozen=True)
class NamespaceDefaults:
    """Default image and spec values of a namespace.

    Attributes:
        image: Image of all containers.
        spec: Default values of spec keys.
    """

    image: str | None
    spec: SpecDefaults


def read_defaults(cluster: "Cluster") -> NamespaceDefaults | None:
    """Read the defaults of the namespace.

    Args:
        cluster: The cluster.

    Returns:
        The defaults; None if the namespace has no such ConfigMap.

    Raises:
        SettingError: If the account is not allowed to read the ConfigMap, or its content is not valid.
        UnavailableError: If the API server does not respond.
    """
    config_map = cluster.get("ConfigMap", DEFAULTS_CONFIG_MAP)
    return parse_defaults((config_map.get("data") or {}).get(DEFAULTS_FILE, "")) if config_map else None


def parse_defaults(text: str) -> NamespaceDefaults:
    """Parse the defaults of a namespace.

    Args:
        text: YAML mapping with `image`, and `spec` with `storage`, `compute` and `metrics`.

    Returns:
        The defaults.

    Raises:
        SettingError: If the text has a different structure.
    """
    data: Any = {}
    for document in read_documents(text):
        if document.issues:
            raise _error("", document.issues[0].message)
        data = document.data if document.data is not None else data
    _check_keys(data, "", KEYS)
    spec = data.get("spec") or {}
    _check_keys(spec, "spec", (STORAGE, *SECTIONS))
    for part in SECTIONS:
        _check_keys(spec.get(part) or {}, f"spec.{part}", None)
    image = data.get("image") or None
    if image is not None and not isinstance(image, str):
        raise _error("image", f"{format_value(image)} is not allowed. Allowed: text.")
    return NamespaceDefaults(image, SpecDefaults(DEFAULTS_SOURCE, flatten_defaults(spec)))


def _check_keys(data: Any, path: str, known: Iterable[str] | None) -> None:
    """Require a mapping, with known keys only unless `known` is None."""
    if not isinstance(data, dict):
        raise _error(path, f"{format_value(data)} is not allowed. Allowed: a mapping.")
    if known is None:
        return
    names = tuple(known)
    for key in data:
        if key not in names:
            message = f"unknown key.{did_you_mean(key, names)} Known keys: {', '.join(names)}."
            raise _error(f"{path}.{key}".lstrip("."), message)


def _error(path: str, message: str) -> SettingError:
    return SettingError(f"{DEFAULTS_SOURCE}: {DEFAULTS_FILE}: {path}{': ' if path else ''}{message}")
