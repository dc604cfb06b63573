"""Rungs: the numbers of epochs after which trials are compared, and which trials are continued beyond one.

asha: asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020,
arXiv:1810.05934). median: the median stopping rule (Golovin et al., "Google Vizier", KDD 2017).
"""

import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from topwork.search.trials import Trial
from topwork.spec.search import Pruner

REDUCTION_FACTOR = 3
"""asha continues one in this number of trials at each rung, and trains it for this many times as many epochs."""
MEDIAN_STARTUP_TRIALS = 4
"""median compares a trial with at least this many others."""


class Promotion(NamedTuple):
    """The continuation of a trial.

    Attributes:
        number: Number of the trial.
        epochs: Number of epochs to train in all.
    """

    number: int
    epochs: int


def rung_epochs(pruner: Pruner, max_epochs: int) -> tuple[int, ...]:
    """Return the numbers of epochs after which trials are compared, in ascending order; the last one is all epochs.

    Args:
        pruner: The pruner.
        max_epochs: Number of epochs of a complete trial.

    Example:
        >>> rung_epochs("asha", 20), rung_epochs("median", 20), rung_epochs("none", 20)
        ((2, 7, 20), (5, 10, 20), (20,))
    """
    if pruner == "none":
        return (max_epochs,)
    if pruner == "median":
        return tuple(sorted({-(-max_epochs // 4), -(-max_epochs // 2), max_epochs}))
    epochs = {max_epochs, max(1, round(max_epochs / REDUCTION_FACTOR))}
    divisor = REDUCTION_FACTOR**2
    while max_epochs >= divisor:
        epochs.add(round(max_epochs / divisor))
        divisor *= REDUCTION_FACTOR
    return tuple(sorted(epochs))


class Ladder:
    """The rungs of a search, and the rules by which trials climb them."""

    def __init__(self, pruner: Pruner, max_epochs: int, *, minimize: bool) -> None:
        """Create the rungs.

        Args:
            pruner: The pruner.
            max_epochs: Number of epochs of a complete trial.
            minimize: Whether lower values of the metric are better.
        """
        self.epochs = rung_epochs(pruner, max_epochs)
        self._pruner, self._sign = pruner, 1.0 if minimize else -1.0

    def state_after(
        self, trial: Trial, value: float, trials: Iterable[Trial]
    ) -> Literal["paused", "complete", "pruned"]:
        """Return the state of a trial after a run: paused, complete or pruned.

        Args:
            trial: The running trial.
            value: The result of its run.
            trials: All trials with the results so far.
        """
        if trial.epochs >= self.epochs[-1] or self._pruner == "none":
            return "complete"
        if self._pruner == "median" and self._is_below_median(trial, value, list(trials)):
            return "pruned"
        return "paused"

    def next_promotion(self, trials: Sequence[Trial]) -> Promotion | None:
        """Choose the paused trial to continue now; None if each has to wait for further results.

        Args:
            trials: All trials.
        """
        if self._pruner == "median":
            return next((self._promotion(trial) for trial in trials if _is_paused(trial)), None)
        for epochs in reversed(self.epochs[:-1]):
            ranked = self._ranked(trials, epochs)
            for trial in ranked[: len(ranked) // REDUCTION_FACTOR]:
                if _is_paused(trial) and trial.epochs == epochs:
                    return self._promotion(trial)
        return None

    def last_promotion(self, trials: Sequence[Trial]) -> Promotion | None:
        """Choose the paused trial to continue if nothing else runs, so that at least one trial becomes complete."""
        for epochs in reversed(self.epochs[:-1]):
            for trial in self._ranked(trials, epochs):
                if _is_paused(trial) and trial.epochs == epochs:
                    return self._promotion(trial)
        return None

    def _promotion(self, trial: Trial) -> Promotion:
        return Promotion(trial.number, next(epochs for epochs in self.epochs if epochs > trial.epochs))

    def _ranked(self, trials: Iterable[Trial], epochs: int) -> list[Trial]:
        """Return the trials with a result at a rung, the best one first, the earlier one of equals first."""
        values = _values_at(trials, epochs)
        return [trial for _, _, trial in sorted((self._sign * value, trial.number, trial) for trial, value in values)]

    def _is_below_median(self, trial: Trial, value: float, trials: Sequence[Trial]) -> bool:
        """Whether a value is worse than the median of the other trials; never before one of them is complete."""
        others = [other for trial_, other in _values_at(trials, trial.epochs) if trial_.number != trial.number]
        is_one_complete = any(other.state == "complete" for other in trials)
        if len(others) < MEDIAN_STARTUP_TRIALS or not is_one_complete:
            return False
        return self._sign * value > self._sign * statistics.median(others)


def _is_paused(trial: Trial) -> bool:
    return trial.state == "paused" and trial.equal_to is None


def _values_at(trials: Iterable[Trial], epochs: int) -> list[tuple[Trial, float]]:
    """Return the values of trials after a number of epochs. A trial that repeats another one does not count twice."""
    return [
        (trial, result.value)
        for trial in trials
        if trial.equal_to is None
        for result in trial.results
        if result.epochs == epochs
    ]
