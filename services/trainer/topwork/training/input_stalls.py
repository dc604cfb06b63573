"""Input stalls: how long training waits for batches, whether it is input-bound, and what to change in the spec."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from topwork.spec.job import JobSpec
from topwork.spec.model import Augmentation

# `topwork top` imports this module on machines without TensorFlow.
if TYPE_CHECKING:
    from topwork.model.freezing import UnfreezeSetting
    from topwork.registry.stage_results import HistoryRow, TrainingStage

INPUT_BOUND_SHARE = 1 / 3
"""Share of an epoch that training waits for input, above which it is input-bound."""
MIN_INPUT_WAIT_SECONDS = 1.0
"""Shorter waits per epoch are not worth a warning."""
# Each of these recomputes every pixel. Rotation by itself was measured to cost more than decoding.
_EXPENSIVE_AUGMENTATIONS = (
    "rotation",
    "zoom",
    "translation",
    "contrast",
    "brightness",
    "rand_augment",
    "mix_up",
    "cut_mix",
)


@dataclass
class InputStalls:
    """Measures how long the device is idle because the next batch is not ready.

    On a CPU a step ends when its call returns, so every wait for a batch stalls training. A GPU computes
    asynchronously: a host that waits for a batch while the GPU is still busy stalls nothing. So waits count only up to
    the time that the device may have been idle. It runs the steps one after the other. If each step takes c seconds,
    the last one ends at the latest of (start of step k) + c * (number of steps from k on). The end is observed, which
    gives c.
    """

    starts: list[float] = field(default_factory=list)
    wait_seconds: float = 0.0
    first_request: float = 0.0

    def add_step(self, requested: float, start: float) -> None:
        """Add a step.

        Args:
            requested: Time at which its batch was requested, on the clock of `time.perf_counter`.
            start: Time at which the batch was ready and the step was handed to the device.
        """
        if not self.starts:
            self.first_request = requested
        self.starts.append(start)
        self.wait_seconds += start - requested

    def take_totals(self, end: float) -> tuple[float, float]:
        """Return the time since the last call, divided into waiting and computing, and start over.

        Args:
            end: Time at which the device had completed all steps, on the same clock.

        Returns:
            Seconds in which the device waited for input, and seconds in which it computed.
        """
        steps = len(self.starts)
        step_seconds = min(max(end - start, 0.0) / (steps - index) for index, start in enumerate(self.starts))
        duration = end - self.first_request
        idle = max(duration - steps * step_seconds, 0.0)
        stalled = min(self.wait_seconds, idle)
        self.starts, self.wait_seconds = [], 0.0
        return stalled, duration - stalled


def input_wait_share(rows: Sequence["HistoryRow"]) -> float:
    """Compute the share of time in which training waited for input.

    Args:
        rows: History rows with `seconds` and, unless an older topwork wrote them, `input_wait_seconds`.

    Returns:
        Share in 0..1.
    """
    seconds = sum(float(row["seconds"]) for row in rows)
    return sum(float(row.get("input_wait_seconds", 0.0)) for row in rows) / seconds if seconds else 0.0


def is_input_bound(row: "HistoryRow") -> bool:
    """Return whether training waited for input for too much of an epoch.

    Args:
        row: History row of the epoch.
    """
    return (
        input_wait_share([row]) > INPUT_BOUND_SHARE
        and float(row.get("input_wait_seconds", 0.0)) >= MIN_INPUT_WAIT_SECONDS
    )


def input_bound_advice(spec: JobSpec, stage: "TrainingStage", unfrozen: "UnfreezeSetting", *, from_cache: bool) -> str:
    """Suggest changes to the spec for an input-bound stage.

    Args:
        spec: The job's `spec`.
        stage: Name of the stage.
        unfrozen: Layers of the base that the last phase trains.
        from_cache: Whether the input is cached features, so that no images are read.

    Returns:
        Suggestions separated by semicolons, the most effective first.
    """
    advice = []
    if not from_cache:
        key = "transfer" if stage == "transfer" else "fineTune"
        settings = spec.transfer if stage == "transfer" else spec.fine_tune
        mixes_images = spec.augmentation.mix_up or spec.augmentation.cut_mix
        if settings and settings.cache.use == "off" and unfrozen != "all" and not mixes_images:
            advice.append(f"set spec.{key}.featureCache: on to read images once per view instead of once per epoch")
        if expensive := [_spec_key(name) for name in _EXPENSIVE_AUGMENTATIONS if getattr(spec.augmentation, name)]:
            advice.append(f"remove {' and '.join(expensive)} from spec.augmentation")
    advice.append(f"raise spec.compute.cpu above {spec.compute.cpu}, or use a machine with more cores")
    if from_cache:
        advice.append("raise spec.compute.memory so that features are not read from scratch")
    return "; ".join(advice)


def _spec_key(field_name: str) -> str:
    return Augmentation.model_fields[field_name].alias or field_name
