"""What `topwork top` makes of the series of a run: figures, lines, JSON."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from prometheus_client import generate_latest

from topwork.cli.top.calculation import History, Place, figures
from topwork.cli.top.snapshot import Figures, Speed, Traffic
from topwork.cli.top.views import as_json, detail, table
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.scrape import Reading, parse_page

BEGAN = 1_600_000_000.0
PLACE = Place("http://127.0.0.1:9101/metrics")


def metrics_of(run: str = "cats-1a2b3c4d", stage: str = "run") -> Metrics:
    metrics = Metrics(gpus=False)
    metrics.start_job(job=run.rpartition("-")[0], run=run, stage=stage, version="1.2.3")
    return metrics


def read(metrics: Metrics, seconds: float) -> Reading:
    """What the page of a process says so many seconds after the beginning."""
    return parse_page(generate_latest(metrics.labeled_registry).decode(), BEGAN + seconds)


@contextmanager
def stage(metrics: Metrics, name: str, seconds: float = 0.0) -> Iterator[None]:
    with metrics.track_stage(name):
        metrics.set_stage_start(name, datetime.fromtimestamp(BEGAN + seconds, UTC))
        yield


def seen(*readings: Reading, seconds: float | None = None) -> Figures:
    history = History()
    for reading in readings:
        history.add(reading)
    return figures(history.readings, readings[-1].at if seconds is None else BEGAN + seconds, PLACE)


def steps(metrics: Metrics, count: int, seconds: float, wait: float = 0.0) -> None:
    for _ in range(count):
        metrics.record_step(images=64, seconds=seconds)
    metrics.record_step_time(count * wait, count * (seconds - wait))


# ── Figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_process_that_has_just_begun_is_starting():
    found = seen(read(metrics_of(), 0))
    assert (found.run, found.job, found.state, found.stage) == ("cats-1a2b3c4d", "cats", "starting", None)
    assert (found.epoch, found.speed, found.learning_rate, found.images) == (None, None, None, None)


def test_a_container_that_has_just_begun_tells_its_stage():
    assert seen(read(metrics_of(stage="transfer"), 0)).stage == "transfer"


def test_the_stage_at_work_is_shown_with_its_age_and_those_before_with_what_they_took():
    metrics = metrics_of()
    metrics.restore_stage("pull", datetime.fromtimestamp(BEGAN, UTC), datetime.fromtimestamp(BEGAN + 40, UTC))
    with stage(metrics, "transfer", 50):
        found = seen(read(metrics, 110))
    assert (found.state, found.stage, found.stage_seconds) == ("running", "transfer", 60)
    assert found.seconds_by_stage == {"pull": 40}


def test_speed_is_that_of_the_last_moments():
    metrics = metrics_of()
    with stage(metrics, "transfer"):
        steps(metrics, 100, 1.0)
        first = read(metrics, 100)
        steps(metrics, 10, 0.5, wait=0.2)
        assert seen(first, read(metrics, 105)).speed == Speed(128.0, 0.5, pytest.approx(0.4), lately=True)


def test_speed_is_the_mean_where_no_step_ended_lately():
    metrics = metrics_of()
    with stage(metrics, "transfer"):
        steps(metrics, 100, 0.5, wait=0.1)
        readings = read(metrics, 100), read(metrics, 102)
    assert seen(*readings).speed == Speed(128.0, 0.5, pytest.approx(0.2), lately=False)


def test_steps_long_ago_do_not_count_for_the_speed_of_now():
    metrics = metrics_of()
    with stage(metrics, "transfer"):
        readings = [read(metrics, 0)]
        for second in range(2, 62, 2):
            steps(metrics, 1, 1.0 if second < 30 else 0.25)
            readings.append(read(metrics, second))
        assert seen(*readings).speed == Speed(256.0, 0.25, pytest.approx(0.0), lately=True)


def test_time_left_follows_the_epochs_that_were_seen_to_end():
    metrics = metrics_of()
    metrics.set_planned_epochs("transfer", 20)
    with stage(metrics, "transfer", -5000):  # it was slow before
        readings = []
        for epoch in range(5, 9):
            metrics.set_epoch("transfer", epoch)
            readings += [read(metrics, epoch * 100), read(metrics, epoch * 100 + 50)]
    # Epochs of 100 s; the eighth ended 50 s ago.
    assert seen(*readings).seconds_left == pytest.approx(12 * 100 - 50)


def test_time_left_follows_the_age_of_the_stage_where_no_epoch_was_seen_to_end():
    metrics = metrics_of()
    metrics.set_planned_epochs("transfer", 20)
    with stage(metrics, "transfer"):
        assert seen(read(metrics, 10)).seconds_left is None
        metrics.set_epoch("transfer", 4)
        assert seen(read(metrics, 450)).seconds_left == pytest.approx(100 * 15.5)
    assert seen(read(metrics, 450)).seconds_left is None


def test_another_run_at_the_same_address_begins_anew():
    first, second = metrics_of("cats-11111111"), metrics_of("cats-22222222")
    with stage(first, "transfer"), stage(second, "transfer"):
        steps(first, 100, 1.0)
        steps(second, 110, 0.5)
        found = seen(read(first, 0), read(second, 2))
    assert (found.run, found.speed) == ("cats-22222222", Speed(128.0, 0.5, 0.0, lately=False))


def test_a_process_that_was_started_anew_has_no_negative_rates():
    before, after = metrics_of(), metrics_of()
    steps(before, 100, 1.0)
    before.count_storage_bytes("upload", 1000)
    assert seen(read(before, 0), read(after, 2)).traffic["upload"] == Traffic(0.0, None)


def test_traffic_is_the_sum_and_the_rate():
    metrics = metrics_of()
    metrics.count_storage_bytes("upload", 1000)
    first = read(metrics, 0)
    metrics.count_storage_bytes("upload", 500)
    metrics.count_storage_retry()
    found = seen(first, read(metrics, 2))
    assert found.traffic == {"download": Traffic(0.0, 0.0), "upload": Traffic(1500.0, 250.0)}
    assert found.retries == 1


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (2, "refused"), (3, "gate not met"), (75, "storage failed"), (143, "stopped"), (1, "failed")],
)
def test_a_process_that_lingers_says_how_it_ended(code: int, state: str):
    metrics = metrics_of()
    with stage(metrics, "publish"):
        pass
    metrics.set_exit_code("run", code)
    found = seen(read(metrics, 9))
    assert (found.state, found.exit_code, found.stage) == (state, code, "publish")


def test_a_history_stays_small_however_long_it_is_watched():
    metrics = metrics_of()
    history = History()
    for second in range(0, 800, 2):
        metrics.set_epoch("transfer", second // 10)
        history.add(read(metrics, second))
    assert len(history.readings) < 40


# ── Lines ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def played() -> Figures:
    """A run in its seventh epoch of twenty."""
    metrics = metrics_of()
    metrics.set_dataset_images(24998)
    metrics.count_rejected_images("truncated", 12)
    metrics.restore_stage("pull", datetime.fromtimestamp(BEGAN, UTC), datetime.fromtimestamp(BEGAN + 40, UTC))
    metrics.set_planned_epochs("transfer", 20)
    metrics.set_replicas(2)
    metrics.set_learning_rate(0.001)
    with stage(metrics, "transfer", 50):
        first = read(metrics, 60)
        steps(metrics, 10, 0.08, wait=0.04)
        metrics.set_epoch("transfer", 7)
        metrics.set_evaluation("train", {"loss": 0.25, "accuracy": 0.875})
        metrics.set_evaluation("validation", {"loss": 0.5, "accuracy": 0.75})
        metrics.set_best_metric("transfer", "accuracy", "validation", 0.8125)
        metrics.count_storage_bytes("upload", 3 * 2**20)
        return seen(first, read(metrics, 62), seconds=62)


def test_a_run_is_shown_in_detail():
    lines = list(detail(played()))
    assert lines == [
        "cats-1a2b3c4d: running, transfer for 12s",
        "  epoch          7/20  ━━━━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌  20s left",
        "  loss           train 0.2500   validation 0.5000",
        "  accuracy       train 0.8750   validation 0.7500",
        "  best           validation_accuracy 0.8125 in transfer",
        "  learning rate  0.001",
        "  speed          800 images/s, 80 ms a step on 2 replicas",
        "  input          50% of the time waits for it: more than a third, so input limits the speed",
        "  storage        download 0 B, upload 3.0 MiB (1.5 MiB/s)",
        "  images         24,998 in the dataset, 12 rejected",
        "  stages done    pull 40s",
        "  read from      http://127.0.0.1:9101/metrics",
    ]


def test_runs_are_shown_as_a_table():
    other = Figures("dogs-22222222", "dogs", "pod", state="pending", reason="no node has room")
    header, first, second = table([played(), other])
    assert header.split() == ["RUN", "STAGE", "EPOCH", "LOSS", "BEST", "IMAGES/S", "WAIT", "GPU", "LEFT", "STATE"]
    assert first.split() == [
        "cats-1a2b3c4d", "transfer", "7/20", "0.5000", "validation_accuracy", "0.8125", "800", "50%", "20s", "running",
    ]  # fmt: skip
    assert second.split() == ["dogs-22222222", "pending:", "no", "node", "has", "room"]


def test_gpus_are_shown_each_and_together():
    page = "\n".join(
        f'topwork_gpu_{name}{{gpu="{gpu}",run="cats-1a2b3c4d",transferjob="cats"}} {value}'
        for gpu, values in {"0": (0.5, 2**34, 2**36, 400.4, 61), "10": (1.0, 2**30, 2**36, 90, 40)}.items()
        for name, value in zip(
            ("utilization_ratio", "memory_used_bytes", "memory_total_bytes", "power_watts", "temperature_celsius"),
            values,
            strict=True,
        )
    )
    found = seen(parse_page(page, BEGAN))
    assert [line for line in detail(found) if "GPU" in line] == [
        "  GPU 0          50% busy, 16.0 GiB of 64.0 GiB, 400 W, 61 °C",
        "  GPU 10         100% busy, 1.0 GiB of 64.0 GiB, 90 W, 40 °C",
    ]
    assert "75% of 2" in list(table([found]))[1]


def test_a_run_that_stands_still_says_so():
    metrics = metrics_of()
    with stage(metrics, "transfer"):
        reading = read(metrics, 0)
        progress = reading.value("last_progress_timestamp_seconds") or math.nan
    found = figures([reading], progress + 600, PLACE)
    assert "  no progress    for 10m" in list(detail(found))
    assert list(table([found]))[1].endswith("running: no progress for 10m")


def test_json_says_what_is_no_number_as_text():
    metrics = metrics_of()
    metrics.set_loss("train", math.nan)
    metrics.set_metric("top_5", "train", 0.5)
    told = json.loads(json.dumps(as_json(seen(read(metrics, 0))), allow_nan=False))
    assert told["loss"] == {"train": "nan"}
    assert told["metrics"] == {"train": {"top_5": 0.5}}
    assert told["traffic"]["upload"] == {"bytes": 0.0, "bytesPerSecond": None}
    assert (told["secondsLeft"], told["readSecondsAgo"]) == (None, 0.0)
