"""Runs in MLflow: one MLflow run for each run, whatever happens to the run or the server."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow import MlflowClient
from structlog.testing import capture_logs
from tests.monitoring.prometheus_server import free_port
from tests.tracking.mlflow_server import START_SECONDS

from topwork.clients.mlflow import MlflowServer
from topwork.clients.s3.storage import Storage
from topwork.errors import GateError, SettingError, Stopped, UnavailableError
from topwork.redaction import register_secrets
from topwork.registry.cross_validation import fold_jobs
from topwork.registry.versions import Version
from topwork.tracking.mlflow_runs import MlflowRuns
from topwork.tracking.mlflow_values import run_parameters
from topwork.tracking.run_record import Outcome, RunRecord
from topwork.tracking.run_tracking import RunTracking, tracking_services


@pytest.fixture
def experiment(request):
    return request.node.name


@pytest.fixture
def make_tracked_job(make_job, mlflow, experiment):
    def make(labels=None, **overrides):
        job = make_job(tracking={"mlflow": {"uri": mlflow.uri, "experiment": experiment}}, **overrides)
        return job.model_copy(update={"metadata": job.metadata.model_copy(update={"labels": labels or {}})})

    return make


@pytest.fixture
def start(storage):
    """Start to follow a job, as each process of a run does."""

    def start(job):
        return RunTracking(job, storage, tracking_services(job, storage))

    return start


def test_run_is_recorded_with_parameters_epochs_and_status(make_tracked_job, start, progress_of, mlflow, experiment):
    job = make_tracked_job()
    tracking = start(job)
    tracking.report(job, progress_of(2))
    tracking.report(job, progress_of(3))
    tracking.report(job, progress_of(1, "fine-tune"))
    tracking.fail(GateError("accuracy is 0.5000, but the gate requires at least 0.9000"))
    (run,) = mlflow.runs(experiment)
    assert (run.info.run_name, run.info.status) == (job.run, "FAILED")
    assert run.data.tags["topwork.error"] == "accuracy is 0.5000, but the gate requires at least 0.9000"
    assert run.data.params == run_parameters(job)
    assert run.data.params["transfer.optimizer.learningRate"] == "0.001"
    assert run.data.params["dataset.imageSize"] == "[32, 32]"
    assert not [path for path in run.data.params if path.startswith(("publish", "evaluate", "tracking", "storage"))]
    assert mlflow.history(run, "transfer/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert mlflow.history(run, "transfer/validation_loss") == [(1, 1.125), (2, 0.625), (3, 1 / 3 + 0.125)]
    assert mlflow.history(run, "fine-tune/learning_rate") == [(1, 0.001)]
    points = mlflow.client.get_metric_history(run.info.run_id, "transfer/loss")
    assert [point.timestamp for point in points] == [1767312001500, 1767312003000, 1767312004500]


def test_next_process_continues_the_same_mlflow_run(make_tracked_job, start, progress_of, mlflow, experiment):
    job = make_tracked_job()
    killed = start(job)
    killed.report(job, progress_of(2))
    killed.pause()  # a killed process sends no status
    (run,) = mlflow.runs(experiment)
    assert run.info.status == "RUNNING"
    stopped = start(job)
    stopped.report(job, progress_of(3))
    stopped.fail(Stopped("Stopped in epoch 3"))
    (run,) = mlflow.runs(experiment)
    assert (run.info.status, run.data.tags["topwork.error"]) == ("KILLED", "")
    resumed = start(job)
    resumed.report(job, progress_of(4))
    resumed.pause()
    (run,) = mlflow.runs(experiment)
    assert run.info.status == "RUNNING"
    assert mlflow.history(run, "transfer/loss") == [(epoch, 1 / epoch) for epoch in (1, 2, 3, 4)]


def test_epoch_that_is_trained_again_shows_its_new_values(make_tracked_job, start, progress_of, mlflow, experiment):
    job = make_tracked_job()
    first = start(job)
    first.report(job, progress_of(2))
    first.pause()
    again = start(job)
    again.report(job, progress_of(2, factor=3.0))
    again.pause()
    repeated = start(job)
    repeated.report(job, progress_of(2, factor=3.0))
    repeated.pause()
    (run,) = mlflow.runs(experiment)
    assert run.data.metrics["transfer/loss"] == 1.5
    assert mlflow.history(run, "transfer/loss") == [(1, 1.0), (1, 3.0), (2, 0.5), (2, 1.5)]


def test_server_that_is_down_in_the_middle_gets_everything(make_tracked_job, start, progress_of, mlflow, experiment):
    job = make_tracked_job()
    with capture_logs() as logs:
        tracking = start(job)
        tracking.report(job, progress_of(1))
        wait_for(lambda: [mlflow.history(run, "transfer/loss") for run in mlflow.runs(experiment)] == [[(1, 1.0)]])
        mlflow.stop()
        for epochs in (2, 3):
            began = time.monotonic()
            tracking.report(job, progress_of(epochs))
            assert time.monotonic() - began < 1.0  # an attempt to connect takes several seconds
            wait_for(lambda: events(logs) == ["tracking interrupted"])
        mlflow.start()
        tracking.report(job, progress_of(4))
        wait_for(lambda: events(logs) == ["tracking interrupted", "tracking resumed"])
        tracking.pause()
    assert (
        logs[0]["reason"] == f"The MLflow server {mlflow.uri} failed: it cannot be reached, or does not answer in time."
    )
    (run,) = mlflow.runs(experiment)
    assert mlflow.history(run, "transfer/loss") == [(epoch, 1 / epoch) for epoch in (1, 2, 3, 4)]


def test_mlflow_run_that_is_deleted_meanwhile_is_replaced(make_tracked_job, start, progress_of, mlflow, experiment):
    job = make_tracked_job()
    with capture_logs() as logs:
        tracking = start(job)
        tracking.report(job, progress_of(1))
        wait_for(lambda: [mlflow.history(run, "transfer/loss") for run in mlflow.runs(experiment)] == [[(1, 1.0)]])
        mlflow.client.delete_run(mlflow.runs(experiment)[0].info.run_id)
        tracking.report(job, progress_of(2))
        wait_for(lambda: events(logs) == ["tracking interrupted"])
        tracking.report(job, progress_of(3))
        tracking.pause()
    assert events(logs) == ["tracking interrupted", "tracking resumed"]
    (run,) = mlflow.runs(experiment)
    assert mlflow.history(run, "transfer/loss") == [(epoch, 1 / epoch) for epoch in (1, 2, 3)]


def test_values_of_an_epoch_are_sent_together_in_large_requests(
    make_tracked_job, s3_settings, progress_of, mlflow, experiment, monkeypatch
):
    """Otherwise, an epoch whose loss has arrived would be taken for complete after an outage between two requests."""
    storage = Storage("s3://topwork-test/ada's", s3_settings)  # the quote becomes part of a filter
    job = make_tracked_job(storage=storage.uri)
    sent = []
    original = MlflowClient.log_batch

    def log_batch(self, run_id, metrics=(), **values):
        sent.append([metric.step for metric in metrics])
        original(self, run_id, metrics=metrics, **values)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    tracking = RunTracking(job, storage, tracking_services(job, storage))
    tracking.report(job, progress_of(300))
    tracking.pause()
    batches = [steps for steps in sent if steps]
    assert [len(steps) for steps in batches] == [996, 804]
    assert batches[0][-1] == 166
    (run,) = mlflow.runs(experiment)
    assert mlflow.history(run, "transfer/loss") == [(epoch, 1 / epoch) for epoch in range(1, 301)]


def events(logs):
    return [entry["event"] for entry in logs if entry["event"].startswith("tracking")]


def wait_for(condition):
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_server_that_does_not_answer_delays_the_end_only_briefly(make_job, storage, progress_of, monkeypatch):
    monkeypatch.setattr("topwork.tracking.run_tracking.CLOSE_SECONDS", 0.5)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as silent:  # accepts connections, and never answers
        uri = f"http://127.0.0.1:{silent.server_port}"
        job = make_job(tracking={"mlflow": {"uri": uri}})
        with capture_logs() as logs:
            tracking = RunTracking(job, storage, tracking_services(job, storage))
            tracking.report(job, progress_of(1))
            tracking.finish()
    assert logs[-1] == {
        "event": "tracking incomplete",
        "log_level": "warning",
        "service": "MLflow",
        "hint": f"topwork track sync {storage.uri} {job.run}",
    }


def test_published_version_is_registered_once_with_its_uri(make_tracked_job, storage, mlflow, experiment):
    job = make_tracked_job()
    uri = storage.uri_of("models/cats/3")
    version = Version(
        name=f"cats-{experiment}", version=3, uri=uri, run=job.run, weights="", published="", main_metric="accuracy",
        metrics={"accuracy": 0.9}, split="test", images=10,
    )  # fmt: skip
    record = RunRecord(job, outcome=Outcome("FINISHED", {"test/accuracy": 0.9}, version))
    for _ in range(2):
        MlflowRuns(mlflow.uri, experiment, storage).send(record)
    (run,) = mlflow.runs(experiment)
    assert (run.info.status, mlflow.history(run, "test/accuracy")) == ("FINISHED", [(0, 0.9)])
    assert (run.data.tags["topwork.model"], run.data.tags["topwork.report"]) == (uri, f"{uri}/report.html")
    (registered,) = mlflow.client.search_model_versions(f"name = '{version.name}'")
    assert (registered.source, registered.run_id) == (uri, run.info.run_id)
    assert registered.tags == {"topwork.version": "3", "topwork.run": job.run}


def test_trials_are_nested_below_their_search_which_ends_with_the_best_one(
    make_tracked_job, start, progress_of, mlflow, experiment
):
    for trial, rate in (("0", 0.01), ("1", 0.001)):
        labels = {"topwork.dev/search": "rates-12345678", "topwork.dev/trial": trial}
        settings = {"train": "all", "epochs": 2, "batchSize": 8, "optimizer": {"learningRate": rate}}
        job = make_tracked_job(labels, transfer=settings, publish={"enabled": False})
        tracking = start(job)
        tracking.report(job, progress_of(1))
        tracking.finish()
    trials = [run for run in mlflow.runs(experiment) if "topwork.run" in run.data.tags]
    (parent,) = (run for run in mlflow.runs(experiment) if "topwork.search" in run.data.tags)
    assert (parent.info.run_name, parent.info.status) == ("rates-12345678", "RUNNING")
    assert [run.data.tags["mlflow.parentRunId"] for run in trials] == [parent.info.run_id] * 2
    assert [run.data.tags["topwork.trial"] for run in trials] == ["0", "1"]
    assert [run.data.params["transfer.optimizer.learningRate"] for run in trials] == ["0.01", "0.001"]
    winner = make_tracked_job({"topwork.dev/search": "rates-12345678"})
    start(winner).fail(GateError("accuracy is 0.5000"))
    parent = mlflow.client.get_run(parent.info.run_id)
    assert (parent.info.status, parent.data.tags["topwork.error"]) == ("FAILED", "accuracy is 0.5000")


def test_folds_are_nested_below_their_run(make_tracked_job, two_class_folder, start, progress_of, mlflow, experiment):
    dataset = {
        "source": {"folder": {"uri": str(two_class_folder)}}, "splits": {"folds": 2, "validation": 0.2},
        "imageSize": [32, 32],
    }  # fmt: skip
    job = make_tracked_job(dataset=dataset)
    tracking = start(job)
    for fold in fold_jobs(job):
        tracking.report(fold, progress_of(2))
    tracking.pause()
    parent, *folds = sorted(mlflow.runs(experiment), key=lambda run: run.info.run_name)
    assert parent.info.run_name == job.run
    assert [run.info.run_name for run in folds] == [f"{job.run}-fold-1", f"{job.run}-fold-2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in folds} == {parent.info.run_id}
    assert [run.data.tags["topwork.fold"] for run in folds] == ["1", "2"]


def test_processes_that_start_at_the_same_time_use_one_mlflow_run(mlflow, experiment):
    identity, barrier = {"topwork.run": "cats-12345678"}, threading.Barrier(4)

    def open_run(_):
        server = MlflowServer(mlflow.uri, experiment)
        barrier.wait()
        server.open_run(identity, "cats-12345678")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_run, range(4)))
    run_id = MlflowServer(mlflow.uri, experiment).open_run(identity, "cats-12345678")
    assert [run.info.run_id for run in mlflow.runs(experiment)] == [run_id]


@pytest.fixture
def rejecting_server():
    """A server that answers all requests in the same way, and records their Authorization header."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.authorizations.append(self.headers["Authorization"])
            body = self.server.body or f"not {self.headers['Authorization']}".encode()
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.authorizations, server.status, server.body = [], 401, b""
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_token_comes_from_the_environment_and_is_never_shown(rejecting_server, monkeypatch, mlflow):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-the-user")
    register_secrets(["token-of-the-user"], "environment")
    uri = f"http://127.0.0.1:{rejecting_server.server_port}"
    with pytest.raises(SettingError, match=r"rejected the credentials \(HTTP 401\)\. Set MLFLOW_TRACKING_TOKEN"):
        MlflowServer(uri, "experiment")
    assert rejecting_server.authorizations == ["Bearer token-of-the-user"]
    rejecting_server.status = 418
    with pytest.raises(UnavailableError) as error:
        MlflowServer(uri, "experiment")
    assert "***" in str(error.value)
    assert "token-of-the-user" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b"", r"failed: it answers with HTTP 500\.$"),
        (200, b"<html>", r"failed: .*not in a valid JSON format"),
        (200, b'{"experiment": 5}', r"sent an invalid response: Failed to parse experiment"),
        (200, b"{}", r"failed: it does not find a run that it created\.$"),
    ],
)
def test_server_that_is_not_mlflow_or_broken_is_reported_once(
    rejecting_server, monkeypatch, caplog, status, body, message
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    rejecting_server.status, rejecting_server.body = status, body
    with pytest.raises(UnavailableError, match=message):
        MlflowServer(f"http://127.0.0.1:{rejecting_server.server_port}", "experiment").open_run({"a": "b"}, "run")
    assert not caplog.records


def test_retries_of_the_libraries_are_not_logged(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(UnavailableError, match=r"it cannot be reached, or does not answer in time\.$"):
        MlflowServer(f"http://127.0.0.1:{free_port()}", "experiment")
    assert not caplog.records
    logging.getLogger("urllib3.connectionpool").warning("of another client")
    assert caplog.messages == ["of another client"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://8.8.8.8:5000", "is plain HTTP to 8.8.8.8"),
        ("http://169.254.169.254", "is a link-local address or a cloud metadata service"),
    ],
)
def test_credentials_are_not_sent_to_unsafe_hosts(uri, message):
    with pytest.raises(SettingError, match=message):
        MlflowServer(uri, "experiment")
