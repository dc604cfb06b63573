"""A running job: status, logs and metrics, and rejected changes."""

import re
import time

import pytest
from ruamel.yaml import YAML
from tests.cluster.environment import EVENT_SECONDS, RUN_SECONDS, START_SECONDS
from tests.cluster.kubectl import wait_for
from tests.cluster.manifests import inspection
from tests.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

# Far more epochs than the job can train during these tests.
LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}

TOKEN_EXISTS = "import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))"


@pytest.fixture(scope="module")
def training(make_shared_run, topwork) -> Run:
    """A run whose transfer stage takes longer than the tests of this module."""
    run = make_shared_run(transfer=LONG_TRAINING, compute={"deadlineSeconds": 7200})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    assert run.object_name in submitted.output
    run.wait_for_epochs(run.wait_for_pod())
    return run


def last_pod(run):
    return run.pods()[-1]


def test_submitting_the_same_spec_again_changes_nothing(training, topwork):
    before = training.kubernetes_job()["metadata"]["uid"]
    again = topwork("submit", training.file)
    assert again.exit_code == 0, again.output
    assert "unchanged" in again.output
    assert training.kubernetes_job()["metadata"]["uid"] == before


def test_changed_compute_is_rejected_while_the_job_runs(training, topwork, tmp_path):
    before = training.kubernetes_job()
    content = YAML(typ="safe").load(training.file.read_text())
    content["spec"]["compute"]["sharedMemory"] = "96Mi"
    changed = tmp_path / "changed.yaml"
    with changed.open("w") as stream:
        YAML().dump(content, stream)
    rejected = topwork("submit", changed)
    assert rejected.exit_code == 2, rejected.output
    assert "compute.sharedMemory" in rejected.output
    after = training.kubernetes_job()
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])


def test_changed_image_is_rejected_while_the_job_runs(training, topwork):
    rejected = topwork("submit", training.file, "--image", "registry.invalid/topwork:other")
    assert rejected.exit_code == 2, rejected.output
    assert "image" in rejected.output


def test_status_shows_stage_and_epochs(training, topwork):
    status = topwork("status", training.name)
    assert status.exit_code == 0, status.output
    assert "transfer" in status.output
    assert "10000" in status.output


def test_list_shows_the_run(training, topwork):
    listed = topwork("list")
    assert listed.exit_code == 0, listed.output
    line = next(line for line in listed.stdout.splitlines() if training.name in line)
    assert "transfer" in line


def test_logs_of_a_finished_and_of_a_running_stage(training, topwork):
    pulled = topwork("logs", training.name, "--stage", "pull")
    assert pulled.exit_code == 0, pulled.output
    assert '"dataset"' in pulled.stdout
    assert '"epoch"' not in pulled.stdout
    trained = topwork("logs", training.name, "--stage", "transfer")
    assert trained.exit_code == 0, trained.output
    assert '"epoch"' in trained.stdout


def test_followed_logs_grow(training, topwork):
    followed = topwork.start("logs", training.name, "--stage", "transfer", "-f")
    followed.wait_for('"epoch"', seconds=EVENT_SECONDS)
    previous_length = len(followed.output)
    time.sleep(10)
    assert len(followed.output) > previous_length
    assert followed.process.poll() is None
    followed.interrupt()


def test_followed_logs_continue_from_pull_to_transfer(training, topwork):
    followed = topwork.start("logs", training.name, "-f")
    followed.wait_for('"dataset"', '"stage": "transfer"', seconds=EVENT_SECONDS)
    followed.interrupt()


def test_interrupted_follow_does_not_stop_the_job(training, topwork):
    before = training.kubernetes_job()["metadata"]["uid"]
    followed = topwork.start("status", training.name, "--follow")
    followed.wait_for("transfer", seconds=EVENT_SECONDS)
    result = followed.interrupt()
    assert result.exit_code == 130, result.output
    assert f"topwork status {training.name}" in result.output
    assert "--follow" in result.output
    assert "Traceback" not in result.output
    job = training.kubernetes_job()
    assert job["metadata"]["uid"] == before
    assert "deletionTimestamp" not in job["metadata"]


def test_metrics_are_served_at_the_pod_ip(training, namespace):
    text = namespace.metrics(last_pod(training)["metadata"]["name"], 9102)
    labels = rf'run="{training.object_name}",stage="transfer",transferjob="{training.name}"'
    assert re.search(rf"^topwork_stage_running{{{labels}}} 1\.0$", text, re.MULTILINE)
    assert re.search(rf"^topwork_epochs_planned{{{labels}}} 10000\.0$", text, re.MULTILINE)


def test_container_has_no_service_account_token(training, namespace):
    pod = inspection(training.kubernetes_job(), TOKEN_EXISTS)
    name = pod["metadata"]["name"]
    namespace.apply(pod)

    def has_ended() -> bool:
        return namespace.get("pod", name)["status"].get("phase") in {"Succeeded", "Failed"}

    try:
        wait_for(has_ended, f"end of {name}", seconds=START_SECONDS)
        assert namespace("logs", name).strip() == "False"
    finally:
        namespace("delete", "pod", name, "--wait=false")
