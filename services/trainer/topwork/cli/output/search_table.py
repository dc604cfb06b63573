"""Text about a search: the table of its trials, its state on one line, and its best parameters."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from itertools import takewhile
from operator import getitem
from typing import Any

from topwork.cli.output.tables import format_table
from topwork.search.metrics import is_minimized
from topwork.search.parameter_names import format_parameter, short_names
from topwork.search.trials import TRIAL_STATES, Trial
from topwork.spec.job import JobSpec
from topwork.spec.loading.paths import parse_path
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import trial_spec
from topwork.spec.yaml_output import dump_yaml


def table_columns(search: TransferSearch) -> tuple[str, ...]:
    """Return the headings of the table of trials."""
    names = short_names(search.spec.space).values()
    return ("TRIAL", "STATE", search.spec.metric.upper(), "EPOCHS", "SECONDS", *names)


def table_row(trial: Trial, search: TransferSearch) -> tuple[str, ...]:
    """Return the cells of a trial."""
    return (
        f"{trial.number}",
        trial.state,
        "" if trial.value is None else f"{trial.value:.4f}",
        f"{trial.epochs}" if trial.epochs else "",
        f"{trial.seconds:.1f}" if trial.results and trial.equal_to is None else "",
        *(format_parameter(trial.params[path]) if path in trial.params else "" for path in search.spec.space),
    )


def ranked(trials: Sequence[Trial], search: TransferSearch) -> list[Trial]:
    """Return complete trials first, the best first, then those that trained fewer epochs, then those without value."""
    sign = 1.0 if is_minimized(search.spec.metric) else -1.0

    def key(trial: Trial) -> tuple[bool, bool, float, int]:
        is_valued = trial.value is not None
        return not is_valued, trial.state != "complete", sign * (trial.value or 0.0), trial.number

    return sorted(trials, key=key)


def format_trials(trials: Sequence[Trial], search: TransferSearch) -> Iterator[str]:
    """Format the table of trials.

    Args:
        trials: The trials in the order of the table.
        search: The search.

    Yields:
        The lines, headings first, and then the reasons of failed trials.
    """
    yield from format_table(table_columns(search), [table_row(trial, search) for trial in trials], text_columns=2)
    for trial in trials:
        if trial.error:
            yield f"trial {trial.number} failed: {trial.error}"
        if trial.equal_to is not None:
            yield f"trial {trial.number} has the parameters of trial {trial.equal_to} and was not run again"


def format_state(trials: Sequence[Trial], best: Trial | None, search: TransferSearch) -> str:
    """Summarize a search on one line.

    Example:
        >>> format_state(study.trials, study.best, search)
        '7 of 16 trials: 1 running, 5 complete, 1 failed; best accuracy 0.9533 (trial 4)'
    """
    counts = Counter(trial.state for trial in trials)
    states = ", ".join(f"{counts[state]} {state}" for state in TRIAL_STATES if counts[state])
    text = f"{len(trials)} of {search.spec.trials} trials" + (f": {states}" if states else "")
    if best is None or best.value is None:
        return text
    return f"{text}; best {search.spec.metric} {best.value:.4f} (trial {best.number})"


def format_best(best: Trial, search: TransferSearch, name: str) -> str:
    """Write the parameters of the best trial as YAML that replaces those of a TransferJob.

    Args:
        best: The best trial.
        search: The search.
        name: ID of the search.
    """
    comment = f"# {name}, trial {best.number}: {search.spec.metric} {best.value} on the validation split\n"
    spec = trial_spec(search, best.params).model_dump(mode="json", by_alias=True, exclude_unset=True)
    nested: dict[str, Any] = {}
    for text, value in best.params.items():
        path = parse_path(text, JobSpec)
        keys = [str(step) for step in takewhile(lambda step: isinstance(step, str), path)]
        # An item of a list can't be replaced alone.
        _set(nested, keys, value if len(keys) == len(path) else reduce(getitem, keys, spec))
    return comment + dump_yaml([{"spec": nested}])


def _set(nested: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        nested = nested.setdefault(key, {})
    nested[last] = value


def format_overrides_of(params: Mapping[str, Any]) -> list[str]:
    """Format parameters as `PATH=VALUE` items of `--set`, with values as JSON, which is YAML.

    Example:
        >>> format_overrides_of({"transfer.optimizer.learningRate": 0.003})
        ['spec.transfer.optimizer.learningRate=0.003']
    """
    return [f"spec.{path}={json.dumps(value)}" for path, value in params.items()]
