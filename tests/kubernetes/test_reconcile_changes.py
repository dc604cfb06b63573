"""The reconciler follows changes of a TransferJob: other spec, suspended, resumed, canceled, adopted."""

from copy import deepcopy
from typing import Any

import api_statuses
import sample_objects
from api_server import ApiServer, Fault
from controlled_cluster import ControlledCluster, run_of

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.spec import TransferJob

RUN = run_of()
Object = dict[str, Any]


def spec_with_epochs(epochs: int) -> Object:
    """Return the sample spec with other epochs, which is another run."""
    content = deepcopy(sample_objects.spec())
    content["spec"]["fineTune"]["epochs"] = epochs
    return content


def run_with_epochs(epochs: int) -> str:
    return TransferJob.model_validate(spec_with_epochs(epochs)).run


# ── Other spec ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_spec_stops_the_old_run_before_the_new_one_starts(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    pod = world.active_pods()[0]
    world.apply(spec_with_epochs(20))
    world.settle()
    other = run_with_epochs(20)
    assert {key: world.status().get(key) for key in ("state", "run", "observedGeneration", "waitingFor")} == {
        "state": "Pending",
        "run": other,
        "observedGeneration": 2,
        "waitingFor": f"pod/{pod} to write its checkpoint (at most 300 s)",
    }
    assert other not in world.jobs()
    world.advance(20)
    assert (world.jobs(), world.status()["state"], world.status()["attempts"]) == ([other], "Running", 1)
    assert world.server.get("ConfigMap", RUN) is None
    world.advance(200)
    assert world.status()["state"] == "Complete"
    assert ("SpecChanged", f"{other} replaces {RUN}") in world.events()
    # The GPU time of the first run counts, its pods don't.
    assert (world.status()["attempts"], len(world.status()["attemptHistory"])) == (1, 1)
    assert world.status()["gpuSeconds"] > world.status()["attemptHistory"][0]["gpuSeconds"] + 60


def test_a_spec_that_returns_to_the_first_run_waits_for_its_deleted_job(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.apply(spec_with_epochs(20))
    world.settle()
    world.apply(sample_objects.spec())
    world.settle()
    assert (world.status()["run"], world.status()["state"]) == (RUN, "Pending")
    world.advance(20)
    assert (world.jobs(), world.status()["state"]) == ([RUN], "Running")
    world.advance(200)
    assert world.kubernetes.job_creations() == {RUN: 2}


def test_only_the_last_of_several_quick_changes_runs(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    for epochs in (20, 30, 40):
        world.apply(spec_with_epochs(epochs))
        world.settle()
    world.advance(260)
    assert (world.status()["state"], world.status()["run"]) == ("Complete", run_with_epochs(40))
    assert world.kubernetes.job_creations() == {RUN: 1, run_with_epochs(40): 1}


def test_changes_that_concern_no_pod_are_applied_in_place(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    uid, pod = world.job()["metadata"]["uid"], world.active_pods()
    changed = sample_objects.spec(retries=7, deadlineSeconds=7200, ttlSecondsAfterFinished=60)
    changed["metadata"]["labels"] = {"team": "vision"}
    world.apply(changed)
    world.settle()
    job = world.job()
    assert (job["metadata"]["uid"], world.active_pods()) == (uid, pod)
    assert (job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (7, 7200)
    assert job["metadata"]["labels"]["team"] == "vision"
    assert (world.status()["state"], world.status()["observedGeneration"]) == ("Running", 2)
    world.advance(200)
    assert world.status()["state"] == "Complete"
    world.advance(70)
    assert world.jobs() == []


def test_labels_are_applied_without_a_new_generation(world: ControlledCluster) -> None:
    def labels_of(*objects: Object) -> list[str | None]:
        return [obj["metadata"]["labels"].get("team") for obj in objects]

    world.apply(sample_objects.spec())
    world.advance(30)
    uid, pod = world.job()["metadata"]["uid"], world.active_pods()
    spec = sample_objects.spec()
    for team in ("vision", "speech", None):
        spec["metadata"]["labels"] = {"team": team} if team else {}
        world.apply(spec)
        world.settle()
        assert labels_of(world.job(), world.server.get("ConfigMap", RUN)) == [team, team]
        assert (world.job()["metadata"]["uid"], world.active_pods()) == (uid, pod)
        assert (world.status()["state"], world.status()["observedGeneration"]) == ("Running", 1)
    world.restart()
    world.server.requests.clear()
    world.settle()
    assert [request for request in world.server.requests if "/jobs/" in request.path] == []
    world.advance(200)
    assert world.status()["state"] == "Complete"


def test_labels_do_not_start_a_failed_run_again(api_server: ApiServer, cluster: Cluster) -> None:
    world = ControlledCluster(api_server, cluster, script={"transfer": [2]})
    world.apply(sample_objects.spec())
    world.advance(200)
    spec = sample_objects.spec()
    spec["metadata"]["labels"] = {"team": "vision"}
    world.apply(spec)
    world.advance(200)
    assert (world.status()["state"], world.status()["attempts"]) == ("Failed", 1)


def test_other_resources_stop_the_pod_and_start_another(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.set_compute(memory="64Gi")
    world.advance(20)
    pod = world.server.list("Pod")[0]
    assert pod["spec"]["containers"][0]["resources"]["limits"]["memory"] == "64Gi"
    assert (world.status()["state"], world.status()["run"], world.status()["attempts"]) == ("Running", RUN, 2)
    reasons = {event["reason"] for event in world.server.list("Event") if event["type"] == "Warning"}
    assert reasons == set()


def test_a_complete_run_stays_complete_with_a_new_generation(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    world.cluster.delete("Job", RUN, propagation="Foreground")
    world.set_compute(memory="64Gi")
    world.advance(20)
    assert (world.jobs(), world.status()["state"], world.status()["observedGeneration"]) == ([], "Complete", 2)
    assert world.condition("Complete")["observedGeneration"] == 2


def test_a_complete_run_gets_another_ttl(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    world.set_compute(ttlSecondsAfterFinished=60)
    world.advance(80)
    assert (world.jobs(), world.status()["state"]) == ([], "Complete")


def test_a_failed_run_starts_again_when_its_spec_changes(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.script = {"transfer": [2]}
    world.apply(sample_objects.spec())
    world.advance(140)
    assert world.status()["state"] == "Failed"
    world.set_compute(retries=5)
    world.advance(160)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 2)
    assert world.status().get("error") is None
    assert "Resumed" in [reason for reason, _ in world.events()]


def test_a_run_keeps_its_image_when_the_default_changes(world: ControlledCluster) -> None:
    put_defaults(world, "image: registry/topwork:1-gpu")
    world.apply(sample_objects.spec())
    world.advance(30)
    put_defaults(world, "image: registry/topwork:2-gpu")
    world.restart()
    world.set_compute(memory="64Gi")
    world.advance(20)
    assert image(world) == "registry/topwork:1-gpu"
    world.set_compute(image="registry/topwork:3-gpu")
    world.advance(20)
    assert image(world) == "registry/topwork:3-gpu"
    world.change(lambda job: job["spec"]["compute"].pop("image"))
    world.advance(20)
    assert image(world) == "registry/topwork:2-gpu"


def test_changed_defaults_do_not_touch_a_run(world: ControlledCluster) -> None:
    content = sample_objects.spec()
    storage = content["spec"].pop("storage")
    put_defaults(world, f"spec: {{storage: {storage}}}")
    world.apply(content)
    world.advance(30)
    put_defaults(world, "spec: {storage: s3://other}")
    world.cluster.delete("Job", RUN, propagation="Foreground")
    world.restart()
    world.advance(20)
    assert (world.jobs(), world.status()["run"]) == ([RUN], RUN)
    config_map = world.server.get("ConfigMap", RUN)
    assert config_map and storage in config_map["data"]["job.yaml"]


def put_defaults(world: ControlledCluster, text: str) -> None:
    metadata = {"name": "topwork-defaults"}
    world.server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}})


def image(world: ControlledCluster) -> str:
    return str(world.job()["spec"]["template"]["spec"]["containers"][0]["image"])


# ── Suspend and resume ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_suspended_run_frees_its_gpus_and_resumes(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(90)
    world.suspend()
    world.settle()
    assert (world.status()["state"], world.condition("Suspended")["status"]) == ("Suspended", "True")
    assert "to write its checkpoint" in world.status()["waitingFor"]
    world.advance(20)
    assert (world.jobs(), world.status().get("waitingFor"), [*world.delays.values()]) == ([], None, [None])
    world.suspend(False)
    world.settle()
    assert (world.status()["state"], world.condition("Suspended")["status"]) == ("Running", "False")
    world.advance(100)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 2)
    assert [reason for reason, _ in world.events()] == [
        "Created",
        "Running",
        "Suspended",
        "Resumed",
        "Running",
        "Completed",
    ]


def test_a_run_that_is_resumed_at_once_waits_for_its_pod(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(90)
    world.suspend()
    world.settle()
    world.suspend(False)
    world.settle()
    assert world.status()["state"] == "Pending"
    assert "to write its checkpoint" in world.status()["waitingFor"]
    world.advance(120)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 2)


def test_a_transfer_job_can_be_created_suspended(world: ControlledCluster) -> None:
    content = sample_objects.spec()
    content["spec"]["suspend"] = True
    world.apply(content)
    world.settle()
    assert (world.jobs(), world.status()["state"], world.status()["run"]) == ([], "Suspended", RUN)
    world.suspend(False)
    world.advance(200)
    assert world.status()["state"] == "Complete"


def test_a_spec_that_changes_while_it_is_suspended_applies_on_resumption(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(90)
    world.suspend()
    world.advance(20)
    world.set_compute(memory="64Gi")
    world.advance(20)
    assert (world.jobs(), world.status()["state"]) == ([], "Suspended")
    world.suspend(False)
    world.settle()
    limits = world.job()["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["memory"] == "64Gi"


def test_suspending_a_finished_run_changes_nothing(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    world.suspend()
    world.settle()
    assert (world.status()["state"], world.condition("Suspended")["status"]) == ("Complete", "False")
    assert world.jobs() == [RUN]


# ── Cancel ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_canceled_run_stops_for_good(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.annotate(cancel=RUN)
    world.settle()
    assert (world.status()["state"], world.condition("Cancelled")["status"]) == ("Cancelled", "True")
    world.advance(20)
    world.restart()
    world.advance(20)
    assert (world.jobs(), world.status().get("waitingFor"), world.status()["exitCode"]) == ([], None, 143)
    assert world.status()["attemptHistory"][0]["exitCode"] == 143


def test_a_canceled_run_starts_again_once_the_annotation_is_gone_and_the_spec_changes(
    world: ControlledCluster,
) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.annotate(cancel=RUN)
    world.advance(20)
    world.set_compute(retries=5)
    world.settle()
    assert world.status()["state"] == "Cancelled"
    world.change(lambda job: job["metadata"].pop("annotations"))
    world.settle()
    assert world.status()["state"] == "Cancelled"
    world.set_compute(retries=6)
    world.advance(200)
    assert world.status()["state"] == "Complete"


def test_the_annotation_of_another_run_cancels_nothing(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(30)
    world.annotate(cancel=run_with_epochs(20))
    world.settle()
    assert world.status()["state"] == "Running"
    world.apply(spec_with_epochs(20))
    world.settle()
    assert (world.status()["state"], world.status()["run"]) == ("Cancelled", run_with_epochs(20))


def test_a_pending_run_can_be_canceled(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.can_schedule = False
    world.apply(sample_objects.spec())
    world.settle()
    world.annotate(cancel=RUN)
    world.settle()
    assert (world.jobs(), world.status()["state"], world.status()["gpuSeconds"]) == ([], "Cancelled", 0)


def test_a_complete_run_can_not_be_canceled(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.advance(200)
    world.annotate(cancel=RUN)
    world.settle()
    assert (world.status()["state"], world.jobs()) == ("Complete", [RUN])


# ── Annotations, and Jobs of `submit` ───────────────────────────────────────────────────────────────────────────────


def test_only_the_first_pod_of_a_run_deletes_earlier_results(world: ControlledCluster) -> None:
    content = sample_objects.spec()
    content["metadata"]["annotations"] = {"topwork.dev/restart": "true", "topwork.dev/dataset": "datasets/flowers/1"}
    world.apply(content)
    world.settle()
    first = {"topwork.dev/dataset": "datasets/flowers/1", "topwork.dev/restart": "true"}
    assert world.job()["spec"]["template"]["metadata"]["annotations"] == first
    world.advance(30)
    world.suspend()
    world.advance(20)
    world.suspend(False)
    world.settle()
    annotations = {"topwork.dev/dataset": "datasets/flowers/1"}
    assert world.job()["spec"]["template"]["metadata"]["annotations"] == annotations


def submit(world: ControlledCluster, image: str = "topwork:0") -> Object:
    """Create the objects of the run as `topwork submit --as job` does."""
    rendered = render(sample_objects.transfer_job(), RenderOptions(image))
    for obj in rendered.objects:
        world.cluster.apply(obj)
    return world.job(RUN)


def test_a_running_job_of_submit_is_adopted(world: ControlledCluster) -> None:
    uid = submit(world)["metadata"]["uid"]
    world.settle()
    world.apply(sample_objects.spec())
    world.settle()
    job = world.job()
    assert (job["metadata"]["uid"], world.status()["state"]) == (uid, "Running")
    assert [owner["kind"] for owner in job["metadata"]["ownerReferences"]] == ["TransferJob"]
    assert job["spec"]["ttlSecondsAfterFinished"] > 10**9
    assert world.status()["image"] == "topwork:0"
    world.advance(200)
    assert (world.status()["state"], world.status()["attempts"]) == ("Complete", 1)
    assert world.job()["spec"]["ttlSecondsAfterFinished"] == 86400


def test_a_failed_job_of_submit_is_replaced(world: ControlledCluster) -> None:
    world.kubernetes.kubelet.script = {"transfer": [2]}
    uid = submit(world)["metadata"]["uid"]
    world.advance(140)
    world.apply(sample_objects.spec())
    world.advance(200)
    assert world.job()["metadata"]["uid"] != uid
    assert world.status()["state"] == "Complete"


def test_a_controller_that_is_killed_while_a_run_is_replaced_leaves_no_config_map(world: ControlledCluster) -> None:
    world.apply(sample_objects.spec())
    world.settle()
    world.apply(spec_with_epochs(20))
    world.server.inject(Fault(api_statuses.status(503, "ServiceUnavailable", "down"), method="DELETE"), times=5)
    world.settle()
    world.advance(40)
    assert [item["metadata"]["name"] for item in world.server.list("ConfigMap")] == [run_with_epochs(20)]
    world.errors.clear()
