"""Conversion between the custom resource TransferJob and the models of the spec."""

from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import read_data
from topwork.spec.loading.yaml_document import Path
from topwork.spec.schema import key_types
from topwork.spec.spec_model import SpecModel

METADATA_KEYS = ("name", "namespace", "labels")
"""Keys of the metadata that concern the run. Annotations and the keys that the API server adds do not."""
SWITCHES = {True: "on", False: "off"}


def parse_transfer_job(obj: KubernetesObject, defaults: SpecDefaults | None = None) -> TransferJob:
    """Convert a custom resource to the model of its spec.

    Args:
        obj: The TransferJob as the API server returns it. Its status, annotations and managed fields are ignored.
        defaults: Values for keys that the spec does not set.

    Returns:
        The job.

    Raises:
        InvalidSpecError: With all problems, in the words of `topwork validate`.

    Example:
        >>> parse_transfer_job(cluster.get("TransferJob", "cats-vs-dogs")).run
        'cats-vs-dogs-5d41402a'
    """
    return read_data(restore_switches(plain_data(obj), (), TransferJob), defaults)


def plain_data(obj: KubernetesObject) -> dict[str, Any]:
    """Return the parts of a custom resource that its file contains."""
    metadata = obj.get("metadata") or {}
    known = {key: metadata[key] for key in METADATA_KEYS if metadata.get(key) is not None}
    return {key: value for key, value in obj.items() if key not in {"metadata", "status"}} | {"metadata": known}


def build_transfer_job(job: TransferJob, namespace: str | None) -> KubernetesObject:
    """Convert a job to the custom resource to apply.

    Args:
        job: The job.
        namespace: Namespace of the object; None for that of the spec.

    Returns:
        The object with only the values that the spec sets, so that the defaults of the namespace apply to all others.
    """
    obj: KubernetesObject = job.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    if namespace:
        obj["metadata"]["namespace"] = namespace
    return obj


def restore_switches(value: Any, path: Path, model: type[SpecModel]) -> Any:
    """Turn booleans back into on and off: kubectl and Helm parse YAML 1.1, in which these words are booleans.

    Args:
        value: Plain data.
        path: Its path in the model.
        model: Root of the path.
    """
    if isinstance(value, dict):
        return {key: restore_switches(inner, (*path, key), model) for key, inner in value.items()}
    if isinstance(value, list):
        return [restore_switches(item, (*path, index), model) for index, item in enumerate(value)]
    if isinstance(value, bool) and SWITCHES[value] in key_types.literal_values(key_types.types_at(model, path)):
        return SWITCHES[value]
    return value
