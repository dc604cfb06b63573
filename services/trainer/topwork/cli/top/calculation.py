"""What the series of a run say, reckoned into figures: rates, ages, the time that is left."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from topwork.cli.top.snapshot import Best, Figures, Gpu, Speed, Traffic
from topwork.clients.prometheus.scrape import Reading
from topwork.cluster.names import STAGES

RATE_SECONDS = 30.0
"""Rates are of so much time at most; of the last two readings where they lie further apart."""
KEPT_EPOCHS = 20
"""Readings that are kept because an epoch ended then."""
ENDINGS = {0: "done", 2: "refused", 3: "gate not met", 75: "storage failed", 143: "stopped"}


class History:
    """What a process told lately, as far as figures need it."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        # The first reading, and each in which an epoch was seen to have ended since the one before.
        self._marks: list[Reading] = []

    def add(self, reading: Reading) -> None:
        """Keep a reading; what another run, or an earlier process at the same address, told is forgotten."""
        if self.readings and not _goes_on(self.readings[-1], reading):
            self.readings, self._marks = [], []
        if not self._marks or _epochs(self._marks[-1]) != _epochs(reading):
            self._marks = [*self._marks, reading][-KEPT_EPOCHS:]
        recent = [one for one in self.readings if reading.at - one.at <= RATE_SECONDS]
        # The last one is kept however old it is, for whoever reads seldom.
        kept = {one.at: one for one in (*self._marks, *self.readings[-1:], *recent, reading)}
        self.readings = [kept[at] for at in sorted(kept)]


class Place(NamedTuple):
    """Where a process was read: a URL or an instance of Prometheus; its namespace and pod where there are such."""

    source: str
    namespace: str | None = None
    pod: str | None = None


def figures(readings: Sequence[Reading], now: float, place: Place) -> Figures:
    """Turn what a process told into figures.

    Args:
        readings: What it told, the oldest first; at least one.
        now: Unix time in seconds.
        place: Where it was read.

    Returns:
        The figures.
    """
    last = readings[-1]
    stage = _stage(last)
    code = _whole(max(last.by("exit_code", "stage").values(), default=None))
    return Figures(
        run=last.label("run") or "",
        job=last.label("transferjob") or "",
        source=place.source,
        namespace=place.namespace,
        pod=place.pod,
        state=_state(last, code),
        stage=stage,
        stage_seconds=_stage_seconds(last, stage, now),
        seconds_by_stage=last.by("stage_duration_seconds", "stage"),
        epoch=_whole(last.value("epoch", stage=stage)) if stage else None,
        epochs=_whole(last.value("epochs_planned", stage=stage)) if stage else None,
        seconds_left=_seconds_left(readings, stage, now) if code is None else None,
        loss=last.by("loss", "split"),
        metrics=_metrics(last),
        best=_best(last, stage),
        learning_rate=last.value("learning_rate") or None,
        speed=_speed(readings),
        replicas=_whole(last.value("replicas")) or None,
        gpus=_gpus(last),
        checkpoint_seconds_ago=_age(last.value("checkpoint_last_success_timestamp_seconds"), now),
        progress_seconds_ago=_age(last.value("last_progress_timestamp_seconds"), now),
        traffic=_traffic(readings),
        retries=_whole(last.value("storage_retries_total")),
        images=_whole(last.value("dataset_images")) or None,
        rejected=_whole(sum(sample.value for sample in last.of("images_rejected_total"))),
        gates_failed=_whole(last.value("gates_failed")),
        exit_code=code,
        version=last.label("version"),
        read_seconds_ago=max(0.0, now - last.at),
    )


def _goes_on(before: Reading, after: Reading) -> bool:
    same = before.label("run") == after.label("run")
    return same and (before.value("steps_total") or 0) <= (after.value("steps_total") or 0)


def _epochs(reading: Reading) -> dict[str, float]:
    return reading.by("epoch", "stage")


def _whole(value: float | None) -> int | None:
    """Round what counts things; nan and infinity count nothing."""
    try:
        return None if value is None else round(value)
    except (ValueError, OverflowError):
        return None


def _age(moment: float | None, now: float) -> float | None:
    """Seconds since a moment; None for one that never came (0)."""
    return max(0.0, now - moment) if moment and moment == moment else None  # noqa: PLR0124 - nan differs from itself


def _stage(reading: Reading) -> str | None:
    """The stage at work, or else the one that was last, or else the one that this process is for."""
    running = [stage for stage, value in reading.by("stage_running", "stage").items() if value == 1]
    if running:
        return running[-1]
    started = reading.by("stage_start_timestamp_seconds", "stage")
    if started:
        return max(started, key=lambda stage: started[stage])
    told = next((info.labels.get("stage") for info in reading.of("stage_info")), None)
    return told if told in STAGES else None  # topwork run is for all of them


def _state(reading: Reading, code: int | None) -> str:
    if code is not None:
        return ENDINGS.get(code, "failed")
    if 1 in reading.by("stage_running", "stage").values():
        return "running"
    return "between stages" if reading.by("stage_start_timestamp_seconds", "stage") else "starting"


def _stage_seconds(reading: Reading, stage: str | None, now: float) -> float | None:
    if stage is None:
        return None
    took = reading.value("stage_duration_seconds", stage=stage)
    running = reading.value("stage_running", stage=stage) == 1
    return took if not running and took is not None else _started(reading, stage, now)


def _started(reading: Reading, stage: str, now: float) -> float | None:
    return _age(reading.value("stage_start_timestamp_seconds", stage=stage), now)


def _seconds_left(readings: Sequence[Reading], stage: str | None, now: float) -> float | None:
    """Time until the last epoch that is planned, at the pace of those that ended while this was watched.

    Where fewer than two ended, at the pace since the stage was first started, even if it stood still since.
    """
    last = readings[-1]
    if stage is None or last.value("stage_running", stage=stage) != 1:
        return None
    epoch, epochs = last.value("epoch", stage=stage), last.value("epochs_planned", stage=stage)
    if epochs is None or not epoch:
        return None
    seen = _ended_epochs(readings, stage)
    if len(seen) >= 2:
        pace = (seen[-1].at - seen[0].at) / (seen[-1].epoch - seen[0].epoch)
        return max(0.0, pace * (epochs - epoch) - (now - seen[-1].at))
    since = _started(last, stage, now)
    # On average half an epoch more is done than is counted.
    return max(0.0, since * (epochs - epoch - 0.5) / (epoch + 0.5)) if since is not None else None


class _Ended(NamedTuple):
    epoch: float
    at: float


def _ended_epochs(readings: Sequence[Reading], stage: str) -> list[_Ended]:
    """The epochs that were seen to end."""
    told = [(reading.value("epoch", stage=stage), reading.at) for reading in readings]
    return [
        _Ended(new, at) for (old, _), (new, at) in pairwise(told) if old is not None and new is not None and new > old
    ]


def _metrics(reading: Reading) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for sample in reading.of("metric"):
        found.setdefault(sample.labels.get("split", ""), {})[sample.labels.get("name", "")] = sample.value
    return found


def _best(reading: Reading, stage: str | None) -> Best | None:
    """The best metric of a stage; of the last one that has one, where the stage trains nothing or no epoch ended."""
    found = [
        Best(labels["stage"], labels["name"], labels["split"], value)
        for _, labels, value in reading.of("best_metric")
        if {"stage", "name", "split"} <= labels.keys()
    ]
    started = reading.by("stage_start_timestamp_seconds", "stage")
    return max(found, key=lambda best: (best.stage == stage, started.get(best.stage, 0.0)), default=None)


def _base(readings: Sequence[Reading]) -> Reading | None:
    """The reading from which rates are reckoned."""
    last = readings[-1]
    recent = [one for one in readings[:-1] if last.at - one.at <= RATE_SECONDS]
    return recent[0] if recent else (readings[-2] if len(readings) > 1 else None)


def _speed(readings: Sequence[Reading]) -> Speed | None:
    last, base = readings[-1], _base(readings)
    lately, ever = _Training.between(base, last) if base else None, _Training.between(None, last)
    shown = lately if lately and lately.steps > 0 else ever
    if not (shown.steps > 0 and shown.seconds > 0):
        return None
    # Waiting is told once for several steps: it may be that none was told lately.
    wait = next((one.input_wait for one in (lately, ever) if one and one.input_wait is not None), None)
    return Speed(shown.images / shown.seconds, shown.seconds / shown.steps, wait, shown is lately)


class _Training(NamedTuple):
    """What training did between two readings, or since the process was started."""

    steps: float
    images: float
    seconds: float
    input_wait: float | None

    @classmethod
    def between(cls, before: Reading | None, after: Reading) -> "_Training":
        def grown(name: str) -> float:
            return (after.value(name) or 0.0) - ((before.value(name) if before else None) or 0.0)

        wait, compute = grown("input_wait_seconds_total"), grown("step_compute_seconds_total")
        share = wait / (wait + compute) if wait >= 0 and compute > 0 else None
        return cls(grown("steps_total"), grown("images_total"), grown("step_duration_seconds_sum"), share)


def _gpus(reading: Reading) -> tuple[Gpu, ...]:
    told = {
        "utilization": reading.by("gpu_utilization_ratio", "gpu"),
        "memory_used_bytes": reading.by("gpu_memory_used_bytes", "gpu"),
        "memory_total_bytes": reading.by("gpu_memory_total_bytes", "gpu"),
        "power_watts": reading.by("gpu_power_watts", "gpu"),
        "temperature_celsius": reading.by("gpu_temperature_celsius", "gpu"),
    }
    indices = sorted({index for values in told.values() for index in values}, key=lambda index: (len(index), index))
    return tuple(Gpu(index, **{name: values.get(index) for name, values in told.items()}) for index in indices)


def _traffic(readings: Sequence[Reading]) -> dict[str, Traffic]:
    base, last = _base(readings), readings[-1]
    before = base.by("storage_bytes_total", "direction") if base else {}
    found = {}
    for direction, value in last.by("storage_bytes_total", "direction").items():
        rate = (value - before.get(direction, 0.0)) / (last.at - base.at) if base and last.at > base.at else None
        found[direction] = Traffic(value, rate)
    return found
