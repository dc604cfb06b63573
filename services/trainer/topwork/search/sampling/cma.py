"""CMA-ES, with a state that is computed again from the results of a search.

Optuna's sampler of the same algorithm stores pickled objects with its trials; a journal must not contain any.
"""

import math
from collections.abc import Sequence
from typing import Any

from topwork.search.metrics import is_minimized
from topwork.search.sampling.rounding import round_value
from topwork.search.trials import Trial
from topwork.spec.search import Parameter, TransferSearch

INITIAL_SIGMA = 1 / 6
"""Initial standard deviation, as a fraction of the range of each parameter; as in Optuna."""


def sample_cma(search: TransferSearch, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Sample the numeric parameters without conditions by CMA-ES.

    Each population size of results, in the order of their trials, is one generation. Results are those after the
    smallest number of epochs, which all trials have.

    Args:
        search: The search.
        trials: Trials so far.
        seed: Seed of this sample.

    Returns:
        Values of these parameters. The others are sampled elsewhere.
    """
    import numpy as np
    from cmaes import CMA  # type: ignore[import-untyped]

    numeric = {name: parameter for name, parameter in search.spec.space.items() if _is_numeric(parameter)}
    count = len(numeric)
    optimizer = CMA(
        mean=np.full(count, 0.5),
        sigma=INITIAL_SIGMA,
        bounds=np.array([[0.0, 1.0]] * count),
        seed=seed,
        n_max_resampling=10 * count,
    )
    sign = 1.0 if is_minimized(search.spec.metric) else -1.0
    solutions = [
        (np.array([_to_unit(numeric[name], trial.params[name]) for name in numeric]), sign * trial.results[0].value)
        for trial in trials
        if trial.results
    ]
    size = optimizer.population_size
    for start in range(0, len(solutions) - size + 1, size):
        optimizer.tell(solutions[start : start + size])
    return {name: _from_unit(numeric[name], value) for name, value in zip(numeric, optimizer.ask(), strict=True)}


def _is_numeric(parameter: Parameter) -> bool:
    return parameter.choice is None and not parameter.when


def _scale(parameter: Parameter) -> tuple[float, float]:
    """Return the bounds on the scale on which a parameter is sampled. Each integer is a range of width 1."""
    if parameter.int is not None:
        return parameter.int[0] - 0.5, parameter.int[1] + 0.5
    if parameter.log_uniform is not None:
        return math.log(parameter.log_uniform[0]), math.log(parameter.log_uniform[1])
    return parameter.uniform or (0.0, 0.0)


def _to_unit(parameter: Parameter, value: float) -> float:
    low, high = _scale(parameter)
    position = math.log(value) if parameter.log_uniform else value
    return (position - low) / (high - low) if high > low else 0.5


def _from_unit(parameter: Parameter, position: float) -> float:
    low, high = _scale(parameter)
    value = low + float(position) * (high - low)
    if parameter.int is not None:
        return min(max(round(value), parameter.int[0]), parameter.int[1])
    if parameter.log_uniform is not None:
        return round_value(parameter, math.exp(value))
    return round_value(parameter, value)
