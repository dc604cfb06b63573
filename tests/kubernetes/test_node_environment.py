"""The containers of a run on several nodes read their place among the nodes from the environment that is rendered."""

from typing import Any

import pytest
from test_render import make, pod

from topwork.cli.runtime.environment import read_node
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.names import COORDINATOR_PORTS, NODE_PORTS
from topwork.nodes.node import Node


def environment(container: dict[str, Any], index: int | None) -> dict[str, str]:
    """Return the variables of a container, with that of the Job controller."""
    variables = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    return variables | ({} if index is None else {"JOB_COMPLETION_INDEX": str(index)})


def containers(nodes: int) -> list[dict[str, Any]]:
    template = pod(render(make({"nodes": nodes, "prefetch": True}), RenderOptions()).training)
    return [*template["initContainers"], *template["containers"]]


@pytest.mark.parametrize("index", [0, 3])
def test_containers_know_their_node_and_the_addresses_of_all(index: int) -> None:
    for container in containers(4):
        node = read_node(environment(container, index))
        assert (node.index, node.count, node.is_chief) == (index, 4, index == 0)
        stage = "fine-tune" if container["name"] == "fine-tune" else "transfer"
        assert {address.rpartition(":")[2] for address in node.addresses} == {str(NODE_PORTS[stage])}
        assert node.coordinator == f"{node.addresses[0].rpartition(':')[0]}:{COORDINATOR_PORTS[stage]}"


def test_containers_of_a_single_node_and_of_the_prefetch_job_are_alone() -> None:
    prefetch = render(make({"nodes": 4, "prefetch": True}), RenderOptions()).prefetch
    assert prefetch
    for container in [*containers(1), *pod(prefetch)["containers"]]:
        assert read_node(environment(container, None)) == Node()
