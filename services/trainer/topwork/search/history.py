"""The state of a search, as the events of its journal build it up."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from topwork.search import events
from topwork.search.trials import Trial, TrialResult
from topwork.spec.digest import digest_of

FAILURES_THAT_END = 3
"""A search whose first trials fail in this number has a mistake that all trials share."""


class History:
    """The trials of a search and what else its events recorded.

    Attributes:
        length: Number of events.
        started: When the search was started; None before.
        published: URI of the published model; None before, and when the search has continued since then.
        is_ended: Whether the search is over.
        gpu_seconds: GPU seconds of all runs.
        known_params: Digests of the parameters of all trials.
    """

    def __init__(self) -> None:
        self.length = 0
        self.started: datetime | None = None
        self.published: str | None = None
        self.is_ended = False
        self.gpu_seconds = 0.0
        self.known_params: set[str] = set()
        self._trials: list[Trial] = []
        self._view: tuple[Trial, ...] | None = None  # unended_trials after the last event
        self._digests: dict[str, int] = {}
        self._outcomes: list[str] = []  # of runs, in order: an error, or "" for a result

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials by number. Those that repeat another one have its results. None is paused after the end."""
        trials = self.unended_trials
        if not self.is_ended:
            return trials
        return tuple(replace(trial, state="pruned") if trial.state == "paused" else trial for trial in trials)

    @property
    def unended_trials(self) -> tuple[Trial, ...]:
        """All trials as before the end of the search, which a larger budget or more trials can continue."""
        if self._view is None:
            self._view = tuple(self._with_results(trial) for trial in self._trials)
        return self._view

    def number_of(self, digest: str) -> int | None:
        """Return the number of the trial that trains a spec with a digest; None if there is none."""
        return self._digests.get(digest)

    @property
    def fatal_error(self) -> str:
        """The last error of a search whose first trials all failed; otherwise empty."""
        first = self._outcomes[:FAILURES_THAT_END]
        return first[-1] if len(first) == FAILURES_THAT_END and all(first) else ""

    def apply(self, event: events.SearchEvent) -> None:
        """Add an event."""
        self.length += 1
        self._view = None
        match event:
            case events.Created():
                self.started = event.time
            case events.Started() | events.Repeated() | events.Rejected():
                self._add_trial(event)
            case events.Promoted():
                self._reopen()
                self._update(event.number, state="running", epochs=event.epochs, finished=None)
            case events.Finished():
                self._add_result(event)
            case events.Failed():
                self._add_failure(event)
            case events.Ended():
                self.is_ended = True
            case events.Published():
                self.published = event.uri

    def _add_trial(self, event: events.Started | events.Repeated | events.Rejected) -> None:
        self._reopen()
        self.known_params.add(digest_of(event.params))
        trial = Trial(event.number, event.params, "running", epochs=0, started=event.time)
        match event:
            case events.Started():
                trial = replace(trial, epochs=event.epochs)
                self._digests.setdefault(event.digest, event.number)
            case events.Repeated():
                trial = replace(trial, equal_to=event.equal_to)
            case events.Rejected():
                trial = replace(trial, state="failed", error=event.error, finished=event.time)
        self._trials.append(trial)

    def _add_result(self, event: events.Finished) -> None:
        trial = self._trials[event.number]
        result = TrialResult(
            event.epochs, event.run, event.value, event.metrics, event.seconds, event.gpu_seconds, event.dataset
        )
        self._update(event.number, state=event.state, results=(*trial.results, result), finished=event.time)
        self._add_cost(event)
        self._outcomes.append("")

    def _add_failure(self, event: events.Failed) -> None:
        self._update(event.number, state="failed", error=event.error, finished=event.time)
        self._add_cost(event)
        self._outcomes.append(event.error)

    def _add_cost(self, event: events.Finished | events.Failed) -> None:
        trial = self._trials[event.number]
        self._update(
            event.number,
            seconds=trial.seconds + event.seconds,
            gpu_seconds=trial.gpu_seconds + event.gpu_seconds,
        )
        self.gpu_seconds += event.gpu_seconds

    def _reopen(self) -> None:
        """A search that continues is not over, and another model may become the best one."""
        self.is_ended, self.published = False, None

    def _update(self, number: int, **changes: Any) -> None:
        self._trials[number] = replace(self._trials[number], **changes)

    def _with_results(self, trial: Trial) -> Trial:
        if trial.equal_to is None:
            return trial
        original = self._trials[trial.equal_to]
        return replace(
            trial,
            state=original.state,
            epochs=original.epochs,
            results=original.results,
            error=original.error,
            finished=max(trial.started, original.finished) if trial.started and original.finished else None,
        )
