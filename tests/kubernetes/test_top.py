"""`topwork top -n NAMESPACE`: runs of a cluster, read through its API server."""

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


def training(stage: str = "transfer") -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job="flowers", run=RUN, stage=stage, version="1.2.3")
    metrics.set_planned_epochs(stage, 20)
    metrics.set_epoch(stage, 5)
    return metrics


def test_the_container_that_runs_is_read_through_the_api_server(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    metrics = training()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.track_stage("transfer"):
        code, lines = topwork("top", "flowers", *FAST)
    assert code == 0, lines
    assert lines[0].startswith(f"{RUN} in namespace team-a: running, transfer for ")
    assert lines[1].startswith("  epoch          5/20  ━━━━━━╌")
    assert lines[-1] == f"  read from      pod {POD}:9102"
    paths = {request.path for request in simulated.server.requests if "proxy" in request.path}
    assert paths == {f"/api/v1/namespaces/team-a/pods/{POD}%3A9102/proxy/metrics"}


def test_a_run_that_waits_says_why(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pending_pod(NO_GPUS)
    code, lines = topwork("top", *FAST)
    assert code == 0, lines
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert "nvidia.com/gpu" in lines[1]


def test_a_run_that_is_over_is_not_among_those_under_way_and_tells_its_end_when_asked_for(
    simulated: SimulatedCluster, topwork: Topwork
):
    simulated.finish_run()
    assert topwork("top", *FAST) == (0, ["No run is under way in namespace team-a."])
    code, lines = topwork("top", RUN, *FAST)
    assert (code, lines[0]) == (0, f"{RUN} in namespace team-a: succeeded, fine-tune")


def test_a_container_whose_port_is_closed_is_shown_with_what_the_cluster_says(
    simulated: SimulatedCluster, topwork: Topwork
):
    simulated.put_pod(TRANSFERRED | {"fine-tune": running(200)})
    code, lines = topwork("top", *FAST, "--json")
    (told,) = json.loads("\n".join(lines))
    assert (code, told["state"], told["stage"], told["epoch"]) == (0, "running", "fine-tune", None)
    assert f"read the metrics of Pod {POD}:9103 in team-a (503: error trying to reach service" in told["reason"]


def test_a_stop_is_told_while_the_process_still_serves(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)}, deleted=120)
    metrics = training()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.track_stage("transfer"):
        _, lines = topwork("top", *FAST)
    assert lines[0].startswith(f"{RUN} in namespace team-a: stopping, transfer")


def test_who_must_not_reach_pods_is_told_which_right_is_missing(simulated: SimulatedCluster, topwork: Topwork):
    simulated.put_pod(PULLED | {"transfer": running(100)})
    refusal = api_statuses.rbac_denied("get", "pods/proxy", "team-a", f"{POD}:9102")
    simulated.server.inject(Fault(refusal, path="/proxy"))
    assert topwork("top", *FAST) == (
        2,
        [
            "topwork: alice may not get pods/proxy in the namespace team-a. Whoever runs the cluster can give you the "
            "role topwork-submitter of k8s/base; kubectl auth can-i get pods/proxy -n team-a says when it is there."
        ],
    )


def test_an_unknown_run_names_those_that_there_are(simulated: SimulatedCluster, topwork: Topwork):
    code, lines = topwork("top", "dogs", *FAST)
    assert (code, lines) == (2, [f"topwork: no job or run dogs in namespace team-a. There are: {RUN}."])


def test_a_page_that_is_cut_off_is_said_and_read_again(simulated: SimulatedCluster, make_cluster: Callable[..., Any]):
    from topwork.cli.top.sources import Pods

    simulated.put_pod(PULLED | {"transfer": running(100)})
    metrics = training()
    simulated.server.pod_ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    pods = Pods(make_cluster(), None)
    simulated.server.inject(Fault(cut_after_bytes=100, path="/proxy"))
    (broken,) = pods.read(0.0)
    assert broken.epoch is None
    assert broken.reason
    (found,) = pods.read(1.0)
    assert (found.epoch, found.reason) == (5, None)
