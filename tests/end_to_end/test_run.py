"""`topwork run`: training and publishing with the embedded storage, stops, metrics, and exit codes."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}

PREDICT_WITH_KERAS_AND_TENSORFLOW = """
import json, sys
import keras, numpy as np, tensorflow as tf
directory, path = sys.argv[1:]
data = tf.io.read_file(path)
image = tf.image.resize(tf.io.decode_image(data, channels=3, expand_animations=False), (32, 32), antialias=True)
image = tf.cast(tf.round(image), tf.float32)[tf.newaxis]
by_keras = keras.models.load_model(directory + "/model.keras").predict(image, verbose=0)[0]
served = tf.saved_model.load(directory)
by_image = served.signatures["serving_default"](image)["probabilities"].numpy()[0]
by_bytes = served.signatures["encoded"](data[tf.newaxis])
print(json.dumps([by_keras.tolist(), by_image.tolist(), by_bytes["probabilities"].numpy()[0].tolist(),
                  by_bytes["class"].numpy()[0].decode()]))
"""


def published_uri(summary: str) -> str:
    return next(word for word in summary.split() if word.startswith("s3://photos/topwork/models/tiny/")).rstrip("/.,")


def test_run_publishes_a_model_that_keras_and_tensorflow_load(
    topwork, topwork_in_new_interpreter, write_local_job, two_class_folder, tmp_path
):
    completed = topwork_in_new_interpreter(
        "run", write_local_job(fineTune=FINE_TUNE, publish={"formats": ["keras", "savedModel"]})
    )
    assert completed.returncode == 0, completed.stderr
    assert published_uri(completed.stdout) == "s3://photos/topwork/models/tiny/1"
    assert "Traceback" not in completed.stderr

    fetched = topwork("models", "fetch", "s3://photos/topwork", "tiny", tmp_path / "model")
    assert fetched.returncode == 0, fetched.stderr
    image = two_class_folder / "red" / "01.png"
    plain = subprocess.run(
        [sys.executable, "-c", PREDICT_WITH_KERAS_AND_TENSORFLOW, tmp_path / "model", image],
        capture_output=True,
        text=True,
        check=True,
    )
    by_keras, by_image, by_bytes, class_name = json.loads(plain.stdout)
    assert by_image == pytest.approx(by_keras, abs=1e-5)
    assert by_bytes == pytest.approx(by_keras, abs=1e-5)
    assert class_name in {"blue", "red"}

    predicted = topwork("predict", "s3://photos/topwork/models/tiny/latest", image, "--json")
    assert predicted.returncode == 0, predicted.stderr
    assert class_name in predicted.stdout

    again = topwork("run", tmp_path / "job.yaml")
    assert again.returncode == 0, again.stderr
    assert published_uri(again.stdout) == "s3://photos/topwork/models/tiny/1"
    assert "epoch=" not in again.stderr


def test_killed_run_resumes_from_its_checkpoint(topwork, start_topwork, write_local_job):
    # An epoch takes a fraction of a second. By default, epochs store a checkpoint once a minute.
    compute = {"gpus": 0, "checkpointMinutes": 1e-4}
    job = write_local_job(transfer={"train": "all", "epochs": 6, "batchSize": 8}, compute=compute)
    process = start_topwork("run", job)
    process.wait_for_output("epoch=3")
    process.send_signal(signal.SIGKILL)
    completed = topwork("run", job)
    assert completed.returncode == 0, completed.stderr
    epochs = [line for line in completed.stderr.splitlines() if "[info] epoch " in line]
    assert 0 < len(epochs) < 6, completed.stderr
    assert "epoch=6" in epochs[-1]


def test_sigterm_stores_a_checkpoint_and_exits_with_143(start_topwork, write_local_job):
    process = start_topwork("run", write_local_job(transfer={"train": "all", "epochs": 500, "batchSize": 8}))
    process.wait_for_output("epoch=3")
    assert process.send_signal(signal.SIGTERM) == 143
    assert "Start the same job again to resume" in process.output
    assert "Traceback" not in process.output


def test_simultaneous_runs_share_the_embedded_storage(start_topwork, write_local_job):
    runs = [
        start_topwork("run", write_local_job("one.yaml", seed=1)),
        start_topwork("run", write_local_job("two.yaml", seed=2)),
    ]
    assert [process.process.wait(timeout=900) for process in runs] == [0, 0], [process.output for process in runs]
    assert {published_uri(process.output)[-1] for process in runs} == {"1", "2"}


def test_metrics_are_served_during_a_run(start_topwork, write_local_job):
    job = write_local_job(transfer={"train": "all", "epochs": 500, "batchSize": 8})
    process = start_topwork("run", job, "--metrics-port", "0")
    process.wait_for_output("epoch=2")
    run = process.output.split("run name=")[1].split()[0]
    port = process.output.split("port=")[1].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        text, scraped = response.read().decode(), time.time()
    process.send_signal(signal.SIGTERM)
    series = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        assert (sample.labels.pop("transferjob"), sample.labels.pop("run")) == ("tiny", run)
        series[sample.name, *sample.labels.values()] = sample.value
    assert series["topwork_stage_running", "transfer"] == 1
    assert series["topwork_epochs_planned", "transfer"] == 500
    assert series["topwork_loss", "train"] > 0
    total = series["topwork_input_wait_seconds_total",] + series["topwork_step_compute_seconds_total",]
    # A scrape can come between a step and the update of its time counters.
    assert total == pytest.approx(series["topwork_step_duration_seconds_sum",], rel=0.5)
    assert 0 <= scraped - series["topwork_last_progress_timestamp_seconds",] < 30
    assert ("topwork_exit_code", "run") not in series


def test_missing_bucket_on_a_real_endpoint_is_reported(topwork, write_local_job, s3_settings):
    completed = topwork(
        "run",
        write_local_job(),
        AWS_ENDPOINT_URL=s3_settings.endpoint_url,
        AWS_ACCESS_KEY_ID=s3_settings.access_key,
        AWS_SECRET_ACCESS_KEY=s3_settings.secret_key,
        AWS_REGION="us-east-1",
    )
    assert completed.returncode == 2
    assert "photos" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert s3_settings.secret_key not in completed.stderr


def test_failed_gate_exits_with_3_and_publishes_nothing(topwork, write_local_job):
    evaluate = {"metrics": ["calibrationError"], "gates": [{"metric": "calibrationError", "atMost": 0.0}]}
    completed = topwork("run", write_local_job(evaluate=evaluate))
    assert completed.returncode == 3, completed.stderr
    assert "calibrationError" in completed.stderr
    listed = topwork("models", "list", "s3://photos/topwork")
    assert "tiny" not in listed.stdout


def test_validate_does_not_import_tensorflow(environment, tmp_path, write_local_job):
    completed = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "topwork", "validate", write_local_job()],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {line.split("|")[-1].strip() for line in completed.stderr.splitlines()}
    assert "topwork.spec.job" in modules
    assert not {"tensorflow", "keras", "numpy", "boto3", "matplotlib"} & modules


@pytest.mark.parametrize("example", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_is_valid(topwork, example):
    completed = topwork("validate", example.absolute())
    assert completed.returncode == 0, completed.stderr
