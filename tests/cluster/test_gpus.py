"""A node with two simulated GPUs: scheduling, resource requests, and two replicas of the CPU build."""

import json

import pytest
from tests.cluster.environment import EVENT_SECONDS, RUN_SECONDS
from tests.cluster.kubectl import Kubectl, wait_for

from topwork.cluster.names import GPU_RESOURCE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]


def gpus(node: dict[str, object]) -> int:
    return int(node["status"].get("allocatable", {}).get(GPU_RESOURCE, 0))


def set_gpus(kubectl: Kubectl, node: str, count: str | None) -> None:
    """Set the GPU capacity of a node, or remove it with None; the kubelet keeps unknown resources."""
    status = {"status": {"capacity": {GPU_RESOURCE: count}, "allocatable": {GPU_RESOURCE: count}}}
    kubectl("patch", "node", node, "--subresource=status", "--type=merge", "--patch", json.dumps(status))


@pytest.fixture
def two_gpus(cluster):
    """A node with two GPUs, which are simulated unless a node has real ones."""
    nodes = cluster.items("node")
    if any(gpus(node) for node in nodes):
        if max(map(gpus, nodes)) < 2:
            pytest.skip("no node has two GPUs; GPUs are not simulated on nodes that have some")
        yield
        return
    schedulable = [node for node in nodes if not node["spec"].get("unschedulable") and not node["spec"].get("taints")]
    assert schedulable, "every node is cordoned or tainted"
    name = schedulable[0]["metadata"]["name"]
    set_gpus(cluster, name, "2")
    try:
        wait_for(lambda: gpus(cluster.get("node", name)) == 2, f"two GPUs on {name}", seconds=EVENT_SECONDS)
        yield
    finally:
        set_gpus(cluster, name, None)


def test_two_gpus_train_two_replicas(make_run, topwork, two_gpus):
    run = make_run(compute={"gpus": 2})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 0, result.output
    pod = run.pods()[-1]
    requested = {
        container["name"]: {kind: amounts.get(GPU_RESOURCE) for kind, amounts in container["resources"].items()}
        for container in pod["spec"]["initContainers"] + pod["spec"]["containers"]
    }
    none, two = {"requests": None, "limits": None}, {"requests": "2", "limits": "2"}
    assert requested == {"pull": none, "transfer": two, "fine-tune": two}
    logs = topwork("logs", run.name, "--stage", "transfer")
    assert '"replicas": 2' in logs.stdout, logs.output
