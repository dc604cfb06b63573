"""Values of trials: within bounds and conditions, and determined by seed, number and results."""

import math
from itertools import product
from typing import Any

import pytest
from tests.search.small_searches import (
    DROPOUT,
    LEARNING_RATE,
    MemoryJournal,
    accuracy_of,
    complete,
    make_search,
    result_of,
)

from topwork.search.sampling.proposals import MAX_LISTED_COMBINATIONS, MAX_SAMPLES, Proposals
from topwork.search.sampling.rounding import round_value
from topwork.search.study import Study
from topwork.spec.search import Parameter, TransferSearch

BATCH_SIZE = "transfer.batchSize"
OPTIMIZER = "transfer.optimizer.name"
MOMENTUM = "transfer.optimizer.momentum"
MIXED_SPACE: dict[str, Any] = {
    MOMENTUM: {"uniform": [0.1, 0.9], "when": {OPTIMIZER: "sgd"}},
    OPTIMIZER: {"choice": ["adam", "sgd"]},
    LEARNING_RATE: {"logUniform": [1e-5, 1e-1]},
    DROPOUT: {"uniform": [0.0, 0.9]},
    BATCH_SIZE: {"int": [8, 64]},
    "augmentation": {"choice": [{}, {"flip": "horizontal", "rotation": 0.1}]},
}


def all_params(search: TransferSearch) -> list[dict[str, Any]]:
    return [trial.params for trial in complete(Study(search, MemoryJournal())).trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_values_are_within_their_bounds_and_conditions(sampler: str):
    for params in all_params(make_search(space=MIXED_SPACE, sampler=sampler, trials=20)):
        assert 1e-5 <= params[LEARNING_RATE] <= 1e-1
        assert 0.0 <= params[DROPOUT] <= 0.9
        assert params[BATCH_SIZE] in range(8, 65)
        assert type(params[BATCH_SIZE]) is int
        assert params["augmentation"] in MIXED_SPACE["augmentation"]["choice"]
        assert (MOMENTUM in params) == (params[OPTIMIZER] == "sgd")
        assert list(params) == [name for name in MIXED_SPACE if name in params]


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_all_values_occur(sampler: str):
    params = all_params(make_search(space=MIXED_SPACE, sampler=sampler, trials=20))
    assert {trial[OPTIMIZER] for trial in params} == {"adam", "sgd"}
    assert {str(trial["augmentation"]) for trial in params} == {
        str(value) for value in MIXED_SPACE["augmentation"]["choice"]
    }
    assert len({trial[BATCH_SIZE] for trial in params}) > 5


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_the_seed_decides_the_values(sampler: str):
    space = {LEARNING_RATE: {"choice": [10**-n for n in range(1, 5)]}, DROPOUT: {"choice": [n / 10 for n in range(9)]}}
    space = {"space": space} if sampler == "grid" else {}
    first, again, other = (all_params(make_search(sampler=sampler, seed=seed, **space)) for seed in (1, 1, 2))
    assert first == again != other


def test_cmaes_converges():
    params = all_params(make_search(sampler="cmaes", trials=60))
    early, late = (sum(0.99 - 0.2 / 9 - accuracy_of(trial, 9) for trial in part) for part in (params[:20], params[40:]))
    assert late < early / 4


def test_a_grid_covers_each_combination_once():
    space = {BATCH_SIZE: {"int": [8, 12]}, OPTIMIZER: {"choice": ["adam", "sgd"]}}
    params = all_params(make_search(space=space, sampler="grid", trials=100))
    assert len(params) == 10
    assert {(trial[BATCH_SIZE], trial[OPTIMIZER]) for trial in params} == set(product(range(8, 13), ("adam", "sgd")))


def test_a_grid_has_no_values_for_parameters_that_do_not_apply():
    space = {MOMENTUM: {"choice": [0.5, 0.9], "when": {OPTIMIZER: "sgd"}}, OPTIMIZER: {"choice": ["adam", "sgd"]}}
    params = all_params(make_search(space=space, sampler="grid"))
    expected = [{OPTIMIZER: "adam"}, {OPTIMIZER: "sgd", MOMENTUM: 0.5}, {OPTIMIZER: "sgd", MOMENTUM: 0.9}]
    assert sorted(params, key=str) == sorted(expected, key=str)


def test_the_first_trials_of_a_grid_differ_in_all_parameters():
    space = {BATCH_SIZE: {"int": [8, 64]}, OPTIMIZER: {"choice": ["adam", "sgd"]}, DROPOUT: {"choice": [0.0, 0.1, 0.2]}}
    params = all_params(make_search(space=space, sampler="grid", trials=12))
    assert all(len({trial[name] for trial in params}) > 1 for name in space)


def test_a_grid_that_is_too_large_to_list_has_different_random_combinations():
    space = {BATCH_SIZE: {"int": [1, 200]}, "model.head.hidden": {"choice": [[n] for n in range(1, 101)]}}
    search = make_search(space=space, sampler="grid", trials=30)
    assert Proposals(search).size is None
    assert MAX_LISTED_COMBINATIONS < 200 * 100
    assert len({str(params) for params in all_params(search)}) == 30


def test_later_proposals_are_other_samples_and_then_the_rest_of_a_finite_space():
    space = {BATCH_SIZE: {"int": [8, 12]}, OPTIMIZER: {"choice": ["adam", "sgd"]}}
    search = make_search(space=space, trials=4)
    trials = complete(Study(search, MemoryJournal())).trials
    candidates = list(Proposals(search).candidates(trials))
    samples, rest = candidates[:MAX_SAMPLES], candidates[MAX_SAMPLES:]
    assert len({str(params) for params in samples}) > 3
    assert len(rest) == 6
    assert all(params != trial.params for params in rest for trial in trials)


def test_tpe_avoids_values_that_failed():
    """A failed trial is the worst one: later trials keep away from it."""
    study = Study(make_search(trials=30), MemoryJournal())
    while run := study.start_next():
        trial = study.trials[run.number]
        if trial.params[LEARNING_RATE] > 1e-3:
            study.record_failure(run.number, "diverged")
        else:
            study.record_result(run.number, result_of(trial, 0.5))
    failed = [trial.state == "failed" for trial in study.trials]
    assert sum(failed[:10]) >= 3
    assert sum(failed[20:]) < sum(failed[:10])


def test_parallel_trials_differ():
    journal = MemoryJournal()
    complete(Study(make_search(trials=20), journal))
    study = Study(make_search(trials=30), journal)
    while study.start_next():
        pass
    rates = [math.log10(trial.params[LEARNING_RATE]) for trial in study.trials[20:]]
    assert len(rates) == 10
    assert max(rates) - min(rates) > 0.1


@pytest.mark.parametrize(
    ("parameter", "value", "rounded"),
    [
        ({"log_uniform": (1e-6, 1e-2)}, 0.000123456789, 0.00012346),
        ({"log_uniform": (1e-6, 1e-2)}, 0.00999999999, 0.01),
        ({"uniform": (0.0, 0.5)}, 0.123456789, 0.12346),
        ({"uniform": (0.0, 0.5)}, 1e-9, 0.0),
        ({"uniform": (100.0, 100.001)}, 100.000123456, 100.0001235),
        ({"uniform": (0.000123456789, 0.5)}, 0.0001234568, 0.000123456789),
        ({"uniform": (-3.0, -1.0)}, -2.123456789, -2.1235),
    ],
)
def test_sampled_values_are_rounded_within_their_bounds(parameter: dict[str, Any], value: float, rounded: float):
    assert round_value(Parameter(**parameter), value) == rounded
