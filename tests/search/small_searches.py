"""Searches without data, a journal in memory, and a coordinator that computes results instead of training."""

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from topwork.search.journal import Event, JournalConflictError
from topwork.search.study import Study
from topwork.search.trials import Trial, TrialResult
from topwork.spec.search import TransferSearch

LEARNING_RATE = "transfer.optimizer.learningRate"
DROPOUT = "model.head.dropout"
START = datetime(2026, 1, 1, tzinfo=UTC)


def make_search(template: dict[str, Any] | None = None, **overrides: Any) -> TransferSearch:
    """Build a search of two parameters of the head; keyword arguments replace top-level keys of `spec`."""
    spec = {
        "template": {
            "storage": "s3://bucket/topwork",
            "dataset": {
                "source": {"folder": {"uri": "s3://bucket/photos"}},
                "splits": {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"},
                "imageSize": [96, 96],
            },
            "model": {"base": {"application": "MobileNetV2"}},
            "transfer": {"epochs": 9},
            **(template or {}),
        },
        "space": {LEARNING_RATE: {"logUniform": [1e-5, 1e-1]}, DROPOUT: {"uniform": [0.0, 0.9]}},
        "trials": 12,
        **overrides,
    }
    return TransferSearch.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferSearch", "metadata": {"name": "cats"}, "spec": spec}
    )


class MemoryJournal:
    """A journal in memory, whose events pass through JSON as in storage."""

    def __init__(self, events: list[Event] | None = None) -> None:
        self.events = deepcopy(events or [])

    def read(self, start: int = 0) -> list[Event]:
        return deepcopy(self.events[start:])

    def append(self, number: int, event: Event) -> None:
        if number != len(self.events):
            raise JournalConflictError(f"event {number} exists")
        self.events.append(json.loads(json.dumps(event, allow_nan=False)))


def fixed_clock() -> datetime:
    return START


def ticking_clock(minutes: float) -> Callable[[], datetime]:
    """Return a clock that advances at each call."""
    calls = count()
    return lambda: START + timedelta(minutes=minutes * next(calls))


def accuracy_of(params: dict[str, Any], epochs: int) -> float:
    """Return a made-up accuracy: best at a learning rate of 2e-3 and a dropout of 0.35, and better with more epochs."""
    rate, dropout = params.get(LEARNING_RATE, 2e-3), params.get(DROPOUT, 0.35)
    return 0.99 - 0.1 * (math.log10(rate) + 2.7) ** 2 - (dropout - 0.35) ** 2 - 0.2 / epochs


def result_of(trial: Trial, value: float | None = None, **changes: Any) -> TrialResult:
    value = accuracy_of(trial.params, trial.epochs) if value is None else value
    return TrialResult(
        trial.epochs, f"cats-{trial.number}", value, {"accuracy": value, "loss": 1 - value}, 60.0, **changes
    )


def step(study: Study, parallel: int = 1) -> bool:
    """Do what a coordinator does next: start a run, or else record the result of the first running one.

    Returns:
        Whether there was something to do.
    """
    if len(study.running) < parallel and study.start_next():
        return True
    for run in study.running[:1]:
        study.record_result(run.number, result_of(study.trials[run.number]))
        return True
    return False


def complete(study: Study, parallel: int = 1) -> Study:
    """Run all trials."""
    while step(study, parallel):
        pass
    return study


def started_runs(journal: MemoryJournal) -> Iterator[tuple[int, int]]:
    """Yield trial and epochs of each run that was started."""
    for event in journal.events:
        if event["event"] in {"started", "promoted"}:
            yield event["number"], event["epochs"]
