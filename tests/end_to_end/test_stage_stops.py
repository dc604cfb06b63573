"""SIGTERM at any point of `topwork stage`, and the resumed run."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from topwork.cluster.termination_message import TerminationMessage
from topwork.spec.loading.loader import read_jobs

FINE_TUNE = {"epochs": 12, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}
TRANSFER = {"train": "all", "epochs": 12, "batchSize": 8, "featureCache": "off"}
STOPPED = "Stopped. Start the same job again to resume."
# Logged just before TensorFlow is imported.
STARTED = '"message": "run"'


@pytest.fixture
def preloaded_python() -> None:
    """Stops come while TensorFlow is imported, too, so that every process is a new interpreter."""


def run_and_stop(
    pod, stage: str, job: Path, condition: str | Callable[[], bool], seconds: float = 20, **variables: str
):
    """Start a container and stop it once its log contains a text or a condition holds."""
    container = pod.start(stage, job, **variables)
    container.wait_for(condition if callable(condition) else lambda: condition in container.output)
    code, message = container.stop(seconds)
    assert (code, message.outcome, message.exit_code, message.run) == (143, "stopped", 143, run_of(job)), (
        container.output
    )
    # `lines` also checks that every line is JSON.
    assert (container.lines[-1]["message"], container.lines[-1]["exit_code"]) == (message.error, 143)
    return message, container


def run_of(job: Path) -> str:
    return read_jobs(job)[0].run


def test_pull_stops_before_and_while_reading_images(pod, write_job):
    job = write_job()
    message, _ = run_and_stop(pod, "pull", job, STARTED)
    assert message == TerminationMessage(stage="pull", outcome="stopped", exit_code=143, run=run_of(job), error=STOPPED)
    run_and_stop(pod, "pull", job, (pod.scratch / run_of(job) / "pull").exists)
    code, _, container = pod.run("pull", job)
    assert (code, container.field("done", "images")) == (0, 40)


def test_transfer_stores_a_checkpoint_and_resumes_from_it(pod, write_job):
    job = write_job(transfer=TRANSFER)
    run_and_stop(pod, "transfer", job, STARTED)
    message, _ = run_and_stop(pod, "transfer", job, '"epoch": 3, ', seconds=60)
    assert 3 <= message.epochs < 12
    assert message.metric == "validation_accuracy"
    assert message.error.endswith("the checkpoint is stored. Start the same job again to resume.")
    code, done, container = pod.run("transfer", job)
    assert (code, done.epochs) == (0, 12), container.output
    assert container.field("resumed", "epoch") == message.epochs
    trained = [line["epoch"] for line in container.lines if line["message"] == "epoch"]
    assert trained == list(range(message.epochs + 1, 13))


def test_storage_too_slow_for_the_grace_period_keeps_earlier_checkpoints(pod, write_job, storage, proxy):
    job = write_job(transfer=TRANSFER)
    message, _ = run_and_stop(pod, "transfer", job, '"epoch": 3, ', seconds=60)
    prefix = "stages/transfer/"
    before = {stored.key: stored.etag for stored in storage.list(prefix)}
    bucket_and_prefix = storage.uri.removeprefix("s3://")
    with proxy(stall=f"PUT /{bucket_and_prefix}/{prefix}".encode()) as port:
        variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "TOPWORK_GRACE_SECONDS": "9"}
        container = pod.start("transfer", job, **variables)
        container.wait_for_output(f'"epoch": {message.epochs + 2}, ')
        container.process.terminate()
        time.sleep(1)
        started = time.monotonic()
        # A second signal does not change the deadline.
        code, late_message = container.stop(seconds=8)
    assert time.monotonic() - started < 5
    assert (code, late_message.outcome, late_message.exit_code) == (143, "stopped", 143), container.output
    assert "took longer than the grace period of 9 s allows. Earlier checkpoints are kept" in late_message.error
    after = {stored.key: stored.etag for stored in storage.list(prefix)}
    assert before.items() <= after.items()
    assert not [key for key in after.keys() - before.keys() if key.endswith("manifest.json")]
    code, done, container = pod.run("transfer", job)
    assert (code, done.epochs, container.field("resumed", "epoch")) == (0, 12, message.epochs), container.output


def test_grace_period_that_is_not_a_number_is_reported(pod, write_job):
    code, message, _ = pod.run("transfer", write_job(), TOPWORK_GRACE_SECONDS="5m")
    assert (code, message.error) == (2, "TOPWORK_GRACE_SECONDS is '5m': expected seconds, such as 300.")


def test_fine_tune_stops_in_training_evaluation_export_and_upload_and_publishes_once(pod, write_job, storage, proxy):
    job = write_job(fineTune=FINE_TUNE, publish={"formats": ["keras", "savedModel"]})
    message, _ = run_and_stop(pod, "fine-tune", job, '"stage": "fine-tune", "epoch": 3, ', seconds=60)
    assert 3 <= message.epochs < 12
    message, container = run_and_stop(pod, "fine-tune", job, '"message": "evaluation"')
    assert ("resumed" in container.messages, message.epochs) == (True, 12)
    run_and_stop(pod, "fine-tune", job, '"message": "export"')
    with proxy(stall=b"models/tiny/1/saved_model.pb") as port:
        address = f"http://127.0.0.1:{port}"
        run_and_stop(pod, "fine-tune", job, '"message": "export check"', AWS_ENDPOINT_URL=address)
    code, message, container = pod.run("fine-tune", job)
    assert (code, message.model) == (0, storage.uri_of("models/tiny/1")), container.output
    manifests = [stored.key for stored in storage.list("models/") if stored.key.endswith("/manifest.json")]
    assert manifests == ["models/tiny/1/manifest.json"]


def test_stop_succeeds_while_storage_does_not_respond(pod, write_job, proxy):
    with proxy(silent=True) as port:
        container = pod.start("pull", write_job(), AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        container.wait_for_output('"message": "metrics"')
        time.sleep(2)
        code, message = container.stop(seconds=20)
    assert (code, message.outcome, message.error) == (143, "stopped", STOPPED)


def test_stop_ends_a_library_that_blocks_signals(pod, write_job, tmp_path):
    blocking_module = "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass"
    (tmp_path / "blocking").mkdir()
    (tmp_path / "blocking" / "tensorflow.py").write_text(blocking_module)
    path = os.pathsep.join([str(tmp_path / "blocking"), *filter(None, [os.environ.get("PYTHONPATH")])])
    container = pod.start("transfer", write_job(), PYTHONPATH=path)
    container.wait_for_output(STARTED)
    time.sleep(2)
    code, message = container.stop(seconds=30)
    assert (code, message.outcome, message.error) == (143, "stopped", STOPPED)
    assert container.messages[-1] == STOPPED
