"""Rendering a run on several nodes: addresses, ports, retries, placement, and who may connect to which port."""

import re
from typing import Any

import pytest
from object_validation import assert_valid_object
from test_render import DNS_LABEL, MAX_LENGTH, POD_SUFFIX, make, pod

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import COORDINATOR_PORTS, METRICS_PORTS, NODE_PORTS

# A Service needs a name of RFC 1035: it begins with a letter.
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
CLOSED_PORTS = [*NODE_PORTS.values(), *COORDINATOR_PORTS.values(), 1, 40000, 65535]


def render_nodes(nodes: int = 2, name: str = "cats-vs-dogs", **compute: Any) -> RenderedObjects:
    return render(make({"nodes": nodes, **compute}, name), RenderOptions())


def containers(rendered: RenderedObjects) -> dict[str, dict[str, Any]]:
    template = pod(rendered.training)
    return {container["name"]: container for container in template["initContainers"] + template["containers"]}


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}


def service_of(rendered: RenderedObjects) -> KubernetesObject:
    assert rendered.service
    return rendered.service


def pod_labels(job: KubernetesObject | None) -> dict[str, str]:
    assert job
    labels: dict[str, str] = job["spec"]["template"]["metadata"]["labels"]
    return labels


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() == {"matchLabels"}
    return selector["matchLabels"].items() <= labels.items()


def is_admitted(
    policy: KubernetesObject | None, target: dict[str, str], port: int, source: dict[str, str] | None, protocol: str
) -> bool:
    """Evaluate a NetworkPolicy.

    Args:
        policy: The policy.
        target: Labels of the pod to which the source connects.
        port: Port of the target.
        source: Labels of a pod in the same namespace; None for a source outside it.
        protocol: TCP or UDP.
    """
    assert policy
    spec = policy["spec"]
    if not matches(spec["podSelector"], target) or "Ingress" not in spec["policyTypes"]:
        return True
    for rule in spec["ingress"]:
        peers = [peer["podSelector"] for peer in rule.get("from", ())]
        is_source = not peers or (source is not None and any(matches(peer, source) for peer in peers))
        is_port = any(item["protocol"] == protocol and item.get("port", port) == port for item in rule["ports"])
        if is_source and is_port:
            return True
    return False


def test_single_node_is_rendered_as_if_the_key_did_not_exist() -> None:
    """A changed Job would have another digest, so `submit` would report other settings for each running Job."""
    rendered = render_nodes(1, prefetch=True)
    assert rendered == render(make({"prefetch": True}), RenderOptions())
    assert (rendered.service, rendered.network_policy) == (None, None)
    assert [obj["kind"] for obj in rendered.objects] == ["ConfigMap", "Job", "Job"]
    assert "nodes" not in rendered.config_map["data"]["job.yaml"]
    spec = rendered.training["spec"]
    assert not {"completionMode", "successPolicy"} & spec.keys()
    assert not {"subdomain", "topologySpreadConstraints"} & pod(rendered.training).keys()
    for container in containers(rendered).values():
        assert not {"TOPWORK_NODES", "TOPWORK_COORDINATOR", "no_grpc_proxy"} & variables(container).keys()
        assert [port["containerPort"] for port in container["ports"]] == [METRICS_PORTS[container["name"]]]


def test_objects_come_before_the_job_that_needs_them() -> None:
    kinds = [obj["kind"] for obj in render_nodes(prefetch=True).objects]
    assert kinds == ["ConfigMap", "Service", "NetworkPolicy", "Job", "Job"]


def test_job_is_indexed_and_complete_when_node_0_has_published() -> None:
    spec = render_nodes(4, retries=5).training["spec"]
    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"]) == (4, 4)
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize(("nodes", "retries", "limit"), [(1, 3, 3), (2, 3, 6), (64, 100, 6400), (64, 0, 0)])
def test_retries_are_those_of_all_nodes(nodes: int, retries: int, limit: int) -> None:
    spec = render(make({"nodes": nodes, "retries": retries}), RenderOptions()).training["spec"]
    assert spec["backoffLimit"] == limit
    assert "backoffLimitPerIndex" not in spec


def test_prefetch_job_is_that_of_a_run_on_one_node() -> None:
    one, two = (render_nodes(nodes, prefetch=True).prefetch for nodes in (1, 2))
    assert one
    assert two
    assert two["spec"] == one["spec"]


def test_every_stage_knows_the_hosts_of_all_nodes() -> None:
    rendered = render_nodes(4)
    run, domain = rendered.training["metadata"]["name"], service_of(rendered)["metadata"]["name"]
    hosts = [f"{run}-{index}.{domain}" for index in range(4)]
    assert pod(rendered.training)["subdomain"] == domain
    for stage, container in containers(rendered).items():
        used = "fine-tune" if stage == "fine-tune" else "transfer"
        assert variables(container)["TOPWORK_NODES"] == ",".join(f"{host}:{NODE_PORTS[used]}" for host in hosts)
        assert variables(container)["TOPWORK_COORDINATOR"] == f"{hosts[0]}:{COORDINATOR_PORTS[used]}"


def test_nodes_do_not_connect_through_a_proxy() -> None:
    """The Secret with the storage settings may set https_proxy, which gRPC uses unless the host has a listed suffix."""
    for container in containers(render_nodes()).values():
        values = variables(container)
        for address in values["TOPWORK_NODES"].split(","):
            assert address.rpartition(":")[0].endswith(values["no_grpc_proxy"])


def test_index_is_left_to_kubernetes() -> None:
    """The Job controller adds JOB_COMPLETION_INDEX to all containers, unless they set it."""
    for container in containers(render_nodes()).values():
        assert "JOB_COMPLETION_INDEX" not in {variable["name"] for variable in container["env"]}


def test_each_port_belongs_to_one_container() -> None:
    rendered = render_nodes()
    ports = [port for container in containers(rendered).values() for port in container["ports"]]
    assert len({port["containerPort"] for port in ports}) == len(ports) == 7
    assert len({port["name"] for port in ports}) == len(ports)
    # The limit of the name of a container port.
    assert max(len(port["name"]) for port in ports) <= 15
    assert {port["port"] for port in service_of(rendered)["spec"]["ports"]} == {
        port["containerPort"] for port in ports
    } - set(METRICS_PORTS.values())


def test_service_resolves_pods_that_are_not_ready() -> None:
    """Nodes connect in the init container transfer, too, in which no pod is Ready."""
    spec = service_of(render_nodes())["spec"]
    assert spec["clusterIP"] == "None"
    assert spec["publishNotReadyAddresses"] is True


@pytest.mark.parametrize("name", ["a", "4", "a" * 40, "9" * 40])
def test_names_of_64_nodes_are_valid_for_any_job_name(name: str) -> None:
    rendered = render_nodes(64, name)
    for obj in rendered.objects:
        assert_valid_object(obj)
    assert SERVICE_NAME.fullmatch(service_of(rendered)["metadata"]["name"])
    assert len(service_of(rendered)["metadata"]["name"]) <= MAX_LENGTH
    addresses = variables(containers(rendered)["transfer"])["TOPWORK_NODES"].split(",")
    assert len(set(addresses)) == 64
    for address in addresses:
        host, domain = address.split(":")[0].split(".")
        assert DNS_LABEL.fullmatch(host)
        assert domain == service_of(rendered)["metadata"]["name"]
        assert len(host) + POD_SUFFIX <= MAX_LENGTH


def test_service_and_policy_select_only_the_training_pods_of_the_run() -> None:
    rendered, other = render_nodes(prefetch=True), render_nodes(name="other")
    assert rendered.network_policy
    selector = service_of(rendered)["spec"]["selector"]
    assert rendered.network_policy["spec"]["podSelector"] == {"matchLabels": selector}
    assert selector.items() <= pod_labels(rendered.training).items()
    assert not selector.items() <= pod_labels(rendered.prefetch).items()
    assert not selector.items() <= pod_labels(other.training).items()


@pytest.mark.parametrize("port", CLOSED_PORTS)
def test_only_pods_of_the_same_run_reach_the_ports_between_nodes(port: int) -> None:
    rendered, other = render_nodes(prefetch=True), render_nodes(name="other")
    own = pod_labels(rendered.training)
    assert is_admitted(rendered.network_policy, own, port, own, "TCP")
    for source in (None, {}, {"app": "prometheus"}, pod_labels(other.training), pod_labels(rendered.prefetch)):
        assert not is_admitted(rendered.network_policy, own, port, source, "TCP")


@pytest.mark.parametrize("port", METRICS_PORTS.values())
def test_everyone_reaches_the_metrics(port: int) -> None:
    rendered = render_nodes()
    for source in (None, {}, {"app": "prometheus"}):
        assert is_admitted(rendered.network_policy, pod_labels(rendered.training), port, source, "TCP")
        assert not is_admitted(rendered.network_policy, pod_labels(rendered.training), port, source, "UDP")


def test_policy_does_not_restrict_egress_or_other_pods() -> None:
    rendered, other = render_nodes(prefetch=True), render_nodes(name="other")
    assert rendered.network_policy
    assert rendered.network_policy["spec"]["policyTypes"] == ["Ingress"]
    for target in (pod_labels(rendered.prefetch), pod_labels(other.training)):
        assert is_admitted(rendered.network_policy, target, 9112, None, "TCP")


def test_topology_adds_preferences_to_those_of_the_spec() -> None:
    term = {"topologyKey": "rack", "labelSelector": {"matchLabels": {"app": "cache"}}}
    own = {"weight": 7, "podAffinityTerm": term}
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    affinity = {"nodeAffinity": {}, "podAffinity": {preferred: [own]}}
    rendered = render_nodes(topology={"pack": "zone", "spread": "host"}, affinity=affinity)
    selector = {"matchLabels": service_of(rendered)["spec"]["selector"]}
    pack = {"weight": 100, "podAffinityTerm": {"topologyKey": "zone", "labelSelector": selector}}
    assert pod(rendered.training)["affinity"] == {"nodeAffinity": {}, "podAffinity": {preferred: [own, pack]}}
    assert pod(rendered.training)["topologySpreadConstraints"] == [
        {"maxSkew": 1, "topologyKey": "host", "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector}
    ]


@pytest.mark.parametrize(
    ("topology", "fields"),
    [
        (None, set()),
        ({}, set()),
        ({"pack": "zone"}, {"affinity"}),
        ({"spread": "zone"}, {"topologySpreadConstraints"}),
    ],
)
def test_topology_adds_only_what_it_sets(topology: dict[str, str] | None, fields: set[str]) -> None:
    rendered = render_nodes(topology=topology)
    assert {"affinity", "topologySpreadConstraints"} & pod(rendered.training).keys() == fields


def test_no_job_allows_partial_admission() -> None:
    """Kueue admits fewer pods only with an annotation on the Job: annotations of the spec are those of its pods."""
    annotation = "kueue.x-k8s.io/job-min-parallelism"
    rendered = render_nodes(queue="team-a", annotations={annotation: "1"})
    assert annotation not in rendered.training["metadata"]["annotations"]
