"""Runs with the same key share the results of a stage: nothing is trained twice."""

import json
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import GateError
from topwork.pipeline import run
from topwork.registry.runs import delete_results
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import read_reference
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.checkpointing import checkpoints

pytestmark = pytest.mark.usefixtures("export_check_in_process")

FINE_TUNE = {"epochs": 1, "optimizer": {"name": "adam", "learningRate": 1e-5}}
PUBLISH = {"formats": ["keras"]}
UNREACHABLE = {"metrics": ["accuracy", "calibrationError"], "gates": [{"metric": "calibrationError", "atMost": 0.0}]}
MET = {"metrics": ["accuracy", "calibrationError"], "gates": [{"metric": "calibrationError", "atMost": 1.0}]}


def run_logged(job, workspace):
    """Run a job; returns the published version, or the error, and the stages that trained an epoch."""
    with capture_logs() as logs:
        try:
            result = run(job, workspace)
        except GateError as error:
            result = error
    return result, [entry["stage"] for entry in logs if entry["event"] == "epoch"]


def test_only_the_stages_that_depend_on_a_change_run_again(make_job, workspace):
    unmet, trained = run_logged(make_job(fineTune=FINE_TUNE, publish=PUBLISH, evaluate=UNREACHABLE), workspace)
    assert isinstance(unmet, GateError)
    assert trained == ["transfer", "transfer", "fine-tune"]
    # Another gate, as the error recommends.
    first, trained = run_logged(make_job(fineTune=FINE_TUNE, publish=PUBLISH, evaluate=MET), workspace)
    assert (first.version, trained) == (1, [])
    # Another metric, format and name.
    metrics = MET | {"metrics": ["accuracy", "f1", "calibrationError"]}
    second, trained = run_logged(make_job(fineTune=FINE_TUNE, publish=PUBLISH, evaluate=metrics), workspace)
    assert (second.version, list(second.metrics), trained) == (2, ["accuracy", "f1", "calibrationError", "loss"], [])
    renamed = make_job(fineTune=FINE_TUNE, publish=PUBLISH | {"name": "another"}, evaluate=MET)
    third, trained = run_logged(renamed, workspace)
    assert (third.name, third.version, trained) == ("another", 1, [])
    # Back to the second spec: its version is found again.
    again, trained = run_logged(make_job(fineTune=FINE_TUNE, publish=PUBLISH, evaluate=MET), workspace)
    assert (again.version, trained) == (1, [])
    # A gate that the published version does not meet.
    unmet, trained = run_logged(make_job(fineTune=FINE_TUNE, publish=PUBLISH, evaluate=UNREACHABLE), workspace)
    assert isinstance(unmet, GateError)
    assert trained == []
    # Another fineTune reuses transfer.
    longer = make_job(fineTune=FINE_TUNE | {"epochs": 2}, publish=PUBLISH, evaluate=MET)
    fourth, trained = run_logged(longer, workspace)
    assert (fourth.version, trained) == (3, ["fine-tune", "fine-tune"])


def test_run_adopts_a_stage_that_another_run_completes_first(make_job, workspace, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "EPOCH_SECONDS", 0.0)
    settings = {"train": "all", "batchSize": 8, "featureCache": "off"}
    job = make_job(transfer=settings | {"epochs": 6})
    dataset = pull(job, workspace)
    key = stage_keys(job, dataset.metadata.fingerprint, workspace.storage).transfer
    # The other run trained the same images; a copy of its result appears while this one trains.
    shorter = make_job(transfer=settings | {"epochs": 1})
    other = transfer(shorter, dataset, workspace)
    other_key = stage_keys(shorter, dataset.metadata.fingerprint, workspace.storage).transfer
    result = workspace.storage.read(f"stages/transfer/{other_key}/done.json")

    class Observer(Metrics):
        def set_epoch(self, stage, epoch):
            if epoch == 2:
                workspace.storage.write(f"stages/transfer/{key}/done.json", result)
            super().set_epoch(stage, epoch)

    scratch = tmp_path / "second"
    scratch.mkdir()
    second = replace(workspace, metrics=Observer(), progress=NoProgress(), scratch=scratch)
    with capture_logs() as logs:
        adopted = transfer(job, dataset, second)
    assert adopted == other
    assert [entry["epoch"] for entry in logs if entry["event"] == "epoch"] == [1, 2]
    assert "another run has completed the stage" in [entry["event"] for entry in logs]
    assert read_reference(workspace.storage, job.run, "transfer").key == key
    assert not list(workspace.storage.list(f"stages/transfer/{key}/runs/"))


def test_simultaneous_results_of_a_stage_end_as_one(make_job, workspace, tmp_path):
    job = make_job(transfer={"train": "all", "epochs": 1, "batchSize": 8, "featureCache": "off"})
    dataset = pull(job, workspace)
    first = transfer(job.as_run("tiny-1"), dataset, workspace)
    done = f"stages/transfer/{stage_keys(job, dataset.metadata.fingerprint, workspace.storage).transfer}/done.json"
    content = workspace.storage.read(done)
    workspace.storage.delete([done])
    second = transfer(job.as_run("tiny-2"), dataset, workspace)
    workspace.storage.write(done, content)  # the first run was faster after all
    assert json.loads(workspace.storage.read(done))["key"] == first.key
    assert second.class_names == first.class_names
    assert transfer(job.as_run("tiny-3"), dataset, workspace) == first
    assert {read_reference(workspace.storage, run, "transfer").key for run in ("tiny-1", "tiny-2", "tiny-3")} == {
        done.split("/")[2]
    }


def test_restart_deletes_the_shared_result(make_job, workspace):
    job = make_job(transfer={"train": "all", "epochs": 1, "batchSize": 8, "featureCache": "off"})
    dataset = pull(job, workspace)
    for run_name in ("tiny-1", "tiny-2"):
        transfer(job.as_run(run_name), dataset, workspace)
    delete_results(job.as_run("tiny-2"), None, workspace.storage)
    assert not list(workspace.storage.list("stages/"))
    assert not list(workspace.storage.list("runs/tiny-2/"))
    with capture_logs() as logs:
        transfer(job.as_run("tiny-2"), dataset, workspace)
    assert "epoch" in [entry["event"] for entry in logs]
