"""`topwork top -n NAMESPACE`: runs of a cluster, read through the API server."""

import json
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer
from api_statuses import Fault
from sample_objects import NO_GPUS, PULLED, RUN, TRANSFERRED, running
from simulated_cluster import SimulatedCluster

from topwork.clients.prometheus.metrics import Metrics

POD = f"{RUN}-abcde"
FAST = ("--once", "--interval", "0.2", "-n", "team-a")
Topwork = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def simulated(api_server: ApiServer) -> SimulatedCluster:
    """A cluster with the Job of a run, and no pod yet."""
    api_server.put(sample_objects.job())
    return SimulatedCluster(api_server)


def start_metrics(stage: str = "transfer") -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job="flowers", run=RUN, stage=stage, version="1.2.3")
    metrics.set_planned_epochs(stage, 20)
    metrics.set_epoch(stage, 5)
    return metrics


def test_running_container_is_read_through_the_api_server(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    metrics = start_metrics()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.track_stage("transfer"):
        code, lines = topwork("top", "flowers", *FAST)
    assert code == 0, lines
    assert lines[0].startswith(f"{RUN} in namespace team-a: running, transfer for ")
    assert lines[1].startswith("  epoch          5/20  ━━━━━━╌")
    assert lines[-1] == f"  source         pod {POD}:9102"
    paths = {request.path for request in simulated.server.requests if "proxy" in request.path}
    assert paths == {f"/api/v1/namespaces/team-a/pods/{POD}%3A9102/proxy/metrics"}


def test_pending_run_is_shown_with_its_reason(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pending_pod(NO_GPUS)
    code, lines = topwork("top", *FAST)
    assert code == 0, lines
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert "nvidia.com/gpu" in lines[1]


def test_finished_run_is_shown_only_by_name(simulated: SimulatedCluster, topwork: Topwork):
    simulated.finish_run()
    assert topwork("top", *FAST) == (0, ["No runs in progress in namespace team-a."])
    code, lines = topwork("top", RUN, *FAST)
    assert (code, lines[0]) == (0, f"{RUN} in namespace team-a: succeeded, fine-tune")


def test_container_that_does_not_answer_is_shown_with_its_status_in_the_cluster(
    simulated: SimulatedCluster, topwork: Topwork
):
    simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)})
    code, lines = topwork("top", *FAST, "--json")
    (run,) = json.loads("\n".join(lines))
    assert (code, run["state"], run["stage"], run["epoch"]) == (75, "running", "fine-tune", None)
    assert f"read the metrics of Pod {POD}:9103 in team-a (503: error trying to reach service" in run["reason"]


def test_stopping_run_is_shown_while_its_process_still_answers(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)}, deleted=120)
    metrics = start_metrics()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.track_stage("transfer"):
        _, lines = topwork("top", *FAST)
    assert lines[0].startswith(f"{RUN} in namespace team-a: stopping, transfer")


def test_missing_permission_for_pods_is_reported(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    denied = api_statuses.rbac_denied("get", "pods/proxy", "team-a", f"{POD}:9102")
    simulated.server.inject(Fault(denied, path="/proxy"))
    assert topwork("top", *FAST) == (
        2,
        [
            "topwork: alice is not allowed to get pods/proxy in namespace team-a. Ask a cluster administrator for the "
            "role topwork-submitter of k8s/base, then check with: kubectl auth can-i get pods/proxy -n team-a"
        ],
    )


def test_unknown_run_is_reported_with_the_existing_runs(simulated: SimulatedCluster, topwork: Topwork):
    code, lines = topwork("top", "dogs", *FAST)
    assert (code, lines) == (2, [f"topwork: no job or run dogs in namespace team-a. Existing runs: {RUN}."])


def test_truncated_page_is_reported_and_read_again(simulated: SimulatedCluster, make_cluster: Callable[..., Any]):
    from topwork.cli.top.sources import ClusterSource

    simulated.put_pod(PULLED | {"transfer": running(100)})
    metrics = start_metrics()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    source = ClusterSource(make_cluster(), None)
    simulated.server.inject(Fault(cut_after_bytes=100, path="/proxy"))
    (broken,) = source.read(0.0)
    assert broken.epoch is None
    assert broken.reason
    (run,) = source.read(1.0)
    assert (run.epoch, run.reason) == (5, None)


@pytest.fixture
def two_nodes(api_server: ApiServer) -> SimulatedCluster:
    """A cluster with the Job of a run on two nodes, whose pods run the transfer stage."""
    job = sample_objects.job(nodes=2)
    api_server.put(job)
    for index in range(2):
        api_server.put(sample_objects.pod(PULLED | {"transfer": running(100)}, of=job, index=index))
    return SimulatedCluster(api_server)


def start_node(index: int) -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job="flowers", run=RUN, stage="transfer", version="1.2.3", node=index, nodes=2)
    metrics.set_planned_epochs("transfer", 20)
    metrics.set_epoch("transfer", 5)
    metrics.record_evaluation_speed(images=100, seconds=1.0 + index)
    return metrics


def test_pods_of_all_nodes_are_read(two_nodes: SimulatedCluster, topwork: Topwork):
    nodes = [start_node(index) for index in range(2)]
    for index, metrics in enumerate(nodes):
        two_nodes.server.pod_ports[f"{RUN}-{index}-abcde", 9102] = metrics.serve(0, "127.0.0.1")
    with nodes[0].track_stage("transfer"), nodes[1].track_stage("transfer"):
        code, lines = topwork("top", "flowers", *FAST)
    assert code == 0, lines
    assert lines[0].startswith(f"{RUN} in namespace team-a: running, transfer for ")
    assert [line for line in lines if line.startswith("  node")] == [
        f"  node 0         running, evaluates 100 images/s, {RUN}-0-abcde",
        f"  node 1         running, evaluates 50 images/s (slow node), {RUN}-1-abcde",
    ]
    assert lines[-1] == f"  source         pod {RUN}-0-abcde:9102"


def test_node_that_does_not_answer_is_shown_with_the_reason(two_nodes: SimulatedCluster, topwork: Topwork):
    metrics = start_node(0)
    two_nodes.server.pod_ports[f"{RUN}-0-abcde", 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.track_stage("transfer"):
        code, lines = topwork("top", "flowers", *FAST)
    assert code == 0, lines
    (node,) = (line for line in lines if line.startswith("  node 1"))
    assert node.startswith("  node 1         running: ")
    assert node.endswith(f", {RUN}-1-abcde")
