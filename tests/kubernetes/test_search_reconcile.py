"""The controller runs the trials of a TransferSearch as TransferJobs, and publishes the best one."""

from collections.abc import Iterator
from typing import Any

import api_statuses
import pytest
import sample_objects
import sample_searches
from api_server import ApiServer
from api_statuses import Fault
from sample_searches import DROPOUT, RATE, SearchWorld

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.searches.config_map_journal import decode_events

Object = dict[str, Any]


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> Iterator[SearchWorld]:
    controlled = SearchWorld(api_server, cluster)
    yield controlled
    assert controlled.kubernetes.overlapping_pods() == []
    assert controlled.errors == []


# ── Trials ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trials_run_as_transfer_jobs_that_the_search_owns(world: SearchWorld) -> None:
    search = world.apply(sample_searches.search(trials=2))
    world.settle()
    assert [*world.trial_jobs()] == ["flowers-0"]
    trial, identity = world.trial_jobs()["flowers-0"], world.search_status()["search"]
    owner = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferSearch", "name": "flowers"}
    owner |= {"uid": search["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}
    assert trial["metadata"]["ownerReferences"] == [owner]
    labels = {"team": "vision", "topwork.dev/search": identity, "topwork.dev/trial": "0"}
    assert trial["metadata"]["labels"] == labels
    job = world.job(trial["status"]["run"])
    assert job["metadata"]["labels"].items() >= labels.items()
    assert trial["spec"]["publish"]["enabled"] is False
    assert 1e-5 <= trial["spec"]["transfer"]["optimizer"]["learningRate"] <= 1e-1


def test_a_search_publishes_its_best_trial_under_its_own_name(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2))
    world.finish()
    jobs, status = world.trial_jobs(), world.search_status()
    assert {name: job["status"]["state"] for name, job in jobs.items()} == dict.fromkeys(
        ("flowers-0", "flowers-1", "flowers-best"), "Complete"
    )
    values = [jobs[f"flowers-{number}"]["status"]["metrics"]["accuracy"] for number in range(2)]
    best = values.index(max(values))
    winner = jobs[f"flowers-{best}"]["spec"]
    assert jobs["flowers-best"]["spec"]["transfer"]["optimizer"] == winner["transfer"]["optimizer"]
    assert jobs["flowers-best"]["spec"]["model"]["head"] == winner["model"]["head"]
    assert jobs["flowers-best"]["spec"]["publish"]["name"] == "flowers"
    # Its pods refuse to train other weights than those of the winner.
    annotations = world.job(jobs["flowers-best"]["status"]["run"])["spec"]["template"]["metadata"]["annotations"]
    assert annotations["topwork.dev/selected-run"] == jobs[f"flowers-{best}"]["status"]["run"]
    params = {
        RATE: str(winner["transfer"]["optimizer"]["learningRate"]),
        DROPOUT: str(winner["model"]["head"]["dropout"]),
    }
    assert status["best"] == {"trial": best, "value": values[best], "params": params}
    assert (status["state"], status["progress"], status["endReason"]) == (
        "Complete",
        "2/2",
        "all 2 trials are finished",
    )
    assert status["trials"] == {"running": 0, "paused": 0, "complete": 2, "pruned": 0, "failed": 0}
    assert (status["model"], status["modelVersion"]) == (jobs["flowers-best"]["status"]["model"], 1)
    assert world.search_condition("Complete")["message"] == f"published {status['model']}"
    assert [reason for reason, _ in world.search_events()] == ["Running", "Completed"]


def test_at_most_parallel_trials_are_unfinished_at_any_time(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=5, parallel=2))
    world.finish()
    assert world.search_status()["state"] == "Complete"
    unfinished: set[str] = set()
    most = 0
    for change in world.server.objects.history:
        if change.kind == "TransferJob":
            state = (change.object.get("status") or {}).get("state")
            name = change.object["metadata"]["name"]
            (unfinished.discard if state == "Complete" else unfinished.add)(name)
            most = max(most, len(unfinished - {"flowers-best"}))
    assert most == 2


def test_a_promoted_trial_continues_as_the_same_transfer_job(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=3, pruner="asha"))
    world.settle()
    assert world.trial_jobs()["flowers-0"]["spec"]["transfer"]["epochs"] == 1
    assert world.trial_jobs()["flowers-0"]["spec"]["compute"]["keepCheckpoint"] is True
    world.finish()
    status, jobs = world.search_status(), world.trial_jobs()
    assert status["state"] == "Complete"
    assert status["trials"] == {"running": 0, "paused": 0, "complete": 1, "pruned": 2, "failed": 0}
    trained = {name: job["spec"]["transfer"]["epochs"] for name, job in jobs.items()}
    winner = f"flowers-{status['best']['trial']}"
    assert trained == dict.fromkeys(("flowers-0", "flowers-1", "flowers-2"), 1) | {winner: 9, "flowers-best": 9}
    runs = {pod.run for pod in world.kubernetes.pods if pod.run.startswith(f"{winner}-")}
    assert len(runs) == 3  # 1, 3 and 9 epochs


def test_gpu_time_of_a_promoted_trial_counts_once(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1, pruner="asha"))
    world.kubernetes.kubelet.stage_seconds = 15.0
    world.advance(180)
    total = world.trial_jobs()["flowers-0"]["status"]["gpuSeconds"]
    assert total > 3 * 2 * 40  # three runs of about 45 s on two GPUs
    assert world.search_status()["gpuSeconds"] == pytest.approx(total, abs=4)


def test_later_trials_use_the_dataset_of_the_first(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2))
    world.finish()
    jobs = world.trial_jobs()
    dataset = jobs["flowers-0"]["status"]["dataset"]
    assert "annotations" not in jobs["flowers-0"]["metadata"]
    for name in ("flowers-1", "flowers-best"):
        assert jobs[name]["metadata"]["annotations"]["topwork.dev/dataset"] == dataset


def test_trials_on_lists_of_images_use_the_dataset_and_the_same_lists(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2))
    images = iter(("datasets/flowers/one#0123abcd", "datasets/flowers/one#4567cdef"))
    kubelet = world.kubernetes.kubelet
    kubelet.evaluate = lambda spec: setattr(kubelet, "dataset", next(images)) or sample_searches.evaluate(spec)
    world.finish()
    assert world.trial_jobs()["flowers-1"]["metadata"]["annotations"]["topwork.dev/dataset"] == "datasets/flowers/one"
    assert "a list of the splits has changed" in world.search_status()["error"]


def test_a_trial_on_another_dataset_failed(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2, parallel=2))
    datasets = iter(("datasets/flowers/one", "datasets/flowers/two"))
    kubelet = world.kubernetes.kubelet
    kubelet.evaluate = lambda spec: setattr(kubelet, "dataset", next(datasets)) or sample_searches.evaluate(spec)
    world.finish()
    status = world.search_status()
    assert status["trials"]["failed"] == 1
    assert "a list of the splits has changed" in status["error"]


# ── Failures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_trial_counts_and_the_search_goes_on(world: SearchWorld) -> None:
    world.kubernetes.kubelet.script = {"transfer": [2]}
    world.apply(sample_searches.search(trials=3))
    world.finish()
    status = world.search_status()
    assert (status["state"], status["trials"]["failed"], status["trials"]["complete"]) == ("Complete", 1, 2)
    error = world.trial_jobs()["flowers-0"]["status"]["error"]
    assert ("TrialFailed", f"trial 0: {error}") in world.search_events()


def test_a_search_whose_first_three_trials_fail_ends_with_their_error(world: SearchWorld) -> None:
    world.kubernetes.kubelet.script = {"pull": [2] * 10}
    world.apply(sample_searches.search(trials=10))
    world.finish()
    status = world.search_status()
    assert (status["state"], status["trials"]["failed"], [*world.trial_jobs()]) == (
        "Failed",
        3,
        ["flowers-0", "flowers-1", "flowers-2"],
    )
    assert world.search_condition("Failed")["reason"] == "NoCompleteTrial"
    assert world.trial_jobs()["flowers-2"]["status"]["error"] in status["error"]


def test_a_gate_that_is_not_met_fails_the_search(world: SearchWorld) -> None:
    world.kubernetes.kubelet.script = {"fine-tune": [0, 3]}
    world.apply(sample_searches.search(trials=1))
    world.finish()
    status = world.search_status()
    assert (status["state"], status.get("model")) == ("Failed", None)
    assert world.search_condition("Failed")["reason"] == "GateNotMet"
    assert status["error"].startswith("transferjob/flowers-best: ")


def test_a_canceled_trial_failed_and_a_deleted_one_runs_again(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2, parallel=2))
    world.advance(40)
    world.cluster.delete("TransferJob", "flowers-0")
    second = world.trial_jobs()["flowers-1"]
    annotations = {"topwork.dev/cancel": second["status"]["run"]}
    world.cluster.apply(
        {key: second[key] for key in ("apiVersion", "kind")}
        | {"metadata": {"name": "flowers-1", "annotations": annotations}}
    )
    world.settle()
    world.finish()
    status = world.search_status()
    assert (status["trials"]["complete"], status["trials"]["failed"]) == (1, 1)
    assert status["error"] == f"trial 1: {second['status']['run']} was canceled"
    assert world.states()["flowers-0"] == "Complete"


def test_a_trial_without_the_metric_failed(world: SearchWorld) -> None:
    world.kubernetes.kubelet.evaluate = lambda spec: {"accuracy": 0.9}
    world.apply(sample_searches.search(trials=3, metric="loss"))
    world.finish()
    status = world.search_status()
    run = world.trial_jobs()["flowers-2"]["status"]["run"]
    error = f"{run} is complete, but its loss on the validation split is unknown: it reported accuracy"
    assert (status["state"], status["trials"]["failed"]) == ("Failed", 3)
    assert error in status["error"]


# ── Suspension, cancellation, deletion ──────────────────────────────────────────────────────────────────────────────


def test_a_suspended_search_frees_its_gpus_and_continues_later(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=4, parallel=2))
    world.advance(40)
    world.change_search(suspend=True)
    world.advance(60)
    assert world.search_status()["state"] == "Suspended"
    assert world.search_condition("Suspended")["status"] == "True"
    assert world.active_pods() == []
    assert world.states() == dict.fromkeys(("flowers-0", "flowers-1"), "Suspended")
    world.advance(40)
    assert world.states() == dict.fromkeys(("flowers-0", "flowers-1"), "Suspended")
    world.change_search(suspend=False)
    world.finish()
    assert (world.search_status()["state"], world.search_status()["progress"]) == ("Complete", "4/4")


def test_a_complete_search_remains_complete_when_it_is_suspended(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1))
    world.finish()
    before = world.search_status()
    world.change_search(suspend=True)
    world.advance(60)
    after = world.search_status()
    assert (after["state"], after["completionTime"]) == ("Complete", before["completionTime"])
    assert world.trial_jobs()["flowers-best"]["spec"]["suspend"] is False


def cancel(world: SearchWorld, search: str | None) -> None:
    metadata = {"name": "flowers", "annotations": {"topwork.dev/cancel": search} if search else {}}
    kind = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferSearch"}
    world.cluster.apply(kind | {"metadata": metadata}, manager="topwork-cancel", force=True)


def test_a_canceled_search_stops_its_trials_and_can_be_resumed(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2))
    world.advance(40)
    cancel(world, world.search_status()["search"])
    world.advance(60)
    assert (world.search_status()["state"], world.active_pods()) == ("Cancelled", [])
    assert "completionTime" in world.search_status()
    cancel(world, None)
    world.finish()
    assert world.search_status()["state"] == "Complete"


def test_deleting_a_search_deletes_all_that_it_owns(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=3, parallel=2))
    world.advance(100)
    world.cluster.delete("TransferSearch", "flowers")
    world.advance(60)
    kinds = ("TransferSearch", "TransferJob", "Job", "Pod", "ConfigMap")
    assert {kind: world.server.list(kind) for kind in kinds} == {kind: [] for kind in kinds}


# ── Changed specs ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_more_trials_continue_a_complete_search(world: SearchWorld) -> None:
    world.kubernetes.kubelet.evaluate = lambda spec: {"accuracy": 1.0 - spec["model"]["head"]["dropout"], "loss": 0.1}
    world.apply(sample_searches.search(trials=1, seed=1))
    world.finish()
    first = world.search_status()
    world.change_search(trials=4)
    world.finish()
    status = world.search_status()
    assert (status["state"], status["progress"], status["search"]) == ("Complete", "4/4", first["search"])
    assert status["best"]["value"] > first["best"]["value"]
    assert (first["modelVersion"], status["modelVersion"]) == (1, 2)
    assert sum(pod.job.startswith("flowers-0-") for pod in world.kubernetes.pods) == 1


def test_another_space_starts_the_search_over(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=4, parallel=3))
    world.advance(40)
    first = world.search_status()["search"]
    world.change_search(space={RATE: {"logUniform": [1e-4, 1e-2]}}, trials=2, parallel=1)
    world.advance(20)
    status = world.search_status()
    assert status["search"] != first
    jobs = world.trial_jobs()
    assert {name: job["metadata"]["labels"]["topwork.dev/search"] for name, job in jobs.items()} == {
        "flowers-0": status["search"]
    }
    world.finish()
    assert (world.search_status()["state"], world.search_status()["progress"]) == ("Complete", "2/2")
    journals = {item["metadata"]["name"] for item in world.server.list("ConfigMap") if "binaryData" in item}
    assert journals == {f"{first}-journal", f"{status['search']}-journal"}


@pytest.mark.parametrize("rates", [{"choice": [0.001]}, {"logUniform": [1e-5, 1e-1]}], ids=["same", "other"])
def test_a_new_search_does_not_use_the_images_of_the_one_before(world: SearchWorld, rates: Object) -> None:
    space = {RATE: rates, DROPOUT: {"choice": [0.1, 0.2]}}
    world.apply(sample_searches.search(trials=2, space=space))
    world.finish()
    assert "topwork.dev/dataset" in world.trial_jobs()["flowers-1"]["metadata"]["annotations"]
    world.kubernetes.kubelet.dataset = "datasets/flowers/new"
    world.change_search(seed=7)
    world.finish()
    status, jobs = world.search_status(), world.trial_jobs()
    assert (status["state"], status["trials"]["complete"]) == ("Complete", 2)
    assert [jobs[name]["status"]["dataset"] for name in ("flowers-0", "flowers-1")] == ["datasets/flowers/new"] * 2
    assert "annotations" not in jobs["flowers-0"]["metadata"]


def test_an_edited_trial_is_restored(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1))
    world.advance(20)
    before = world.trial_jobs()["flowers-0"]
    world.change(lambda job: job["spec"]["transfer"].update(epochs=50, batchSize=8), "flowers-0")
    world.advance(20)
    assert world.trial_jobs()["flowers-0"]["spec"] == before["spec"]
    world.finish()
    assert world.search_status()["state"] == "Complete"


# ── Invalid specs, defaults and conflicts ───────────────────────────────────────────────────────────────────────────


def test_an_invalid_search_is_rejected_with_all_its_problems(world: SearchWorld) -> None:
    space = {RATE: {"uniform": [0.0, 7.0]}, DROPOUT: {"uniform": [0.0, 7.0]}}
    world.apply(sample_searches.search(space=space))
    world.settle()
    accepted, status = world.search_condition("Accepted"), world.search_status()
    assert (accepted["status"], accepted["reason"], status["state"]) == ("False", "InvalidSpec", "Failed")
    assert RATE in accepted["message"]
    assert DROPOUT in accepted["message"]
    assert [reason for reason, _ in world.search_events()] == ["InvalidSpec"]
    assert world.trial_jobs() == {}


def test_trials_get_the_defaults_of_the_namespace_as_they_were_at_the_start(world: SearchWorld) -> None:
    def set_defaults(gpus: int) -> None:
        text = f"image: registry/topwork:{gpus}-gpu\nspec:\n  storage: s3://own/topwork\n  compute: {{gpus: {gpus}}}\n"
        metadata = {"name": "topwork-defaults"}
        config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}}
        world.cluster.apply(config_map, manager="helm", force=True)

    set_defaults(4)
    search = sample_searches.search(trials=2)
    del search["spec"]["template"]["storage"], search["spec"]["template"]["compute"]["gpus"]
    world.apply(search)
    world.advance(60)
    set_defaults(8)
    world.finish()
    specs = [job["spec"] for job in world.trial_jobs().values()]
    assert {(spec["storage"], spec["compute"]["gpus"], spec["compute"]["image"]) for spec in specs} == {
        ("s3://own/topwork", 4, "registry/topwork:4-gpu")
    }


def test_a_transfer_job_of_others_with_the_name_of_a_trial_is_left_alone(world: SearchWorld) -> None:
    other = sample_objects.spec()
    other["metadata"]["name"] = "flowers-0"
    world.apply(other)
    world.apply(sample_searches.search(trials=1))
    world.settle()
    assert world.search_status()["waitingFor"] == (
        "transferjob/flowers-0 does not belong to this search, but has the name of one of its trials. Delete it, or "
        "rename the search."
    )
    assert world.trial_jobs()["flowers-0"]["spec"] == world.server.get("TransferJob", "flowers-0")["spec"]
    world.delete("flowers-0")
    world.finish()
    assert world.search_status()["state"] == "Complete"


def test_a_trial_that_the_cluster_rejects_is_reported_and_tried_again(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1))
    denied = api_statuses.status(403, "Forbidden", 'admission webhook "policy.example.com" denied the request: no GPUs')
    world.server.inject(Fault(denied, method="POST", path="/transferjobs"))
    world.deliver()
    world.reconcile_search()
    assert (world.search_status()["state"], world.trial_jobs()) == ("Pending", {})
    assert world.search_status()["waitingFor"].startswith("transferjob/flowers-0: ")
    assert "no GPUs" in world.search_status()["waitingFor"]
    world.finish()
    assert world.search_status()["state"] == "Complete"


class MutatingCluster(Cluster):
    """A connection to a cluster whose admission webhooks change the memory of TransferJobs."""

    def in_namespace(self, namespace: str) -> Cluster:
        return self

    def create(self, obj: Object) -> Object:
        return super().create(self._mutate(obj))

    def replace(self, obj: Object) -> Object:
        return super().replace(self._mutate(obj))

    def _mutate(self, obj: Object) -> Object:
        if obj["kind"] != "TransferJob":
            return obj
        compute = obj["spec"]["compute"] | {"memory": "64Gi"}
        return obj | {"spec": obj["spec"] | {"compute": compute}}


def test_a_trial_that_another_tool_changes_is_reported_and_has_no_result(world: SearchWorld) -> None:
    world.controller_cluster = lambda: MutatingCluster(world.cluster._client, "team-a")
    world.restart()
    world.apply(sample_searches.search(trials=1))
    world.finish()
    status = world.search_status()
    assert (status["state"], status["progress"]) == ("Running", "0/1")
    message = "transferjob/flowers-0: another tool changes its spec, so its result does not count: "
    assert status["waitingFor"].startswith(message)
    assert "memory" in status["waitingFor"]


def test_a_search_without_free_gpus_says_what_its_trials_wait_for(world: SearchWorld) -> None:
    world.kubernetes.kubelet.can_schedule = False
    world.apply(sample_searches.search(trials=1))
    world.advance(20)
    status = world.search_status()
    assert (status["state"], status["progress"]) == ("Pending", "0/1")
    assert status["waitingFor"].startswith("flowers-0: ")
    assert "nvidia.com/gpu" in status["waitingFor"]
    world.kubernetes.kubelet.can_schedule = True
    world.advance(20)
    assert world.search_status()["state"] == "Running"
    assert "waitingFor" not in world.search_status()


def test_nothing_is_requested_for_a_search_without_a_change(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1))
    world.finish()
    requests = len(world.server.requests)
    world.reconcile_search()
    assert len(world.server.requests) == requests


def test_a_damaged_journal_is_reported_and_nothing_runs(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=2))
    world.settle()
    name = f"{world.search_status()['search']}-journal"
    stored = world.server.get("ConfigMap", name)
    assert len(decode_events(stored)) == 2
    world.server.put(stored | {"binaryData": {"journal.jsonl.gz": "bm90IGd6aXA="}})
    world.finish()
    assert world.search_condition("Accepted")["reason"] == "InvalidJournal"
    assert name in world.search_status()["waitingFor"]
    assert [*world.trial_jobs()] == ["flowers-0"]
    assert {str(error)[:30] for error in world.errors} == {"TransferSearch flowers in team"}
    world.errors.clear()
    world.server.put(world.server.get("ConfigMap", name) | {"binaryData": stored["binaryData"]})
    world.finish()
    assert world.search_status()["state"] == "Complete"


def test_a_journal_that_the_cluster_rejects_is_reported_and_tried_again(world: SearchWorld) -> None:
    world.apply(sample_searches.search(trials=1))
    too_long = api_statuses.status(413, "RequestEntityTooLarge", "Request entity too large: limit is 3145728")
    world.server.inject(Fault(too_long, method="PUT", path="/configmaps"))
    world.deliver()
    world.reconcile_search()
    assert "Request entity too large" in world.search_status()["waitingFor"]
    assert world.trial_jobs() == {}
    assert len(world.errors) == 1
    world.errors.clear()
    world.finish()
    assert world.search_status()["state"] == "Complete"
    assert "waitingFor" not in world.search_status()


def test_a_change_that_refuses_a_running_trial_is_rejected_until_it_is_undone(world: SearchWorld) -> None:
    space = {"transfer.batchSize": {"int": [32, 64]}, RATE: {"choice": [0.001]}}
    template = sample_searches.TEMPLATE | {"compute": {"gpus": 1}}
    world.apply(sample_searches.search(trials=1, space=space, template=template, seed=1))
    world.settle()
    trial = world.trial_jobs()["flowers-0"]
    assert trial["spec"]["transfer"]["batchSize"] % 16
    world.change_search(template=template | {"compute": {"gpus": 16}})
    world.settle()
    accepted = world.search_condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSpec")
    assert "has changed since trial 0 was started" in world.search_status()["waitingFor"]
    assert world.trial_jobs()["flowers-0"]["spec"] == trial["spec"]
    world.change_search(template=template)
    world.finish()
    assert world.search_status()["state"] == "Complete"
