"""Cross-validation: every fold is a run of its own, and its metrics are those of images that it was not trained on."""

import json
import re
import shutil
from statistics import fmean, stdev

import numpy as np
import pytest

from topwork import pipeline
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import GateError
from topwork.registry.cross_validation import CrossValidation, fold_jobs
from topwork.registry.runs import delete_results
from topwork.registry.versions import list_models, read_latest
from topwork.stages.publish import find_outcome
from topwork.stages.pull import pull

FAST = {"train": "all", "epochs": 1, "batchSize": 4, "optimizer": {"learningRate": 0.01}}


@pytest.fixture
def make_folds_job(make_job, two_class_folder):
    def make(publish=None, evaluate=None, **splits):
        return make_job(
            dataset={
                "source": {"folder": {"uri": str(two_class_folder)}},
                "splits": {"folds": 2, **splits},
                "imageSize": [32, 32],
            },
            transfer=FAST,
            evaluate={"metrics": ["accuracy", "auc"], **(evaluate or {})},
            publish={"formats": ["keras"], **(publish or {})},
        )

    return make


def read_json(workspace, key):
    return json.loads(workspace.storage.read(key))


def test_folds_are_evaluated_on_all_images_and_nothing_is_published(make_folds_job, workspace, two_class_folder):
    for path in list(two_class_folder.glob("red/*")):
        shutil.copy(path, path.with_name(f"copy-{path.name}"))
    job = make_folds_job()
    outcome = pipeline.run(job, workspace)
    assert isinstance(outcome, CrossValidation)
    images = pull(job, workspace).metadata.images
    assert outcome.images == images
    folds = [read_json(workspace, f"runs/{fold.run}/metrics.json") for fold in fold_jobs(job)]
    accuracies = [fold["metrics"]["accuracy"] for fold in folds]
    assert outcome.metrics["accuracy"] == pytest.approx(fmean(accuracies))
    assert outcome.deviations["accuracy"] == pytest.approx(stdev(accuracies))
    together = read_json(workspace, f"runs/{job.run}/metrics.json")
    assert together["crossValidation"]["mean"]["accuracy"] == together["metrics"]["accuracy"] == fmean(accuracies)
    # Each image is counted once in the confusion matrix, with the prediction of the fold that it was not trained on.
    assert np.sum(together["evaluation"]["confusion"]) == images
    assert np.array_equal(
        together["evaluation"]["confusion"], np.sum([fold["evaluation"]["confusion"] for fold in folds], axis=0)
    )
    assert list_models(workspace.storage) == {}
    report = workspace.storage.read(f"runs/{job.run}/report.html").decode()
    assert "Nothing is published" in report
    for fold in (1, 2):
        assert re.search(rf"Fold {fold}: [0-9]+ of 30 test images have a near duplicate in train", report)
    assert outcome.duplicates > 0
    assert f"{outcome.metrics['accuracy']:.4f} ± {outcome.deviations['accuracy']:.4f}" in report
    assert f"2 folds: accuracy {outcome.metrics['accuracy']:.4f} ± " in outcome.summary()[0]


def test_no_image_of_a_test_split_trains_its_fold(make_folds_job, workspace):
    job = make_folds_job(validation=0.2)
    dataset, tested = pull(job, workspace), []
    for fold in fold_jobs(job):
        local = fetch_dataset(dataset, fold, workspace)
        assert not set(local.test.names) & {*local.train.names, *local.validation.names}
        assert local.test.size + local.train.size + local.validation.size == dataset.metadata.images
        # The images are those of the names, although all folds share one file of resized images.
        index = local.test.size - 1
        fresh = local.test.resized((16, 16), local.test.preprocessing)
        fresh = fresh.resized(local.test.image_size, local.test.preprocessing)
        assert np.array_equal(local.test.load_images(np.array([index])), fresh.load_images(np.array([index])))
        tested += local.test.names
    assert len(tested) == len(set(tested)) == dataset.metadata.images
    assert len(list((workspace.scratch / dataset.prefix).glob("pixels-*"))) == 1


@pytest.mark.usefixtures("export_check_in_process")
def test_final_model_is_trained_on_all_images_and_published_with_the_metrics_of_the_folds(make_folds_job, workspace):
    gates = [{"metric": "auc", "atLeast": 0.0}]
    job = make_folds_job(publish={"fold": "all"}, evaluate={"gates": gates})
    published = pipeline.run(job, workspace)
    version = read_latest(workspace.storage, job.model_name)
    together = read_json(workspace, f"{version.uri.removeprefix(workspace.storage.uri).strip('/')}/metrics.json")
    assert (version.split, version.images) == ("cross-validation", 40)
    assert version.metrics == together["crossValidation"]["mean"]
    assert version.deviations == together["crossValidation"]["standardDeviation"]
    assert fetch_dataset(pull(job, workspace), job, workspace).train.size == 40
    card = workspace.storage.read(f"models/{job.model_name}/1/card.md").decode()
    assert "No image was kept to test this model" in card
    assert "by cross-validation with 2 folds on 40 images" in card
    assert "± " in published.summary()[0]
    # The same run again finds the version without training.
    assert find_outcome(job, pull(job, workspace), workspace).version == 1


def test_missed_gate_keeps_the_final_model_from_being_trained(make_folds_job, workspace):
    gate = {"gates": [{"metric": "accuracy", "atLeast": 1.0}, {"metric": "auc", "atMost": 0.0}]}
    job = make_folds_job(publish={"fold": "all"}, evaluate=gate)
    with pytest.raises(GateError, match="auc is"):
        pipeline.run(job, workspace)
    assert workspace.storage.read(f"runs/{job.run}/transfer/done.json") is None
    assert workspace.storage.read(f"runs/{job.run}/report.html")


def test_completed_folds_are_not_trained_again(make_folds_job, workspace, monkeypatch):
    job = make_folds_job(folds=3)
    evaluate, calls = pipeline.evaluate_fold, []

    def fail_at_the_second(fold, *arguments):
        calls.append(fold.run)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(fold, *arguments)

    monkeypatch.setattr(pipeline, "evaluate_fold", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job, workspace)
    series = workspace.metrics.registry.get_sample_value
    steps = series("topwork_steps_total")
    outcome = pipeline.run(job, workspace)
    # Two folds were trained before the interruption, and one after it.
    assert series("topwork_steps_total") == steps * 3 / 2
    assert [fold.fold for fold in outcome.folds] == [1, 2, 3]
    assert find_outcome(job, pull(job, workspace), workspace) == outcome


def test_one_fold_is_the_same_training_as_in_all_folds(make_folds_job, workspace):
    single = make_folds_job(fold=2)
    outcome = pipeline.run(single, workspace)
    assert [fold.fold for fold in outcome.folds] == [2]
    assert outcome.deviations == {}
    assert "fold 2 of 2" in outcome.summary()[0]
    series = workspace.metrics.registry.get_sample_value
    steps = series("topwork_steps_total")
    both = pipeline.run(make_folds_job(), workspace)
    assert series("topwork_steps_total") == 2 * steps
    assert both.folds[1].metrics == outcome.folds[0].metrics


def test_restart_deletes_the_results_of_all_folds(make_folds_job, workspace):
    job = make_folds_job()
    dataset = pull(job, workspace)
    pipeline.run(job, workspace)
    delete_results(job, dataset, workspace.storage)
    left = [stored.key for stored in workspace.storage.list()]
    assert not [key for key in left if key.startswith(("runs/", "stages/"))]
