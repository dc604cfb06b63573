"""How long training stood still for want of input: what the wait for batches says on a device that computes aside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from topwork.spec.job import JobSpec
from topwork.spec.model import Augmentation


@dataclass
class HoldUps:
    """Steps since the device was last waited for.

    On a processor a step has ended when its call returns, and each wait for a batch is time lost. A GPU is given its
    work and computes aside: the host that waits for a batch meanwhile holds nothing up. So the waits count no further
    than the device can have been idle. It works off the steps one after the other; should each take it c seconds, the
    last one ends at the latest of (start of step k) + c * (steps from k on). The end is seen, which gives c.
    """

    starts: list[float] = field(default_factory=list)
    waited: float = 0.0
    began: float = 0.0

    def step(self, asked: float, start: float) -> None:
        """Note a step.

        Args:
            asked: When its batch was asked for, on the clock of `time.perf_counter`.
            start: When the batch was there, and the device was given its work.
        """
        if not self.starts:
            self.began = asked
        self.starts.append(start)
        self.waited += start - asked

    def settle(self, ended: float) -> tuple[float, float]:
        """Account for the steps, now that the device has done them all, and begin anew.

        Args:
            ended: When it had, on the same clock.

        Returns:
            Seconds in which it stood still for want of input, and seconds in which it computed.
        """
        steps = len(self.starts)
        longest = min(max(ended - start, 0.0) / (steps - index) for index, start in enumerate(self.starts))
        idle = max(ended - self.began - steps * longest, 0.0)
        held = min(self.waited, idle)
        took = ended - self.began
        self.starts, self.waited = [], 0.0
        return held, took - held


if TYPE_CHECKING:
    from topwork.model.freezing import Unfrozen
    from topwork.registry.stage_results import Row, TrainingStage

MOST_SHARE = 1 / 3
"""Share of an epoch's steps from which input holds them up."""
LEAST_SECONDS = 1.0
"""Nobody gains from saving less than this in an epoch."""
# Each of them computes every pixel anew; of these, rotation alone was measured to cost more than decoding.
COSTLY = ("rotation", "zoom", "translation", "contrast", "brightness", "rand_augment", "mix_up", "cut_mix")


def wait_share(rows: Sequence["Row"]) -> float:
    """Say for what share of its steps training stood still for want of input.

    Args:
        rows: Epochs, each with its seconds and, unless an older topwork wrote it, input_wait_seconds.

    Returns:
        0..1.
    """
    seconds = sum(float(row["seconds"]) for row in rows)
    return sum(float(row.get("input_wait_seconds", 0.0)) for row in rows) / seconds if seconds else 0.0


def is_held_up(row: "Row") -> bool:
    """Whether input took too much of an epoch.

    Args:
        row: The epoch.
    """
    return wait_share([row]) > MOST_SHARE and float(row.get("input_wait_seconds", 0.0)) >= LEAST_SECONDS


def remedies(spec: JobSpec, stage: "TrainingStage", unfrozen: "Unfrozen", *, on_features: bool) -> str:
    """Say what would bring the input of a stage up to its training, by what the job says now.

    Args:
        spec: The job's `spec`.
        stage: The stage.
        unfrozen: What of the base it trains in the end.
        on_features: Whether its input is kept features, and no images are read.

    Returns:
        What to do, the most rewarding first.
    """
    found = []
    if not on_features:
        key = "transfer" if stage == "transfer" else "fineTune"
        settings = spec.transfer if stage == "transfer" else spec.fine_tune
        mixes = spec.augmentation.mix_up or spec.augmentation.cut_mix
        if settings and settings.cache.use == "off" and unfrozen != "all" and not mixes:
            found.append(f"set spec.{key}.featureCache: on, so that images are read once for each view, not each epoch")
        if costly := [_key(name) for name in COSTLY if getattr(spec.augmentation, name)]:
            found.append(f"do without {' and '.join(costly)} in spec.augmentation")
    found.append(f"raise spec.compute.cpu from {spec.compute.cpu}, or run on a machine with more cores")
    if on_features:
        found.append("raise spec.compute.memory, so that the features need not be read from scratch")
    return "; ".join(found)


def _key(name: str) -> str:
    """Name a field as the spec does."""
    return Augmentation.model_fields[name].alias or name
