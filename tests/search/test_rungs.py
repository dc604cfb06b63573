"""Rungs: when trials are compared, and which of them are continued."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.search.small_searches import MemoryJournal, make_search, result_of, started_runs

from topwork.search.rungs import Ladder, Promotion, rung_epochs
from topwork.search.study import Study
from topwork.search.trials import Trial, TrialResult


def paused(number: int, *values: float, state: str = "paused") -> Trial:
    """A trial with values after 1, 3 and 9 epochs."""
    results = tuple(
        TrialResult(epochs, "run", value, {}, 1.0) for epochs, value in zip((1, 3, 9), values, strict=False)
    )
    return Trial(number, {}, state, epochs=results[-1].epochs, results=results)


@pytest.mark.parametrize(
    ("pruner", "epochs", "rungs"),
    [
        ("none", 9, (9,)),
        ("asha", 2, (1, 2)),
        ("asha", 3, (1, 3)),
        ("asha", 5, (2, 5)),
        ("asha", 9, (1, 3, 9)),
        ("asha", 100, (1, 4, 11, 33, 100)),
        ("median", 2, (1, 2)),
        ("median", 3, (1, 2, 3)),
        ("median", 20, (5, 10, 20)),
    ],
)
def test_rungs_of_a_pruner(pruner: str, epochs: int, rungs: tuple[int, ...]):
    assert rung_epochs(pruner, epochs) == rungs


def test_asha_promotes_the_best_third_of_a_rung():
    trials = [paused(0, 0.3), paused(1, 0.5), paused(2, 0.4)]
    assert Ladder("asha", 9, minimize=False).next_promotion(trials) == Promotion(1, 3)
    assert Ladder("asha", 9, minimize=True).next_promotion(trials) == Promotion(0, 3)


def test_asha_waits_for_three_results():
    assert Ladder("asha", 9, minimize=False).next_promotion([paused(0, 0.3), paused(1, 0.5)]) is None


def test_asha_does_not_promote_a_trial_twice():
    trials = [paused(0, 0.3), paused(1, 0.5, 0.6), paused(2, 0.4)]
    assert Ladder("asha", 9, minimize=False).next_promotion(trials) is None


def test_asha_promotes_from_the_highest_rung_first():
    trials = [
        paused(0, 0.9, 0.1), paused(1, 0.8, 0.2), paused(2, 0.7, 0.3),
        *(paused(number, value) for number, value in enumerate((0.95, 0.1, 0.1, 0.1, 0.1, 0.1), 3)),
    ]  # fmt: skip
    assert Ladder("asha", 9, minimize=False).next_promotion(trials) == Promotion(2, 9)


def test_asha_counts_a_failed_trial_in_the_rungs_that_it_reached():
    trials = [paused(0, 0.9, state="failed"), paused(1, 0.8), paused(2, 0.7)]
    assert Ladder("asha", 9, minimize=False).next_promotion(trials) is None


def test_asha_does_not_count_a_repeated_trial():
    trials = [paused(0, 0.9), paused(1, 0.8), Trial(2, {}, "paused", 1, paused(0, 0.9).results, equal_to=0)]
    assert Ladder("asha", 9, minimize=False).next_promotion(trials) is None


def test_the_last_promotion_continues_the_best_trial_of_the_highest_rung():
    trials = [paused(0, 0.9), paused(1, 0.1, 0.4), paused(2, 0.1, 0.5)]
    assert Ladder("asha", 9, minimize=False).last_promotion(trials) == Promotion(2, 9)


MEDIAN_TRIALS = [paused(0, 0.2, 0.2, 0.2, state="complete"), *(paused(n, n / 10) for n in (4, 6, 8))]


@pytest.mark.parametrize(("value", "state"), [(0.49, "pruned"), (0.5, "paused"), (0.6, "paused")])
def test_median_stops_a_trial_below_the_median_of_the_others(value: float, state: str):
    trial = Trial(9, {}, "running", 1)
    assert Ladder("median", 4, minimize=False).state_after(trial, value, [*MEDIAN_TRIALS, trial]) == state


def test_median_stops_no_trial_before_one_is_complete():
    trials = [paused(n, n / 10) for n in range(5)]
    assert Ladder("median", 4, minimize=False).state_after(Trial(9, {}, "running", 1), 0.0, trials) == "paused"


def test_median_stops_no_trial_before_four_others_have_a_value():
    trials = MEDIAN_TRIALS[:3]
    assert Ladder("median", 4, minimize=False).state_after(Trial(9, {}, "running", 1), 0.0, trials) == "paused"


def test_median_continues_a_trial_before_it_starts_another():
    study = Study(make_search(pruner="median"), MemoryJournal())
    for epochs in (3, 5, 9):
        run = study.start_next()
        assert (run.number, run.epochs) == (0, epochs)
        study.record_result(0, result_of(study.trials[0]))


@given(
    pruner=st.sampled_from(["asha", "median"]),
    trials=st.integers(1, 30),
    epochs=st.integers(2, 30),
    parallel=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_search_with_a_pruner(pruner: str, trials: int, epochs: int, parallel: int, seed: int):
    """Results arrive in any order: rungs are climbed one by one and once, in asha only by the best third."""
    search = make_search(
        {"transfer": {"epochs": epochs}}, pruner=pruner, trials=trials, sampler="random", metric="loss"
    )
    rungs, journal, random = rung_epochs(pruner, epochs), MemoryJournal(), Random(seed)
    study = Study(search, journal)
    while not study.end_reason:
        while len(study.running) < parallel and (run := study.start_next()):
            check_promotion(study, run.epochs, run.number, rungs, pruner)
        run = random.choice(study.running)
        study.record_result(run.number, result_of(study.trials[run.number], random.choice([random.random(), 0.5])))

    runs = list(started_runs(journal))
    assert max(Counter(runs).values()) == 1
    for trial in study.trials:
        assert [result.epochs for result in trial.results] == list(rungs[: len(trial.results)])
    assert len(study.trials) == trials
    assert study.finish().epochs == epochs
    assert {trial.state for trial in study.trials} <= {"complete", "pruned"}


def check_promotion(study: Study, epochs: int, number: int, rungs: tuple[int, ...], pruner: str) -> None:
    """A promoted trial was among the best third of its rung, unless no other run could make a trial complete."""
    if epochs == rungs[0] or pruner == "median":
        return
    below = rungs[rungs.index(epochs) - 1]
    values = {
        trial.number: (result.value, trial.number)
        for trial in study.trials
        for result in trial.results
        if result.epochs == below
    }
    is_last = len(study.running) == 1 and all(trial.state != "complete" for trial in study.trials)
    assert number in sorted(values, key=lambda other: values[other])[: len(values) // 3] or is_last
