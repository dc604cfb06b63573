"""Conversion between the custom resource TransferSearch and the models of the spec."""

from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.transfer_job import plain_data, restore_switches
from topwork.spec.job import JobSpec
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import read_search_data
from topwork.spec.loading.paths import PathError, parse_path
from topwork.spec.search import TransferSearch


def parse_transfer_search(obj: KubernetesObject, defaults: SpecDefaults | None = None) -> TransferSearch:
    """Convert a custom resource to the model of its spec.

    Args:
        obj: The TransferSearch as the API server returns it. Its status, annotations and managed fields are ignored.
        defaults: Values for keys that the template does not set.

    Returns:
        The search.

    Raises:
        InvalidSpecError: With all problems, in the words of `topwork validate`.
    """
    data = restore_switches(plain_data(obj), (), TransferSearch)
    space = (data.get("spec") or {}).get("space")
    if isinstance(space, dict):
        data["spec"]["space"] = {name: _restore_parameter(name, parameter) for name, parameter in space.items()}
    return read_search_data(data, defaults)


def build_transfer_search(search: TransferSearch, namespace: str | None) -> KubernetesObject:
    """Convert a search to the custom resource to apply.

    Args:
        search: The search.
        namespace: Namespace of the object; None for that of the spec.

    Returns:
        The object with only the values that the spec sets, so that the defaults of the namespace apply to all others.
    """
    obj: KubernetesObject = search.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    # In a choice or a condition, null is a value.
    space = {
        name: parameter.model_dump(mode="json", by_alias=True, exclude_unset=True)
        for name, parameter in search.spec.space.items()
    }
    obj["spec"]["space"] = space
    if namespace:
        obj["metadata"]["namespace"] = namespace
    return obj


def _restore_parameter(name: str, parameter: Any) -> Any:
    """Turn booleans among the choices and conditions of a parameter back into on and off."""
    if not isinstance(parameter, dict):
        return parameter
    restored = dict(parameter)
    if isinstance(parameter.get("choice"), list):
        restored["choice"] = [_restore_value(name, value) for value in parameter["choice"]]
    if isinstance(parameter.get("when"), dict):
        restored["when"] = {other: _restore_value(other, value) for other, value in parameter["when"].items()}
    return restored


def _restore_value(name: str, value: Any) -> Any:
    try:
        return restore_switches(value, parse_path(name, JobSpec), JobSpec)
    except PathError:  # reported by the validation
        return value
