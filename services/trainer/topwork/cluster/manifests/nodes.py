"""Additional objects and fields of a run on several nodes: host names, ports, placement, and access to the ports."""

from copy import deepcopy
from typing import Any

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import (
    COORDINATOR_PORTS,
    METRICS_PORTS,
    NODE_PORTS,
    StageName,
    labels,
    node_hosts,
    node_selector,
    object_name,
    service_name,
)
from topwork.spec import TransferJob
from topwork.spec.kubernetes_types import PREFERRED

PACK_WEIGHT = 100
"""Weight of `topology.pack` from 1 to 100, compared with that of other preferences of `compute.affinity`."""


def build_service(job: TransferJob) -> KubernetesObject:
    """Build the headless Service that gives each pod of a run a host name.

    Args:
        job: The job.

    Returns:
        A Service without namespace.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service_name(job), "labels": labels(job)},
        "spec": {
            "clusterIP": "None",
            # A pod is Ready only in its last container, but nodes also connect in the init container transfer.
            "publishNotReadyAddresses": True,
            "selector": node_selector(job),
            "ports": [
                {"name": port["name"], "port": port["containerPort"]}
                for stage in NODE_PORTS
                for port in node_ports(stage)
            ],
        },
    }


def build_network_policy(job: TransferJob) -> KubernetesObject:
    """Build the NetworkPolicy that lets only the pods of a run connect to each other.

    The servers between the nodes don't authenticate clients. All TCP ports are allowed, because NCCL chooses its own.
    The metrics ports remain open to all, as without a policy. Egress isn't restricted.

    Args:
        job: The job.

    Returns:
        A NetworkPolicy without namespace.
    """
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": object_name(job), "labels": labels(job)},
        "spec": {
            "podSelector": {"matchLabels": node_selector(job)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": node_selector(job)}}],
                    "ports": [{"protocol": "TCP"}],
                },
                {"ports": [{"protocol": "TCP", "port": port} for port in METRICS_PORTS.values()]},
            ],
        },
    }


def node_ports(stage: StageName) -> list[dict[str, Any]]:
    """List the container ports between the nodes in a stage."""
    if stage not in NODE_PORTS:
        return []
    return [
        {"name": f"grpc-{stage}", "containerPort": NODE_PORTS[stage]},
        {"name": f"tcp-{stage}", "containerPort": COORDINATOR_PORTS[stage]},
    ]


def node_variables(job: TransferJob, stage: StageName) -> list[dict[str, Any]]:
    """List the environment variables of connections between the nodes; Kubernetes adds JOB_COMPLETION_INDEX.

    Args:
        job: The job.
        stage: The stage of the container. `pull` gets the addresses of `transfer`: it needs only their number.
    """
    hosts, stage = node_hosts(job), stage if stage in NODE_PORTS else "transfer"
    return [
        {"name": "TOPWORK_NODES", "value": ",".join(f"{host}:{NODE_PORTS[stage]}" for host in hosts)},
        {"name": "TOPWORK_COORDINATOR", "value": f"{hosts[0]}:{COORDINATOR_PORTS[stage]}"},
        # With http_proxy or https_proxy, gRPC would connect to the nodes through that proxy and wait without limit. It
        # compares the suffix of each host.
        {"name": "no_grpc_proxy", "value": service_name(job)},
    ]


def node_pod_fields(job: TransferJob) -> dict[str, Any]:
    """Return the fields of a pod that give it a host name and place it relative to the other pods of the run."""
    topology = job.spec.compute.topology
    fields: dict[str, Any] = {"subdomain": service_name(job)}
    if topology and topology.spread:
        fields["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": topology.spread,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": node_selector(job)},
            }
        ]
    return fields


def build_affinity(job: TransferJob) -> dict[str, Any]:
    """Return the affinity of the spec, with the preference of `topology.pack`."""
    compute = job.spec.compute
    affinity = deepcopy(compute.affinity)
    if compute.topology and compute.topology.pack:
        term = {"topologyKey": compute.topology.pack, "labelSelector": {"matchLabels": node_selector(job)}}
        pods = affinity.setdefault("podAffinity", {})
        pods[PREFERRED] = [*pods.get(PREFERRED, ()), {"weight": PACK_WEIGHT, "podAffinityTerm": term}]
    return affinity
