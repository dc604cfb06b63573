"""`topwork stage` is stopped, at any moment, and goes on the next time."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from topwork.cluster.termination_message import TerminationMessage
from topwork.spec.loading.loader import read_jobs

FINE_TUNE = {"epochs": 12, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}
TRANSFER = {"train": "all", "epochs": 12, "batchSize": 8, "featureCache": "off"}
STOPPED = "Stopped. Start the same job again to resume."
# TensorFlow is imported next.
BEGUN = '"message": "run"'


def stopped(pod, stage: str, job: Path, moment: str | Callable[[], bool], seconds: float = 20, **variables: str):
    """Start a container, stop it when a moment has come, and give its ending and its process."""
    process = pod.start(stage, job, **variables)
    process.wait_for(moment if callable(moment) else lambda: moment in process.output)
    code, ending = process.stop(seconds)
    assert (code, ending.outcome, ending.exit_code, ending.run) == (143, "stopped", 143, run_of(job)), process.output
    # The last line says so, and no line is anything but JSON.
    assert (process.lines[-1]["message"], process.lines[-1]["exit_code"]) == (ending.error, 143)
    return ending, process


def run_of(job: Path) -> str:
    return read_jobs(job)[0].run


def test_pull_is_stopped_before_and_while_it_reads_images(pod, write):
    job = write()
    ending, _ = stopped(pod, "pull", job, BEGUN)
    assert ending == TerminationMessage(stage="pull", outcome="stopped", exit_code=143, run=run_of(job), error=STOPPED)
    stopped(pod, "pull", job, (pod.scratch / run_of(job) / "pull").exists)
    code, _, process = pod.run("pull", job)
    assert (code, process.fact("done", "images")) == (0, 40)


def test_transfer_stores_a_checkpoint_and_goes_on_from_it(pod, write):
    job = write(transfer=TRANSFER)
    stopped(pod, "transfer", job, BEGUN)
    ending, _ = stopped(pod, "transfer", job, '"epoch": 3, ', seconds=60)
    assert 3 <= ending.epochs < 12
    assert ending.metric == "validation_accuracy"
    assert ending.error.endswith("the checkpoint is stored. Start the same job again to resume.")
    code, done, process = pod.run("transfer", job)
    assert (code, done.epochs) == (0, 12), process.output
    assert process.fact("resumed", "epoch") == ending.epochs
    trained = [line["epoch"] for line in process.lines if line["message"] == "epoch"]
    assert trained == list(range(ending.epochs + 1, 13))


def test_storage_that_is_too_slow_for_the_grace_period_costs_no_checkpoint(pod, write, storage, proxy):
    job = write(transfer=TRANSFER)
    ending, _ = stopped(pod, "transfer", job, '"epoch": 3, ', seconds=60)
    stored = f"runs/{run_of(job)}/transfer/checkpoints/"
    before = {one.key: one.etag for one in storage.list(stored)}
    path = storage.uri.removeprefix("s3://")
    with proxy(stall=f"PUT /{path}/{stored}".encode()) as port:
        variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "TOPWORK_GRACE_SECONDS": "9"}
        process = pod.start("transfer", job, **variables)
        process.wait_for_line(f'"epoch": {ending.epochs + 2}, ')
        process.process.terminate()
        time.sleep(1)
        began = time.monotonic()
        # A second signal changes nothing: the process knows by when it must end.
        code, late = process.stop(seconds=8)
    assert time.monotonic() - began < 5
    assert (code, late.outcome, late.exit_code) == (143, "stopped", 143), process.output
    assert "took longer than the grace period of 9 s allows. Earlier checkpoints are kept" in late.error
    left = {one.key: one.etag for one in storage.list(stored)}
    assert before.items() <= left.items()
    assert not [key for key in left.keys() - before.keys() if key.endswith("manifest.json")]
    code, done, process = pod.run("transfer", job)
    assert (code, done.epochs, process.fact("resumed", "epoch")) == (0, 12, ending.epochs), process.output


def test_a_grace_period_that_is_no_number_is_named(pod, write):
    code, ending, _ = pod.run("transfer", write(), TOPWORK_GRACE_SECONDS="5m")
    assert (code, ending.error) == (2, "TOPWORK_GRACE_SECONDS is '5m': expected seconds, such as 300.")


def test_fine_tune_is_stopped_in_training_export_and_upload_and_publishes_once(pod, write, storage, proxy):
    job = write(fineTune=FINE_TUNE)
    ending, _ = stopped(pod, "fine-tune", job, '"stage": "fine-tune", "epoch": 3, ', seconds=60)
    assert 3 <= ending.epochs < 12
    ending, process = stopped(pod, "fine-tune", job, '"message": "evaluation"')
    assert ("resumed" in process.messages, ending.epochs) == (True, 12)
    stopped(pod, "fine-tune", job, '"message": "export"')
    with proxy(stall=b"models/tiny/1/saved_model.pb") as port:
        address = f"http://127.0.0.1:{port}"
        stopped(pod, "fine-tune", job, '"message": "export check"', AWS_ENDPOINT_URL=address)
    code, ending, process = pod.run("fine-tune", job)
    assert (code, ending.model) == (0, storage.uri_of("models/tiny/1")), process.output
    manifests = [stored.key for stored in storage.list("models/") if stored.key.endswith("/manifest.json")]
    assert manifests == ["models/tiny/1/manifest.json"]


def test_a_stop_is_granted_while_storage_does_not_answer(pod, write, proxy):
    with proxy(silent=True) as port:
        process = pod.start("pull", write(), AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        process.wait_for_line('"message": "metrics"')
        time.sleep(2)
        code, ending = process.stop(seconds=20)
    assert (code, ending.outcome, ending.error) == (143, "stopped", STOPPED)


def test_a_library_that_hears_no_signal_is_ended_all_the_same(pod, write, tmp_path):
    deaf = "import time\nwhile True:\n    try: time.sleep(60)\n    except BaseException: pass"
    (tmp_path / "deaf").mkdir()
    (tmp_path / "deaf" / "tensorflow.py").write_text(deaf)
    path = os.pathsep.join([str(tmp_path / "deaf"), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = pod.start("transfer", write(), PYTHONPATH=path)
    process.wait_for_line(BEGUN)
    time.sleep(2)
    code, ending = process.stop(seconds=30)
    assert (code, ending.outcome, ending.error) == (143, "stopped", STOPPED)
    assert process.messages[-1] == STOPPED
