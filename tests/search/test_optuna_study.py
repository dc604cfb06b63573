"""The trials of a search as Optuna's samplers and importance see them."""

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from tests.search.small_searches import LEARNING_RATE, make_search

from topwork.search.optuna_study import optuna_study
from topwork.search.trials import Trial, TrialResult

OPTIMIZER = "transfer.optimizer.name"
BATCH_SIZE = "transfer.batchSize"
SPACE: dict[str, Any] = {
    LEARNING_RATE: {"logUniform": [1e-5, 1e-1]},
    BATCH_SIZE: {"int": [8, 64]},
    OPTIMIZER: {"choice": ["adam", "sgd"]},
}
PARAMS = {LEARNING_RATE: 0.001, BATCH_SIZE: 16, OPTIMIZER: "sgd"}
RESULTS = (TrialResult(1, "run", 0.5, {}, 1.0), TrialResult(3, "run", 0.6, {}, 1.0))


@pytest.mark.parametrize(
    ("trial", "state", "value", "intermediate"),
    [
        (Trial(0, PARAMS, "running", 1), TrialState.RUNNING, None, {}),
        (Trial(0, PARAMS, "running", 9, RESULTS), TrialState.PRUNED, None, {1: 0.5, 3: 0.6}),
        (Trial(0, PARAMS, "paused", 3, RESULTS), TrialState.PRUNED, None, {1: 0.5, 3: 0.6}),
        (Trial(0, PARAMS, "pruned", 3, RESULTS), TrialState.PRUNED, None, {1: 0.5, 3: 0.6}),
        (Trial(0, PARAMS, "complete", 3, RESULTS), TrialState.COMPLETE, 0.6, {1: 0.5, 3: 0.6}),
        (Trial(0, PARAMS, "failed", 1, error="NaN"), TrialState.PRUNED, None, {}),
        (Trial(0, PARAMS, "failed", 9, RESULTS, error="NaN"), TrialState.PRUNED, None, {}),
    ],
)
def test_a_trial_in_each_state(trial: Trial, state: TrialState, value: float | None, intermediate: dict[int, float]):
    (frozen,) = optuna_study(make_search(space=SPACE), [trial]).trials
    assert (frozen.state, frozen.value, frozen.intermediate_values) == (state, value, intermediate)


def test_values_have_the_distributions_of_the_space_and_choices_are_indices():
    (frozen,) = optuna_study(make_search(space=SPACE), [Trial(0, PARAMS, "running", 1)]).trials
    assert frozen.params == {LEARNING_RATE: 0.001, BATCH_SIZE: 16, OPTIMIZER: 1}
    assert frozen.distributions == {
        LEARNING_RATE: FloatDistribution(1e-5, 1e-1, log=True),
        BATCH_SIZE: IntDistribution(8, 64),
        OPTIMIZER: CategoricalDistribution((0, 1)),
    }


@pytest.mark.parametrize(
    ("metric", "direction"), [("accuracy", StudyDirection.MAXIMIZE), ("loss", StudyDirection.MINIMIZE)]
)
def test_the_metric_decides_the_direction(metric: str, direction: StudyDirection):
    assert optuna_study(make_search(metric=metric), ()).direction == direction
