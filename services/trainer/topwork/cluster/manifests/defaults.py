"""What jobs of a namespace don't have to say: the ConfigMap that the Helm chart makes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from topwork.cluster.names import DEFAULTS_CONFIG_MAP, DEFAULTS_FILE
from topwork.errors import SettingError
from topwork.spec.loading.defaults import PARTS, STORAGE, SpecDefaults, default_values
from topwork.spec.loading.yaml_document import read_documents
from topwork.spec.messages import hint, shown

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

SOURCE = f"configmap/{DEFAULTS_CONFIG_MAP}"
KEYS = ("image", "spec")


@dataclass(frozen=True)
class Defaults:
    """Defaults of a namespace.

    Attributes:
        image: Image of all containers.
        spec: Keys of the spec.
    """

    image: str | None
    spec: SpecDefaults


def read_defaults(cluster: "Cluster") -> Defaults | None:
    """Read the defaults of the namespace.

    Args:
        cluster: The cluster.

    Returns:
        The defaults; None where there are none.

    Raises:
        SettingError: If the account must not read them, or they are none.
        UnavailableError: If the API server does not answer.
    """
    found = cluster.get("ConfigMap", DEFAULTS_CONFIG_MAP)
    return parse_defaults((found.get("data") or {}).get(DEFAULTS_FILE, "")) if found else None


def parse_defaults(text: str) -> Defaults:
    """Read defaults from YAML.

    Args:
        text: A mapping with `image`, and `spec` with `storage`, `compute` and `metrics`.

    Returns:
        The defaults.

    Raises:
        SettingError: If the text is something else.
    """
    data: Any = {}
    for document in read_documents(text):
        if document.faults:
            raise _wrong("", document.faults[0].message)
        data = document.data if document.data is not None else data
    _check_keys(data, "", KEYS)
    spec = data.get("spec") or {}
    _check_keys(spec, "spec", (STORAGE, *PARTS))
    for part in PARTS:
        _check_keys(spec.get(part) or {}, f"spec.{part}", None)
    image = data.get("image") or None
    if image is not None and not isinstance(image, str):
        raise _wrong("image", f"{shown(image)} is not allowed. Allowed: text.")
    return Defaults(image, SpecDefaults(SOURCE, default_values(spec)))


def _check_keys(data: Any, path: str, known: Iterable[str] | None) -> None:
    if not isinstance(data, dict):
        raise _wrong(path, f"{shown(data)} is not allowed. Allowed: a mapping.")
    for key in data if known is not None else ():
        if key not in (names := tuple(known or ())):
            raise _wrong(f"{path}.{key}".lstrip("."), f"no such key.{hint(key, names)} Known: {', '.join(names)}.")


def _wrong(path: str, message: str) -> SettingError:
    return SettingError(f"{SOURCE}: {DEFAULTS_FILE}: {path}{': ' if path else ''}{message}")
