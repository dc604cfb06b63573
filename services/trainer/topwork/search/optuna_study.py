"""The trials of a search as an in-memory study of Optuna, which is imported only when a study is built."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from topwork.search.metrics import is_minimized
from topwork.search.trials import Trial
from topwork.spec.search import Parameter, TransferSearch
from topwork.spec.search.space import is_same

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


def optuna_study(
    search: TransferSearch, trials: Iterable[Trial], sampler: "optuna.samplers.BaseSampler | None" = None
) -> "optuna.Study":
    """Build a study of Optuna.

    A choice is represented by its index, because Optuna accepts only numbers and strings. Trials that trained only some
    of their epochs are PRUNED with their intermediate values. Failed ones are PRUNED without a value, which samplers
    rank last: Optuna would ignore a FAILed trial, and suggest the same values again.

    Args:
        search: The search.
        trials: Its trials.
        sampler: Sampler of the study; None for a study that is only read.

    Returns:
        A study that is kept in memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=sampler or optuna.samplers.RandomSampler(seed=search.spec.seed),
        direction="minimize" if is_minimized(search.spec.metric) else "maximize",
    )
    distributions = {name: distribution_of(parameter) for name, parameter in search.spec.space.items()}
    for trial in trials:
        study.add_trial(_frozen_trial(search, trial, distributions))
    return study


def distribution_of(parameter: Parameter) -> "BaseDistribution":
    """Return the values of a parameter as a distribution of Optuna."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.uniform is not None:
        return FloatDistribution(*parameter.uniform)
    if parameter.log_uniform is not None:
        return FloatDistribution(*parameter.log_uniform, log=True)
    if parameter.int is not None:
        return IntDistribution(*parameter.int)
    return CategoricalDistribution(tuple(range(len(parameter.choice or ()))))


def _frozen_trial(
    search: TransferSearch, trial: Trial, distributions: dict[str, "BaseDistribution"]
) -> "optuna.trial.FrozenTrial":
    from optuna.trial import TrialState, create_trial

    state, value, values = TrialState.PRUNED, None, {result.epochs: result.value for result in trial.results}
    if trial.state == "failed":
        values = {}
    elif trial.state == "complete":
        state, value = TrialState.COMPLETE, trial.value
    elif not trial.results:
        state = TrialState.RUNNING
    space = search.spec.space
    return create_trial(
        state=state,
        value=value,
        intermediate_values=values,
        params={name: _to_optuna(space[name], value) for name, value in trial.params.items()},
        distributions={name: distributions[name] for name in trial.params},
    )


def _to_optuna(parameter: Parameter, value: Any) -> Any:
    if parameter.choice is None:
        return value
    return next(index for index, choice in enumerate(parameter.choice) if is_same(choice, value))
