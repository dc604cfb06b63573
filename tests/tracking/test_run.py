"""A run with both followers that is killed and resumed, and what can be sent again from storage alone."""

import csv
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.tracking.mlflow_server import START_SECONDS
from tests.tracking.tensorboard_server import run_tensorboard

from topwork.errors import SettingError
from topwork.spec.yaml_output import dump_job

SPEC = {
    "transfer": {"train": "all", "epochs": 200, "batchSize": 8, "featureCache": "off"},
    "fineTune": {"epochs": 2, "optimizer": {"learningRate": 1e-5}},
    "evaluate": {"metrics": ["accuracy", "f1"], "gates": [{"metric": "accuracy", "atLeast": 0.0}]},
    "compute": {"gpus": 0, "checkpointMinutes": 0.004},
}


@dataclass
class TrackedRun:
    name: str
    experiment: str
    history: list[dict[str, str]]


@pytest.fixture
def environment(command, monkeypatch):
    """Variables of a process that uses the storage of the tests."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-the-user")
    return dict(os.environ)


@pytest.fixture
def run_killed_once(make_job, storage, mlflow, environment, preloaded_python, tmp_path):
    """Run a job whose first process receives SIGKILL after some epochs that MLflow already has."""
    tracking = {"tensorboard": True, "mlflow": {"uri": mlflow.uri, "experiment": "killed"}}
    file, log = tmp_path / "job.yaml", tmp_path / "log"
    file.write_text(dump_job(make_job(tracking=tracking, **SPEC)))
    arguments = ["-m", "topwork", "run", file, "--log-format", "json", "--state", tmp_path / "state"]
    with log.open("wb") as output:
        process = preloaded_python.start(arguments, stdout=output, stderr=output, env=environment)
    wait_for(lambda: process.poll() is not None or (_has_checkpoint(storage) and _epochs(mlflow, "killed")))
    process.kill()
    assert process.wait(60) == -9, log.read_text()
    (first,) = mlflow.runs("killed")
    assert first.info.status == "RUNNING"
    completed = preloaded_python.run(arguments, env=environment)
    assert completed.returncode == 0, completed.stderr
    assert "token-of-the-user" not in log.read_text() + completed.stdout + completed.stderr
    assert '"resumed"' in completed.stderr
    name = first.info.run_name
    rows = csv.DictReader(io.StringIO(storage.read(f"runs/{name}/history.csv").decode()))
    return TrackedRun(name, "killed", list(rows))


def _has_checkpoint(storage) -> bool:
    keys = [stored.key for stored in storage.list("stages/transfer/")]
    return any("/checkpoints/" in key and key.endswith("manifest.json") for key in keys)


def _epochs(mlflow, experiment) -> int:
    return sum(len(mlflow.history(run, "transfer/loss")) for run in mlflow.runs(experiment))


def wait_for(condition) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def values(run: TrackedRun, stage: str, name: str) -> list[tuple[int, float]]:
    return [(int(row["epoch"]), float(row[name])) for row in run.history if row["stage"] == stage]


def check_mlflow_run(mlflow, experiment: str, run: TrackedRun, storage) -> Any:
    (found,) = mlflow.runs(experiment)
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    for stage, name in (("transfer", "loss"), ("transfer", "validation_accuracy"), ("fine-tune", "validation_loss")):
        assert mlflow.history(found, f"{stage}/{name}") == values(run, stage, name)
    assert set(found.data.metrics) >= {"test/accuracy", "test/f1", "test/loss"}
    assert found.data.tags["topwork.model"] == storage.uri_of("models/tiny/1")
    return found


def test_killed_run_continues_and_can_be_sent_again(run_killed_once, storage, mlflow, command, tmp_path):
    run = run_killed_once
    found = check_mlflow_run(mlflow, "killed", run, storage)
    versions = [
        version
        for version in mlflow.client.search_model_versions("name = 'tiny'")
        if version.run_id == found.info.run_id
    ]
    assert [version.source for version in versions] == [storage.uri_of("models/tiny/1")]

    directory = tmp_path / "logs"
    command("track", "events", storage.uri, directory)
    with run_tensorboard(directory) as tensorboard:
        assert sorted(tensorboard.tags()) == [f"{run.name}/fine-tune", f"{run.name}/transfer"]
        shown = tensorboard.scalars(f"{run.name}/transfer", "validation_loss")
    assert [(step, value) for _, step, value in shown] == [
        (step, pytest.approx(value)) for step, value in values(run, "transfer", "validation_loss")
    ]

    # A second time, nothing changes; a new server gets everything.
    for experiment in ("killed", "sent-again"):
        arguments = ["track", "sync", storage.uri, run.name, "--set", f"spec.tracking.mlflow.experiment={experiment}"]
        result = command(*arguments)
        uri = storage.uri_of("models/tiny/1")
        assert result.stdout == f"Sent {run.name} to TensorBoard and MLflow: 202 epochs, finished, {uri}\n"
        check_mlflow_run(mlflow, experiment, run, storage)


def test_sync_names_what_is_missing(make_job, storage, command):
    with pytest.raises(SettingError, match="has no run tiny-00000000"):
        command("track", "sync", storage.uri, "tiny-00000000")
    job = make_job()
    storage.write(f"runs/{job.run}/spec.yaml", dump_job(job).encode())
    with pytest.raises(SettingError, match=r"has no spec\.tracking\. Name the server: --set spec.tracking.mlflow.uri="):
        command("track", "sync", storage.uri, job.run)
    with pytest.raises(SettingError, match=r"--set spec\.transfer\.epochs=3 does not concern the tracking"):
        command("track", "sync", storage.uri, job.run, "--set", "spec.transfer.epochs=3")


def test_missing_client_is_reported_before_training(make_job, storage, command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("topwork.clients.mlflow.find_spec", lambda name: None)
    file = tmp_path / "job.yaml"
    file.write_text(dump_job(make_job(tracking={"mlflow": {"uri": "https://mlflow.example"}})))
    with pytest.raises(SettingError, match=r"requires mlflow-skinny, which is not installed"):
        command("run", file, "--state", tmp_path / "state")
    assert not list(storage.list("stages/"))
