"""Study: which runs a search starts, what it records, and that any coordinator continues it in the same way."""

import json
import math
import subprocess
import sys
import zlib
from random import Random

import pytest
from tests.search.small_searches import (
    DROPOUT,
    LEARNING_RATE,
    MemoryJournal,
    accuracy_of,
    complete,
    fixed_clock,
    make_search,
    result_of,
    started_runs,
    step,
    ticking_clock,
)

from topwork.errors import DataError, FormatError, SpecError
from topwork.search.journal import Event, JournalConflictError
from topwork.search.study import Study
from topwork.spec.search import TransferSearch

CHOICE = {"choice": [0.0, 0.1, 0.2]}
LEARNING_RATES = {"choice": [0.01, 0.001]}


class Killed(BaseException):
    """The coordinator ended at once."""


class MortalJournal(MemoryJournal):
    """Kills its coordinator before or after the append of an event."""

    def __init__(self, events: list[Event], kill_at: int, *, before: bool) -> None:
        super().__init__(events)
        self._kill_at, self._before = kill_at, before

    def append(self, number: int, event: Event) -> None:
        if self._before and number == self._kill_at:
            raise Killed
        super().append(number, event)
        if number == self._kill_at:
            raise Killed


def test_all_trials_run_completely_without_a_pruner():
    study = complete(Study(make_search(trials=3), MemoryJournal()))
    assert [(trial.number, trial.state, trial.epochs) for trial in study.trials] == [
        (0, "complete", 9),
        (1, "complete", 9),
        (2, "complete", 9),
    ]
    assert study.end_reason == "all 3 trials are finished"
    assert study.running == ()


def test_the_best_trial_has_the_highest_accuracy():
    study = complete(Study(make_search(), MemoryJournal()))
    assert study.best is not None
    assert study.best.value == max(trial.value for trial in study.trials)


@pytest.mark.parametrize("metric", ["loss", "calibrationError"])
def test_the_best_trial_has_the_lowest_value_of_a_metric_that_is_minimized(metric: str):
    search = make_search({"evaluate": {"metrics": ["accuracy", "calibrationError"]}}, metric=metric)
    study = complete(Study(search, MemoryJournal()))
    assert study.best is not None
    assert study.best.value == min(trial.value for trial in study.trials)


def test_the_earlier_one_of_two_equally_good_trials_is_the_best():
    study = Study(make_search(trials=2), MemoryJournal())
    for _ in range(2):
        run = study.start_next()
        study.record_result(run.number, result_of(study.trials[run.number], 0.5))
    assert study.best.number == 0


@pytest.mark.parametrize("pruner", ["none", "asha", "median"])
@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_a_search_that_is_killed_at_each_event_makes_the_same_decisions(sampler: str, pruner: str, parallel: int):
    search = make_search(sampler=sampler, pruner=pruner, trials=8)  # tpe and cmaes use results from trial 6 on
    expected = MemoryJournal()
    complete(Study(search, expected, fixed_clock), parallel).finish()
    events: list[Event] = []
    for number in range(len(expected.events)):
        for before in (True, False):
            journal = MortalJournal(events, number, before=before)
            with pytest.raises(Killed):
                complete(Study(search, journal, fixed_clock), parallel).finish()
            events = journal.events
    assert events == expected.events


@pytest.mark.parametrize("pruner", ["none", "asha"])
def test_two_coordinators_start_no_run_twice(pruner: str):
    search, journal, random = make_search(pruner=pruner), MemoryJournal(), Random(0)
    studies = [Study(search, journal), Study(search, journal)]
    conflicts = 0
    while any(not study.end_reason for study in studies):
        study = random.choice(studies)
        try:
            step(study, parallel=3)
        except JournalConflictError:
            conflicts += 1
            study.refresh()
        if random.random() < 0.2:
            study.refresh()
    runs = list(started_runs(journal))
    assert conflicts > 5
    assert len(runs) == len(set(runs))
    assert len({number for number, _ in runs}) == search.spec.trials
    studies[0].refresh()
    studies[1].refresh()
    assert studies[0].trials == studies[1].trials


def test_a_run_without_a_result_is_running_after_a_restart():
    search, journal = make_search(), MemoryJournal()
    run = Study(search, journal).start_next()
    assert Study(search, journal).running == (run,)


def test_reading_a_search_writes_nothing():
    journal = MemoryJournal()
    study = Study(make_search(), journal)
    assert (study.trials, study.running, study.best, study.end_reason, study.published) == ((), (), None, "", None)
    assert journal.events == []


def test_a_result_is_recorded_once():
    study = Study(make_search(), MemoryJournal())
    run = study.start_next()
    first = study.record_result(run.number, result_of(study.trials[0], 0.5))
    assert study.record_result(run.number, result_of(study.trials[0], 0.9)) == first
    assert first.results == (result_of(study.trials[0], 0.5),)


def test_the_result_of_a_smaller_rung_is_not_recorded_for_a_promoted_trial():
    search = make_search(pruner="asha", trials=1)
    study = Study(search, MemoryJournal())
    study.start_next()
    early = result_of(study.trials[0])
    study.record_result(0, early)
    study.start_next()
    assert study.record_result(0, early).state == "running"


def test_a_failed_trial_counts_as_a_trial_and_is_not_run_again():
    study = Study(make_search(trials=2), MemoryJournal())
    run = study.start_next()
    failed = study.record_failure(run.number, "Weights became NaN.", seconds=30.0, gpu_seconds=60.0)
    assert (failed.state, failed.error, failed.seconds, failed.gpu_seconds) == (
        "failed", "Weights became NaN.", 30.0, 60.0,
    )  # fmt: skip
    complete(study)
    assert [trial.state for trial in study.trials] == ["failed", "complete"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_a_number_is_a_failure(value: float):
    study = Study(make_search(), MemoryJournal())
    run = study.start_next()
    trial = study.record_result(run.number, result_of(study.trials[0], value, gpu_seconds=7.0))
    assert (trial.state, trial.error, trial.gpu_seconds) == (
        "failed",
        f"accuracy on the validation split is {value}.",
        7.0,
    )


def test_a_value_on_another_dataset_is_a_failure():
    study = Study(make_search(), MemoryJournal())
    for dataset in ("datasets/photos/aa", "datasets/photos/bb"):
        run = study.start_next()
        trial = study.record_result(run.number, result_of(study.trials[run.number], dataset=dataset))
    assert trial.state == "failed"
    assert trial.error == (
        "The trial used the dataset datasets/photos/bb, but earlier trials used datasets/photos/aa: the source "
        "or a list of the splits has changed, so the values cannot be compared. Restore it, or start a new search by "
        "changing seed."
    )


def test_three_failures_at_the_beginning_end_the_search():
    study = Study(make_search(), MemoryJournal())
    while run := study.start_next():
        study.record_failure(run.number, f"error {run.number}.")
    assert study.end_reason == (
        "the first 3 trials failed. The last error: error 2. Fix its cause, then change seed to start a new search"
    )
    with pytest.raises(DataError, match=r"No trial of the search cats-\w{8} is complete\. The last error: error 2\."):
        study.finish()


def test_three_failures_after_a_result_do_not_end_the_search():
    study = Study(make_search(trials=6), MemoryJournal())
    study.record_failure(study.start_next().number, "error")
    step(study)
    step(study)
    while run := study.start_next():
        study.record_failure(run.number, "error")
    assert [trial.state for trial in study.trials] == ["failed", "complete", "failed", "failed", "failed", "failed"]
    assert study.finish().number == 1


def test_a_combination_that_the_spec_refuses_fails_without_a_run():
    # The learning rate of fineTune must not be above the one of transfer.
    space = {"fineTune.optimizer.learningRate": {"choice": [1e-3, 1e-5]}, LEARNING_RATE: {"choice": [1e-2, 1e-4]}}
    search = make_search({"fineTune": {"epochs": 1, "optimizer": {"learningRate": 1e-5}}}, space=space, sampler="grid")
    journal = MemoryJournal()
    study = complete(Study(search, journal))
    refused = next(trial for trial in study.trials if trial.state == "failed")
    assert refused.error.startswith("spec.fineTune.optimizer.learningRate: 0.001 is above spec.transfer.optimizer")
    assert len(list(started_runs(journal))) == 3
    assert study.end_reason == "all 4 combinations of the space are tried"


def test_a_trial_that_trains_the_same_as_an_earlier_one_has_its_results_without_a_run():
    # Adam is the default, so both choices train the same.
    space = {"transfer.optimizer": {"choice": [{"learningRate": 0.01}, {"learningRate": 0.01, "name": "adam"}]}}
    journal = MemoryJournal()
    study = complete(Study(make_search(space=space, sampler="grid"), journal))
    first, second = study.trials
    assert (second.equal_to, second.results, second.state, second.seconds) == (0, first.results, "complete", 0.0)
    assert list(started_runs(journal)) == [(0, 9)]
    assert study.best.number == 0


def test_a_trial_that_repeats_a_running_one_is_not_run_after_a_restart():
    space = {"transfer.optimizer": {"choice": [{"learningRate": 0.01}, {"learningRate": 0.01, "name": "adam"}]}}
    search, journal = make_search(space=space, sampler="grid"), MemoryJournal()
    study = Study(search, journal)
    study.start_next()
    assert study.start_next() is None
    assert [trial.state for trial in study.trials] == ["running", "running"]
    assert [run.number for run in Study(search, journal).running] == [0]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_finite_space_is_tried_completely_and_never_twice(sampler: str):
    search = make_search(space={LEARNING_RATE: LEARNING_RATES, DROPOUT: CHOICE}, sampler=sampler, trials=100)
    journal = MemoryJournal()
    study = complete(Study(search, journal))
    assert len(list(started_runs(journal))) == len(study.trials) == 6
    assert {(trial.params[LEARNING_RATE], trial.params[DROPOUT]) for trial in study.trials} == {
        (rate, dropout) for rate in (0.01, 0.001) for dropout in (0.0, 0.1, 0.2)
    }
    assert study.end_reason == "all 6 combinations of the space are tried"


def test_no_trial_starts_when_the_gpu_hours_are_used_up():
    study = Study(make_search(budget={"gpuHours": 1.0}), MemoryJournal())
    while run := study.start_next():
        study.record_result(run.number, result_of(study.trials[run.number], gpu_seconds=1500.0))
    assert len(study.trials) == 3
    assert study.end_reason == "the budget is used up: gpuHours 1"


def test_no_trial_starts_when_the_hours_are_used_up():
    study = complete(Study(make_search(budget={"hours": 1.0}), MemoryJournal(), ticking_clock(minutes=10)))
    assert 0 < len(study.trials) < 12
    assert study.end_reason == "the budget is used up: hours 1"


def test_one_trial_becomes_complete_although_the_budget_is_used_up():
    study = Study(make_search(pruner="asha", budget={"gpuHours": 1.0}), MemoryJournal())
    while run := study.start_next():
        study.record_result(run.number, result_of(study.trials[run.number], gpu_seconds=1900.0))
    assert [trial.state for trial in study.trials].count("complete") == 1
    assert len(study.trials) == 2
    assert study.best.epochs == 9


def test_no_trial_is_continued_when_the_budget_is_used_up():
    journal, promotions = MemoryJournal(), 0
    study = Study(make_search(pruner="asha", trials=30), journal)
    while run := study.start_next():
        is_promotion = journal.events[-1]["event"] == "promoted"
        if is_promotion and any(trial.state == "complete" for trial in study.trials):
            before = MemoryJournal(journal.events[:-1])
            limited = Study(make_search(pruner="asha", trials=30, budget={"gpuHours": 0.01}), before)
            assert limited.start_next() is None
            assert limited.end_reason == "the budget is used up: gpuHours 0.01"
            promotions += 1
        study.record_result(run.number, result_of(study.trials[run.number], gpu_seconds=60.0))
    assert promotions > 2


def test_a_budget_that_was_raised_continues_the_search():
    journal = MemoryJournal()
    study = complete(Study(make_search(budget={"hours": 0.5}), journal, ticking_clock(minutes=10)))
    study.finish()
    assert len(complete(Study(make_search(), journal)).trials) == 12


def test_more_trials_continue_the_search():
    journal = MemoryJournal()
    study = complete(Study(make_search(trials=9, pruner="asha"), journal))
    study.finish()
    study.record_published("s3://bucket/topwork/models/cats/1/")
    assert {trial.state for trial in study.trials} == {"complete", "pruned"}

    study = Study(make_search(trials=12, pruner="asha"), journal)
    assert (study.end_reason, study.published) == ("", "s3://bucket/topwork/models/cats/1/")
    study.start_next()
    assert study.published is None
    assert "paused" in {trial.state for trial in study.trials}
    assert len(complete(study).trials) == 12


def test_a_finished_search_is_finished_once():
    journal = MemoryJournal()
    study = complete(Study(make_search(trials=2), journal))
    best = study.finish()
    length = len(journal.events)
    assert Study(make_search(trials=2), journal).finish() == best
    study.record_published("s3://bucket/topwork/models/cats/1/")
    study.record_published("s3://bucket/topwork/models/cats/1/")
    assert len(journal.events) == length + 1
    assert Study(make_search(trials=2), journal).published == "s3://bucket/topwork/models/cats/1/"


def test_a_search_without_a_complete_trial_has_no_best_job():
    with pytest.raises(DataError, match="is complete yet, so there is no best one"):
        Study(make_search(), MemoryJournal()).best_job()


def test_a_trial_that_a_changed_template_refuses_is_named():
    def search(gpus: int) -> TransferSearch:
        return make_search({"compute": {"gpus": gpus}}, space={"transfer.batchSize": {"int": [32, 64]}}, trials=2)

    journal = MemoryJournal()
    first = Study(search(gpus=1), journal)
    run = first.start_next()
    refusal = (
        r"The template has changed since trial 0 was started, .*batchSize: .* Restore the template, or change seed"
    )
    with pytest.raises(SpecError, match=refusal):
        _ = Study(search(gpus=16), journal).running
    first.record_result(run.number, result_of(first.trials[0]))
    with pytest.raises(SpecError, match=refusal):
        Study(search(gpus=16), journal).best_job()
    assert first.best_job().spec.compute.gpus == 1


def test_metrics_that_are_undefined_are_not_recorded():
    study = Study(make_search(), MemoryJournal())
    run = study.start_next()
    result = result_of(study.trials[0])
    result.metrics["auc"] = math.nan
    assert study.record_result(run.number, result).results[0].metrics.keys() == {"accuracy", "loss"}


def test_a_long_error_is_cut():
    study = Study(make_search(), MemoryJournal())
    trial = study.record_failure(study.start_next().number, "x" * 100_000)
    assert len(trial.error) == 1000


def test_the_journal_of_another_version_is_refused():
    journal = MemoryJournal([{"event": "created", "time": "2026-01-01T00:00:00Z", "format": 99, "name": "cats"}])
    with pytest.raises(FormatError, match="has format 99, but this version of topwork reads format 1"):
        Study(make_search(), journal)


def test_the_journal_of_another_search_is_refused():
    journal = MemoryJournal()
    Study(make_search(), journal).start_next()
    with pytest.raises(DataError, match=r"^The journal is that of the search cats-\w{8}, not of cats-\w{8}\."):
        Study(make_search(seed=1), journal)


def test_a_damaged_event_is_reported_with_its_number():
    journal = MemoryJournal()
    Study(make_search(), journal).start_next()
    journal.events[1]["number"] = "first"
    with pytest.raises(DataError, match=r"^Event 1 of the journal of the search is invalid: started\.number: "):
        Study(make_search(), journal)


@pytest.mark.parametrize("number", [7, -1])
def test_an_event_of_an_unknown_trial_is_reported(number: int):
    journal = MemoryJournal()
    study = Study(make_search(), journal)
    study.start_next()
    study.record_failure(0, "diverged")
    journal.events[2]["number"] = number
    with pytest.raises(DataError, match=r"^Event 2 of the journal of the search is "):
        Study(make_search(), journal)


def test_the_journal_of_1000_trials_fits_into_a_config_map():
    journal = MemoryJournal()
    complete(Study(make_search(sampler="random", trials=100, pruner="asha"), journal), parallel=10)
    size = len(zlib.compress(json.dumps(journal.events).encode()))
    # A ConfigMap has at most 2**20 bytes, of which base64 takes a quarter.
    assert 10 * size < 2**18


def test_tpe_finds_better_values_than_random_sampling():
    regrets = {
        sampler: sum(0.99 - 0.2 / 9 - best_value(sampler, seed) for seed in range(3)) for sampler in ("random", "tpe")
    }
    # Measured over 20 seeds: 0.0007 and 0.0136 with three parameters.
    assert regrets["tpe"] < regrets["random"] / 2


def best_value(sampler: str, seed: int) -> float:
    study = complete(Study(make_search(sampler=sampler, seed=seed, trials=40), MemoryJournal()))
    assert study.best.value == accuracy_of(study.best.params, 9)
    return study.best.value


def test_optuna_is_imported_only_when_a_trial_is_chosen():
    code = "import sys, topwork.search.study, topwork.search.optuna_study; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
