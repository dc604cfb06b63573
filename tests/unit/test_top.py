"""`topwork top`: computing the state of a run from its metrics, and formatting it as text and JSON."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from prometheus_client import generate_latest

from topwork.cli.top.views import format_details, format_runs, snapshot_to_json
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.scrape import Reading, parse_page
from topwork.cluster.status.snapshot import RunSnapshot, StorageTraffic, TrainingSpeed
from topwork.cluster.status.snapshot_calculation import ProcessLocation, ReadingHistory, compute_snapshot

START_TIME = 1_600_000_000.0
LOCATION = ProcessLocation("http://127.0.0.1:9101/metrics")


def start_metrics(run: str = "cats-1a2b3c4d", stage: str = "run") -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job=run.rpartition("-")[0], run=run, stage=stage, version="1.2.3")
    return metrics


def read(metrics: Metrics, seconds: float) -> Reading:
    """Read the metrics page at a time, in seconds after the start."""
    return parse_page(generate_latest(metrics.labeled_registry).decode(), START_TIME + seconds)


@contextmanager
def run_stage(metrics: Metrics, name: str, seconds: float = 0.0) -> Iterator[None]:
    with metrics.track_stage(name):
        metrics.set_stage_start(name, datetime.fromtimestamp(START_TIME + seconds, UTC))
        yield


def observe(*readings: Reading, seconds: float | None = None) -> RunSnapshot:
    history = ReadingHistory()
    for reading in readings:
        history.add(reading)
    return compute_snapshot(history.readings, readings[-1].at if seconds is None else START_TIME + seconds, LOCATION)


def run_steps(metrics: Metrics, count: int, seconds: float, wait: float = 0.0) -> None:
    for _ in range(count):
        metrics.record_step(images=64, seconds=seconds)
    metrics.record_step_time(count * wait, count * (seconds - wait))


# ── Calculation ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("epoch", "planned"), [("1", "+Inf"), ("+Inf", "+Inf"), ("NaN", "3"), ("-0.5", "3")])
def test_impossible_epochs_have_no_remaining_time(epoch, planned):
    page = (
        'topwork_stage_running{stage="transfer"} 1\ntopwork_stage_start_timestamp_seconds{stage="transfer"} 1.6e9\n'
        f'topwork_epoch{{stage="transfer"}} {epoch}\ntopwork_epochs_planned{{stage="transfer"}} {planned}\n'
    )
    assert observe(parse_page(page, START_TIME + 100)).seconds_left is None


def test_new_process_is_starting():
    snapshot = observe(read(start_metrics(), 0))
    assert (snapshot.run, snapshot.job, snapshot.state, snapshot.stage) == ("cats-1a2b3c4d", "cats", "starting", None)
    assert (snapshot.epoch, snapshot.speed, snapshot.learning_rate, snapshot.images) == (None, None, None, None)


def test_new_container_has_its_stage():
    assert observe(read(start_metrics(stage="transfer"), 0)).stage == "transfer"


def test_running_stage_has_its_elapsed_time_and_finished_stages_their_durations():
    metrics = start_metrics()
    metrics.restore_stage("pull", datetime.fromtimestamp(START_TIME, UTC), datetime.fromtimestamp(START_TIME + 40, UTC))
    with run_stage(metrics, "transfer", 50):
        snapshot = observe(read(metrics, 110))
    assert (snapshot.state, snapshot.stage, snapshot.stage_seconds) == ("running", "transfer", 60)
    assert snapshot.seconds_by_stage == {"pull": 40}


def test_speed_is_computed_from_recent_readings():
    metrics = start_metrics()
    with run_stage(metrics, "transfer"):
        run_steps(metrics, 100, 1.0)
        first = read(metrics, 100)
        run_steps(metrics, 10, 0.5, wait=0.2)
        assert observe(first, read(metrics, 105)).speed == TrainingSpeed(128.0, 0.5, pytest.approx(0.4), lately=True)


def test_speed_is_the_mean_if_no_step_ended_recently():
    metrics = start_metrics()
    with run_stage(metrics, "transfer"):
        run_steps(metrics, 100, 0.5, wait=0.1)
        readings = read(metrics, 100), read(metrics, 102)
    assert observe(*readings).speed == TrainingSpeed(128.0, 0.5, pytest.approx(0.2), lately=False)


def test_speed_ignores_steps_before_the_rate_period():
    metrics = start_metrics()
    with run_stage(metrics, "transfer"):
        readings = [read(metrics, 0)]
        for second in range(2, 62, 2):
            run_steps(metrics, 1, 1.0 if second < 30 else 0.25)
            readings.append(read(metrics, second))
        assert observe(*readings).speed == TrainingSpeed(256.0, 0.25, pytest.approx(0.0), lately=True)


def test_time_left_is_estimated_from_observed_epochs():
    metrics = start_metrics()
    metrics.set_planned_epochs("transfer", 20)
    with run_stage(metrics, "transfer", -5000):  # slower before the first reading
        readings = []
        for epoch in range(5, 9):
            metrics.set_epoch("transfer", epoch)
            readings += [read(metrics, epoch * 100), read(metrics, epoch * 100 + 50)]
    # Epochs take 100 s; the eighth ended 50 s ago.
    assert observe(*readings).seconds_left == pytest.approx(12 * 100 - 50)


def test_time_left_is_estimated_from_the_stage_start_without_observed_epochs():
    metrics = start_metrics()
    metrics.set_planned_epochs("transfer", 20)
    with run_stage(metrics, "transfer"):
        assert observe(read(metrics, 10)).seconds_left is None
        metrics.set_epoch("transfer", 4)
        assert observe(read(metrics, 450)).seconds_left == pytest.approx(100 * 15.5)
    assert observe(read(metrics, 450)).seconds_left is None


def test_another_run_at_the_same_address_starts_a_new_history():
    first, second = start_metrics("cats-11111111"), start_metrics("cats-22222222")
    with run_stage(first, "transfer"), run_stage(second, "transfer"):
        run_steps(first, 100, 1.0)
        run_steps(second, 110, 0.5)
        snapshot = observe(read(first, 0), read(second, 2))
    assert (snapshot.run, snapshot.speed) == ("cats-22222222", TrainingSpeed(128.0, 0.5, 0.0, lately=False))


def test_restarted_process_has_no_negative_rates():
    before, after = start_metrics(), start_metrics()
    run_steps(before, 100, 1.0)
    before.count_storage_bytes("upload", 1000)
    assert observe(read(before, 0), read(after, 2)).traffic["upload"] == StorageTraffic(0.0, None)


def test_traffic_has_a_total_and_a_rate():
    metrics = start_metrics()
    metrics.count_storage_bytes("upload", 1000)
    first = read(metrics, 0)
    metrics.count_storage_bytes("upload", 500)
    metrics.count_storage_retry()
    snapshot = observe(first, read(metrics, 2))
    assert snapshot.traffic == {"download": StorageTraffic(0.0, 0.0), "upload": StorageTraffic(1500.0, 250.0)}
    assert snapshot.retries == 1


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (2, "refused"), (3, "gate not met"), (75, "storage failed"), (143, "stopped"), (1, "failed")],
)
def test_finished_process_has_the_state_of_its_exit_code(code: int, state: str):
    metrics = start_metrics()
    with run_stage(metrics, "publish"):
        pass
    metrics.set_exit_code("run", code)
    snapshot = observe(read(metrics, 9))
    assert (snapshot.state, snapshot.exit_code, snapshot.stage) == (state, code, "publish")


def test_history_size_is_limited():
    metrics = start_metrics()
    history = ReadingHistory()
    for second in range(0, 800, 2):
        metrics.set_epoch("transfer", second // 10)
        history.add(read(metrics, second))
    assert len(history.readings) < 40


# ── Formatting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def example_run() -> RunSnapshot:
    """A run in the seventh of twenty epochs."""
    metrics = start_metrics()
    metrics.set_dataset_images(24998)
    metrics.count_rejected_images("truncated", 12)
    metrics.restore_stage("pull", datetime.fromtimestamp(START_TIME, UTC), datetime.fromtimestamp(START_TIME + 40, UTC))
    metrics.set_planned_epochs("transfer", 20)
    metrics.set_replicas(2)
    metrics.set_learning_rate(0.001)
    with run_stage(metrics, "transfer", 50):
        first = read(metrics, 60)
        run_steps(metrics, 10, 0.08, wait=0.04)
        metrics.set_epoch("transfer", 7)
        metrics.set_evaluation("train", {"loss": 0.25, "accuracy": 0.875})
        metrics.set_evaluation("validation", {"loss": 0.5, "accuracy": 0.75})
        metrics.set_best_metric("transfer", "accuracy", "validation", 0.8125)
        metrics.count_storage_bytes("upload", 3 * 2**20)
        return observe(first, read(metrics, 62), seconds=62)


def test_format_details_shows_all_data_of_a_run():
    lines = list(format_details(example_run()))
    assert lines == [
        "cats-1a2b3c4d: running, transfer for 12s",
        "  epoch          7/20  ━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌  20s left",
        "  loss           train 0.2500   validation 0.5000",
        "  accuracy       train 0.8750   validation 0.7500",
        "  best           validation_accuracy 0.8125 in transfer",
        "  learning rate  0.001",
        "  speed          800 images/s, 80 ms per step on 2 replicas",
        "  input          50% of step time spent waiting: training is input-bound",
        "  storage        download 0 B, upload 3.0 MiB (1.5 MiB/s)",
        "  images         24,998 in the dataset, 12 rejected",
        "  stages done    pull 40s",
        "  source         http://127.0.0.1:9101/metrics",
    ]


def test_format_runs_shows_a_table():
    other = RunSnapshot("dogs-22222222", "dogs", "pod", state="pending", reason="insufficient GPUs")
    header, first, second = format_runs([example_run(), other])
    assert header.split() == ["RUN", "STAGE", "EPOCH", "LOSS", "BEST", "IMAGES/S", "WAIT", "GPU", "LEFT", "STATE"]
    assert first.split() == [
        "cats-1a2b3c4d", "transfer", "7/20", "0.5000", "validation_accuracy", "0.8125", "800", "50%", "20s", "running",
    ]  # fmt: skip
    assert second.split() == ["dogs-22222222", "pending:", "insufficient", "GPUs"]


def test_gpus_are_shown_individually_and_as_a_mean():
    page = "\n".join(
        f'topwork_gpu_{name}{{gpu="{gpu}",run="cats-1a2b3c4d",transferjob="cats"}} {value}'
        for gpu, values in {"0": (0.5, 2**34, 2**36, 400.4, 61), "10": (1.0, 2**30, 2**36, 90, 40)}.items()
        for name, value in zip(
            ("utilization_ratio", "memory_used_bytes", "memory_total_bytes", "power_watts", "temperature_celsius"),
            values,
            strict=True,
        )
    )
    snapshot = observe(parse_page(page, START_TIME))
    assert [line for line in format_details(snapshot) if "GPU" in line] == [
        "  GPU 0          50% busy, 16.0 GiB of 64.0 GiB, 400 W, 61 °C",
        "  GPU 10         100% busy, 1.0 GiB of 64.0 GiB, 90 W, 40 °C",
    ]
    assert "75% of 2" in list(format_runs([snapshot]))[1]


def test_run_without_progress_is_reported():
    metrics = start_metrics()
    with run_stage(metrics, "transfer"):
        reading = read(metrics, 0)
        progress = reading.value("last_progress_timestamp_seconds") or math.nan
    snapshot = compute_snapshot([reading], progress + 600, LOCATION)
    assert "  no progress    for 10m" in list(format_details(snapshot))
    assert list(format_runs([snapshot]))[1].endswith("running: no progress for 10m")


def test_json_contains_nan_as_a_string():
    metrics = start_metrics()
    metrics.set_loss("train", math.nan)
    metrics.set_metric("top_5", "train", 0.5)
    output = json.loads(json.dumps(snapshot_to_json(observe(read(metrics, 0))), allow_nan=False))
    assert output["loss"] == {"train": "nan"}
    assert output["metrics"] == {"train": {"top_5": 0.5}}
    assert output["traffic"]["upload"] == {"bytes": 0.0, "bytesPerSecond": None}
    assert (output["secondsLeft"], output["readSecondsAgo"]) == (None, 0.0)
