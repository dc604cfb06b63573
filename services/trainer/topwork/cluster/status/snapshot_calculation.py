"""Computes the state of a run from the metrics of its process: rates, ages and the remaining time."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from topwork.clients.prometheus.scrape import Reading
from topwork.cluster.names import STAGES
from topwork.cluster.status.snapshot import (
    BestMetric,
    GpuUsage,
    NodeSnapshot,
    RunSnapshot,
    StorageTraffic,
    TrainingSpeed,
)

RATE_SECONDS = 30.0
"""Maximum period of rates. If the last two readings are further apart, rates are computed from these two."""
MAX_EPOCH_READINGS = 20
"""Maximum number of readings kept for the duration of epochs."""
MAX_NODE_DIGITS = 4
STATES_BY_EXIT_CODE = {0: "done", 2: "refused", 3: "gate not met", 75: "storage failed", 143: "stopped"}


class ReadingHistory:
    """The recent readings of a process that rates and the remaining time are computed from."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        # The first reading, and each reading with more completed epochs than the one before.
        self._epoch_readings: list[Reading] = []

    def add(self, reading: Reading) -> None:
        """Add a reading. Earlier readings of another run or process at the same address are dropped."""
        if self.readings and not _is_same_process(self.readings[-1], reading):
            self.readings, self._epoch_readings = [], []
        if not self._epoch_readings or _epochs(self._epoch_readings[-1]) != _epochs(reading):
            self._epoch_readings = [*self._epoch_readings, reading][-MAX_EPOCH_READINGS:]
        recent = [earlier for earlier in self.readings if reading.at - earlier.at <= RATE_SECONDS]
        # The previous reading is kept at any age, for long intervals between readings.
        by_time = {item.at: item for item in (*self._epoch_readings, *self.readings[-1:], *recent, reading)}
        self.readings = [by_time[at] for at in sorted(by_time)]


class ProcessLocation(NamedTuple):
    """Where a process was read: a URL, a pod or a Prometheus instance, and its namespace and pod in a cluster."""

    source: str
    namespace: str | None = None
    pod: str | None = None


def compute_snapshot(readings: Sequence[Reading], now: float, location: ProcessLocation) -> RunSnapshot:
    """Compute the state of a run from the readings of its process.

    Args:
        readings: Readings in chronological order; at least one.
        now: Unix time in seconds.
        location: Where the process was read.

    Returns:
        The state of the run.
    """
    last = readings[-1]
    stage = _current_stage(last)
    exit_code = _to_int(max(last.values_by_label("exit_code", "stage").values(), default=None))
    return RunSnapshot(
        run=last.label("run") or "",
        job=last.label("transferjob") or "",
        source=location.source,
        namespace=location.namespace,
        pod=location.pod,
        state=_state(last, exit_code),
        stage=stage,
        stage_seconds=_stage_seconds(last, stage, now),
        seconds_by_stage=last.values_by_label("stage_duration_seconds", "stage"),
        epoch=_to_int(last.value("epoch", stage=stage)) if stage else None,
        epochs=_to_int(last.value("epochs_planned", stage=stage)) if stage else None,
        seconds_left=_seconds_left(readings, stage, now) if exit_code is None else None,
        loss=last.values_by_label("loss", "split"),
        metrics=_metrics(last),
        best=_best_metric(last, stage),
        learning_rate=last.value("learning_rate") or None,
        speed=_speed(readings),
        replicas=_to_int(last.value("replicas")) or None,
        gpus=_gpus(last),
        checkpoint_seconds_ago=_age(last.value("checkpoint_last_success_timestamp_seconds"), now),
        progress_seconds_ago=_age(last.value("last_progress_timestamp_seconds"), now),
        traffic=_traffic(readings),
        retries=_to_int(last.value("storage_retries_total")),
        images=_to_int(last.value("dataset_images")) or None,
        rejected=_to_int(sum(sample.value for sample in last.select("images_rejected_total"))),
        gates_failed=_to_int(last.value("gates_failed")),
        exit_code=exit_code,
        version=last.label("version"),
        read_seconds_ago=max(0.0, now - last.at),
        nodes=_node(readings, location),
        node_count=_to_int(last.value("nodes")),
    )


def _is_same_process(before: Reading, after: Reading) -> bool:
    if (before.label("run"), node_of(before)) != (after.label("run"), node_of(after)):
        return False
    # Only node 0 counts steps.
    counters = ("steps_total", "step_compute_seconds_total")
    return all((before.value(name) or 0) <= (after.value(name) or 0) for name in counters)


def _epochs(reading: Reading) -> dict[str, float]:
    return reading.values_by_label("epoch", "stage")


def _to_int(value: float | None) -> int | None:
    """Round a count; None for NaN and infinity."""
    try:
        return None if value is None else round(value)
    except (ValueError, OverflowError):
        return None


def _age(time: float | None, now: float) -> float | None:
    """Return the seconds since a time; None for a time of 0 or NaN."""
    return max(0.0, now - time) if time and time == time else None  # noqa: PLR0124 - NaN differs from itself


# ── Stage and epochs ────────────────────────────────────────────────────────────────────────────────────────────────


def _current_stage(reading: Reading) -> str | None:
    """Return the running stage; otherwise the last one; otherwise the stage that this process was started for."""
    running = [stage for stage, value in reading.values_by_label("stage_running", "stage").items() if value == 1]
    if running:
        return running[-1]
    started = reading.values_by_label("stage_start_timestamp_seconds", "stage")
    if started:
        return max(started, key=lambda stage: started[stage])
    stage = next((info.labels.get("stage") for info in reading.select("stage_info")), None)
    return stage if stage in STAGES else None  # `topwork run` runs all stages


def _state(reading: Reading, exit_code: int | None) -> str:
    if exit_code is not None:
        return STATES_BY_EXIT_CODE.get(exit_code, "failed")
    if 1 in reading.values_by_label("stage_running", "stage").values():
        return "running"
    return "between stages" if reading.values_by_label("stage_start_timestamp_seconds", "stage") else "starting"


def _stage_seconds(reading: Reading, stage: str | None, now: float) -> float | None:
    if stage is None:
        return None
    duration = reading.value("stage_duration_seconds", stage=stage)
    is_running = reading.value("stage_running", stage=stage) == 1
    return duration if not is_running and duration is not None else _seconds_since_start(reading, stage, now)


def _seconds_since_start(reading: Reading, stage: str, now: float) -> float | None:
    return _age(reading.value("stage_start_timestamp_seconds", stage=stage), now)


def _seconds_left(readings: Sequence[Reading], stage: str | None, now: float) -> float | None:
    """Estimate the time to the last planned epoch from the epochs that ended while they were observed.

    If fewer than two ended, the estimate uses the time since the first start of the stage, including interruptions.
    """
    last = readings[-1]
    if stage is None or last.value("stage_running", stage=stage) != 1:
        return None
    epoch, epochs = last.value("epoch", stage=stage), last.value("epochs_planned", stage=stage)
    if epochs is None or epoch is None or not (epoch > 0 and math.isfinite(epochs - epoch)):
        return None
    ends = _observed_epoch_ends(readings, stage)
    if len(ends) >= 2:
        epoch_seconds = (ends[-1].at - ends[0].at) / (ends[-1].epoch - ends[0].epoch)
        return max(0.0, epoch_seconds * (epochs - epoch) - (now - ends[-1].at))
    elapsed = _seconds_since_start(last, stage, now)
    # On average, half of the current epoch is complete.
    return max(0.0, elapsed * (epochs - epoch - 0.5) / (epoch + 0.5)) if elapsed is not None else None


class _EpochEnd(NamedTuple):
    epoch: float
    at: float


def _observed_epoch_ends(readings: Sequence[Reading], stage: str) -> list[_EpochEnd]:
    """Return the first readings after the end of each observed epoch."""
    epochs = [(reading.value("epoch", stage=stage), reading.at) for reading in readings]
    return [
        _EpochEnd(after, at)
        for (before, _), (after, at) in pairwise(epochs)
        if before is not None and after is not None and after > before
    ]


# ── Results ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _metrics(reading: Reading) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, float]] = {}
    for sample in reading.select("metric"):
        metrics.setdefault(sample.labels.get("split", ""), {})[sample.labels.get("name", "")] = sample.value
    return metrics


def _best_metric(reading: Reading, stage: str | None) -> BestMetric | None:
    """Return the best metric of a stage; if it has none, that of the last stage with one."""
    best_metrics = [
        BestMetric(labels["stage"], labels["name"], labels["split"], value)
        for _, labels, value in reading.select("best_metric")
        if {"stage", "name", "split"} <= labels.keys()
    ]
    started = reading.values_by_label("stage_start_timestamp_seconds", "stage")
    return max(best_metrics, key=lambda best: (best.stage == stage, started.get(best.stage, 0.0)), default=None)


# ── Rates and usage ─────────────────────────────────────────────────────────────────────────────────────────────────


def _rate_base(readings: Sequence[Reading]) -> Reading | None:
    """Return the reading at the start of the period of rates."""
    last = readings[-1]
    recent = [reading for reading in readings[:-1] if last.at - reading.at <= RATE_SECONDS]
    return recent[0] if recent else (readings[-2] if len(readings) > 1 else None)


def _speed(readings: Sequence[Reading]) -> TrainingSpeed | None:
    last, base = readings[-1], _rate_base(readings)
    recent, total = _TrainingPeriod.between(base, last) if base else None, _TrainingPeriod.between(None, last)
    period = recent if recent and recent.steps > 0 else total
    if not (period.steps > 0 and period.seconds > 0):
        return None
    return TrainingSpeed(
        period.images / period.seconds, period.seconds / period.steps, _input_wait(readings), lately=period is recent
    )


class _TrainingPeriod(NamedTuple):
    """Training between two readings, or since the process started."""

    steps: float
    images: float
    seconds: float
    input_wait: float | None

    @classmethod
    def between(cls, before: Reading | None, after: Reading) -> "_TrainingPeriod":
        def increase(name: str) -> float:
            return (after.value(name) or 0.0) - ((before.value(name) if before else None) or 0.0)

        wait, compute = increase("input_wait_seconds_total"), increase("step_compute_seconds_total")
        input_wait = wait / (wait + compute) if wait >= 0 and compute > 0 else None
        return cls(increase("steps_total"), increase("images_total"), increase("step_duration_seconds_sum"), input_wait)


def _input_wait(readings: Sequence[Reading]) -> float | None:
    """Return the recent input wait; it is recorded once for several steps, so the recent period may have none."""
    last, base = readings[-1], _rate_base(readings)
    recent, total = _TrainingPeriod.between(base, last) if base else None, _TrainingPeriod.between(None, last)
    return next((item.input_wait for item in (recent, total) if item and item.input_wait is not None), None)


def _node(readings: Sequence[Reading], location: ProcessLocation) -> tuple[NodeSnapshot, ...]:
    """Return the node of a process; nothing for a run on one node."""
    last = readings[-1]
    index = node_of(last)
    if index is None:
        return ()
    images, seconds = last.value("evaluation_images_total"), last.value("evaluation_seconds_total")
    return (
        NodeSnapshot(
            index=index,
            source=location.source,
            pod=location.pod,
            state=_state(last, None),
            input_wait=_input_wait(readings),
            evaluated_per_second=images / seconds if images and seconds else None,
            gpus=_gpus(last),
            read_seconds_ago=0.0,
        ),
    )


def node_of(reading: Reading) -> int | None:
    """Return the index of the node of a process; None for a run on one node.

    Prometheus renames the label if its scrape configuration adds a label `node` too, such as the name of the machine.
    """
    value = reading.label("exported_node") or reading.label("node") or ""
    return int(value) if value.isdecimal() and len(value) <= MAX_NODE_DIGITS else None


def _gpus(reading: Reading) -> tuple[GpuUsage, ...]:
    values = {
        "utilization": reading.values_by_label("gpu_utilization_ratio", "gpu"),
        "memory_used_bytes": reading.values_by_label("gpu_memory_used_bytes", "gpu"),
        "memory_total_bytes": reading.values_by_label("gpu_memory_total_bytes", "gpu"),
        "power_watts": reading.values_by_label("gpu_power_watts", "gpu"),
        "temperature_celsius": reading.values_by_label("gpu_temperature_celsius", "gpu"),
    }
    indices = sorted(
        {index for by_index in values.values() for index in by_index}, key=lambda index: (len(index), index)
    )
    return tuple(
        GpuUsage(index, **{name: by_index.get(index) for name, by_index in values.items()}) for index in indices
    )


def _traffic(readings: Sequence[Reading]) -> dict[str, StorageTraffic]:
    base, last = _rate_base(readings), readings[-1]
    before = base.values_by_label("storage_bytes_total", "direction") if base else {}
    traffic = {}
    for direction, value in last.values_by_label("storage_bytes_total", "direction").items():
        rate = (value - before.get(direction, 0.0)) / (last.at - base.at) if base and last.at > base.at else None
        traffic[direction] = StorageTraffic(value, rate)
    return traffic
