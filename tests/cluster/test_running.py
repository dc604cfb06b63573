"""A run while it trains: what is told of it, and what can't be changed."""

import re
import time

import pytest
from ruamel.yaml import YAML
from tests.cluster.environment import EVENT_SECONDS, RUN_SECONDS
from tests.cluster.runs import Run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2 * RUN_SECONDS)]

# Far more than are trained while the tests look on.
LONG_TRAINING = {"train": "all", "epochs": 10_000, "batchSize": 8, "featureCache": "off"}

# Not from loopback: Prometheus comes to the address of the pod.
SCRAPE = """
import sys, urllib.request
host = f"[{sys.argv[1]}]" if ":" in sys.argv[1] else sys.argv[1]
print(urllib.request.urlopen(f"http://{host}:{sys.argv[2]}/metrics", timeout=20).read().decode())
"""

TOKEN = "import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))"


@pytest.fixture(scope="module")
def training(make_shared_run, topwork) -> Run:
    """A run whose transfer stage is under way, for longer than the tests of this module take."""
    run = make_shared_run(transfer=LONG_TRAINING, compute={"deadlineSeconds": 7200})
    submitted = topwork("submit", run.file)
    assert submitted.exit_code == 0, submitted.output
    assert run.object_name in submitted.output
    run.wait_for_epochs(run.wait_for_pod())
    return run


def the_pod(run):
    return run.pods()[-1]


def test_the_same_spec_again_says_that_it_runs(training, topwork):
    before = training.kubernetes_job()["metadata"]["uid"]
    again = topwork("submit", training.file)
    assert again.exit_code == 0, again.output
    assert "unchanged" in again.output
    assert training.kubernetes_job()["metadata"]["uid"] == before


def test_another_compute_is_refused_while_the_job_runs(training, topwork, tmp_path):
    before = training.kubernetes_job()
    content = YAML(typ="safe").load(training.file.read_text())
    content["spec"]["compute"]["sharedMemory"] = "96Mi"
    changed = tmp_path / "changed.yaml"
    with changed.open("w") as opened:
        YAML().dump(content, opened)
    refused = topwork("submit", changed)
    assert refused.exit_code == 2, refused.output
    assert "compute.sharedMemory" in refused.output
    after = training.kubernetes_job()
    assert (after["metadata"]["uid"], after["spec"]) == (before["metadata"]["uid"], before["spec"])


def test_another_image_is_refused_while_the_job_runs(training, topwork):
    refused = topwork("submit", training.file, "--image", "registry.invalid/topwork:other")
    assert refused.exit_code == 2, refused.output
    assert "image" in refused.output


def test_status_tells_stage_and_epoch(training, topwork):
    status = topwork("status", training.name)
    assert status.exit_code == 0, status.output
    assert "transfer" in status.output
    assert "10000" in status.output


def test_list_shows_the_run(training, topwork):
    listed = topwork("list")
    assert listed.exit_code == 0, listed.output
    line = next(line for line in listed.stdout.splitlines() if training.name in line)
    assert "transfer" in line


def test_logs_of_a_stage_that_has_ended_and_of_one_that_runs(training, topwork):
    pulled = topwork("logs", training.name, "--stage", "pull")
    assert pulled.exit_code == 0, pulled.output
    assert '"dataset"' in pulled.stdout
    assert '"epoch"' not in pulled.stdout
    trained = topwork("logs", training.name, "--stage", "transfer")
    assert trained.exit_code == 0, trained.output
    assert '"epoch"' in trained.stdout


def test_logs_that_are_followed_grow(training, topwork):
    followed = topwork.start("logs", training.name, "--stage", "transfer", "-f")
    followed.wait_for('"epoch"', seconds=EVENT_SECONDS)
    seen = len(followed.output)
    time.sleep(10)
    assert len(followed.output) > seen
    assert followed.process.poll() is None
    followed.interrupt()


def test_logs_that_are_followed_from_the_start_cross_from_pull_to_transfer(training, topwork):
    followed = topwork.start("logs", training.name, "-f")
    followed.wait_for('"dataset"', '"stage": "transfer"', seconds=EVENT_SECONDS)
    followed.interrupt()


def test_an_interrupted_follow_leaves_the_job_and_says_how_to_come_back(training, topwork):
    before = training.kubernetes_job()["metadata"]["uid"]
    followed = topwork.start("status", training.name, "--follow")
    followed.wait_for("transfer", seconds=EVENT_SECONDS)
    ended = followed.interrupt()
    assert ended.exit_code == 130, ended.output
    assert f"topwork status {training.name}" in ended.output
    assert "--follow" in ended.output
    assert "Traceback" not in ended.output
    job = training.kubernetes_job()
    assert job["metadata"]["uid"] == before
    assert "deletionTimestamp" not in job["metadata"]


def test_metrics_answer_at_the_address_of_the_pod(training, namespace):
    pod = the_pod(training)
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]
    text = namespace.python(name, "transfer", SCRAPE, address, "9102")
    labels = rf'run="{training.name}",stage="transfer",transferjob="[^"]+"'
    assert re.search(rf"^topwork_stage_running{{{labels}}} 1\.0$", text, re.MULTILINE)
    assert re.search(rf"^topwork_epochs_planned{{{labels}}} 10000\.0$", text, re.MULTILINE)


def test_the_process_finds_no_token_of_the_api_server(training, namespace):
    name = the_pod(training)["metadata"]["name"]
    assert namespace.python(name, "transfer", TOKEN).strip() == "False"
