"""What a search does next: continue a trial, start another one, or end. A decision depends on the history only."""

from datetime import datetime, timedelta
from typing import Any

from topwork.errors import shorten
from topwork.search import events, jobs
from topwork.search.history import FAILURES_THAT_END, History
from topwork.search.metrics import is_minimized
from topwork.search.rungs import Ladder
from topwork.search.sampling.proposals import Proposals
from topwork.spec.digest import digest_of
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import trial_spec

MAX_ERROR_CHARACTERS = 1000
"""Limit of the errors in a journal."""

Decision = events.Started | events.Repeated | events.Rejected | events.Promoted


class Decisions:
    """The decisions of a search."""

    def __init__(self, search: TransferSearch, history: History) -> None:
        """Create the decisions.

        Args:
            search: The search.
            history: Its history, which changes.
        """
        self._search, self._history = search, history
        self.ladder = Ladder(
            search.spec.pruner, jobs.max_epochs(search.spec.template), minimize=is_minimized(search.spec.metric)
        )
        self._proposals = Proposals(search)

    def next(self, time: datetime) -> Decision | None:
        """Decide what to do next.

        Args:
            time: The current time.

        Returns:
            The event to record; None if nothing starts before a running trial has a result, or ever.
        """
        if promotion := self._next_promotion(time):
            return promotion
        return None if self._why_no_trial_starts(time) else self._choose_trial(time)

    def end_reason(self, time: datetime) -> str:
        """Return why nothing starts any more; empty while something can."""
        trials = self._history.unended_trials
        if any(trial.state == "running" for trial in trials) or self._next_promotion(time):
            return ""
        is_cut_short = self.ladder.next_promotion(trials) is not None
        return (self._exhausted_budget(time) if is_cut_short else "") or self._why_no_trial_starts(time)

    def _next_promotion(self, time: datetime) -> events.Promoted | None:
        """Choose a paused trial to continue.

        When the budget is used up, none is continued, except for the best one if otherwise no trial would be complete.
        """
        trials = self._history.unended_trials
        promotion = None if self._exhausted_budget(time) else self.ladder.next_promotion(trials)
        is_result_possible = any(trial.state in {"running", "complete"} for trial in trials)
        if promotion is None and not is_result_possible and self._why_no_trial_starts(time):
            promotion = self.ladder.last_promotion(trials)
        return promotion and events.Promoted(time=time, number=promotion.number, epochs=promotion.epochs)

    def _why_no_trial_starts(self, time: datetime) -> str:
        """Return why no new trial starts, whether or not paused ones are continued; empty if one does."""
        trials = self._history.unended_trials
        if error := self._history.fatal_error:
            return (
                f"the first {FAILURES_THAT_END} trials failed. The last error: {error} Fix its cause, then change seed "
                "to start a new search"
            )
        if self._proposals.size is not None and len(self._history.known_params) >= self._proposals.size:
            return f"all {self._proposals.size} combinations of the space are tried"
        if len(trials) >= self._search.spec.trials:
            return f"all {len(trials)} trials are finished"
        return self._exhausted_budget(time)

    def _exhausted_budget(self, time: datetime) -> str:
        budget, started = self._search.spec.budget, self._history.started
        if budget.gpu_hours is not None and self._history.gpu_seconds >= 3600 * budget.gpu_hours:
            return f"the budget is used up: gpuHours {budget.gpu_hours:g}"
        if budget.hours is not None and started and time - started >= timedelta(hours=budget.hours):
            return f"the budget is used up: hours {budget.hours:g}"
        return ""

    def _choose_trial(self, time: datetime) -> events.Started | events.Repeated | events.Rejected:
        """Choose the parameters of a new trial, if possible other ones than those of earlier trials."""
        trials = self._history.unended_trials
        for params in self._proposals.candidates(trials):
            event = self._start(len(trials), params, time)
            if digest_of(params) not in self._history.known_params and not isinstance(event, events.Repeated):
                break
        return event

    def _start(
        self, number: int, params: dict[str, Any], time: datetime
    ) -> events.Started | events.Repeated | events.Rejected:
        try:
            digest = jobs.training_digest(trial_spec(self._search, params))
        except InvalidSpecError as error:
            reason = "; ".join(f"{problem.path}: {problem.message}" for problem in error.problems)
            return events.Rejected(time=time, number=number, params=params, error=shorten(reason, MAX_ERROR_CHARACTERS))
        original = self._history.number_of(digest)
        if original is not None:
            return events.Repeated(time=time, number=number, params=params, equal_to=original)
        epochs = jobs.first_epochs(self._search, params)
        return events.Started(time=time, number=number, params=params, epochs=epochs, digest=digest)
