"""A complete run in a namespace that enforces Pod Security restricted: from `topwork submit` to the published model."""

import json
import subprocess
import sys

import pytest
from tests.cluster.commands import CommandResult
from tests.cluster.environment import RUN_SECONDS
from tests.cluster.runs import Run

from topwork.cluster.names import STAGES

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}

# The README promises that models load without topwork.
PLAIN_KERAS = """
import json, sys
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
print(json.dumps(model.predict(np.full((1, 32, 32, 3), 128.0, "float32"), verbose=0)[0].tolist()))
"""


@pytest.fixture(scope="module")
def published(make_shared_run, topwork) -> tuple[Run, CommandResult]:
    """A run that was submitted and followed until it finished, and the result of the command."""
    run = make_shared_run(fineTune=FINE_TUNE, publish={"formats": ["keras", "savedModel"]})
    result = topwork("submit", run.file, "--follow")
    assert result.exit_code == 0, result.output
    return run, result


def only_pod(run):
    pods = run.pods()
    assert len(pods) == 1, [pod["metadata"]["name"] for pod in pods]
    return pods[0]


@pytest.mark.smoke
def test_follow_reports_every_stage_and_the_model(published):
    run, result = published
    assert all(stage in result.output for stage in STAGES), result.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in result.output
    assert "Traceback" not in result.output


def test_model_can_be_fetched_and_loaded_with_keras_only(published, topwork, pod_storage, tmp_path):
    run, _ = published
    uri = f"{run.job.spec.storage}/models/{run.name}/1"
    fetched = topwork.run_locally("models", "fetch", uri, tmp_path / "model", **pod_storage.local_variables)
    assert fetched.exit_code == 0, fetched.output
    loaded = subprocess.run(
        [sys.executable, "-c", PLAIN_KERAS, tmp_path / "model" / "model.keras"],
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert sum(json.loads(loaded.stdout)) == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "model" / "saved_model.pb").is_file()


@pytest.mark.smoke
def test_every_container_has_a_termination_message(published):
    run, _ = published
    termination_messages = run.termination_messages(only_pod(run))
    summaries = {
        name: message and (message.stage, message.outcome, message.exit_code, message.run)
        for name, message in termination_messages.items()
    }
    assert summaries == {stage: (stage, "done", 0, run.object_name) for stage in STAGES}
    assert (termination_messages["transfer"].epochs, termination_messages["fine-tune"].epochs) == (2, 1)
    assert termination_messages["fine-tune"].model == f"{run.job.spec.storage}/models/{run.name}/1"


@pytest.mark.smoke
def test_namespace_enforces_restricted_and_admits_the_pod(published, namespace):
    run, _ = published
    labels = namespace.get("namespace", namespace.namespace)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert only_pod(run)["status"]["phase"] == "Succeeded"


def test_pod_has_no_service_account_token(published):
    run, _ = published
    pod = only_pod(run)["spec"]
    assert pod["automountServiceAccountToken"] is False
    volumes = [volume for volume in pod["volumes"] if "projected" in volume or "secret" in volume]
    containers = pod["initContainers"] + pod["containers"]
    mounts = [mount for container in containers for mount in container["volumeMounts"]]
    assert volumes == []
    assert [mount for mount in mounts if "serviceaccount" in mount["mountPath"]] == []


def test_config_map_is_owned_by_its_job(published, namespace):
    run, _ = published
    owners = namespace.get("configmap", run.object_name)["metadata"]["ownerReferences"]
    job = run.kubernetes_job()
    assert [(owner["kind"], owner["name"], owner["uid"]) for owner in owners] == [
        ("Job", run.object_name, job["metadata"]["uid"])
    ]


@pytest.mark.smoke
def test_submitting_the_same_spec_again_starts_nothing(published, topwork):
    run, _ = published
    before = run.kubernetes_job()
    again = topwork("submit", run.file, "--follow")
    assert again.exit_code == 0, again.output
    assert run.object_name in again.output
    after = run.kubernetes_job()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"] == before["spec"]
    assert len(run.pods()) == 1


@pytest.mark.smoke
def test_status_and_list_show_a_finished_run(published, topwork):
    run, _ = published
    status = topwork("status", run.name)
    assert status.exit_code == 0, status.output
    assert f"{run.job.spec.storage}/models/{run.name}/1" in status.output
    assert "accuracy" in status.output
    listed = topwork("list")
    assert listed.exit_code == 0, listed.output
    assert run.name in listed.output


@pytest.mark.smoke
def test_logs_of_a_finished_run_contain_all_stages_in_order(published, topwork):
    run, _ = published
    logs = topwork("logs", run.name)
    assert logs.exit_code == 0, logs.output
    pulled, transferred = logs.stdout.find('"dataset"'), logs.stdout.find('"stage": "transfer"')
    fine_tuned, published_at = logs.stdout.find('"stage": "fine-tune"'), logs.stdout.find('"evaluation"')
    assert -1 < pulled < transferred < fine_tuned < published_at, logs.output


def test_logs_of_one_stage_contain_no_other_stage(published, topwork):
    run, _ = published
    logs = topwork("logs", run.name, "--stage", "fine-tune")
    assert logs.exit_code == 0, logs.output
    entries = [json.loads(line) for line in logs.stdout.splitlines()]
    assert {line["stage"] for line in entries if line["message"] == "epoch"} == {"fine-tune"}


def test_followed_logs_end_with_the_run(published, topwork):
    run, _ = published
    logs = topwork("logs", run.name, "-f", seconds=120)
    assert logs.exit_code == 0, logs.output
    assert '"stage": "fine-tune"' in logs.stdout
