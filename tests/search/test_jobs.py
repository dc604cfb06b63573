"""The jobs of a search: those of its trials publish nothing, the one of the best trial publishes its model."""

from typing import Any

import pytest
from tests.search.small_searches import DROPOUT, LEARNING_RATE, MemoryJournal, complete, make_search

from topwork.search.jobs import best_job, first_epochs, trial_job, trial_name
from topwork.search.search_id import search_id
from topwork.search.study import Study
from topwork.spec import TransferJob
from topwork.spec.search import TransferSearch

PARAMS = {LEARNING_RATE: 0.01, DROPOUT: 0.5}
FINE_TUNE = {"fineTune": {"epochs": 6, "optimizer": {"learningRate": 1e-5}}}


def is_accepted(job: TransferJob) -> bool:
    """Whether a job is still valid when it is read from YAML, as in a cluster."""
    content = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return TransferJob.model_validate(content, by_name=False) == job


def renamed(search: TransferSearch, name: str) -> TransferSearch:
    return search.model_copy(update={"metadata": search.metadata.model_copy(update={"name": name})})


def test_the_job_of_a_trial_has_its_parameters_and_publishes_nothing():
    template = {
        "evaluate": {
            "metrics": ["accuracy", "auc"],
            "gates": [{"metric": "accuracy", "atLeast": 0.9}],
            "calibration": "temperature",
        },
        "publish": {"name": "felines", "formats": ["onnx"]},
    }
    search = make_search(template)
    job = trial_job(search, 3, PARAMS, 9)
    spec = search.spec.template
    assert job.spec == spec.model_copy(
        update={
            "transfer": spec.transfer.model_copy(
                update={"optimizer": spec.transfer.optimizer.model_copy(update={"learning_rate": 0.01})}
            ),
            "model": spec.model.model_copy(update={"head": spec.model.head.model_copy(update={"dropout": 0.5})}),
            "evaluate": spec.evaluate.model_copy(update={"gates": (), "calibration": "none"}),
            "publish": type(spec.publish)(enabled=False, name="felines"),
        }
    )
    assert job.metadata.name == "cats-3"
    assert job.metadata.labels == {"topwork.dev/search": search_id(search), "topwork.dev/trial": "3"}
    assert is_accepted(job)


@pytest.mark.parametrize(("epochs", "is_kept"), [(3, True), (9, False)])
def test_a_run_keeps_its_checkpoint_if_the_trial_can_be_continued(epochs: int, is_kept: bool):
    job = trial_job(make_search(pruner="asha"), 0, PARAMS, epochs)
    assert (job.spec.transfer.epochs, job.spec.compute.keep_checkpoint) == (epochs, is_kept)
    assert is_accepted(job)


def test_a_pruner_limits_the_epochs_of_fine_tuning():
    job = trial_job(make_search(FINE_TUNE, pruner="asha"), 0, PARAMS, 2)
    assert (job.spec.transfer.epochs, job.spec.fine_tune.epochs) == (9, 2)


def test_a_complete_trial_trains_the_same_as_the_best_job():
    search = make_search(FINE_TUNE, pruner="asha")
    trial, best = trial_job(search, 0, PARAMS, 6), best_job(search, PARAMS)
    assert (trial.spec.transfer, trial.spec.fine_tune) == (best.spec.transfer, best.spec.fine_tune)


@pytest.mark.parametrize(
    ("transfer", "epochs"),
    [
        ({}, 1),
        ({"featureCache": {"use": "on", "views": 3}}, 3),
        ({"optimizer": {"schedule": {"name": "step", "factor": 0.1, "atEpochs": [2, 5]}}}, 9),
    ],
)
def test_a_trial_starts_at_the_first_rung_that_its_spec_accepts(transfer: dict[str, Any], epochs: int):
    template = {"transfer": {"epochs": 9, **transfer}, "augmentation": {"flip": "horizontal"}}
    assert first_epochs(make_search(template, pruner="asha"), PARAMS) == epochs


def test_without_a_pruner_a_trial_trains_the_epochs_of_its_parameters():
    search = make_search(space={"transfer.epochs": {"int": [1, 20]}})
    assert first_epochs(search, {"transfer.epochs": 7}) == 7
    assert trial_job(search, 0, {"transfer.epochs": 7}, 7).spec.transfer.epochs == 7


def test_the_best_job_publishes_under_the_name_of_the_search():
    search = make_search({"evaluate": {"gates": [{"metric": "accuracy", "atLeast": 0.9}]}})
    study = complete(Study(search, MemoryJournal()))
    study.finish()
    job = study.best_job()
    assert (job.metadata.name, job.spec.publish.name) == ("cats", "cats")
    assert job.spec.evaluate.gates == search.spec.template.evaluate.gates
    assert job.spec.transfer.optimizer.learning_rate == study.best.params[LEARNING_RATE]
    assert job.metadata.labels == {"topwork.dev/search": study.id}
    assert is_accepted(job)


def test_the_best_job_publishes_under_the_name_in_the_template():
    assert best_job(make_search({"publish": {"name": "felines"}}), PARAMS).model_name == "felines"


@pytest.mark.parametrize(
    ("name", "suffix", "expected"),
    [
        ("cats", "0", "cats-0"),
        ("a" * 36, "999", "a" * 36 + "-999"),
        ("a" * 40, "999", "a" * 29 + "-71d912-999"),
        ("a" * 28 + "-" + "b" * 11, "best", "a" * 28 + "-414d51-best"),
    ],
)
def test_the_name_of_a_job_has_at_most_40_characters(name: str, suffix: str, expected: str):
    job_name = trial_name(renamed(make_search(), name), suffix)
    assert job_name == expected
    assert len(job_name) <= 40


def test_long_names_that_begin_alike_give_different_names_of_jobs():
    search = make_search()
    assert trial_name(renamed(search, "a" * 40), "1") != trial_name(renamed(search, "a" * 39 + "b"), "1")
