"""What a job reports to its followers: epochs, folds and outcomes of real training, live and from storage."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from topwork.errors import GateError, SettingError, Stopped
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node
from topwork.pipeline import run
from topwork.registry.cross_validation import fold_jobs
from topwork.tracking import run_tracking
from topwork.tracking.background import BackgroundSender
from topwork.tracking.mlflow_values import run_parameters
from topwork.tracking.run_record import Outcome, RunRecord, read_outcome
from topwork.tracking.run_tracking import read_records, track_run

pytestmark = pytest.mark.usefixtures("export_check_in_process")


class Recorder:
    """A service that keeps the last record of each run."""

    name = "recorder"

    def __init__(self):
        self.records = {}

    def send(self, record):
        self.records[record.job.run] = record


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(run_tracking, "tracking_services", lambda job, storage: [recorder])
    monkeypatch.setattr(run_tracking, "CLOSE_SECONDS", 120)
    monkeypatch.setattr(run_tracking, "STOP_SECONDS", 120)
    return recorder


def test_record_that_a_service_rejects_does_not_hold_up_the_others(make_job):
    class Rejecting(Recorder):
        def send(self, record):
            if record.parent:
                raise SettingError("no such run")
            super().send(record)

    job, service = make_job(), Rejecting()
    fold = job.as_run("fold")
    with capture_logs() as logs:
        sender = BackgroundSender(service)
        sender.submit(RunRecord(fold, parent=job.run))
        for _ in range(2):
            sender.submit(RunRecord(job))
        assert not sender.close(60)
    assert list(service.records) == [job.run]
    assert [entry["event"] for entry in logs] == ["tracking interrupted"]


def test_client_is_imported_before_another_thread_uses_it():
    code = (
        "import sys; from topwork.tracking.mlflow_runs import MlflowRuns; assert 'mlflow' not in sys.modules; "
        "MlflowRuns('https://mlflow.example', 'cats', None); assert 'mlflow' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parameters_contain_no_secrets(make_job):
    job = make_job(model={"base": {"saved": {"uri": f"s3://models/hf_{16 * 'a'}/base.keras"}}})
    assert run_parameters(job)["model.base.saved.uri"] == "s3://models/***/base.keras"


def run_tracked(job, workspace):
    with track_run(job, workspace) as tracked:
        return run(job, tracked)


def test_missed_gate_is_a_failure_with_the_metrics(make_job, workspace, recorder):
    gate = {"metric": "calibrationError", "atMost": 0.0}
    job = make_job(evaluate={"metrics": ["accuracy", "calibrationError"], "gates": [gate]})
    with pytest.raises(GateError) as error:
        run_tracked(job, workspace)
    record = recorder.records[job.run]
    assert [row["epoch"] for row in record.stages["transfer"].rows] == [1, 2]
    assert (record.outcome.status, record.outcome.error) == ("FAILED", str(error.value))
    stored = read_outcome(workspace.storage, job)
    assert (stored.status, stored.metrics) == ("FAILED", record.outcome.metrics)
    assert stored.error.startswith("calibrationError is 0.")
    assert (
        record.outcome.metrics["test/accuracy"]
        == json.loads(workspace.storage.read(f"runs/{job.run}/metrics.json"))["metrics"]["accuracy"]
    )


def test_folds_are_runs_of_their_own(make_job, two_class_folder, workspace, recorder):
    dataset = {
        "source": {"folder": {"uri": str(two_class_folder)}}, "splits": {"folds": 2, "validation": 0.2},
        "imageSize": [32, 32],
    }  # fmt: skip
    job = make_job(dataset=dataset)
    result = run_tracked(job, workspace)
    first, second = (recorder.records[fold.run] for fold in fold_jobs(job))
    for number, record in enumerate((first, second)):
        assert (record.parent, record.outcome.status, len(record.stages["transfer"].rows)) == (job.run, "FINISHED", 2)
        assert record.outcome.metrics["test/accuracy"] == result.folds[number].metrics["accuracy"]
    outcome = recorder.records[job.run].outcome
    assert (outcome.status, outcome.version) == ("FINISHED", None)
    assert outcome.metrics["cross-validation/accuracy"] == result.means["accuracy"]
    assert [record.job.run for record in read_records(job, workspace.storage)] == [
        first.job.run,
        second.job.run,
        job.run,
    ]


def test_stages_that_another_run_has_trained_are_reported(make_job, workspace, recorder):
    job = make_job()
    published = run(job, workspace)
    assert run_tracked(job, workspace) == published
    record = recorder.records[job.run]
    assert [row["epoch"] for row in record.stages["transfer"].rows] == [1, 2]
    assert (record.outcome.status, record.outcome.version.uri) == ("FINISHED", published.uri)
    assert record.outcome.metrics["test/accuracy"] == published.metrics["accuracy"]


def test_stop_is_not_a_failure(make_job, workspace, recorder):
    job = make_job()
    with pytest.raises(Stopped), track_run(job, workspace):
        raise Stopped("Stopped in epoch 1")
    assert recorder.records[job.run].outcome == Outcome("KILLED")


def test_error_of_a_run_without_results_is_reported(make_job, workspace, recorder):
    job = make_job()
    with pytest.raises(ValueError, match="shapes"), track_run(job, workspace):
        raise ValueError("shapes differ at https://ada:password@host/")
    assert recorder.records[job.run].outcome == Outcome("FAILED", error="shapes differ at https://***@host/")


def test_only_the_chief_reports(make_job, workspace, recorder):
    node = replace(workspace, nodes=NodeGroup(Node(1, ("a:1", "b:1"), "a:2")))
    with track_run(make_job(), node) as tracked:
        assert tracked is node
    assert not recorder.records


def test_trial_ends_with_its_metrics_on_the_validation_split(make_job, workspace, recorder):
    job = make_job(publish={"enabled": False})
    assert read_outcome(workspace.storage, job) is None
    validated = run_tracked(job, workspace)
    metrics = {f"validation/{name}": value for name, value in validated.metrics.items()}
    assert {"validation/accuracy", "validation/loss"} <= metrics.keys()
    assert recorder.records[job.run].outcome == Outcome("FINISHED", metrics)
