"""Differences between a submitted run and a new submission, key by key."""

from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import JOB_FILE
from topwork.cluster.status.objects import stage_containers
from topwork.spec import TransferJob
from topwork.spec.yaml_output import job_to_dict

NOT_SET = "not set"
MAX_LISTED = 6


def describe_diff(
    before: tuple[KubernetesObject | None, KubernetesObject], after: tuple[KubernetesObject, KubernetesObject]
) -> str:
    """Describe how the objects in the cluster differ from those of a new submission.

    Args:
        before: ConfigMap (None if it was deleted) and Job in the cluster.
        after: ConfigMap and Job of the new submission.

    Returns:
        The spec keys and the image that differ, with old and new values, such as `spec.compute.gpus: 2 → 1`.
    """
    changes = list(_compare(_read_spec(before[0]), _read_spec(after[0]))) if before[0] else []
    changes += _change("image", _image(before[1]), _image(after[1]))
    if not changes:
        versions = (job["metadata"]["labels"].get("app.kubernetes.io/version") for job in (before[1], after[1]))
        changes = _change("topwork version", *versions) or ["the Job itself was modified"]
    return _join(changes)


def describe_spec_diff(before: TransferJob, after: TransferJob) -> str:
    """Describe how two specs differ, in the form of `describe_diff`."""
    return _join(list_spec_diff(before, after))


def list_spec_diff(before: TransferJob, after: TransferJob) -> list[str]:
    """List all keys in which two specs differ, such as `spec.compute.gpus: 2 → 1`."""
    return list(_compare(job_to_dict(before)["spec"], job_to_dict(after)["spec"], "spec"))


def _join(changes: list[str]) -> str:
    more = f", and {len(changes) - MAX_LISTED} more" if len(changes) > MAX_LISTED else ""
    return ", ".join(changes[:MAX_LISTED]) + more


def _read_spec(config_map: KubernetesObject) -> Any:
    try:
        return YAML(typ="safe").load((config_map.get("data") or {}).get(JOB_FILE) or "")
    except YAMLError:
        return None


def _image(job: KubernetesObject) -> str | None:
    containers = stage_containers(job["spec"]["template"])
    return next((str(container.spec.get("image")) for container in containers), None)


def _compare(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            key_path = f"{path}.{key}" if path else str(key)
            yield from _compare(before.get(key, NOT_SET), after.get(key, NOT_SET), key_path)
    elif path:
        yield from _change(path, before, after)


def _change(name: str, before: Any, after: Any) -> list[str]:
    return [f"{name}: {_format(before)} → {_format(after)}"] if before != after else []


def _format(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
