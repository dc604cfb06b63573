"""`topwork top -n NAMESPACE`: runs of a cluster, read through its API server."""

import json
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
import states
from api_server import ApiServer
from api_statuses import Fault
from played import Played
from states import NO_GPUS, PULLED, RUN, TRANSFERRED, running

from topwork.clients.prometheus.metrics import Metrics

POD = f"{RUN}-abcde"
FAST = ("--once", "--interval", "0.2", "-n", "team-a")
Topwork = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def played(api_server: ApiServer) -> Played:
    """A cluster with the Job of a run, and no pod yet."""
    api_server.put(states.job())
    return Played(api_server)


def training(stage: str = "transfer") -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.describe(job="flowers", run=RUN, stage=stage, version="1.2.3")
    metrics.epochs_planned(stage, 20)
    metrics.epoch(stage, 5)
    return metrics


def test_the_container_that_runs_is_read_through_the_api_server(played: Played, topwork: Topwork):
    played.pod(PULLED | {"transfer": running(100)})
    metrics = training()
    played.server.ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.stage("transfer"):
        code, lines = topwork("top", "flowers", *FAST)
    assert code == 0, lines
    assert lines[0].startswith(f"{RUN} in namespace team-a: running, transfer for ")
    assert lines[1].startswith("  epoch          5/20  ━━━━━━╌")
    assert lines[-1] == f"  read from      pod {POD}:9102"
    paths = {request.path for request in played.server.requests if "proxy" in request.path}
    assert paths == {f"/api/v1/namespaces/team-a/pods/{POD}%3A9102/proxy/metrics"}


def test_a_run_that_waits_says_why(played: Played, topwork: Topwork):
    played.pending(NO_GPUS)
    code, lines = topwork("top", *FAST)
    assert code == 0, lines
    assert lines[0] == f"{RUN} in namespace team-a: pending"
    assert "nvidia.com/gpu" in lines[1]


def test_a_run_that_is_over_is_not_among_those_under_way_and_tells_its_end_when_asked_for(
    played: Played, topwork: Topwork
):
    played.finish()
    assert topwork("top", *FAST) == (0, ["No run is under way in namespace team-a."])
    code, lines = topwork("top", RUN, *FAST)
    assert (code, lines[0]) == (0, f"{RUN} in namespace team-a: succeeded, fine-tune")


def test_a_container_whose_port_is_closed_is_shown_with_what_the_cluster_says(played: Played, topwork: Topwork):
    played.pod(TRANSFERRED | {"fine-tune": running(200)})
    code, lines = topwork("top", *FAST, "--json")
    (told,) = json.loads("\n".join(lines))
    assert (code, told["state"], told["stage"], told["epoch"]) == (0, "running", "fine-tune", None)
    assert f"read the metrics of Pod {POD}:9103 in team-a (503: error trying to reach service" in told["reason"]


def test_a_stop_is_told_while_the_process_still_serves(played: Played, topwork: Topwork):
    played.pod(PULLED | {"transfer": running(100)}, deleted=120)
    metrics = training()
    played.server.ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    with metrics.stage("transfer"):
        _, lines = topwork("top", *FAST)
    assert lines[0].startswith(f"{RUN} in namespace team-a: stopping, transfer")


def test_who_must_not_reach_pods_is_told_which_right_is_missing(played: Played, topwork: Topwork):
    played.pod(PULLED | {"transfer": running(100)})
    refusal = api_statuses.rbac("get", "pods/proxy", "team-a", f"{POD}:9102")
    played.server.plant(Fault(refusal, path="/proxy"))
    assert topwork("top", *FAST) == (
        2,
        [
            "topwork: alice may not get pods/proxy in the namespace team-a. Whoever runs the cluster can give you the "
            "role topwork-submitter of k8s/base; kubectl auth can-i get pods/proxy -n team-a says when it is there."
        ],
    )


def test_an_unknown_run_names_those_that_there_are(played: Played, topwork: Topwork):
    code, lines = topwork("top", "dogs", *FAST)
    assert (code, lines) == (2, [f"topwork: no job or run dogs in namespace team-a. There are: {RUN}."])


def test_a_page_that_is_cut_off_is_said_and_read_again(played: Played, make_cluster: Callable[..., Any]):
    from topwork.cli.top.sources import Pods

    played.pod(PULLED | {"transfer": running(100)})
    metrics = training()
    played.server.ports[POD, 9102] = metrics.serve(0, "127.0.0.1")
    pods = Pods(make_cluster(), None)
    played.server.plant(Fault(cut_after=100, path="/proxy"))
    (broken,) = pods.read(0.0)
    assert broken.epoch is None
    assert broken.reason
    (found,) = pods.read(1.0)
    assert (found.epoch, found.reason) == (5, None)
