"""`topwork run`, from the job spec to the published model."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from topwork.spec.loading.loader import read_jobs

FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}

PLAIN_LIBRARIES = """
import json, sys
import keras, numpy as np, tensorflow as tf
folder, picture = sys.argv[1:]
data = tf.io.read_file(picture)
image = tf.image.resize(tf.io.decode_image(data, channels=3, expand_animations=False), (32, 32), antialias=True)
image = tf.cast(tf.round(image), tf.float32)[tf.newaxis]
by_keras = keras.models.load_model(folder + "/model.keras").predict(image, verbose=0)[0]
served = tf.saved_model.load(folder)
by_image = served.signatures["serving_default"](image)["probabilities"].numpy()[0]
by_bytes = served.signatures["encoded"](data[tf.newaxis])
print(json.dumps([by_keras.tolist(), by_image.tolist(), by_bytes["probabilities"].numpy()[0].tolist(),
                  by_bytes["class"].numpy()[0].decode()]))
"""


def version_folder(summary: str) -> str:
    return next(word for word in summary.split() if word.startswith("s3://photos/topwork/models/tiny/")).rstrip("/.,")


def test_run_publishes_a_model_that_plain_libraries_load(topwork, job_file, two_class_folder, tmp_path):
    ended = topwork("run", job_file(fineTune=FINE_TUNE))
    assert ended.returncode == 0, ended.stderr
    assert version_folder(ended.stdout) == "s3://photos/topwork/models/tiny/1"
    assert "Traceback" not in ended.stderr

    fetched = topwork("models", "fetch", "s3://photos/topwork", "tiny", tmp_path / "model")
    assert fetched.returncode == 0, fetched.stderr
    picture = two_class_folder / "red" / "01.png"
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_LIBRARIES, tmp_path / "model", picture], capture_output=True, text=True, check=True
    )
    by_keras, by_image, by_bytes, by_name = json.loads(plain.stdout)
    assert by_image == pytest.approx(by_keras, abs=1e-5)
    assert by_bytes == pytest.approx(by_keras, abs=1e-5)
    assert by_name in {"blue", "red"}

    predicted = topwork("predict", "s3://photos/topwork/models/tiny/latest", picture, "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert by_name in predicted.stdout

    again = topwork("run", tmp_path / "job.yaml")
    assert again.returncode == 0, again.stderr
    assert version_folder(again.stdout) == "s3://photos/topwork/models/tiny/1"
    assert "epoch=" not in again.stderr


def test_a_run_that_was_killed_goes_on_where_it_was(topwork, start, job_file):
    job = job_file(transfer={"train": "all", "epochs": 6, "batchSize": 8})
    running = start("run", job)
    running.wait_for("epoch=3")
    running.stop(signal.SIGKILL)
    ended = topwork("run", job)
    assert ended.returncode == 0, ended.stderr
    epochs = [line for line in ended.stderr.splitlines() if " epoch=" in line]
    assert 0 < len(epochs) < 6, ended.stderr
    assert "epoch=6" in epochs[-1]


def test_sigterm_writes_a_checkpoint_and_ends_with_143(start, job_file):
    running = start("run", job_file(transfer={"train": "all", "epochs": 500, "batchSize": 8}))
    running.wait_for("epoch=3")
    assert running.stop(signal.SIGTERM) == 143
    assert "Start the same job again to resume" in running.output
    assert "Traceback" not in running.output


def test_two_runs_at_once_share_the_embedded_storage(start, job_file):
    runs = [start("run", job_file("one.yaml", seed=1)), start("run", job_file("two.yaml", seed=2))]
    assert [running.process.wait(timeout=900) for running in runs] == [0, 0], [running.output for running in runs]
    assert {version_folder(running.output)[-1] for running in runs} == {"1", "2"}


def test_metrics_are_served_while_a_run_goes_on(start, job_file):
    job = job_file(transfer={"train": "all", "epochs": 500, "batchSize": 8})
    run = read_jobs(job)[0].run
    running = start("run", job, "--metrics-port", "0")
    running.wait_for("epoch=2")
    port = running.output.split("port=")[1].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text, scraped = answer.read().decode(), time.time()
    running.stop(signal.SIGTERM)
    series = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        assert (sample.labels.pop("transferjob"), sample.labels.pop("run")) == ("tiny", run)
        series[sample.name, *sample.labels.values()] = sample.value
    assert series["topwork_stage_running", "transfer"] == 1
    assert series["topwork_epochs_planned", "transfer"] == 500
    assert series["topwork_loss", "train"] > 0
    spent = series["topwork_input_wait_seconds_total",] + series["topwork_step_compute_seconds_total",]
    # A scrape may fall between the steps of an epoch and their account.
    assert spent == pytest.approx(series["topwork_step_duration_seconds_sum",], rel=0.5)
    assert 0 <= scraped - series["topwork_last_progress_timestamp_seconds",] < 30
    assert ("topwork_exit_code", "run") not in series


def test_a_missing_bucket_on_a_real_endpoint_is_named(topwork, job_file, s3_settings):
    ended = topwork(
        "run",
        job_file(),
        AWS_ENDPOINT_URL=s3_settings.endpoint_url,
        AWS_ACCESS_KEY_ID=s3_settings.access_key,
        AWS_SECRET_ACCESS_KEY=s3_settings.secret_key,
        AWS_REGION="us-east-1",
    )
    assert ended.returncode == 2
    assert "photos" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert s3_settings.secret_key not in ended.stderr


def test_a_gate_that_is_not_met_ends_with_3_and_publishes_nothing(topwork, job_file):
    evaluate = {"metrics": ["calibrationError"], "gates": [{"metric": "calibrationError", "atMost": 0.0}]}
    ended = topwork("run", job_file(evaluate=evaluate))
    assert ended.returncode == 3, ended.stderr
    assert "calibrationError" in ended.stderr
    listed = topwork("models", "list", "s3://photos/topwork")
    assert "tiny" not in listed.stdout


def test_validate_loads_no_tensorflow(environment, tmp_path, job_file):
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "topwork", "validate", job_file()],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
    assert "topwork.spec.job" in modules
    assert not {"tensorflow", "keras", "numpy", "boto3", "matplotlib"} & modules


@pytest.mark.parametrize("example", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_validates(topwork, example):
    ended = topwork("validate", example.absolute())
    assert ended.returncode == 0, ended.stderr
