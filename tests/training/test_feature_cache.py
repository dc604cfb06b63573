"""The feature cache: frozen layers run once per view, and training gives the same result as without the cache."""

from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import pytest
from structlog.testing import capture_logs
from tests.training.observer import RunObserver

from topwork.cancellation import StopRequest
from topwork.data.local_dataset import Split
from topwork.errors import SettingError, Stopped
from topwork.model.layer_tree import leaf_layers
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache import placement, units
from topwork.training.feature_cache.placement import available_memory


@pytest.fixture
def head_job(make_job, tmp_path):
    """A job that trains a head on a small saved base."""
    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="low")(image / 255.0)
    maps = keras.layers.BatchNormalization(name="norm")(maps)
    maps = keras.layers.Dropout(0.5)(maps)
    maps = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="high")(maps)
    top = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D(name="pool")(maps))
    keras.Model(image, top).save(tmp_path / "a.keras")

    def make(cache="auto", cut_at="high", pooling="avg", epochs=5, augmentation=None, fine_tune=None):
        settings = {
            "epochs": epochs, "batchSize": 7, "featureCache": cache, "optimizer": {"learningRate": 0.02},
            "earlyStopping": {"patience": 5},
        }  # fmt: skip
        base = {"saved": {"uri": str(tmp_path / "a.keras"), "cutAt": cut_at}}
        model = {"base": base, "head": {"pooling": pooling, "hidden": [6], "dropout": 0.0}}
        return make_job(model=model, transfer=settings, fineTune=fine_tune, augmentation=augmentation or {})

    return make


def load_model(classifier, workspace):
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return keras.models.load_model(path, compile=False)


def run_transfer(job, workspace):
    classifier = transfer(job, pull(job, workspace), workspace)
    return classifier, load_model(classifier, workspace)


def events_named(events, name):
    return [event for event in events if event["event"] == name]


def assert_similar_history(one, other):
    """Compare histories with the precision of float16 features."""
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(
            [row[name] for row in one.history], [row[name] for row in other.history], rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize(("pooling", "cut_at"), [("avg", "high"), ("flatten", "high"), ("avg", "pool")])
def test_cache_without_augmentation_does_not_change_the_result(head_job, workspace, pooling, cut_at):
    with_cache, one = run_transfer(head_job("on", cut_at, pooling), workspace)
    without_cache, other = run_transfer(head_job("off", cut_at, pooling), workspace)
    assert_similar_history(with_cache, without_cache)
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-3, atol=2e-3)
    assert with_cache.parameters == without_cache.parameters
    assert [layer.name for layer in leaf_layers(one)] == [layer.name for layer in leaf_layers(other)]


def count_training_image_reads(job, workspace, monkeypatch):
    reads, load_images = Counter(), Split.load_images

    def counted(split, indices):
        # Validation images are read too: a batch to choose the dtype, and later ones by prefetching.
        if split.size == 24:
            reads.update(split.names[index] for index in indices)
        return load_images(split, indices)

    with monkeypatch.context() as patched:
        patched.setattr(Split, "load_images", counted)
        classifier, _ = run_transfer(job, workspace)
    assert len(classifier.history) == job.spec.transfer.epochs
    return reads


def test_epochs_read_no_images_with_the_cache(head_job, workspace, monkeypatch):
    two, five = (count_training_image_reads(head_job("on", epochs=n), workspace, monkeypatch) for n in (2, 5))
    assert len(two) == 24
    assert two == five
    assert count_training_image_reads(head_job("off"), workspace, monkeypatch).total() > 2 * five.total()


def run_fine_tune(job, workspace):
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    return first, fine_tune(job, first, dataset, workspace)


def test_fine_tuning_caches_the_layers_below_the_unfrozen_ones(head_job, workspace):
    settings = {"epochs": 4, "unfreeze": {"layers": 1}, "optimizer": {"learningRate": 0.01}}
    with capture_logs() as events:
        first, with_cache = run_fine_tune(head_job(fine_tune={**settings, "featureCache": "on"}), workspace)
    _, without_cache = run_fine_tune(head_job(fine_tune={**settings, "featureCache": "off"}), workspace)
    (transferred, tuned) = events_named(events, "features computed")
    assert (transferred["stage"], transferred["shape"]) == ("transfer", "6")
    assert (tuned["stage"], tuned["shape"]) == ("fine-tune", "15x15x4")
    assert with_cache.parameters == without_cache.parameters
    assert_similar_history(with_cache, without_cache)
    before, after = load_model(first, workspace), load_model(with_cache, workspace)
    changed = {
        layer.name
        for layer, other in zip(leaf_layers(before), leaf_layers(after), strict=True)
        if any((one != two).any() for one, two in zip(layer.get_weights(), other.get_weights(), strict=True))
    }
    assert changed == {"high", "hidden_1", "logits"}


def test_augmented_images_are_cached_in_several_views(head_job, workspace):
    job = head_job({"use": "on", "views": 3}, augmentation={"flip": "both", "rotation": 0.2})
    with capture_logs() as events:
        classifier, _ = run_transfer(job, workspace)
    (event,) = events_named(events, "features computed")
    assert (event["views"], event["placement"]) == (3, "memory")
    assert classifier.history[-1]["loss"] < classifier.history[0]["loss"]


def test_log_explains_whether_the_cache_is_used(head_job, workspace):
    with capture_logs() as events:
        for cache, epochs in (("auto", 5), ("auto", 1), ("off", 3)):
            run_transfer(head_job(cache, epochs=epochs), workspace)
    five, one, off = events_named(events, "feature cache")
    assert five["used"]
    assert five["reason"].startswith("the frozen layers run once instead of 5 times, about ")
    assert (one["used"], one["reason"]) == (
        False, "the frozen layers run once instead of 1 times, about 1.0 times less computation"
    )  # fmt: skip
    assert (off["used"], off["reason"]) == (False, "featureCache is off")


def test_stopped_run_computes_no_feature_twice(head_job, workspace, monkeypatch):
    monkeypatch.setattr(units, "MAX_UNIT_IMAGES", 7)
    job = head_job("on", epochs=3, augmentation={"flip": "both"})
    dataset = pull(job, workspace)
    other_storage = workspace.storage.at(f"{workspace.storage.uri}/uninterrupted")
    uninterrupted, _ = run_transfer(job, replace(workspace, storage=other_storage))
    first = RunObserver(at_step=("features: train", 5), action=workspace.stop.set)
    with pytest.raises(Stopped, match="while computing features of the frozen layers"):
        transfer(job, dataset, replace(workspace, progress=first))
    second = RunObserver()
    classifier = transfer(job, dataset, replace(workspace, progress=second, stop=StopRequest()))
    # 24 training images in 4 batches and 3 views, 8 validation images in 2 batches. The stop came after batch 5, in
    # which batch 6 was completed and stored.
    assert first.steps["features: train"] == 5
    assert second.steps["features: train"] + second.steps["features: validation"] == 4 * 3 + 2 - 6
    assert [row["loss"] for row in classifier.history] == [row["loss"] for row in uninterrupted.history]
    assert not [stored.key for stored in workspace.storage.list() if "/features/" in stored.key]


def test_features_that_do_not_fit_in_memory_are_placed_on_scratch(head_job, workspace, monkeypatch):
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.0)
    (workspace.scratch / "features-train.bin").write_bytes(bytes(100))  # of a killed process
    with capture_logs() as events:
        on_scratch, _ = run_transfer(head_job("on"), workspace)
    assert events_named(events, "features computed")[0]["placement"] == "scratch"
    # The next stage needs the space.
    assert list(workspace.scratch.glob("features-*")) == []
    in_memory, _ = run_transfer(head_job("on", epochs=6), workspace)
    assert [row["loss"] for row in on_scratch.history] == [row["loss"] for row in in_memory.history][:5]


def test_lack_of_space_disables_an_optional_cache_and_rejects_a_required_one(head_job, workspace, monkeypatch):
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(placement, "FREE_SHARE", 0.0)
    with capture_logs() as events:
        classifier, _ = run_transfer(head_job("auto"), workspace)
    assert len(classifier.history) == 5
    reason = events_named(events, "feature cache")[1]["reason"]
    assert reason.startswith("the features take 0.0 GiB: more than a quarter of the free memory")
    with pytest.raises(SettingError, match=r"^featureCache of transfer is on, but the features take 0\.0 GiB"):
        run_transfer(head_job("on"), workspace)


def test_available_memory_is_limited_by_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert available_memory(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("200000\n")
    assert available_memory(tmp_path) == 300_000
