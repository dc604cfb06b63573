"""The reconciler runs TransferJobs: from the spec to the final status, across failures, deletions and restarts."""

from collections.abc import Iterator
from typing import Any

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer, Fault, owner_references
from controlled_cluster import SHUTDOWN_SECONDS, ControlledCluster, run_of

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.object_cache import Key
from topwork.cluster.controller.reconciler import Reconciler, ReconcilerSettings

RUN = run_of()
MODEL = "s3://bucket/topwork/models/flowers/1/"


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> Iterator[ControlledCluster]:
    """A cluster with a reconciler; every test ends with at most one active pod of a run at any time."""
    controlled = ControlledCluster(api_server, cluster)
    yield controlled
    assert controlled.kubernetes.overlapping_pods() == []


def test_a_transfer_job_runs_to_its_published_model(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.settle()
    job = world.job(RUN)
    assert job["metadata"]["ownerReferences"] == owner_references(world.server.get("TransferJob", "flowers") or {})
    assert "ttlSecondsAfterFinished" not in job["spec"]
    config_map = world.server.get("ConfigMap", RUN)
    assert config_map and config_map["metadata"]["ownerReferences"] == job["metadata"]["ownerReferences"]
    assert (world.status()["state"], world.status()["stage"]) == ("Running", "pull")
    world.advance(200)
    status = world.status()
    assert {key: status.get(key) for key in ("state", "run", "stage", "model", "modelVersion", "metric")} == {
        "state": "Complete",
        "run": RUN,
        "stage": "fine-tune",
        "model": MODEL,
        "modelVersion": 1,
        "metric": "accuracy 0.9700",
    }
    assert (status["exitCode"], status["attempts"], status["failures"], status["gpus"]) == (0, 1, 0, 2)
    assert {item["type"]: item["status"] for item in status["conditions"]} == {
        "Accepted": "True",
        "Suspended": "False",
        "Complete": "True",
        "Failed": "False",
        "Cancelled": "False",
    }
    assert world.job()["spec"]["ttlSecondsAfterFinished"] == 86400
    assert [reason for reason, _ in world.events()] == ["Created", "Running", "Completed"]
    assert world.errors == []


def test_a_finished_transfer_job_costs_no_requests(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    requests = len(world.server.requests)
    world.restart()
    world.settle()
    assert (len(world.server.requests), [*world.delays.values()]) == (requests, [None])


def test_a_running_transfer_job_costs_one_request_an_interval(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(20)
    world.kubernetes.clock.stop()  # without an interval, each second that begins in the meantime is another update
    requests = len(world.server.requests)
    world.advance(20)
    sent = [(request.method, request.path.rpartition("/")[2]) for request in world.server.requests[requests:]]
    assert sent == [("PATCH", "status")]
    slow = Reconciler(
        world.cluster, world.dispatcher.cache, ReconcilerSettings(status_interval_seconds=15.0, now=world.now)
    )
    world.kubernetes.clock.offset += 5
    first = slow.reconcile(Key("team-a", "flowers"))
    requests = len(world.server.requests)
    world.kubernetes.clock.offset += 5
    second = slow.reconcile(Key("team-a", "flowers"))
    assert first and second and 10 < second <= first <= 15
    assert len(world.server.requests) == requests


def test_a_finished_transfer_job_stays_finished_when_its_job_expires(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(ttlSecondsAfterFinished=60))
    world.advance(300)
    assert world.jobs() == []
    before = world.status()
    world.restart()
    world.apply(sample_objects.spec(ttlSecondsAfterFinished=60))  # as a GitOps tool does every few minutes
    world.advance(30)
    assert (world.jobs(), world.status()) == ([], before)
    assert world.kubernetes.job_creations() == {RUN: 1}


@pytest.mark.parametrize("ttl", ["soon", "-1", "99999999999"])
def test_an_edited_annotation_of_the_job_does_not_hide_its_outcome(world: ControlledCluster, ttl: str) -> None:
    world.apply(sample_objects.spec())
    world.advance(20)
    world.server.patch("Job", RUN, {"metadata": {"annotations": {"topwork.dev/ttl-seconds-after-finished": ttl}}})
    world.advance(200)
    assert (world.status()["state"], world.errors) == ("Complete", [])
    assert "ttlSecondsAfterFinished" not in world.job()["spec"]


def test_an_outcome_is_not_lost_while_the_controller_is_down(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(ttlSecondsAfterFinished=60))
    world.settle()
    for seconds in (60, 60, 60, 24 * 3600):
        world.kubernetes.advance(seconds)
    assert world.status()["state"] == "Running"
    world.restart()
    world.settle()
    assert (world.status()["state"], world.status()["model"]) == ("Complete", MODEL)
    world.advance(70)
    assert world.jobs() == []


def test_failed_attempts_are_counted_and_explained(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.script = {"transfer": [75, 75]}
    world.apply(sample_objects.spec(retries=1))
    world.advance(300)
    status = world.status()
    assert (status["state"], status["exitCode"], status["attempts"], status["failures"]) == ("Failed", 75, 2, 2)
    assert "failed by the test" in status["error"]
    assert world.condition("Failed")["reason"] == "RetriesExceeded"
    assert [record["exitCode"] for record in status["attemptHistory"]] == [75, 75]
    assert world.job()["spec"]["ttlSecondsAfterFinished"] == 86400
    assert world.events()[-1][0] == "RetriesExceeded"


@pytest.mark.parametrize(("code", "reason"), [(2, "InvalidInput"), (3, "GateNotMet")])
def test_a_permanent_failure_has_its_own_reason(world: ControlledCluster, code: int, reason: str) -> None:
    world.kubernetes.kubelet.script = {"fine-tune": [code]}
    world.apply(sample_objects.spec())
    world.advance(200)
    assert (world.status()["state"], world.status()["exitCode"]) == ("Failed", code)
    assert world.condition("Failed") | {"lastTransitionTime": ""} == {
        "type": "Failed",
        "status": "True",
        "reason": reason,
        "message": "failed by the test",
        "lastTransitionTime": "",
        "observedGeneration": 1,
    }


def test_a_deadline_fails_the_run(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(deadlineSeconds=60))
    world.advance(120)
    assert (world.status()["state"], world.condition("Failed")["reason"]) == ("Failed", "DeadlineExceeded")


def test_a_job_that_a_user_deletes_is_created_again_and_resumes(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(90)
    world.cluster.delete("Job", RUN, propagation="Foreground")
    world.settle()
    assert world.status()["state"] == "Pending"
    assert "to write its checkpoint (at most 300 s)" in world.status()["waitingFor"]
    world.advance(130)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 2)
    assert world.kubernetes.job_creations() == {RUN: 2}


@pytest.mark.parametrize("data", [None, {"job.yaml": ""}, {"job.yaml": "spec: ["}])
def test_an_edited_config_map_does_not_stop_the_run(world: ControlledCluster, data: dict[str, str] | None) -> None:
    world.apply(sample_objects.spec())
    world.advance(40)
    config_map = world.cluster.get("ConfigMap", RUN)
    assert config_map
    edited = {key: value for key, value in config_map.items() if key != "data"} | ({"data": data} if data else {})
    world.server.put(edited)
    world.cluster.delete("Job", RUN, propagation="Foreground")
    world.advance(60)
    stored = world.cluster.get("ConfigMap", RUN)
    assert stored and (stored["data"], world.jobs(), world.errors) == (config_map["data"], [RUN], [])


def test_orphaned_pods_end_before_a_job_is_created_again(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    pod = world.active_pods()[0]
    world.cluster.delete("Job", RUN, propagation="Orphan")
    world.settle()
    assert (world.jobs(), world.active_pods()) == ([], [pod])
    assert world.status()["waitingFor"].startswith(f"pod/{pod}")
    world.advance(300)
    assert world.status()["state"] == "Complete"


def test_a_preempted_pod_is_reported_and_replaced(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.kubernetes.evict(world.active_pods()[0], reason="PreemptionByScheduler")
    world.settle()
    assert "preempted by the scheduler" in world.status()["waitingFor"]
    world.advance(SHUTDOWN_SECONDS)
    assert world.status()["state"] == "Running"
    assert "waitingFor" not in world.status()
    world.advance(200)
    status = world.status()
    assert (status["state"], status["attempts"], status["failures"]) == ("Complete", 2, 0)
    assert "preempted" in status["attemptHistory"][0]["error"]


def test_a_pending_run_says_what_it_waits_for(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.can_schedule = False
    world.apply(sample_objects.spec())
    world.settle()
    assert world.status()["state"] == "Pending"
    assert world.status()["waitingFor"].startswith("no node has 2 free nvidia.com/gpu")
    pod = world.server.list("Pod")[0]
    world.server.put(sample_objects.event(pod, "TriggeredScaleUp", "pod triggered scale-up"))
    world.advance(10)
    assert world.status()["waitingFor"].startswith("the autoscaler is adding a node")
    world.kubernetes.kubelet.can_schedule = True
    world.advance(10)
    assert (world.status()["state"], world.status().get("waitingFor")) == ("Running", None)


def test_the_reason_of_a_pending_run_is_read_less_often_the_longer_it_waits(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.can_schedule = False
    world.apply(sample_objects.spec(deadlineSeconds=86400))
    world.advance(300)
    delay = next(iter(world.delays.values()))
    assert delay is not None and 25 <= delay <= 35
    world.advance(6000, step=1000)
    assert [*world.delays.values()] == [300.0]


def test_a_suspended_job_of_kueue_is_pending(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(queue="team-a"))
    world.settle()
    assert world.job()["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    world.server.patch("Job", RUN, {"spec": {"suspend": True}})
    world.advance(20)
    assert world.status()["state"] == "Pending"
    assert world.status()["waitingFor"].startswith("waiting for quota in the queue team-a")
    world.server.patch("Job", RUN, {"spec": {"suspend": False}})
    world.advance(200)
    assert world.status()["state"] == "Complete"


# ── Prefetch ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prefetch_job_pulls_before_gpus_are_requested(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(prefetch=True, ttlSecondsAfterFinished=60))
    world.settle()
    assert world.jobs() == [f"{RUN}-pull"]
    assert (world.status()["state"], world.status()["stage"], world.status()["gpus"]) == ("Running", "pull", 2)
    world.advance(70)
    assert world.jobs() == [RUN, f"{RUN}-pull"]
    world.advance(200)
    assert world.status()["state"] == "Complete"
    assert "Interrupted" not in [reason for reason, _ in world.events()]
    world.advance(100)
    assert world.jobs() == []


def test_a_failed_prefetch_job_does_not_stop_the_run(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.script = {"pull": [2]}
    world.apply(sample_objects.spec(prefetch=True))
    world.advance(300)
    assert world.status()["state"] == "Complete"


def test_a_prefetch_job_that_is_gone_is_not_created_again_once_the_run_trains(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(prefetch=True))
    world.advance(70)
    world.cluster.delete("Job", f"{RUN}-pull")
    world.restart()
    world.advance(200)
    assert world.status()["state"] == "Complete"
    assert world.kubernetes.job_creations() == {RUN: 1, f"{RUN}-pull": 1}


# ── TransferJobs that are deleted ───────────────────────────────────────────────────────────────────────────────────


def test_deleting_a_transfer_job_deletes_its_job_and_pods(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.delete()
    world.advance(20)
    assert (world.jobs(), world.server.list("Pod"), world.server.list("ConfigMap")) == ([], [], [])
    assert world.errors == []


def test_a_transfer_job_created_again_waits_for_the_pods_of_the_deleted_one(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    old = world.job()["metadata"]["uid"]
    world.delete()
    world.apply(sample_objects.spec())
    world.deliver()
    world.reconcile()
    world.settle()
    assert world.status()["state"] == "Pending"
    world.advance(20)
    assert world.job()["metadata"]["uid"] != old
    world.advance(200)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 1)


def test_the_status_of_a_deleted_transfer_job_is_not_stored_in_its_successor(
    world: ControlledCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.apply(sample_objects.spec())
    world.advance(160)
    assert world.status()["state"] == "Running"
    world.kubernetes.clock.offset += 60
    world.kubernetes.settle()
    world.deliver()
    replaced, apply = [], Cluster.apply

    def replace_before(cluster: Cluster, obj: KubernetesObject, **options: Any) -> KubernetesObject:
        if options.get("subresource") == "status" and not replaced:
            replaced.append(obj["status"]["state"])
            world.delete()
            world.apply(sample_objects.spec())
        return apply(cluster, obj, **options)

    monkeypatch.setattr(Cluster, "apply", replace_before)
    world.reconcile()
    assert (replaced, world.status(), world.errors) == (["Complete"], {}, [])
    world.advance(300)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 1)


def test_the_job_of_a_deleted_transfer_job_is_deleted_before_the_garbage_collector_finds_it(
    world: ControlledCluster,
) -> None:
    world.apply(sample_objects.spec())
    world.settle()
    world.server.remove("TransferJob", "flowers")
    world.apply(sample_objects.spec())
    world.deliver()
    world.reconcile()
    assert "deletionTimestamp" in world.job(RUN)["metadata"]
    world.advance(240)
    assert world.status()["state"] == "Complete"


def test_a_transfer_job_that_is_being_deleted_gets_no_job(world: ControlledCluster) -> None:
    obj = world.apply(sample_objects.spec())
    metadata = obj["metadata"] | {"finalizers": ["example.com/keep"], "deletionTimestamp": sample_objects.at(0)}
    world.server.put(obj | {"metadata": metadata})
    world.settle()
    assert (world.jobs(), world.status()) == ([], {})


# ── Requests that fail, and caches that are out of date ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/configmaps/", "/jobs/", "/status", "/jobs", "/pods", "/events/"])
def test_a_request_that_fails_is_made_up_for_later(world: ControlledCluster, path: str) -> None:
    world.apply(sample_objects.spec())
    world.server.inject(Fault(api_statuses.status(503, "ServiceUnavailable", "down"), path=path), times=5)
    world.settle()
    world.advance(240)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 1)
    assert world.kubernetes.job_creations() == {RUN: 1}
    assert [reason for reason, _ in world.events()].count("Completed") == 1


def test_a_stale_cache_creates_no_second_job(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec(ttlSecondsAfterFinished=0))
    world.deliver()
    world.reconcile()
    for _ in range(3):  # the cache still knows no Job
        world.reconcile()
    assert world.kubernetes.job_creations() == {RUN: 1}
    world.kubernetes.settle()
    for _ in range(20):
        world.kubernetes.advance(20)
        world.reconcile()
    assert world.status()["state"] == "Complete"
    world.settle()
    assert world.kubernetes.job_creations() == {RUN: 1}


def test_an_event_is_repeated_under_the_same_name(world: ControlledCluster) -> None:
    world.server.inject(Fault(api_statuses.status(403, "Forbidden", "denied"), path="/flowers/status"))
    world.apply(sample_objects.spec())
    world.advance(10)
    assert [reason for reason, _ in world.events()] == ["Created", "Running"]


def test_a_missing_permission_for_events_does_not_stop_the_run(world: ControlledCluster) -> None:
    denied = api_statuses.rbac_denied("patch", "events", "team-a")
    world.server.inject(Fault(denied, method="PATCH", path="/events/"), times=100)
    world.apply(sample_objects.spec())
    world.advance(200)
    assert (world.status()["state"], world.events()) == ("Complete", [])


def test_a_deleted_definition_causes_no_errors(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.deliver()
    world.server.remove("CustomResourceDefinition", "transferjobs.topwork.dev")
    world.reconcile()
    assert (world.errors, [*world.delays.values()]) == ([], [60.0])


def test_a_namespace_that_is_being_deleted_causes_no_errors(world: ControlledCluster) -> None:
    terminating = api_statuses.forbidden(
        "jobs.batch", RUN, "unable to create new content in namespace team-a because it is being terminated"
    )
    world.server.inject(Fault(terminating, method="PATCH", path="/configmaps/"), times=1)
    world.apply(sample_objects.spec())
    world.settle()
    assert (world.errors, world.events(), [*world.delays.values()]) == ([], [], [60.0])
