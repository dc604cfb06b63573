"""The reconciler and TransferJobs that it or the cluster does not accept."""

import json
from copy import deepcopy
from typing import Any

import api_statuses
import pytest
import sample_objects
from api_server import ApiServer, Fault
from controlled_cluster import ControlledCluster, run_of

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.conditions import Fact, update_conditions
from topwork.cluster.controller.runtime.samples import to_sample
from topwork.cluster.transfer_job_status import TransferJobStatus

RUN = run_of()
Object = dict[str, Any]


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> ControlledCluster:
    return ControlledCluster(api_server, cluster)


def invalid_spec() -> Object:
    """Return a spec that passes the schema and breaks two rules."""
    content = deepcopy(sample_objects.spec())
    content["spec"]["dataset"]["valueRange"] = [255, 0]
    content["spec"]["publish"]["fold"] = "all"
    return content


def correct(job: Object) -> None:
    del job["spec"]["dataset"]["valueRange"], job["spec"]["publish"]["fold"]


def test_an_invalid_spec_is_rejected_with_all_errors_and_gets_no_job(world: ControlledCluster) -> None:
    world.apply(invalid_spec())
    world.settle()
    accepted, failed = world.condition("Accepted"), world.condition("Failed")
    assert (accepted["status"], accepted["reason"], failed["status"]) == ("False", "InvalidSpec", "True")
    assert "spec.dataset.valueRange: " in accepted["message"]
    assert "spec.publish.fold: applies only to cross-validation" in accepted["message"]
    assert (world.status()["state"], world.status()["exitCode"], world.jobs()) == ("Failed", 2, [])
    assert [reason for reason, _ in world.events()] == ["InvalidSpec"]
    assert (world.errors, [*world.delays.values()]) == ([], [None])


def test_a_corrected_spec_runs(world: ControlledCluster) -> None:
    world.apply(invalid_spec())
    world.settle()
    world.change(correct)
    world.advance(200)
    assert (world.status()["state"], world.condition("Accepted")["status"]) == ("Complete", "True")


def test_a_run_goes_on_when_its_spec_becomes_invalid(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.apply(invalid_spec())
    world.advance(20)
    assert (world.status()["state"], world.status()["run"]) == ("Running", RUN)
    assert (world.condition("Accepted")["status"], world.condition("Failed")["status"]) == ("False", "False")
    world.restart()
    world.advance(180)
    assert (world.status()["state"], world.condition("Accepted")["reason"]) == ("Complete", "InvalidSpec")
    assert world.kubernetes.job_creations() == {RUN: 1}
    assert world.errors == []


@pytest.mark.parametrize("how", ["spec", "defaults"])
def test_a_complete_run_does_not_run_again_after_a_rejected_change(world: ControlledCluster, how: str) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    completed = world.status()
    world.cluster.delete("Job", RUN, propagation="Foreground")
    if how == "spec":
        world.change(lambda job: job["spec"]["publish"].update(fold="all"))
    else:
        put_defaults(world, "}")
        world.set_compute(retries=5)
    world.settle()
    assert world.status()["state"] == ("Failed" if how == "spec" else "Pending")
    assert (world.condition("Accepted")["status"], world.condition("Complete")["status"]) == ("False", "False")
    put_defaults(world, "")
    world.change(lambda job: job["spec"]["publish"].pop("fold", None))
    world.advance(40)
    kept = ("state", "model", "exitCode", "completionTime", "metric", "attempts", "gpuSeconds", "error")
    assert {key: world.status().get(key) for key in kept} == {key: completed.get(key) for key in kept}
    assert world.kubernetes.job_creations() == {RUN: 1}


def test_an_invalid_spec_can_be_suspended(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    content = invalid_spec()
    content["spec"]["suspend"] = True
    world.apply(content)
    world.advance(40)
    assert world.jobs() == []
    assert world.active_pods() == []


def test_a_spec_without_storage_waits_for_the_defaults_of_its_namespace(world: ControlledCluster) -> None:
    content = sample_objects.spec()
    storage = content["spec"].pop("storage")
    world.apply(content)
    world.settle()
    assert (world.status()["state"], world.condition("Accepted")["reason"]) == ("Pending", "InvalidSpec")
    assert "spec.storage: is required" in world.status()["waitingFor"]
    assert "The namespace can also set it for all jobs: in configmap/topwork-defaults." in world.status()["waitingFor"]
    assert world.errors
    put_defaults(world, f"spec: {{storage: {storage}}}")
    world.advance(200)
    assert (world.status()["state"], world.status()["run"]) == ("Complete", RUN)


def put_defaults(world: ControlledCluster, text: str) -> None:
    metadata = {"name": "topwork-defaults"}
    world.server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}})


@pytest.mark.parametrize("text", ["image: [1]", "spec: {compute: {gpus: two}}", "image: 'Not an image'", "}"])
def test_invalid_defaults_are_reported_and_read_again(world: ControlledCluster, text: str) -> None:
    put_defaults(world, text)
    content = sample_objects.spec()
    del content["spec"]["compute"]["gpus"]
    world.apply(content)
    world.settle()
    assert (world.status()["state"], world.condition("Accepted")["reason"]) == ("Pending", "InvalidDefaults")
    assert "topwork-defaults" in world.condition("Accepted")["message"]
    assert world.jobs() == []
    put_defaults(world, "image: topwork:1")
    world.advance(20)
    assert (world.status()["state"], world.condition("Accepted")["status"]) == ("Running", "True")


def test_defaults_that_may_not_be_read_are_reported(world: ControlledCluster) -> None:
    denied = api_statuses.rbac_denied("get", "configmaps", "team-a", "topwork-defaults")
    world.server.inject(Fault(denied, path="/topwork-defaults"), times=2)
    world.apply(sample_objects.spec())
    world.settle()
    assert world.condition("Accepted")["reason"] == "InvalidDefaults"
    world.advance(20)
    assert world.condition("Accepted")["status"] == "True"


def test_a_job_of_someone_else_is_a_conflict_and_stays_untouched(world: ControlledCluster) -> None:
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": RUN}, "spec": {"template": {}}}
    before = world.server.put(foreign)
    world.apply(sample_objects.spec())
    world.deliver()
    world.reconcile()
    assert (world.status()["state"], world.condition("Accepted")["reason"]) == ("Pending", "NameConflict")
    assert "was not created by topwork" in world.status()["waitingFor"]
    assert world.server.get("Job", RUN) == before
    world.server.remove("Job", RUN)
    world.advance(20)
    assert world.status()["state"] == "Running"


def test_a_quota_that_rejects_the_job_is_shown_and_tried_again(world: ControlledCluster) -> None:
    quota = api_statuses.quota_exceeded("jobs.batch", RUN, "count/jobs.batch=1", "count/jobs.batch=4", "4")
    world.server.inject(Fault(quota, method="PATCH", path="/jobs/"), times=2)
    world.apply(sample_objects.spec())
    world.settle()
    assert (world.status()["state"], world.condition("Accepted")["status"]) == ("Pending", "True")
    assert "exceeded quota" in world.status()["waitingFor"]
    assert [reason for reason, _ in world.events()] == ["JobRejected"]
    assert len(world.errors) == 2
    world.advance(40)
    assert (world.status()["state"], world.status().get("waitingFor")) == ("Running", None)


def test_a_webhook_that_rejects_an_update_is_tried_again(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(20)
    denied = Fault(api_statuses.webhook_denied("policy", "no retries"), method="PATCH", path="/jobs/")
    world.server.inject(denied, times=2)
    world.set_compute(retries=9)
    world.settle()
    assert (len(world.errors), world.job()["spec"]["backoffLimit"]) == (2, 3)
    assert "no retries" in world.status()["waitingFor"]
    assert world.events()[-1][0] == "JobRejected"
    world.advance(20)
    assert (world.job()["spec"]["backoffLimit"], world.status()["observedGeneration"]) == (9, 2)
    assert world.status().get("waitingFor") is None


def test_a_status_of_a_newer_version_is_left_alone(world: ControlledCluster) -> None:
    stored = world.apply(sample_objects.spec())
    world.server.put(stored | {"status": {"observedGeneration": 1, "run": RUN, "state": "Preempted"}})
    world.settle()
    assert (world.status()["state"], world.jobs()) == ("Preempted", [])
    assert {str(error) for error in world.errors} == {
        "The status of transferjob/flowers has an unknown value at state: a newer version of topwork wrote it. "
        "Use that version."
    }
    assert to_sample(stored | {"status": {"state": "Preempted"}}).state == "Pending"


def test_a_webhook_that_rejects_every_update_does_not_hide_the_outcome(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    # As Kueue does for the queue of a running Job.
    reason = 'admission webhook "vjob.kb.io" denied the request: metadata.labels: field is immutable'
    world.server.inject(
        Fault(api_statuses.forbidden("jobs.batch", RUN, reason), method="PATCH", path="/jobs/"), times=99
    )
    world.set_compute(queue="research")
    world.advance(20)
    status = world.status()
    assert (status["state"], status["observedGeneration"], world.jobs()) == ("Running", 1, [RUN])
    assert "field is immutable" in status["waitingFor"]
    assert [reason for reason, _ in world.events()].count("JobRejected") == 1
    world.advance(300)
    status = world.status()
    assert (status["state"], status["observedGeneration"], status["attempts"]) == ("Complete", 2, 1)
    assert status.get("waitingFor") is None


def test_long_errors_are_cut(world: ControlledCluster) -> None:
    tolerations = [{"operator": "Exists", "value": "x" * 900} for _ in range(64)]
    put_defaults(world, json.dumps({"spec": {"compute": {"tolerations": tolerations}}}))
    world.apply(sample_objects.spec())
    world.settle()
    assert len(world.condition("Accepted")["message"]) > 1000
    assert len(world.status()["waitingFor"]) <= 1000
    assert all(len(message) <= 1000 for _, message in world.events())


def test_the_message_of_a_condition_is_cut_once() -> None:
    message, now = "é" * 40_000, sample_objects.NOW
    fact = Fact("InvalidSpec", message, holds=False)
    conditions = update_conditions(TransferJobStatus(), "Failed", {"Accepted": fact}, 1, now)
    assert len(conditions[0].message) <= 32_768
    again = Fact("InvalidSpec", conditions[0].message, holds=False)
    status = TransferJobStatus(conditions=conditions)
    assert update_conditions(status, "Failed", {"Accepted": again}, 1, now) == conditions
