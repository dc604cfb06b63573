"""How far a stage is, as the log of its container tells it."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

# What is watched, the first that the line holds.
METRICS = ("validation_accuracy", "validation_auc", "validation_loss", "accuracy", "auc", "loss")


@dataclass(frozen=True)
class Epoch:
    """How far a stage is.

    Attributes:
        stage: The stage.
        epoch: The last complete epoch, counted from 1.
        epochs: How many are planned.
        metric: Name of the metric that is watched.
        value: Its value at that epoch.
        best: Its best value so far.
    """

    stage: str
    epoch: int
    epochs: int
    metric: str | None = None
    value: float | None = None
    best: float | None = None


def read_epoch(line: str, before: Epoch | None = None) -> Epoch | None:
    """Read a line of a log.

    Args:
        line: The line.
        before: The epoch before it, whose best value may stand.

    Returns:
        The epoch that it tells of; None if it tells of something else.
    """
    if '"epoch"' not in line:
        return None
    try:
        told = json.loads(line)
        if told["message"] != "epoch":
            return None
        metric = next((name for name in METRICS if _is_number(told.get(name))), None)
        value = float(told[metric]) if metric else None
        epoch = Epoch(str(told["stage"]), int(told["epoch"]), int(told["epochs"]), metric, value, value)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return _with_best(epoch, before)


def last_epoch(lines: Iterable[str]) -> Epoch | None:
    """Read the last epoch of a log, with the best value of those before it."""
    found = None
    for line in lines:
        found = read_epoch(line, found) or found
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _with_best(epoch: Epoch, before: Epoch | None) -> Epoch:
    if before is None or (before.stage, before.metric) != (epoch.stage, epoch.metric):
        return epoch
    if before.best is None or epoch.best is None or epoch.metric is None:
        return epoch
    better = min if epoch.metric.endswith("loss") else max
    return Epoch(epoch.stage, epoch.epoch, epoch.epochs, epoch.metric, epoch.value, better(before.best, epoch.best))
