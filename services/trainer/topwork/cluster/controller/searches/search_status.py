"""Builds the status of a TransferSearch from its journal and the TransferJobs that it owns, and its events."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from topwork.cluster.controller.conditions import Fact, update_conditions
from topwork.cluster.controller.events import Report
from topwork.cluster.controller.searches.observation import SearchObservation
from topwork.cluster.controller.searches.spec_resolution import SearchTarget
from topwork.cluster.controller.searches.trial_jobs import is_unfinished
from topwork.cluster.controller.status_update import MAX_TEXT_CHARACTERS, model_version
from topwork.cluster.status.objects import name_of
from topwork.cluster.status.transfer_job_run import read_transfer_job_status
from topwork.cluster.transfer_job_status import ConditionType, State
from topwork.cluster.transfer_search_status import BestTrial, TransferSearchStatus, TrialCounts
from topwork.errors import shorten
from topwork.search.study import Study
from topwork.search.trials import FINAL_TRIAL_STATES, Trial

MAX_REPORTED_FAILURES = 10
"""Maximum number of events about failed trials."""


def build_search_status(
    seen: SearchObservation, state: State, facts: Mapping[ConditionType, Fact], **values: Any
) -> TransferSearchStatus:
    """Build a status from the last one.

    Args:
        seen: The observation.
        state: State of the search.
        facts: Conditions that differ from the defaults of the state.
        values: Other values.
    """
    previous = seen.previous
    conditions = update_conditions(previous, state, facts, seen.generation, seen.now)
    final = state in {"Complete", "Failed", "Cancelled"}
    same = previous.state == state and previous.search == values.get("search", previous.search)
    values = {
        "observed_generation": seen.generation,
        "state": state,
        "conditions": conditions,
        "waiting_for": None,
        "error": None,
        "completion_time": (previous.completion_time if same else seen.now) if final else None,
        **values,
    }
    for key in ("waiting_for", "error"):
        values[key] = shorten(values[key], MAX_TEXT_CHARACTERS) if values[key] else None
    return previous.model_copy(update=values)


def describe_study(study: Study, target: SearchTarget) -> dict[str, Any]:
    """Return the values of the status that the journal determines."""
    trials = study.trials
    counts = Counter(trial.state for trial in trials)
    finished = sum(counts[state] for state in FINAL_TRIAL_STATES)
    best, spec = study.best, target.search.spec
    failures = [trial for trial in trials if trial.state == "failed"]
    return {
        "search": target.id,
        "progress": f"{finished}/{max(spec.trials, len(trials))}",
        "trials": TrialCounts.model_validate(counts),
        "best": _describe_best(best) if best else None,
        "metric": f"validation_{spec.metric} {best.value:.4f}" if best else None,
        "model": study.published,
        "model_version": model_version(study.published) if study.published else None,
        "end_reason": study.end_reason or None,
        "start_time": study.started,
        "gpu_seconds": sum(trial.gpu_seconds for trial in trials),
        "error": f"trial {failures[-1].number}: {failures[-1].error}" if failures else None,
    }


def _describe_best(trial: Trial) -> BestTrial:
    params = {name: json.dumps(value) for name, value in trial.params.items()}
    return BestTrial(trial=trial.number, value=trial.value, params=params)


def is_started(seen: SearchObservation, study: Study) -> bool:
    """Return whether a trial has run, or runs."""
    if seen.previous.state == "Running" or any(trial.results or trial.error for trial in study.trials):
        return True
    return any(read_transfer_job_status(obj).state != "Pending" for obj in seen.transfer_jobs.values())


def describe_wait(seen: SearchObservation) -> str | None:
    """Explain why no trial runs; None if one does, or if there is nothing to wait for."""
    unfinished = [obj for obj in seen.transfer_jobs.values() if is_unfinished(obj)]
    statuses = [read_transfer_job_status(obj) for obj in unfinished]
    if any(status.state == "Running" for status in statuses):
        return None
    reasons = (
        f"{name_of(obj)}: {status.waiting_for}"
        for obj, status in zip(unfinished, statuses, strict=True)
        if status.waiting_for
    )
    return next(reasons, None)


def describe_search_changes(
    previous: TransferSearchStatus, status: TransferSearchStatus
) -> Iterator[tuple[tuple[object, ...], Report]]:
    """Describe how the status of a TransferSearch changed.

    Yields:
        What tells each event from others with the same reason, and what to report.
    """
    before, accepted = previous.condition("Accepted"), status.condition("Accepted")
    is_rejected = accepted is not None and accepted.status == "False"
    if accepted and is_rejected and (before is None or before.message != accepted.message):
        yield (accepted.message,), Report(accepted.reason, accepted.message, is_warning=True)
    failed = status.trials.failed
    if failed > previous.trials.failed and status.error and failed <= MAX_REPORTED_FAILURES:
        yield (failed,), Report("TrialFailed", status.error, is_warning=True)
    if status.state == previous.state or is_rejected:
        return
    if status.state == "Running":
        yield (), Report("Running", f"{status.search} runs its trials")
    elif status.state != "Pending" and (condition := status.condition(status.state)):
        text = condition.message or f"{status.search} is {status.state.lower()}"
        yield (status.progress,), Report(condition.reason, text, is_warning=status.state == "Failed")
