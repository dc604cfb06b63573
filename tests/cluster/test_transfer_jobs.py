"""TransferJobs applied with kubectl: runs, changes of the spec, stops, and GitOps tools that apply them repeatedly."""

import time

import pytest
from tests.cluster.controller import Controller
from tests.cluster.environment import DELETION_SECONDS, EVENT_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import Kubectl, KubectlError, wait_for
from tests.cluster.manifests import ROOT, RULE_ERRORS, break_rules
from tests.cluster.transfer_jobs import LONG_TRAINING, TransferJobRun

from topwork.cluster.names import CANCEL_ANNOTATION, JOB_LABEL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(3 * RUN_SECONDS)]

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}
COLUMNS = "NAME STATE STAGE PROGRESS ETA METRIC MODEL"
SYNC_SECONDS, SYNCS = 5, 12
# Longer than a controller needs to start and to reconcile all TransferJobs.
SETTLE_SECONDS = 45


@pytest.fixture(scope="module")
def published(make_shared_transfer_job) -> TransferJobRun:
    """A TransferJob that has published its model."""
    run = make_shared_transfer_job(fineTune=FINE_TUNE)
    run.apply()
    run.wait_for_condition("Complete")
    return run


@pytest.fixture
def train(make_transfer_job):
    """Function that applies a TransferJob and waits for some epochs; returns the run, its pod and the epoch numbers."""

    def start(**spec):
        run = make_transfer_job(**{"transfer": LONG_TRAINING, **spec})
        run.apply()
        pod = run.wait_for_pod()
        return run, pod, run.wait_for_epochs(pod, 3)

    return start


def sync(run: TransferJobRun) -> None:
    """Apply the file as Argo CD does."""
    run.apply("--server-side", "--field-manager=argocd-controller", "--force-conflicts")


@pytest.mark.smoke
def test_applied_transfer_job_publishes_its_model(published):
    status = published.observed_status()
    assert (status.state, status.run) == ("Complete", published.object_name)
    assert status.model == f"{published.job.spec.storage}/models/{published.name}/1"
    assert (status.model_version, status.attempts, status.failures, status.exit_code) == (1, 1, 0, 0)
    assert status.start_time < status.completion_time
    assert {condition.type: condition.status for condition in status.conditions} == {
        "Accepted": "True",
        "Suspended": "False",
        "Complete": "True",
        "Failed": "False",
        "Cancelled": "False",
    }
    messages = published.termination_messages(published.pods()[-1])
    assert messages["fine-tune"].model == status.model


@pytest.mark.smoke
def test_objects_of_the_run_belong_to_the_transfer_job(published):
    owner = published.transfer_job()["metadata"]["uid"]
    for kind in ("job", "configmap"):
        references = published.kubectl.get(kind, published.object_name)["metadata"]["ownerReferences"]
        assert [(item["kind"], item["uid"]) for item in references if item.get("controller")] == [
            ("TransferJob", owner)
        ]


@pytest.mark.smoke
def test_kubectl_get_shows_the_columns(published):
    narrow = published.kubectl("get", "tj", published.name).splitlines()
    assert narrow[0].split() == [*COLUMNS.split(), "AGE"]
    assert narrow[1].split()[:2] == [published.name, "Complete"]
    wide = published.kubectl("get", "topwork", "--output", "wide")
    assert wide.splitlines()[0].split() == [*COLUMNS.split(), "RUN", "ATTEMPTS", "GPUS", "WAITING", "FOR", "AGE"]
    assert published.object_name in wide


def test_each_change_of_state_has_one_event(published):
    events = [(event["reason"], event["message"]) for event in published.events()]
    assert len(events) == len(set(events))
    reasons = [reason for reason, _ in events]
    assert reasons.count("Created") == reasons.count("Completed") == 1
    assert "Running" in reasons


def test_metrics_of_the_controller_have_the_transfer_job(published, controller: Controller):
    series = controller.metrics(controller.wait_for_leader())
    labels = f'namespace="{published.kubectl.namespace}"'
    name = f'transferjob="{published.name}"'
    assert series[f'topwork_transferjob_state{{{labels},state="Complete",{name}}}'] == 1
    assert series[f'topwork_transferjob_state{{{labels},state="Running",{name}}}'] == 0
    completed = series[f"topwork_transferjob_completed_timestamp_seconds{{{labels},{name}}}"]
    assert completed == published.observed_status().completion_time.timestamp()


def test_finished_transfer_job_whose_job_is_gone_stays_finished(published, controller: Controller):
    published.kubectl("delete", "job", published.object_name, "--ignore-not-found")
    controller.kill()
    controller.wait_for_leader()
    sync(published)
    time.sleep(SETTLE_SECONDS)
    assert published.kubernetes_job() is None
    assert published.observed_status().state == "Complete"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_server_accepts_every_example(path, definition, namespace: Kubectl):
    options = ("--dry-run=server", "--validate=strict", "--warnings-as-errors")
    assert namespace("apply", "--filename", str(path), *options).rstrip().endswith("(server dry run)")


def test_server_rejects_unknown_keys(make_transfer_job):
    run = make_transfer_job()
    run.edit(lambda spec: spec.update(epoch=3))
    with pytest.raises(KubectlError, match=r'unknown field "spec\.epoch"'):
        run.apply("--dry-run=server", "--validate=strict")


@pytest.mark.smoke
def test_suspended_transfer_job_frees_its_pod_and_resumes_from_its_checkpoint(train):
    run, _, epochs = train()
    run.patch(suspend=True)
    run.wait_for_state("Suspended", seconds=DELETION_SECONDS)
    assert run.condition_of_transfer_job("Suspended").status == "True"
    run.wait_until_stopped()
    run.patch(suspend=False)
    assert run.wait_for_epochs(run.wait_for_pod())[0] > epochs[-1]
    status = run.wait_for_state("Running", seconds=EVENT_SECONDS)
    assert (status.run, status.failures) == (run.object_name, 0)
    assert run.condition_of_transfer_job("Suspended").status == "False"


def test_changed_fine_tuning_is_a_new_run_that_reuses_transfer(make_transfer_job):
    first = make_transfer_job(fineTune=FINE_TUNE)
    first.apply()
    first.wait_for_condition("Complete")
    second = first.with_spec(fineTune=FINE_TUNE | {"epochs": 2})
    assert second.object_name != first.object_name
    second.apply()
    status = second.wait_for_state("Complete")
    assert (status.run, status.model_version) == (second.object_name, 2)
    pod = second.pods()[-1]["metadata"]["name"]
    assert second.epochs(pod, "transfer") == []
    assert second.epochs(pod, "fine-tune") == [1, 2]


def test_spec_changed_during_a_run_replaces_it_after_its_checkpoint(train):
    first, pod, _ = train()
    second = first.with_spec(transfer=LONG_TRAINING | {"batchSize": 4})
    with first.kubectl.watch("pod", pod) as events:
        wait_for(events, f"first event of {pod}", seconds=EVENT_SECONDS)
        second.apply()
        wait_for(lambda: events()[-1]["type"] == "DELETED", f"deletion of {pod}", seconds=DELETION_SECONDS)
        last = events()[-1]["object"]
    assert first.termination_messages(last)["transfer"].outcome == "stopped"
    second.wait_for_epochs(second.wait_for_pod())
    assert first.kubernetes_job() is None
    assert second.observed_status().run == second.object_name


def test_change_that_concerns_no_pod_is_applied_to_the_job(train):
    run, pod, _ = train()
    uid = run.job_uid()
    run.edit(lambda spec: spec["compute"].update(retries=7))
    run.apply()
    wait_for(
        lambda: run.kubernetes_job()["spec"]["backoffLimit"] == 7, "backoffLimit of the Job", seconds=EVENT_SECONDS
    )
    assert run.job_uid() == uid
    assert [item["metadata"]["name"] for item in run.pods()] == [pod]


def test_cancel_annotation_stops_the_run_for_good(train):
    run, _, _ = train()
    run.kubectl("annotate", "transferjob", run.name, f"{CANCEL_ANNOTATION}={run.object_name}")
    run.wait_for_condition("Cancelled", seconds=DELETION_SECONDS)
    run.wait_until_stopped()
    sync(run)
    time.sleep(SETTLE_SECONDS)
    assert run.kubernetes_job() is None
    assert run.observed_status().state == "Cancelled"


def test_deleted_transfer_job_stops_its_pod_with_a_checkpoint(train, make_transfer_job):
    run, pod, epochs = train()
    with run.kubectl.watch("pod", pod) as events:
        wait_for(events, f"first event of {pod}", seconds=EVENT_SECONDS)
        run.kubectl("delete", "transferjob", run.name)
        wait_for(lambda: events()[-1]["type"] == "DELETED", f"deletion of {pod}", seconds=DELETION_SECONDS)
        last = events()[-1]["object"]
    assert run.termination_messages(last)["transfer"].outcome == "stopped"
    run.wait_until_deleted()
    # The results in storage stay: the same spec resumes.
    run.apply()
    assert run.wait_for_epochs(run.wait_for_pod())[0] > epochs[-1]


@pytest.mark.smoke
def test_spec_that_breaks_a_rule_is_not_accepted_and_all_errors_are_in_the_status(make_transfer_job):
    run = make_transfer_job()
    valid = run.file.read_text()
    run.edit(break_rules)
    run.apply("--validate=strict")
    run.wait_for_condition("Accepted=False", seconds=EVENT_SECONDS)
    accepted = run.condition_of_transfer_job("Accepted")
    assert accepted.reason == "InvalidSpec"
    assert all(error in accepted.message for error in RULE_ERRORS), accepted.message
    assert run.observed_status().state == "Failed"
    assert run.kubectl.items("job", f"{JOB_LABEL}={run.name}") == []
    run.file.write_text(valid)
    run.apply()
    run.wait_for_pod()
    run.wait_for_condition("Accepted", seconds=EVENT_SECONDS)


def test_repeated_server_side_apply_of_a_gitops_tool_changes_nothing(make_transfer_job):
    run = make_transfer_job(transfer=LONG_TRAINING)
    sync(run)
    run.wait_for_epochs(run.wait_for_pod(), 3)
    before, uid, pods = run.transfer_job(), run.job_uid(), run.pods()
    for _ in range(SYNCS):
        sync(run)
        time.sleep(SYNC_SECONDS)
    after = run.transfer_job()
    assert after["metadata"]["generation"] == before["metadata"]["generation"] == 1
    assert after["spec"] == before["spec"]
    assert run.job_uid() == uid
    assert [pod["metadata"]["uid"] for pod in run.pods()] == [pod["metadata"]["uid"] for pod in pods]
    assert run.observed_status().state == "Running"


def test_pending_transfer_job_says_what_it_waits_for(make_transfer_job):
    transfer = {"train": "all", "epochs": 2, "batchSize": 16, "featureCache": "off"}
    run = make_transfer_job(transfer=transfer, compute={"gpus": 16})
    run.apply()

    def reason() -> str | None:
        status = run.observed_status()
        return status.waiting_for if status.state == "Pending" and "nvidia.com/gpu" in str(status.waiting_for) else None

    wait_for(reason, "reason of the pending pod", seconds=START_SECONDS)
    assert run.observed_status().gpus == 16
