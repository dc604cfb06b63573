"""The simulated Job controller, kubelet and garbage collector behave like those of Kubernetes."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import sample_crd
import sample_objects
from api_server import NAMESPACE, ApiServer, owner_references
from simulated_cluster import wait_for
from simulated_controllers import SimulatedControllers

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import SettingError
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.termination_message import parse_termination_message

RUN = sample_objects.RUN
Object = dict[str, Any]


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer(crds=[sample_crd.definition()]) as server:
        yield server


@pytest.fixture
def controllers(api_server: ApiServer) -> SimulatedControllers:
    """Controllers without a thread, whose stages take 60 s of a clock that the test moves."""
    return SimulatedControllers(api_server, stage_seconds=60, shutdown_seconds=10)


def job(**spec: Any) -> Object:
    rendered = copy.deepcopy(render(sample_objects.transfer_job(), RenderOptions("topwork:1", NAMESPACE)).training)
    rendered["spec"] |= spec
    return rendered


def conditions(server: ApiServer) -> dict[str, str]:
    stored = server.get("Job", RUN)
    assert stored
    return {item["type"]: item["reason"] for item in stored["status"].get("conditions", [])}


def states(pod: Object) -> list[str]:
    statuses = pod["status"]["initContainerStatuses"] + pod["status"]["containerStatuses"]
    return [next(iter(status["state"])) for status in statuses]


def test_pod_runs_its_stages_in_order(api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers):
    cluster.apply(job())
    controllers.settle()
    (pod,) = api_server.list("Pod")
    assert (pod["status"]["phase"], states(pod)) == ("Pending", ["running", "waiting", "waiting"])
    controllers.advance(60)
    controllers.advance(60)
    (pod,) = api_server.list("Pod")
    assert (pod["status"]["phase"], states(pod)) == ("Running", ["terminated", "terminated", "running"])
    controllers.advance(60)
    (pod,) = api_server.list("Pod")
    message = parse_termination_message(pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"])
    assert message
    assert (message.model, message.run) == ("s3://bucket/topwork/models/flowers/1/", RUN)
    assert conditions(api_server) == {"SuccessCriteriaMet": "CompletionsReached", "Complete": "CompletionsReached"}


def test_thread_runs_a_job_to_its_end(api_server: ApiServer, cluster: Cluster):
    with SimulatedControllers(api_server, stage_seconds=0.02) as controllers:
        cluster.apply(job())
        wait_for(lambda: "Complete" in conditions(api_server), "completion")
    assert (controllers.overlapping_pods(), dict(controllers.job_creations())) == ([], {RUN: 1})


@pytest.mark.parametrize(
    ("codes", "retries", "reason", "pods"),
    [
        ([75, 0], 3, "CompletionsReached", 2),
        ([2], 3, "PodFailurePolicy", 1),
        ([1, 1], 1, "BackoffLimitExceeded", 2),
        ([143, 143, 0], 0, "CompletionsReached", 3),
    ],
)
def test_failures_follow_the_policy_of_the_job(
    api_server: ApiServer,
    cluster: Cluster,
    controllers: SimulatedControllers,
    codes: list[int],
    retries: int,
    reason: str,
    pods: int,
):
    controllers.kubelet.script = {"transfer": codes}
    cluster.apply(job(backoffLimit=retries))
    for _ in range(10):
        controllers.advance(60)
    assert ({*conditions(api_server).values()}, len(controllers.pods)) == ({reason}, pods)
    assert controllers.overlapping_pods() == []


def test_deleted_pod_stores_a_checkpoint_and_its_successor_resumes(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.advance(60)
    controllers.advance(40)
    controllers.evict(controllers.pods[0].name)
    controllers.settle()
    assert [pod.name for pod in controllers.active_pods(RUN)] == [controllers.pods[0].name]
    controllers.advance(10)
    assert [pod.ended is None for pod in controllers.pods] == [False, True]
    changes = [change.object for change in api_server.objects.history if change.kind == "Pod"]
    stopped = next(obj for obj in changes if obj.get("status", {}).get("phase") == "Failed")
    assert stopped["status"]["initContainerStatuses"][1]["state"]["terminated"]["exitCode"] == 143
    controllers.advance(20)
    assert states(api_server.list("Pod")[0]) == ["terminated", "terminated", "running"]
    assert cluster.get("Job", RUN)["status"]["failed"] == 0  # type: ignore[index]


def test_foreground_deletion_waits_for_the_pods(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    transfer_job = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "flowers"}}
    owner = cluster.apply(transfer_job | {"spec": {}})
    body = job()
    cluster.apply(body | {"metadata": body["metadata"] | {"ownerReferences": owner_references(owner)}})
    controllers.settle()
    cluster.delete("TransferJob", "flowers", propagation="Foreground")
    controllers.settle()
    assert [len(api_server.list(kind)) for kind in ("TransferJob", "Job", "Pod")] == [1, 1, 1]
    controllers.advance(10)
    assert [len(api_server.list(kind)) for kind in ("TransferJob", "Job", "Pod")] == [0, 0, 0]
    assert len(controllers.pods) == 1


def test_background_deletion_removes_the_owners_first(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.settle()
    cluster.delete("Job", RUN)
    assert [len(api_server.list(kind)) for kind in ("Job", "Pod")] == [0, 1]
    controllers.advance(10)
    assert api_server.list("Pod") == []


def test_suspended_job_stops_its_pod_and_resumes(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job(suspend=True))
    controllers.settle()
    assert (conditions(api_server), controllers.pods) == ({"Suspended": "JobSuspended"}, [])
    cluster.apply(job(suspend=False))
    controllers.settle()
    assert (conditions(api_server), len(controllers.pods)) == ({"Suspended": "JobResumed"}, 1)
    cluster.apply(job(suspend=True))
    controllers.advance(10)
    assert (conditions(api_server), api_server.list("Pod")) == ({"Suspended": "JobSuspended"}, [])


def test_deadline_and_ttl_follow_the_clock(api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers):
    controllers.kubelet.can_schedule = False
    cluster.apply(job(activeDeadlineSeconds=100, ttlSecondsAfterFinished=1000))
    controllers.settle()
    (pod,) = api_server.list("Pod")
    assert pod["status"]["conditions"][0]["reason"] == "Unschedulable"
    controllers.advance(102)
    assert conditions(api_server)["Failed"] == "DeadlineExceeded"
    controllers.advance(1001)
    assert [len(api_server.list(kind)) for kind in ("Job", "Pod")] == [0, 0]


def test_deleted_namespace_stops_its_pods_first(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    cluster.apply(job())
    controllers.settle()
    cluster.delete("Namespace", NAMESPACE)
    controllers.settle()
    with pytest.raises(SettingError, match=r"is being deleted"):
        cluster.apply(job())
    assert [len(api_server.list(kind)) for kind in ("Job", "Pod")] == [0, 1]
    controllers.advance(10)
    assert api_server.list("Pod") == []
    assert api_server.get("Namespace", NAMESPACE) is None


def test_object_of_a_missing_owner_is_deleted(
    api_server: ApiServer, cluster: Cluster, controllers: SimulatedControllers
):
    owner = cluster.apply(job())
    cluster.delete("Job", RUN)
    api_server.put(sample_objects.pod(of=owner))
    controllers.settle()
    assert [pod["metadata"].get("deletionGracePeriodSeconds") for pod in api_server.list("Pod")] == [300]
