"""Importance of the parameters of a search: how much of the variation of its metric each of them explains."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from topwork.search.optuna_study import optuna_study
from topwork.search.trials import Trial
from topwork.spec.search import TransferSearch

MIN_TRIALS = 8
"""With fewer trials, any order of the parameters would be chance."""
ROUGH_TRIALS = 30


class Importance(NamedTuple):
    """Importance of the parameters.

    Attributes:
        shares: Share of each parameter by its path, from 0 to 1; they add up to 1. Empty if it can't be told.
        note: How it was computed, or why not.
    """

    shares: dict[str, float]
    note: str


def parameter_importance(search: TransferSearch, trials: Sequence[Trial]) -> Importance:
    """Compute the importance of the parameters.

    By fANOVA (Hutter et al., ICML 2014), or by PED-ANOVA (Watanabe et al., IJCAI 2023) if there are conditional
    parameters, which fANOVA does not support.

    With a pruner, the trials are compared after the epochs that most of them have trained, usually those before the
    first comparison. Those that trained all epochs are a selection of good ones, in which the parameter that made the
    others bad would look unimportant.

    Args:
        search: The search.
        trials: Its trials. Those that repeat another one are not counted twice.

    Returns:
        The importance. The same trials give the same values.
    """
    epochs, compared = _comparable(search, trials)
    if len(compared) < MIN_TRIALS:
        return Importance({}, f"Needs at least {MIN_TRIALS} comparable trials; there are {len(compared)}.")
    basis = f"{len(compared)} trials" + (f" after {epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "")
    if len({trial.value for trial in compared}) == 1:
        return Importance({}, f"All {basis} have the same value.")
    is_conditional = any(parameter.when for parameter in search.spec.space.values())
    shares = _evaluate(search, compared, is_conditional=is_conditional)
    total = sum(shares.values())
    if not total:
        return Importance({}, f"The {basis} do not show which parameter matters.")
    method = "PED-ANOVA" if is_conditional else "fANOVA"
    rough = f" With fewer than {ROUGH_TRIALS} trials, this is only a hint." if len(compared) < ROUGH_TRIALS else ""
    note = f"Share in the variation of {search.spec.metric}, by {method} from {basis}.{rough}"
    return Importance({path: share / total for path, share in shares.items()}, note)


def _comparable(search: TransferSearch, trials: Sequence[Trial]) -> tuple[int, list[Trial]]:
    """Return the number of epochs after which most trials have a value, and the trials with only that value.

    The number is 0 without a pruner: trials may have different numbers of epochs then.
    """
    own = [trial for trial in trials if trial.results and trial.equal_to is None and trial.state != "failed"]
    if search.spec.pruner == "none":
        return 0, [trial for trial in own if trial.state == "complete"]
    counts = Counter(result.epochs for trial in own for result in trial.results)
    epochs = max(counts, key=lambda epochs: (counts[epochs], epochs), default=0)
    return epochs, [
        replace(trial, state="complete", epochs=epochs, results=(result,))
        for trial in own
        for result in trial.results
        if result.epochs == epochs
    ]


def _evaluate(search: TransferSearch, trials: list[Trial], *, is_conditional: bool) -> dict[str, float]:
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

    evaluator = PedAnovaImportanceEvaluator() if is_conditional else FanovaImportanceEvaluator(seed=search.spec.seed)
    with warnings.catch_warnings():
        # The interface of the evaluators is called experimental.
        warnings.simplefilter("ignore")
        return get_param_importances(optuna_study(search, trials), evaluator=evaluator, normalize=False)
