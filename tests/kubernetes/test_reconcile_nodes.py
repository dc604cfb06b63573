"""The reconciler runs TransferJobs on several nodes: an Indexed Job with its Service and NetworkPolicy."""

from typing import Any

import pytest
import sample_objects
from api_server import owner_references
from controlled_cluster import ControlledCluster, run_of

from topwork.cluster.controller.progress import ProgressReader
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.operations.submit import Submission
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import UnavailableError

RUN = run_of(nodes=2)
SERVICE = f"topwork-{RUN}"
MODEL = "s3://bucket/topwork/models/flowers/1/"
Object = dict[str, Any]


def network(world: ControlledCluster) -> list[str]:
    """Names of all Services and NetworkPolicies."""
    return [obj["metadata"]["name"] for kind in ("Service", "NetworkPolicy") for obj in world.server.list(kind)]


def pod_of(world: ControlledCluster, index: int) -> str:
    return next(pod.name for pod in world.kubernetes.active_pods(RUN) if pod.index == index)


def summary(world: ControlledCluster) -> tuple[object, ...]:
    return tuple(world.status().get(key) for key in ("state", "stage", "waitingFor"))


def completion_count(world: ControlledCluster) -> int:
    return int(world.job()["spec"]["completions"])


def test_a_run_on_two_nodes_publishes_its_model(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.settle()
    owners = owner_references(world.server.get("TransferJob", "flowers") or {})
    for kind, name in (("Service", SERVICE), ("NetworkPolicy", RUN), ("Job", RUN), ("ConfigMap", RUN)):
        obj = world.server.get(kind, name)
        assert obj, kind
        assert obj["metadata"]["ownerReferences"] == owners
        assert obj["metadata"]["annotations"]["topwork.dev/generation"] == "1"
    assert summary(world) == ("Running", "pull", None)
    world.advance(200)
    status = world.status()
    assert {key: status.get(key) for key in ("state", "stage", "model", "metric", "attempts", "failures", "gpus")} == {
        "state": "Complete",
        "stage": "fine-tune",
        "model": MODEL,
        "metric": "accuracy 0.9700",
        "attempts": 1,
        "failures": 0,
        "gpus": 4,
    }
    assert [(record["index"], record["attempt"]) for record in status["attemptHistory"]] == [(0, 1), (1, 1)]
    assert status["gpuSeconds"] == sum(record["gpuSeconds"] for record in status["attemptHistory"]) > 0
    assert world.job()["spec"]["ttlSecondsAfterFinished"] == 86400
    assert [reason for reason, _ in world.events()] == ["Created", "Running", "Completed"]


def test_service_and_network_policy_end_with_the_run(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(60)
    assert network(world) == [SERVICE, RUN]
    world.advance(140)
    assert (world.status()["state"], network(world)) == ("Complete", [])


def test_the_service_is_created_before_the_job(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.settle()
    created = [change.kind for change in world.server.objects.history if change.type == "ADDED"]
    order = [kind for kind in created if kind in {"ConfigMap", "Service", "NetworkPolicy", "Job", "Pod"}]
    assert order == ["ConfigMap", "Service", "NetworkPolicy", "Job", "Pod", "Pod"]


def test_a_missing_node_keeps_the_run_pending_with_the_reason(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.unschedulable = {1}
    world.apply(sample_objects.spec(nodes=2))
    world.advance(120)
    state, stage, waiting_for = summary(world)
    assert (state, stage) == ("Pending", "transfer")
    assert str(waiting_for).startswith("1 of 2 pods is pending: no node has 2 free nvidia.com/gpu")
    world.kubernetes.kubelet.unschedulable = set()
    world.advance(200)
    assert world.status()["state"] == "Complete"


def test_a_killed_node_is_one_attempt_and_one_failure(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.kubernetes.kill(pod_of(world, 1))
    world.settle()
    status = world.status()
    assert (status["attempts"], status["failures"], status["state"]) == (2, 1, "Running")
    codes = [(record["index"], record.get("exitCode")) for record in status["attemptHistory"]]
    assert sorted(codes[:2]) == [(0, 75), (1, 137)]
    world.advance(200)
    status = world.status()
    assert (status["state"], status["attempts"], status["failures"], status["model"]) == ("Complete", 2, 1, MODEL)


def test_exceeded_retries_name_the_node_that_failed_first(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2, retries=1))
    world.advance(80)
    for _ in range(2):
        world.kubernetes.kill(pod_of(world, 1))
        world.advance(20)
    status = world.status()
    assert (status["state"], status["exitCode"], status["attempts"], status["failures"]) == ("Failed", 137, 2, 2)
    assert status["error"].startswith("node 1: killed (SIGKILL)")
    assert status["error"].endswith("(attempt 2 of 2)")


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy"])
def test_a_deleted_object_between_the_nodes_is_created_again(world: ControlledCluster, kind: str) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    before = network(world)
    world.server.remove(kind, SERVICE if kind == "Service" else RUN)
    assert network(world) != before
    world.advance(20)
    assert network(world) == before
    assert world.kubernetes.job_creations() == {RUN: 1}


def test_suspension_keeps_what_connects_the_nodes_until_they_have_stopped(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.suspend()
    world.settle()
    assert len(world.active_pods()) == 2
    assert network(world) == [SERVICE, RUN]
    world.advance(20)
    assert (world.jobs(), world.status()["state"]) == ([], "Suspended")
    assert {record["exitCode"] for record in world.status()["attemptHistory"]} == {143}
    world.suspend(False)
    world.advance(200)
    status = world.status()
    assert (status["state"], status["attempts"], network(world)) == ("Complete", 2, [])


def test_cancellation_stops_all_nodes(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.annotate(cancel=RUN)
    world.settle()
    assert world.status()["waitingFor"].startswith("pod/")
    world.advance(20)
    assert (world.jobs(), world.active_pods(), world.status()["state"]) == ([], [], "Cancelled")
    assert "waitingFor" not in world.status()


@pytest.mark.parametrize(("before", "after"), [(2, 4), (1, 2), (2, 1)])
def test_changed_nodes_of_a_running_job_replace_it(world: ControlledCluster, before: int, after: int) -> None:
    world.apply(sample_objects.spec(nodes=before))
    world.advance(80)
    world.set_compute(nodes=after)
    world.settle()
    assert world.status()["waitingFor"].endswith("to write its checkpoint (at most 300 s)")
    world.advance(20)
    assert completion_count(world) == after
    assert (world.status()["run"], world.status()["gpus"]) == (RUN, 2 * after)
    assert network(world) == ([SERVICE, RUN] if after > 1 else [])
    world.advance(200)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 2)
    assert world.kubernetes.job_creations() == {RUN: 2}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_changed_nodes_of_a_suspended_job_apply_when_it_resumes(
    world: ControlledCluster, before: int, after: int
) -> None:
    world.apply(sample_objects.spec(nodes=before))
    world.advance(80)
    world.suspend()
    world.advance(20)
    world.set_compute(nodes=after)
    world.advance(20)
    assert (world.jobs(), world.status()["state"]) == ([], "Suspended")
    world.suspend(False)
    world.settle()
    assert completion_count(world) == after
    assert network(world) == ([SERVICE, RUN] if after > 1 else [])
    world.advance(200)
    assert world.status()["state"] == "Complete"


def test_changed_retries_adapt_the_running_job(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.set_compute(retries=5)
    world.settle()
    job = world.job()["spec"]
    assert (job["backoffLimit"], job["completionMode"], job["successPolicy"]) == (
        10,
        "Indexed",
        {"rules": [{"succeededIndexes": "0"}]},
    )
    assert world.kubernetes.job_creations() == {RUN: 1}


def test_another_run_deletes_the_objects_of_this_one(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.change(lambda job: job["spec"]["fineTune"].update(epochs=20))
    world.advance(20)
    run = world.status()["run"]
    assert run != RUN
    assert network(world) == [f"topwork-{run}", run]


def test_deleting_the_transfer_job_deletes_everything(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    world.delete()
    world.settle()
    world.kubernetes.advance(20)
    assert (world.jobs(), network(world), world.server.list("Pod")) == ([], [], [])


def test_objects_of_a_deleted_transfer_job_are_replaced(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=2))
    world.advance(80)
    old = {kind: obj["metadata"]["uid"] for kind in ("Service", "NetworkPolicy") for obj in world.server.list(kind)}
    world.server.objects.remove(world.server.key("TransferJob", "flowers"))
    world.apply(sample_objects.spec(nodes=2))
    for _ in range(5):
        world.deliver()
        world.reconcile()
        world.kubernetes.clock.offset += 20
        world.kubernetes.settle()
    world.settle()
    new = {kind: obj["metadata"]["uid"] for kind in ("Service", "NetworkPolicy") for obj in world.server.list(kind)}
    assert new.keys() == old.keys()
    assert not {*new.values()} & {*old.values()}


def test_a_service_of_someone_else_is_a_name_conflict(world: ControlledCluster) -> None:
    world.server.put({"apiVersion": "v1", "kind": "Service", "metadata": {"name": SERVICE}, "spec": {}})
    world.apply(sample_objects.spec(nodes=2))
    world.settle()
    accepted = world.condition("Accepted")
    assert (accepted["reason"], world.jobs()) == ("NameConflict", [])
    assert accepted["message"].startswith(f"service/{SERVICE} in namespace team-a was not created by topwork")
    world.errors.clear()


def test_a_plain_run_on_several_nodes_is_adopted(world: ControlledCluster) -> None:
    rendered = render(sample_objects.transfer_job(nodes=2), RenderOptions(namespace="team-a"))
    Submission(world.cluster, rendered, lambda _: None).submit()
    world.kubernetes.advance(60)
    world.apply(sample_objects.spec(nodes=2))
    world.settle()
    service = world.server.get("Service", SERVICE)
    assert service
    assert {owner["kind"] for owner in service["metadata"]["ownerReferences"]} == {"Job", "TransferJob"}
    world.advance(200)
    assert (world.status()["state"], world.kubernetes.job_creations()) == ("Complete", {RUN: 1})


def test_progress_is_read_from_node_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []

    def read_page(url: str, timeout_seconds: float) -> None:
        urls.append(url)
        raise UnavailableError("no page")

    monkeypatch.setattr("topwork.cluster.controller.progress.read_page", read_page)
    job, states = sample_objects.job(nodes=2), sample_objects.PULLED | {"transfer": sample_objects.running(100)}
    pods = [sample_objects.pod(states, of=job, index=index, podIP=f"10.0.0.{index}") for index in (1, 0)]
    status = TransferJobStatus(run=RUN, state="Running", stage="transfer")
    assert ProgressReader(1.0).add_progress("uid", pods, status) == status
    assert urls == ["http://10.0.0.0:9102/metrics"]


def test_the_history_of_many_nodes_is_bounded_and_counts_all_gpu_time(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(nodes=16, retries=10))
    world.advance(80)
    for _ in range(3):
        world.kubernetes.kill(pod_of(world, 7))
        world.advance(20)
    status = world.status()
    assert (status["attempts"], status["failures"]) == (4, 3)
    assert len(status["attemptHistory"]) == 32
    pods = world.kubernetes.pods
    held = sum(2 * ((pod.ended or world.kubernetes.clock.seconds()) - pod.created) for pod in pods)
    assert status["gpuSeconds"] == pytest.approx(held, abs=2 * len(pods) * 2)
