"""Resuming: a stopped or killed stage continues from its newest checkpoint with exactly the same result."""

import json
import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import keras
import numpy as np
import pytest
from tests.training.observer import RunObserver

from topwork.cancellation import StopRequest
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.errors import FormatError, Stopped, UnavailableError
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.checkpointing import checkpoints as checkpoints_module

# Every feature with state: augmentation, dropout, a schedule, a moving average, early stopping, phases.
SPEC = {
    "augmentation": {"flip": "horizontal", "rotation": 0.1},
    "model": {"base": {"cnn": {"filters": [4, 6]}}, "head": {"hidden": [8], "dropout": 0.4}},
    "transfer": {
        "train": "all", "epochs": 3, "batchSize": 5, "earlyStopping": {"patience": 2},
        "optimizer": {
            "learningRate": 0.01, "schedule": {"name": "cosine", "warmupEpochs": 1}, "ema": {"momentum": 0.8},
        },
    },
    "fineTune": {
        "unfreeze": {"steps": [{"layers": 1, "epochs": 2, "learningRate": 0.005},
                               {"layers": 2, "epochs": 2, "learningRate": 0.002}]},
        "optimizer": {"name": "rmsprop", "momentum": 0.5},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def store_a_checkpoint_after_every_epoch(monkeypatch):
    """The epochs of these tests are shorter than the minimum time between checkpoints."""
    monkeypatch.setattr(checkpoints_module, "EPOCH_SECONDS", 0.0)


def make_workspace(workspace, name, observer):
    """Create a workspace with its own storage prefix, scratch directory and metrics, and observe its log."""
    observer.observe_log()
    scratch = workspace.scratch / f"{name}-{os.urandom(4).hex()}"
    scratch.mkdir()
    storage = workspace.storage.at(f"{workspace.storage.uri}/{name}")
    return replace(
        workspace, storage=storage, scratch=scratch, metrics=Metrics(), progress=observer, stop=StopRequest()
    )


def run(job, workspace):
    dataset = pull(job, workspace)
    classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return classifier, keras.models.load_model(path, compile=False).get_weights()


def checkpoint_prefixes(job, workspace, stage):
    """Return the key prefixes of all complete checkpoints of a run, by their names, the oldest first."""
    keys = [stored.key for stored in workspace.storage.list(f"stages/{stage}/")]
    manifests = [key for key in keys if f"/runs/{job.run}/checkpoints/" in key and key.endswith("/manifest.json")]
    by_name = {key.split("/")[-2]: key.removesuffix("/manifest.json") for key in manifests}
    return dict(sorted(by_name.items()))


def checkpoints(job, workspace, stage):
    return list(checkpoint_prefixes(job, workspace, stage))


def rows(classifier):
    return [
        {k: v for k, v in row.items() if k not in {"seconds", "images_per_second", "input_wait_seconds"}}
        for row in classifier.history
    ]


@pytest.fixture(scope="module")
def reference_of():
    cached = {}

    def reference(job, workspace):
        if not cached:
            cached["run"] = run(job, make_workspace(workspace, "reference", RunObserver()))
        return cached["run"]

    return reference


def assert_same_run(resumed, reference):
    assert rows(resumed[0]) == rows(reference[0])
    assert resumed[0].best_epoch == reference[0].best_epoch
    assert resumed[0].kept == reference[0].kept
    for one, other in zip(resumed[1], reference[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_run_stopped_within_and_between_epochs_resumes_step_by_step(make_job, workspace, reference_of):
    job = make_job(**SPEC)
    reference = reference_of(job, workspace)
    steps_per_epoch = 4

    def stop_at(expected_checkpoints, stage, **when):
        observer = RunObserver(**when)
        run_workspace = make_workspace(workspace, "stopped", observer)
        observer.action = run_workspace.stop.set
        with pytest.raises(Stopped, match="the checkpoint is stored"):
            run(job, run_workspace)
        assert checkpoints(job, run_workspace, stage)[-1:] == expected_checkpoints
        assert not list(run_workspace.scratch.glob("checkpoint-*"))
        return observer

    # In the middle of the second epoch, then at the end of that epoch.
    stop_at(["00001-0000002"], "transfer", at_step=("transfer", steps_per_epoch + 2))
    observer = stop_at(["00002"], "transfer", at_epoch=("transfer", 2))
    assert ("resumed", {"stage": "transfer", "epoch": 1, "step": 2}) in observer.events
    assert observer.steps["transfer"] == 2
    # In the first phase of fine-tune, and at its end.
    stop_at(["00001-0000001"], "fine-tune", at_step=("fine-tune", steps_per_epoch + 1))
    stop_at(["00002"], "fine-tune", at_epoch=("fine-tune", 2))
    last = RunObserver()
    run_workspace = make_workspace(workspace, "stopped", last)
    assert_same_run(run(job, run_workspace), reference)
    assert last.steps["fine-tune"] == 2 * steps_per_epoch
    assert [
        (event, fields["stage"]) for event, fields in last.events if event in {"stage already complete", "resumed"}
    ] == [
        ("stage already complete", "pull"),
        ("stage already complete", "transfer"),
        ("resumed", "fine-tune"),
    ]
    assert checkpoints(job, run_workspace, "transfer") == checkpoints(job, run_workspace, "fine-tune") == []


KILLED = """
import os, time
from pathlib import Path
import structlog
from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.spec import TransferJob
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.checkpointing import checkpoints
from topwork.workspace import Workspace

checkpoints.EPOCH_SECONDS = 0.0

def print_epochs(_logger, _method, event):
    if event["event"] == "epoch":
        print(event["stage"], event["epoch"], flush=True)
        if event["epoch"] == 3:
            time.sleep(30)
    raise structlog.DropEvent

structlog.configure(processors=[print_epochs])
job = TransferJob.model_validate_json(os.environ["JOB"])
settings = StorageSettings(*os.environ["S3"].split())
workspace = Workspace(Storage(os.environ["URI"], settings), Metrics(), NoProgress(), Path(os.environ["SCRATCH"]))
transfer(job, pull(job, workspace), workspace)
"""


def test_run_killed_between_epochs_has_the_same_result(make_job, workspace, reference_of, s3_settings):
    job = make_job(**SPEC)
    reference = reference_of(job, workspace)
    observer = RunObserver()
    run_workspace = make_workspace(workspace, "killed", observer)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={
            **os.environ,
            "JOB": job.model_dump_json(by_alias=True),
            "S3": f"{s3_settings.endpoint_url} {s3_settings.access_key} {s3_settings.secret_key}",
            "URI": run_workspace.storage.uri,
            "SCRATCH": str(run_workspace.scratch),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        # The third epoch is complete, but its checkpoint is not written.
        assert [line.strip() for line in iter(process.stdout.readline, "transfer 3\n")] == ["transfer 1", "transfer 2"]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_same_run(run(job, run_workspace), reference)
    assert ("resumed", {"stage": "transfer", "epoch": 2, "step": 0}) in observer.events
    assert observer.steps["transfer"] == 4


def corrupt(storage, key):
    """Flip a bit of a stored file, like a failing disk."""
    data = bytearray(storage.read(key))
    data[len(data) // 2] ^= 1
    storage.write(key, bytes(data))


@pytest.mark.parametrize("damage", ["bytes", "missing", "short", "manifest"])
def test_damaged_checkpoint_is_skipped_in_favor_of_the_previous_one(make_job, workspace, reference_of, damage):
    job = make_job(**SPEC)
    reference_rows = [row for row in rows(reference_of(job, workspace)[0]) if row["stage"] == "transfer"]
    run_workspace = make_workspace(workspace, "damaged", RunObserver(at_epoch=("transfer", 2)))
    run_workspace.progress.action = run_workspace.stop.set
    with pytest.raises(Stopped):
        run(job, run_workspace)
    assert checkpoints(job, run_workspace, "transfer") == ["00001", "00002"]
    prefix = checkpoint_prefixes(job, run_workspace, "transfer")["00002"]
    if damage == "bytes":
        corrupt(run_workspace.storage, f"{prefix}/state.npz")
    elif damage == "missing":
        run_workspace.storage.delete([f"{prefix}/state.npz"])
    elif damage == "short":
        run_workspace.storage.write(f"{prefix}/state.npz", b"")
    else:
        run_workspace.storage.write(f"{prefix}/manifest.json", b"{")
    again = RunObserver()
    assert rows(pull_and_transfer(job, next_process(run_workspace, again))) == reference_rows
    assert [fields["checkpoint"] for fields in again.fields_of("checkpoint is unreadable")] == ["00002"]
    assert ("resumed", {"stage": "transfer", "epoch": 1, "step": 0}) in again.events


def pull_and_transfer(job, workspace):
    return transfer(job, pull(job, workspace), workspace)


def next_process(workspace, observer):
    """Create the workspace of the next process: the same storage and an empty scratch directory."""
    return replace(make_workspace(workspace, "next", observer), storage=workspace.storage)


def test_checkpoint_is_neither_skipped_nor_deleted_if_storage_is_unavailable(make_job, workspace, s3_settings):
    job = make_job(**SPEC)
    run_workspace = make_workspace(workspace, "unavailable", RunObserver(at_epoch=("transfer", 1)))
    run_workspace.progress.action = run_workspace.stop.set
    with pytest.raises(Stopped):
        run(job, run_workspace)
    with breaking_connections(s3_settings, b"GET", b"state.npz") as settings:
        unavailable = replace(
            next_process(run_workspace, RunObserver()), storage=Storage(run_workspace.storage.uri, settings)
        )
        with pytest.raises(UnavailableError):
            run(job, unavailable)
    assert checkpoints(job, run_workspace, "transfer") == ["00001"]


@contextmanager
def breaking_connections(settings, *words):
    """Run a proxy to storage that closes the connection at a request that contains all words."""
    target = settings.endpoint_url.removeprefix("http://").split(":")

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection((target[0], int(target[1]))) as server, suppress(OSError):
                other = {self.request: server, server: self.request}
                while True:
                    for source in select.select([*other], [], [])[0]:
                        data = source.recv(65536)
                        if not data or (source is self.request and all(word in data for word in words)):
                            return
                        other[source].sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield replace(settings, endpoint_url=f"http://127.0.0.1:{server.server_address[1]}", attempts=2)
        server.shutdown()


def test_checkpoints_are_stored_within_epochs_when_due(make_job, workspace, reference_of):
    job = make_job(**SPEC)
    reference = reference_of(job, workspace)
    frequent = make_job(**SPEC, compute={"gpus": 0, "checkpointMinutes": 1e-6})
    assert frequent.run == job.run
    names, snapshots = set(), []
    observer = RunObserver()
    run_workspace = make_workspace(workspace, "frequent", observer)

    def list_checkpoints():
        snapshots.append(checkpoints(job, run_workspace, "transfer"))
        names.update(snapshots[-1])

    observer.on_step = list_checkpoints
    assert_same_run(run(frequent, run_workspace), reference)
    mid_epoch = {name for name in names if "-" in name}
    assert mid_epoch
    assert max(map(len, snapshots)) <= 3  # two are kept, and a third may have just been stored
    # A run resumes from such a checkpoint like from any other.
    failing = make_workspace(workspace, "frequent-2", RunObserver(at_step=("transfer", 6)))
    failing.progress.action = fail_after_a_second
    with pytest.raises(ZeroDivisionError):
        run(frequent, failing)
    newest = checkpoints(job, failing, "transfer")[-1]
    assert "-" in newest
    again = RunObserver()
    reference_rows = [row for row in rows(reference[0]) if row["stage"] == "transfer"]
    assert rows(pull_and_transfer(job, next_process(failing, again))) == reference_rows
    epoch, step = map(int, newest.split("-"))
    assert ("resumed", {"stage": "transfer", "epoch": epoch, "step": step}) in again.events


def fail_after_a_second():
    """Wait for the upload, then fail with an unexpected error."""
    time.sleep(1)
    raise ZeroDivisionError


@pytest.mark.parametrize("checkpoint_format", [0, 2])
def test_checkpoint_of_another_format_is_an_error_that_suggests_a_fix(make_job, workspace, checkpoint_format):
    job = make_job(**SPEC)
    run_workspace = make_workspace(workspace, f"format-{checkpoint_format}", RunObserver(at_epoch=("transfer", 1)))
    run_workspace.progress.action = run_workspace.stop.set
    with pytest.raises(Stopped):
        run(job, run_workspace)
    key = f"{checkpoint_prefixes(job, run_workspace, 'transfer')['00001']}/manifest.json"
    manifest = json.loads(run_workspace.storage.read(key))
    manifest["facts"]["format"] = checkpoint_format
    run_workspace.storage.write(key, json.dumps(manifest).encode())
    with pytest.raises(
        FormatError, match=rf"00001 has format {checkpoint_format}, but this topwork reads format 1\. Resume with"
    ):
        run(job, next_process(run_workspace, RunObserver()))
    assert checkpoints(job, run_workspace, "transfer") == ["00001"]


ON_TWO_REPLICAS = """
import os
from contextlib import contextmanager
from pathlib import Path
from topwork.cli.output.progress import NoProgress
from topwork.cli.runtime.logging import configure_logging
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.errors import Stopped
from topwork.pipeline import run_transfer
from topwork.spec import TransferJob
from topwork.workspace import Workspace

class StopAtStep6(NoProgress):
    steps = 0

    @contextmanager
    def track(self, what, total):
        if what == "transfer":
            yield self
        else:
            with super().track(what, total) as tracker:
                yield tracker

    def advance(self, count=1, **facts):
        self.steps += 1
        if self.steps == 6:
            workspace.stop.set()

configure_logging()
job = TransferJob.model_validate_json(os.environ["JOB"])
storage = Storage(os.environ["URI"], StorageSettings(*os.environ["S3"].split()))
workspace = Workspace(storage, Metrics(), StopAtStep6(), Path(os.environ["SCRATCH"]), replicas=2)
try:
    run_transfer(job, workspace)
except Stopped as stopped:
    print(stopped, workspace.metrics.registry.get_sample_value("topwork_replicas"))
"""


def test_run_resumes_with_another_number_of_replicas(make_job, workspace, s3_settings, preloaded_python):
    # Dropout draws for each replica separately. Without it, results differ only by rounding.
    model = {"base": SPEC["model"]["base"], "head": {"hidden": [8], "dropout": 0.0}}
    job = make_job(**{**SPEC, "model": model, "transfer": {**SPEC["transfer"], "batchSize": 6}})
    uninterrupted = rows(pull_and_transfer(job, make_workspace(workspace, "one", RunObserver())))
    run_workspace = make_workspace(workspace, "two-then-one", RunObserver())
    s3 = f"{s3_settings.endpoint_url} {s3_settings.access_key} {s3_settings.secret_key}"
    variables = {"URI": run_workspace.storage.uri, "S3": s3, "SCRATCH": str(run_workspace.scratch)}
    variables["JOB"] = job.model_dump_json(by_alias=True)
    completed = preloaded_python.run(["-c", ON_TWO_REPLICAS], env={**os.environ, **variables})
    assert completed.stdout.startswith("Stopped in epoch 2 of transfer after step 2"), completed.stderr[-3000:]
    assert completed.stdout.endswith(" 2.0\n")
    again = RunObserver()
    resumed = rows(pull_and_transfer(job, next_process(run_workspace, again)))
    assert ("resumed", {"stage": "transfer", "epoch": 1, "step": 2}) in again.events
    assert again.steps["transfer"] == 3 * 4 - 6
    assert [row["epoch"] for row in resumed] == [row["epoch"] for row in uninterrupted]
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
        np.testing.assert_allclose([row[name] for row in resumed], [row[name] for row in uninterrupted], rtol=2e-4)
