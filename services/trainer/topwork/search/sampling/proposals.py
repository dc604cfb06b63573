"""Chooses the parameters of a trial. A choice depends on the seed, the number of the trial and earlier results only."""

import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from topwork.search.optuna_study import optuna_study
from topwork.search.sampling.cma import sample_cma
from topwork.search.sampling.rounding import round_value
from topwork.search.trials import Trial
from topwork.spec.digest import digest_of
from topwork.spec.search import Parameter, TransferSearch
from topwork.spec.search.space import combinations, is_active, ordered_parameters, values_of

if TYPE_CHECKING:
    import optuna

MAX_LISTED_COMBINATIONS = 10_000
MAX_SAMPLES = 10
"""Number of samples for a trial, until one is not that of an earlier trial."""
TPE_STARTUP_TRIALS = 5
"""Number of trials that tpe draws at random before it uses their results. Half the default of Optuna: searches of image
classifiers are short, and 16 trials found better values on synthetic objectives."""


class Proposals:
    """The source of new trials of a search."""

    def __init__(self, search: TransferSearch) -> None:
        self._search = search
        self._space = search.spec.space

    @property
    def size(self) -> int | None:
        """Number of different combinations; None if there are too many to try them all."""
        return None if self._combinations is None else len(self._combinations)

    def candidates(self, trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
        """Propose parameters for the next trial.

        Args:
            trials: All trials so far.

        Yields:
            A value for each parameter whose conditions are met. Later proposals are for the case that the earlier ones
            are those of earlier trials; in a finite space, they are all combinations that were not tried.
        """
        if self._search.spec.sampler == "grid" and self._combinations is not None:
            yield self._combinations[len(trials)]
            return
        for attempt in range(MAX_SAMPLES):
            yield self._sample_trial(trials, attempt)
        yield from (params for params in self._combinations or () if all(params != trial.params for trial in trials))

    def _sample_trial(self, trials: Sequence[Trial], attempt: int) -> dict[str, Any]:
        spec = self._search.spec
        seed = int(digest_of([spec.seed, len(trials), attempt])[:8], 16)
        if spec.sampler == "tpe":
            return self._sample(self._tpe_study(trials, seed))
        # A grid that is too large to be listed is sampled at random.
        fixed = sample_cma(self._search, trials, seed) if spec.sampler == "cmaes" else {}
        return self._sample(optuna_study(self._search, (), _random_sampler(seed)), fixed)

    @cached_property
    def _combinations(self) -> list[dict[str, Any]] | None:
        """List the combinations of a finite space in random order: the first ones already differ in all parameters."""
        if any(values_of(parameter) is None for parameter in self._space.values()):
            return None
        found = list(islice(combinations(self._space), MAX_LISTED_COMBINATIONS + 1))
        if len(found) > MAX_LISTED_COMBINATIONS:
            return None
        distinct = list({digest_of(params): params for params in found}.values())
        random.Random(self._search.spec.seed).shuffle(distinct)  # noqa: S311 - not for security
        return distinct

    def _tpe_study(self, trials: Sequence[Trial], seed: int) -> "optuna.Study":
        from optuna.samplers import TPESampler

        return optuna_study(self._search, trials, TPESampler(seed=seed, n_startup_trials=TPE_STARTUP_TRIALS))

    def _sample(self, study: "optuna.Study", fixed: dict[str, Any] | None = None) -> dict[str, Any]:
        trial = study.ask()
        params = dict(fixed or {})
        for name, parameter in ordered_parameters(self._space):
            if name not in params and is_active(parameter, params):
                params[name] = _suggest(trial, name, parameter)
        return {name: params[name] for name in self._space if name in params}


def _random_sampler(seed: int) -> "optuna.samplers.BaseSampler":
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed)


def _suggest(trial: "optuna.Trial", name: str, parameter: Parameter) -> Any:
    if parameter.choice is not None:
        return parameter.choice[trial.suggest_categorical(name, range(len(parameter.choice)))]
    if parameter.int is not None:
        return trial.suggest_int(name, *parameter.int)
    if parameter.log_uniform is not None:
        return round_value(parameter, trial.suggest_float(name, *parameter.log_uniform, log=True))
    return round_value(parameter, trial.suggest_float(name, *(parameter.uniform or (0.0, 0.0))))
