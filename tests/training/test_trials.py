"""Trials of a head share features, base and audit, and have the results of runs that share nothing."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from tests.training.observer import RunObserver

from topwork import pipeline
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.local_dataset import fetch_dataset
from topwork.registry.shared_features import delete_shared_features, mark_used
from topwork.registry.stage_results import read_run_result
from topwork.stages.pull import pull
from topwork.training.feature_cache import request
from topwork.training.feature_cache.request import FeatureRequest
from topwork.workspace import RecentResults


@pytest.fixture
def make_trial(make_job, tmp_path):
    """Build a trial of a head on a small saved base."""
    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="low")(image / 255.0)
    maps = keras.layers.BatchNormalization(name="norm")(maps)
    maps = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="high")(maps)
    keras.Model(image, maps).save(tmp_path / "base.keras")

    def make(rate, *, pooling="avg", dropout=0.2, batch_size=8, run="", **spec):
        job = make_job(
            model={
                "base": {"saved": {"uri": str(tmp_path / "base.keras"), "cutAt": "high"}},
                "head": {"pooling": pooling, "dropout": dropout, "hidden": [4]},
            },
            transfer={"epochs": 2, "batchSize": batch_size, "optimizer": {"learningRate": rate}},
            **{"publish": {"enabled": False}, "augmentation": {"flip": "horizontal"}} | spec,
        )
        labels = {"topwork.dev/search": "tiny-12345678"}
        return job.model_copy(update={"metadata": job.metadata.model_copy(update={"labels": labels})})

    return make


def run(job, workspace):
    """Run a trial; returns its metrics, its weights and an observer of its progress and log."""
    observer = RunObserver()
    observer.observe_log()
    workspace = replace(workspace, progress=observer, metrics=Metrics())
    outcome = pipeline.run(job, workspace)
    classifier = read_run_result(workspace.storage, job.run, "transfer")
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return outcome.metrics, keras.models.load_model(path, compile=False), observer


def alone(job, workspace):
    """Run a trial in another storage and process, where it shares nothing."""
    storage = workspace.storage.at(f"{workspace.storage.uri}/alone")
    return run(job, replace(workspace, storage=storage, recent=RecentResults()))


def assert_same(one, other):
    assert one[0] == other[0]
    for first, second in zip(one[1].get_weights(), other[1].get_weights(), strict=True):
        np.testing.assert_array_equal(first, second)


def computed(result):
    """Return the operations on images that a run carried out."""
    return {what for what in result[2].steps if what.startswith(("features", "audit"))}


def test_trials_of_a_process_compute_shared_parts_once(make_trial, workspace):
    first = run(make_trial(0.01), workspace)
    assert computed(first) == {
        "audit: near duplicates",
        "features: train",
        "features: validation",
        "features of validation",
    }
    changes = {"dropout": 0.5, "batch_size": 4}
    second = run(make_trial(0.02, **changes), workspace)
    assert computed(second) == set()
    assert "features used again" in [event for event, _ in second[2].events]
    assert_same(second, alone(make_trial(0.02, **changes), workspace))


def test_trial_in_another_process_reads_the_features_from_storage(make_trial, workspace):
    run(make_trial(0.01), workspace)
    job = make_trial(0.02)
    second = run(job, replace(workspace, recent=RecentResults()))
    assert second[2].steps["features: train"] == second[2].steps["features: validation"] == 0
    assert "audit: near duplicates" not in computed(second)
    assert_same(second, alone(job, workspace))
    delete_shared_features(workspace.storage, "tiny-12345678")
    assert not list(workspace.storage.list("features/"))


def test_trials_that_run_at_the_same_time_share_the_computation(make_trial, workspace, monkeypatch):
    monkeypatch.setattr(request, "SHARED_BATCH_PER_REPLICA", 8)
    job = make_trial(0.01)
    reference = alone(job, workspace)
    elsewhere = workspace.storage.at(f"{workspace.storage.uri}/alone")
    stored = [found.key for found in elsewhere.list("features/") if found.key.endswith(".npy")]
    extracted, extract = [], FeatureRequest.extract

    def store_features_of_other_trial(self, part, extractor, numbers):
        extracted.append((part.name, list(numbers)))
        for key in stored if len(extracted) == 3 else ():  # after the sample and the first unit
            workspace.storage.write(key, elsewhere.read(key))
        return extract(self, part, extractor, numbers)

    monkeypatch.setattr(FeatureRequest, "extract", store_features_of_other_trial)
    assert_same(run(job, workspace), reference)
    assert [(name, len(numbers)) for name, numbers in extracted] == [("validation", 1), ("train", 1), ("train", 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": "max"},
        {"augmentation": {"flip": "both"}},
        {"compute": {"gpus": 0, "precision": "mixed_bfloat16"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_trial_does_not_use_features_of_other_settings(make_trial, workspace, change):
    run(make_trial(0.01), workspace)
    result = run(make_trial(0.01, **change), workspace)
    assert {"features: train", "features: validation"} <= computed(result)
    assert result[2].steps["features: train"] > 0


def test_metrics_of_a_shared_base_are_those_of_the_whole_model(make_trial, workspace):
    run(make_trial(0.01), workspace)
    job = make_trial(0.05)
    metrics, model, _ = run(job, workspace)
    split = fetch_dataset(pull(job, workspace), job, workspace).validation
    logits = model.predict(split.load_images(np.arange(split.size)).astype("float32"), verbose=0)
    second = 1 / (1 + np.exp(-logits[:, 0]))
    own = np.where(split.labels == 1, second, 1 - second)
    assert metrics["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-5)
    assert metrics["accuracy"] == np.mean((second > 0.5) == split.labels)


@pytest.mark.usefixtures("export_check_in_process")
def test_run_that_publishes_the_best_model_deletes_the_features_of_its_search(make_trial, workspace):
    workspace.storage.write("features/0123/train/1-batches/000000.npy", b"")
    mark_used(workspace.storage, "features/0123", "tiny-12345678")
    job = make_trial(0.01, publish={"formats": ["keras"]})
    pipeline.run(job, workspace)
    assert not list(workspace.storage.list("features/"))
    assert not [stored.key for stored in workspace.storage.list("datasets/") if "/audit/" in stored.key]
