"""Whether the training of a run is complete, which all of its nodes decide from storage."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from topwork.clients.s3.objects import FileEntry
from topwork.data.dataset_manifest import StoredDataset
from topwork.errors import UnavailableError
from topwork.registry.completion import is_training_complete, read_last_result, restore_metrics
from topwork.registry.cross_validation import fold_jobs
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import Classifier, ParameterCounts, write_stage_result

DATASET = StoredDataset("datasets/photos/0f3a9c57d2e84b16", SimpleNamespace(fingerprint="0f3a9c57d2e84b16"))
FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}


@pytest.fixture
def complete(storage):
    """Store the result of a training stage of a job, or of one of its folds."""

    def complete(job, stage):
        key = stage_keys(job, DATASET.metadata.fingerprint, storage).training_stages[stage]
        classifier = Classifier(
            stage=stage,
            key=f"stages/{stage}/{key}/model-0000000000000000.keras",
            file=FileEntry(size=1, sha256="0" * 64),
            class_names=("blue", "red"),
            image_size=(32, 32),
            history=[{"stage": stage, "epoch": 1, "loss": 0.5, "accuracy": 0.75, "learning_rate": 0.01}],
            best_epoch=1,
            parameters=ParameterCounts(trainable=1, frozen=0),
            started=datetime.now(UTC),
            finished=datetime.now(UTC),
            seconds=1.0,
        )
        write_stage_result(storage, key, classifier)
        return classifier.key

    return complete


@pytest.fixture
def progress(storage):
    """Whether the containers transfer and fine-tune have nothing to train."""
    return lambda job: [is_training_complete(job, stage, DATASET, storage) for stage in ("transfer", "fine-tune")]


def test_a_job_without_fine_tuning_is_complete_after_transfer(make_job, storage, complete, progress):
    job = make_job()
    assert progress(job) == [False, False]
    key = complete(job, "transfer")
    assert progress(job) == [True, True]
    assert [read_last_result(job, stage, DATASET, storage).key for stage in ("transfer", "fine-tune")] == [key, key]


def test_a_job_with_fine_tuning_is_complete_after_both_stages(make_job, storage, complete, progress):
    job = make_job(fineTune=FINE_TUNE)
    transferred = complete(job, "transfer")
    assert progress(job) == [True, False]
    fine_tuned = complete(job, "fine-tune")
    assert progress(job) == [True, True]
    assert read_last_result(job, "transfer", DATASET, storage).key == transferred
    assert read_last_result(job, "fine-tune", DATASET, storage).key == fine_tuned


@pytest.mark.parametrize("publishes", [False, True])
def test_cross_validation_is_complete_after_its_folds_and_the_final_model(
    make_job, two_class_folder, complete, progress, publishes
):
    job = make_job(
        dataset={
            "source": {"folder": {"uri": str(two_class_folder)}},
            "splits": {"folds": 2},
            "imageSize": [32, 32],
        },
        publish={"fold": "all"} if publishes else {},
    )
    assert job.spec.publishes == publishes
    first, second = fold_jobs(job)
    complete(first, "transfer")
    assert progress(job) == [False, False]
    complete(second, "transfer")
    assert progress(job) == [True, not publishes]
    if publishes:
        complete(job, "transfer")
        assert progress(job) == [True, True]


def test_a_result_that_was_deleted_meanwhile_is_reported(make_job, storage):
    with pytest.raises(UnavailableError, match="The result of transfer was deleted while the run used it"):
        read_last_result(make_job(), "fine-tune", DATASET, storage)


def test_metrics_of_all_training_stages_are_restored(make_job, complete, workspace):
    job = make_job(fineTune=FINE_TUNE)
    complete(job, "transfer")
    complete(job, "fine-tune")
    restore_metrics(job, DATASET, workspace)
    series = workspace.metrics.registry.get_sample_value
    assert [series("topwork_epoch", {"stage": stage}) for stage in ("transfer", "fine-tune")] == [1, 1]
    assert series("topwork_loss", {"split": "train"}) == 0.5
