"""A search and its journal: chooses the next run, and records what runs result in."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from topwork.errors import DataError, SpecError, shorten
from topwork.search import events, jobs
from topwork.search.decisions import MAX_ERROR_CHARACTERS, Decisions
from topwork.search.history import History
from topwork.search.journal import Journal
from topwork.search.metrics import is_minimized
from topwork.search.search_id import search_id
from topwork.search.trials import Trial, TrialResult, TrialRun
from topwork.spec import TransferJob
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.search import TransferSearch


def _utc_now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def _explain_refusal(trial: Trial) -> Iterator[None]:
    """Explain why a trial that was started is refused: `compute` can change during a search, such as its GPUs."""
    try:
        yield
    except InvalidSpecError as error:
        raise SpecError(
            f"The template has changed since trial {trial.number} was started, and refuses its parameters: {error} "
            "Restore the template, or change seed to start a new search."
        ) from error


class Study:
    """The trials of a search. Every change is appended to the journal before it takes effect."""

    def __init__(self, search: TransferSearch, journal: Journal, now: Callable[[], datetime] = _utc_now) -> None:
        """Read the journal.

        Args:
            search: The search.
            journal: Its journal.
            now: Returns the current time.

        Raises:
            DataError: If the journal is damaged, that of another search, or that of another topwork version.
            UnavailableError: If the journal cannot be read.
        """
        self.search = search
        self.id = search_id(search)
        self._journal, self._now = journal, now
        self._history = History()
        self._decisions = Decisions(search, self._history)
        self._runs: dict[tuple[int, int], TrialRun] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the events that were appended to the journal since the last call.

        Raises:
            DataError: If the journal is damaged, that of another search, or that of another topwork version.
            UnavailableError: If the journal cannot be read.
        """
        start = self._history.length
        for number, content in enumerate(self._journal.read(start), start):
            event = events.parse_event(number, content)
            if isinstance(event, events.Created) and event.search != self.id:
                raise DataError(f"The journal is that of the search {event.search}, not of {self.id}.")
            try:
                self._history.apply(event)
            except IndexError as error:
                raise DataError(
                    f"Event {number} of the journal of the search is of a trial that no earlier event starts: the "
                    "journal was changed by hand. Restore it, or start a new search by changing its seed."
                ) from error

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, by number."""
        return self._history.trials

    @property
    def running(self) -> tuple[TrialRun, ...]:
        """The runs that were started and have no result. A new coordinator carries them out again: a run resumes.

        Raises:
            SpecError: If the template has changed and refuses the parameters of one of them.
        """
        return tuple(
            self._run_of(trial) for trial in self.trials if trial.state == "running" and trial.equal_to is None
        )

    @property
    def best(self) -> Trial | None:
        """The best complete trial, the earlier one of equals; None without a complete trial."""
        sign = 1.0 if is_minimized(self.search.spec.metric) else -1.0
        trials = self.trials
        values = {
            trial.number: trial.value for trial in trials if trial.state == "complete" and trial.value is not None
        }
        return trials[min(values, key=lambda number: (sign * values[number], number))] if values else None

    @property
    def gpu_seconds(self) -> float:
        """GPU seconds of all runs so far, as far as their results are recorded."""
        return self._history.gpu_seconds

    @property
    def started(self) -> datetime | None:
        """When the search was started; None before."""
        return self._history.started

    @property
    def end_reason(self) -> str:
        """Why no further run starts, such as `all 16 trials are finished`; empty while there can be one."""
        return self._decisions.end_reason(self._now())

    @property
    def published(self) -> str | None:
        """URI of the published model; None before, and when the search has continued since then."""
        return self._history.published

    def start_next(self) -> TrialRun | None:
        """Choose the next run and record it as started; None if there is none at the moment.

        There is none if the trials or the budget are used up, or if the next decision needs the result of a running
        trial. Trials without a run are recorded, too: those that the spec refuses, and those that repeat another one.

        Raises:
            JournalConflictError: If another coordinator has changed the search.
            SpecError: If the template has changed and refuses the parameters of a trial to continue.
            UnavailableError: If the journal cannot be written.
        """
        while decision := self._decisions.next(self._now()):
            self._append(decision)
            if isinstance(decision, events.Started | events.Promoted):
                return self._run_of(self.trials[decision.number])
        return None

    def record_result(self, number: int, result: TrialResult) -> Trial:
        """Record the result of a run of a trial. A result that is already recorded is not recorded again.

        A value that is not a number is a failure, and so is a value on another dataset than that of earlier results.

        Args:
            number: Number of the trial.
            result: The result.

        Returns:
            The trial with its new state.

        Raises:
            JournalConflictError: If another coordinator has changed the search.
            UnavailableError: If the journal cannot be written.
        """
        trial = self.trials[number]
        if trial.state != "running" or result.epochs < trial.epochs:
            return trial
        if problem := self._problem_of(result):
            return self.record_failure(number, problem, seconds=result.seconds, gpu_seconds=result.gpu_seconds)
        event = events.Finished(
            time=self._now(),
            number=number,
            state=self._decisions.ladder.state_after(trial, result.value, self.trials),
            epochs=trial.epochs,
            run=result.run,
            value=result.value,
            metrics={name: value for name, value in result.metrics.items() if math.isfinite(value)},
            seconds=result.seconds,
            gpu_seconds=result.gpu_seconds,
            dataset=result.dataset,
        )
        self._append(event)
        return self.trials[number]

    def record_failure(self, number: int, error: str, *, seconds: float = 0.0, gpu_seconds: float = 0.0) -> Trial:
        """Record that a trial failed for good: its data, its spec or its training is at fault. It is not run again.

        Args:
            number: Number of the trial.
            error: Why it failed.
            seconds: Duration of the run in seconds.
            gpu_seconds: GPU seconds of the run.

        Returns:
            The trial with its new state; unchanged if it is not running.

        Raises:
            JournalConflictError: If another coordinator has changed the search.
            UnavailableError: If the journal cannot be written.
        """
        if self.trials[number].state != "running":
            return self.trials[number]
        self._append(
            events.Failed(
                time=self._now(),
                number=number,
                error=shorten(error, MAX_ERROR_CHARACTERS) or "unknown",
                seconds=seconds,
                gpu_seconds=gpu_seconds,
            )
        )
        return self.trials[number]

    def finish(self) -> Trial:
        """Record that the search is over and return the best trial; paused trials become pruned.

        Raises:
            DataError: If no trial is complete.
            JournalConflictError: If another coordinator has changed the search.
            UnavailableError: If the journal cannot be written.
        """
        if not self._history.is_ended:
            self._append(events.Ended(time=self._now(), reason=self.end_reason or "the search was ended"))
        if self.best is None:
            errors = [trial.error for trial in self.trials if trial.error]
            last = f" The last error: {errors[-1]}" if errors else ""
            raise DataError(f"No trial of the search {self.id} is complete.{last}")
        return self.best

    def best_job(self) -> TransferJob:
        """Return the job that publishes the best trial: the template with its parameters. Its training is stored.

        Raises:
            DataError: If no trial is complete.
            SpecError: If the template has changed and refuses its parameters.
        """
        if self.best is None:
            raise DataError(f"No trial of the search {self.id} is complete yet, so there is no best one.")
        with _explain_refusal(self.best):
            return jobs.best_job(self.search, self.best.params)

    def record_published(self, uri: str) -> None:
        """Record the URI of the published model.

        Raises:
            JournalConflictError: If another coordinator has changed the search.
            UnavailableError: If the journal cannot be written.
        """
        if self.published != uri:
            self._append(events.Published(time=self._now(), uri=uri))

    def _append(self, event: events.SearchEvent) -> None:
        """Append an event to the journal, and the event that creates it before the first one."""
        pending = [event]
        if not self._history.length:
            pending.insert(0, events.Created(time=event.time, format=events.JOURNAL_FORMAT, search=self.id))
        for item in pending:
            self._journal.append(self._history.length, item.dump())
            self._history.apply(item)

    def _problem_of(self, result: TrialResult) -> str:
        if not math.isfinite(result.value):
            return f"{self.search.spec.metric} on the validation split is {result.value}."
        earlier = {known.dataset for trial in self.trials for known in trial.results if known.dataset}
        if result.dataset and earlier and result.dataset not in earlier:
            return (
                f"The trial used the dataset {result.dataset}, but earlier trials used {min(earlier)}: the source or "
                "a list of the splits has changed, so the values cannot be compared. Restore it, or start a new search "
                "by changing seed."
            )
        return ""

    def _run_of(self, trial: Trial) -> TrialRun:
        key = trial.number, trial.epochs
        if key not in self._runs:
            with _explain_refusal(trial):
                job = jobs.trial_job(self.search, trial.number, trial.params, trial.epochs)
            self._runs[key] = TrialRun(trial.number, trial.epochs, job)
        return self._runs[key]
