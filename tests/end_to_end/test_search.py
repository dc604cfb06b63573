"""`topwork search`: the command with embedded storage, its stop and continuation, and what shows its results."""

import json
import signal
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

SPACE = {"transfer.optimizer.learningRate": {"logUniform": [1e-4, 1e-1]}}


@pytest.fixture
def write_search(make_job, tmp_path):
    """Write a search over the tiny job for the embedded storage; keyword arguments replace keys of `spec`."""

    def write(transfer=None, **spec):
        job = make_job(storage="s3://photos/topwork", **({"transfer": transfer} if transfer else {}))
        template = job.model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"]
        content = {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferSearch",
            "metadata": {"name": "tiny"},
            "spec": {"space": SPACE, "trials": 2, "template": template, **spec},
        }
        with (tmp_path / "search.yaml").open("w") as file:
            YAML().dump(content, file)
        return tmp_path / "search.yaml"

    return write


def trial_lines(text):
    return [line for line in text.splitlines() if "[info] trial " in line]


def test_search_stops_continues_and_is_shown(topwork, start_topwork, write_search, environment, tmp_path):
    epochs = {"train": "all", "epochs": 40, "batchSize": 8, "featureCache": "off"}
    search = write_search(epochs)
    process = start_topwork("search", search)
    process.wait_for_output("[info] trial number=0")

    refused = topwork("search", search)
    assert refused.returncode == 2
    assert "Another process on this machine is running tiny-" in refused.stderr

    assert process.send_signal(signal.SIGTERM) == 143
    assert "Start the same job again to resume" in process.output
    assert "Traceback" not in process.output
    stopped = json.loads(topwork("search", "show", search, "--json").stdout)
    assert [trial["state"] for trial in stopped["trials"]] == ["complete", "running"]

    completed = topwork("search", search)
    assert completed.returncode == 0, completed.stderr
    assert len(trial_lines(completed.stderr)) == 1
    assert "Published tiny version 1" in completed.stdout
    assert "epoch" not in completed.stderr.replace("epochs=", "")

    command = [sys.executable, "-X", "importtime", "-m", "topwork", "search", "show", "s3://photos/topwork", "tiny"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "2 of 2 trials: 2 complete; best accuracy" in shown.stdout
    assert "published  s3://photos/topwork/models/tiny/1" in shown.stdout
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "topwork.search.study" in imported
    assert not imported & {"tensorflow", "keras", "optuna", "matplotlib"}

    best = topwork("search", "best", f"s3://photos/topwork/searches/{stopped['id']}", "--options")
    options = best.stdout.split()
    assert options[0] == "--set"
    assert options[1].startswith("spec.transfer.optimizer.learningRate=0.0")

    written = topwork("search", "report", search, "--output", tmp_path / "report.html")
    assert written.returncode == 0, written.stderr
    assert "took no part in the search" in (tmp_path / "report.html").read_text()


def test_errors_name_what_to_do(topwork, write_search, write_local_job):
    search = write_search()
    unknown = topwork("search", "show", search)
    assert unknown.returncode == 2
    assert "was not started in s3://photos/topwork. Start it with topwork search" in unknown.stderr
    unnamed = topwork("search", "best", "s3://photos/topwork")
    assert "Name a search of it. Searches: none." in unnamed.stderr
    job = topwork("search", write_local_job())
    assert job.returncode == 2
    assert "is a TransferJob: run it with topwork run" in job.stderr


def test_help_lists_the_commands(topwork):
    shown = topwork("search", "--help")
    assert shown.returncode == 0
    for command in ("run", "show", "best", "report"):
        assert f"\n  {command}" in shown.stdout
