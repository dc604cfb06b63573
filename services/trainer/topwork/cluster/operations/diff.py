"""What a new submission would change of a Job that is there, key by key."""

from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_FILE
from topwork.cluster.status.objects import containers

ABSENT = "not set"
MOST_SHOWN = 6


def differences(
    before: tuple[KubernetesObject | None, KubernetesObject], after: tuple[KubernetesObject, KubernetesObject]
) -> str:
    """Say what differs between what is there and what would be applied.

    Args:
        before: ConfigMap (None where it is gone) and Job that are there.
        after: ConfigMap and Job that would be applied.

    Returns:
        The keys of the spec and the image, each with its old and its new value.
    """
    found = list(_differences(_spec(before[0]), _spec(after[0]))) if before[0] else []
    old, new = _image(before[1]), _image(after[1])
    if old != new:
        found.append(f"the image is {old}, now {new}")
    if not found:
        old, new = (job["metadata"]["labels"].get("app.kubernetes.io/version") for job in (before[1], after[1]))
        found = [f"topwork {old} has rendered it, now it is {new}" if old != new else "its manifest was changed"]
    more = f", and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return ", ".join(found[:MOST_SHOWN]) + more


def _spec(config_map: KubernetesObject) -> Any:
    try:
        return YAML(typ="safe").load((config_map.get("data") or {}).get(JOB_FILE) or "")
    except YAMLError:
        return None


def _image(job: KubernetesObject) -> str | None:
    return next((str(found.spec.get("image")) for found in containers(job["spec"]["template"])), None)


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(before.get(key, ABSENT), after.get(key, ABSENT), below)
    elif before != after and path:
        yield f"{path} is {_shown(before)}, now {_shown(after)}"


def _shown(value: Any) -> str:
    return "off" if value is False else "on" if value is True else str(value)
