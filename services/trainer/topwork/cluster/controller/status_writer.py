"""Writes the status of a custom resource."""

from typing import TYPE_CHECKING

from pydantic import BaseModel

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import CONTROLLER_MANAGER

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


def write_status(cluster: "Cluster", obj: KubernetesObject, status: BaseModel) -> KubernetesObject:
    """Write the status of a custom resource, unless the object was changed since it was read.

    Args:
        cluster: The cluster, with the namespace of the object.
        obj: The object, as read from the API server.
        status: Its status.

    Returns:
        The stored object.

    Raises:
        ConflictError: If the object was changed, or another one was created under its name.
    """
    # The status must not end up in another object that was created under this name in the meantime.
    metadata = {key: obj["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
    content = {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "metadata": metadata,
        "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    return cluster.apply(content, manager=CONTROLLER_MANAGER, force=True, subresource="status")
