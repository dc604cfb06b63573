"""The simulated Job controller and kubelet run Indexed Jobs as Kubernetes does, and several nodes as topwork does."""

import copy
from typing import Any

import pytest
import sample_objects
from api_server import NAMESPACE, ApiServer
from simulated_controllers import SimulatedControllers

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import SettingError
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.termination_message import parse_termination_message

RUN = sample_objects.RUN
Object = dict[str, Any]


@pytest.fixture
def controllers(api_server: ApiServer) -> SimulatedControllers:
    """Controllers without a thread, whose stages take 60 s of a clock that the test moves."""
    return SimulatedControllers(api_server, stage_seconds=60, shutdown_seconds=10)


def job(nodes: int = 2, **spec: Any) -> Object:
    rendered = render(sample_objects.transfer_job(nodes=nodes), RenderOptions("topwork:1", NAMESPACE))
    training = copy.deepcopy(rendered.training)
    training["spec"] |= spec
    return training


def conditions(server: ApiServer) -> dict[str, str]:
    stored = server.get("Job", RUN)
    assert stored
    return {item["type"]: item["reason"] for item in stored["status"].get("conditions", [])}


def pods(server: ApiServer) -> dict[str, tuple[str, list[str]]]:
    """Phase and states of the containers by name of the pod, without its random end."""
    found = {}
    for pod in server.list("Pod"):
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        states = [next(iter(status["state"])) for status in statuses]
        found[pod["metadata"]["name"].rpartition("-")[0]] = pod["status"]["phase"], states
    return found


def exit_codes(controllers: SimulatedControllers) -> list[tuple[int, int]]:
    """Index and exit code of the pods that ended, in order of their creation."""
    return [(pod.index, pod.exit_code) for pod in controllers.pods if pod.ended is not None]


def test_each_index_has_a_pod_with_its_identity(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.settle()
    for index, pod in enumerate(sorted(api_server.list("Pod"), key=lambda pod: str(pod["metadata"]["name"]))):
        name, key = f"{RUN}-{index}", "batch.kubernetes.io/job-completion-index"
        assert pod["metadata"]["name"].startswith(f"{name}-")
        assert pod["spec"]["hostname"] == name
        assert (pod["metadata"]["labels"][key], pod["metadata"]["annotations"][key]) == (str(index), str(index))
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            assert container["env"][-1]["name"] == "JOB_COMPLETION_INDEX"
            assert container["env"][-1]["valueFrom"] == {"fieldRef": {"fieldPath": f"metadata.labels['{key}']"}}
    assert {pod.index for pod in controllers.pods} == {0, 1}


def test_node_0_pulls_while_the_others_wait_and_then_all_train(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(50)
    assert {states[0] for _, states in pods(api_server).values()} == {"running"}
    controllers.advance(10)
    assert [states for _, states in pods(api_server).values()] == [["terminated", "running", "waiting"]] * 2
    controllers.advance(60)
    assert [states for _, states in pods(api_server).values()] == [["terminated", "terminated", "running"]] * 2


def test_success_of_index_0_completes_the_job(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(60)
    controllers.advance(60)
    controllers.advance(60)
    assert conditions(api_server) == {"SuccessCriteriaMet": "SuccessPolicy", "Complete": "SuccessPolicy"}
    by_index = {pod.index: api_server.get("Pod", pod.name) for pod in controllers.pods}
    ends = [by_index[index]["status"]["containerStatuses"][0]["state"]["terminated"] for index in (0, 1)]
    messages = [parse_termination_message(end.get("message", "")) for end in ends]
    assert [message.model if message else None for message in messages] == [
        "s3://bucket/topwork/models/flowers/1/",
        None,
    ]


def test_success_policy_ends_the_remaining_pods_before_the_job_is_complete(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(60)
    by_index = {pod.index: pod for pod in controllers.pods}
    api_server.patch("Pod", by_index[0].name, {"status": {"phase": "Succeeded"}})
    by_index[0].ended = controllers.clock.seconds()
    controllers.step()
    assert conditions(api_server) == {"SuccessCriteriaMet": "SuccessPolicy"}
    assert "deletionTimestamp" in api_server.get("Pod", by_index[1].name)["metadata"]  # type: ignore[index]
    controllers.advance(10)
    assert conditions(api_server)["Complete"] == "SuccessPolicy"


def test_killed_node_ends_the_others_and_each_pod_counts(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(90)
    controllers.kill(next(pod.name for pod in controllers.pods if pod.index == 1))
    controllers.settle()
    assert exit_codes(controllers) == [(0, 75), (1, 137)]
    assert sorted(pod.index for pod in controllers.active_pods(RUN)) == [0, 1]
    assert api_server.get("Job", RUN)["status"]["failed"] == 2  # type: ignore[index]
    controllers.advance(60)
    controllers.advance(60)
    controllers.advance(60)
    assert conditions(api_server)["Complete"] == "SuccessPolicy"
    assert controllers.overlapping_pods() == []


def test_evicted_node_stops_all_with_one_checkpoint(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(60)
    controllers.advance(40)
    controllers.evict(next(pod.name for pod in controllers.pods if pod.index == 1))
    controllers.advance(10)
    assert exit_codes(controllers) == [(0, 143), (1, 143)]
    assert controllers.kubelet.trained_seconds[RUN, "transfer"] == pytest.approx(40, abs=2)
    assert api_server.get("Job", RUN)["status"]["failed"] == 0  # type: ignore[index]
    controllers.settle()
    controllers.advance(20)
    assert [states for _, states in pods(api_server).values()][-2:] == [["terminated", "terminated", "running"]] * 2


def test_missing_node_keeps_the_others_waiting(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    controllers.kubelet.unschedulable = {1}
    cluster.apply(job())
    controllers.advance(60)
    controllers.advance(600)
    assert pods(api_server)[f"{RUN}-0"] == ("Pending", ["terminated", "running", "waiting"])
    assert pods(api_server)[f"{RUN}-1"] == ("Pending", [])
    controllers.kubelet.unschedulable = set()
    controllers.advance(0)
    controllers.advance(60)
    assert pods(api_server)[f"{RUN}-1"][1] == ["terminated", "terminated", "running"]


def test_backoff_limit_counts_the_pods_of_all_indexes(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    controllers.kubelet.script = {"transfer": [1] * 10}
    cluster.apply(job(backoffLimit=2))
    for _ in range(6):
        controllers.advance(60)
    assert conditions(api_server) == {"FailureTarget": "BackoffLimitExceeded", "Failed": "BackoffLimitExceeded"}
    assert len({pod.uid for pod in controllers.pods if pod.index == 0}) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("completionMode", "NonIndexed"), ("successPolicy", {"rules": [{"succeededIndexes": "1"}]})]
)
def test_mode_and_success_policy_are_immutable(cluster: Cluster, field: str, value: object):
    cluster.apply(job())
    with pytest.raises(SettingError, match=f"spec.{field}: .*field is immutable"):
        cluster.apply(job(**{field: value}))


def test_completions_of_an_indexed_job_change_only_with_its_parallelism(cluster: Cluster):
    cluster.apply(job())
    with pytest.raises(SettingError, match=r"spec.completions: .*field is immutable"):
        cluster.apply(job(completions=3))
    assert cluster.apply(job(completions=3, parallelism=3))["spec"]["completions"] == 3
