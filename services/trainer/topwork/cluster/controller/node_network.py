"""The Service and the NetworkPolicy that connect the nodes of a run: whether they exist, and their deletion."""

from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import service_name_of_run
from topwork.cluster.status.objects import name_of, node_count

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


def read_network(cluster: "Cluster", run: str) -> list[KubernetesObject]:
    """Read the existing Service and NetworkPolicy with the names of those of a run."""
    found = (cluster.get(kind, name) for kind, name in _names(run))
    return [obj for obj in found if obj]


def has_network(cluster: "Cluster", job: KubernetesObject) -> bool:
    """Return whether the nodes of a Job are connected: a Job on one node needs no other objects."""
    return node_count(job) == 1 or all(cluster.get(kind, name) for kind, name in _names(name_of(job)))


def delete_network(cluster: "Cluster", job: KubernetesObject) -> None:
    """Delete what connects the nodes of a Job; nothing for a Job on one node."""
    if node_count(job) > 1:
        for kind, name in _names(name_of(job)):
            cluster.delete(kind, name)


def _names(run: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("Service", service_name_of_run(run)), ("NetworkPolicy", run)
