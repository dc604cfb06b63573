"""The frozen layers run once for each view of an image, and what is above learns as if they ran in every epoch."""

from collections import Counter
from dataclasses import replace

import keras
import numpy as np
import pytest

from topwork.cancellation import StopSignal
from topwork.data.local_dataset import Split
from topwork.errors import SettingError, Stopped
from topwork.model.freezing import leaves
from topwork.progress import Quiet
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache import features, placement
from topwork.training.feature_cache.placement import free_memory


class Kept(Quiet):
    def __init__(self):
        self.notes = []

    def note(self, message, **facts):
        self.notes.append((message, facts))


@pytest.fixture
def head_job(make_job, tmp_path):
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


def model_of(classifier, workspace):
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return keras.models.load_model(path, compile=False)


def run(job, workspace):
    classifier = transfer(job, pull(job, workspace), workspace)
    return classifier, model_of(classifier, workspace)


def told(progress, message):
    return [facts for note, facts in progress.notes if note == message]


def assert_alike(one, other):
    """Histories within what float16 keeps of a feature."""
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(
            [row[name] for row in one.history], [row[name] for row in other.history], rtol=1e-3, err_msg=name
        )


@pytest.mark.parametrize(("pooling", "cut_at"), [("avg", "high"), ("flatten", "high"), ("avg", "pool")])
def test_without_augmentation_the_cache_changes_nothing_but_the_time(head_job, workspace, pooling, cut_at):
    with_cache, one = run(head_job("on", cut_at, pooling), workspace)
    without, other = run(head_job("off", cut_at, pooling), workspace)
    assert_alike(with_cache, without)
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-3, atol=2e-3)
    assert with_cache.parameters == without.parameters
    assert [layer.name for layer in leaves(one)] == [layer.name for layer in leaves(other)]


def training_images_read(job, workspace, monkeypatch):
    read, images = Counter(), Split.images

    def counted(split, indices):
        # A batch of the others is looked at beforehand, and those after it may be read ahead.
        if split.size == 24:
            read.update(split.names[index] for index in indices)
        return images(split, indices)

    with monkeypatch.context() as patched:
        patched.setattr(Split, "images", counted)
        classifier, _ = run(job, workspace)
    assert len(classifier.history) == job.spec.transfer.epochs
    return read


def test_with_the_cache_no_epoch_reads_an_image(head_job, workspace, monkeypatch):
    few, many = (training_images_read(head_job("on", epochs=epochs), workspace, monkeypatch) for epochs in (2, 5))
    assert len(few) == 24
    assert few == many
    assert training_images_read(head_job("off"), workspace, monkeypatch).total() > 2 * many.total()


def fine_tuned(job, workspace, progress=None):
    workspace = replace(workspace, progress=progress or Kept())
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    return first, fine_tune(job, first, dataset, workspace)


def test_fine_tuning_of_the_top_runs_what_lies_below_once(head_job, workspace):
    progress = Kept()
    settings = {"epochs": 4, "unfreeze": {"layers": 1}, "optimizer": {"learningRate": 0.01}}
    first, cached = fine_tuned(head_job(fine_tune={**settings, "featureCache": "on"}), workspace, progress)
    _, plain = fine_tuned(head_job(fine_tune={**settings, "featureCache": "off"}), workspace)
    (transferred, tuned) = told(progress, "features of the frozen layers")
    assert (transferred["stage"], transferred["shape"]) == ("transfer", "6")
    assert (tuned["stage"], tuned["shape"]) == ("fine-tune", "15x15x4")
    assert cached.parameters == plain.parameters
    assert_alike(cached, plain)
    before, after = model_of(first, workspace), model_of(cached, workspace)
    changed = {
        layer.name
        for layer, other in zip(leaves(before), leaves(after), strict=True)
        if any((one != two).any() for one, two in zip(layer.get_weights(), other.get_weights(), strict=True))
    }
    assert changed == {"high", "hidden_1", "logits"}


def test_with_augmentation_the_head_sees_several_views(head_job, workspace):
    progress = Kept()
    job = head_job({"use": "on", "views": 3}, augmentation={"flip": "both", "rotation": 0.2})
    classifier, _ = run(job, replace(workspace, progress=progress))
    (facts,) = told(progress, "features of the frozen layers")
    assert (facts["views"], facts["kept_in"]) == (3, "memory")
    assert classifier.history[-1]["loss"] < classifier.history[0]["loss"]


def test_the_log_says_why_the_cache_is_used_or_not(head_job, workspace):
    progress = Kept()
    for cache, epochs in (("auto", 5), ("auto", 1), ("off", 3)):
        run(head_job(cache, epochs=epochs), replace(workspace, progress=progress))
    many, single, off = told(progress, "feature cache")
    assert many["used"]
    assert many["reason"].startswith("the frozen layers run once instead of 5 times, about ")
    assert (single["used"], single["reason"]) == (
        False, "the frozen layers run once instead of 1 times, about 1.0 times less to compute"
    )  # fmt: skip
    assert (off["used"], off["reason"]) == (False, "featureCache is off")


class StopsAfter(Kept):
    """Asks to stop when so many batches of features are computed."""

    def __init__(self, stop, batches):
        super().__init__()
        self.stop, self.left = stop, batches
        self.computed = 0

    def track(self, what, total):
        return Batches(self) if what.startswith("features") else super().track(what, total)


class Batches:
    def __init__(self, progress):
        self.progress = progress

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def advance(self, count=1):
        self.progress.computed += count
        self.progress.left -= count
        if self.progress.left == 0:
            self.progress.stop.ask()


def test_a_stopped_run_computes_no_feature_twice(head_job, workspace, monkeypatch):
    monkeypatch.setattr(features, "PIECE_IMAGES", 7)
    job = head_job("on", epochs=3, augmentation={"flip": "both"})
    dataset = pull(job, workspace)
    whole, _ = run(job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": "whole"})}), workspace)
    first = StopsAfter(workspace.stop, 5)
    with pytest.raises(Stopped, match="while computing features of the frozen layers"):
        transfer(job, dataset, replace(workspace, progress=first))
    second = StopsAfter(None, -1)
    classifier = transfer(job, dataset, replace(workspace, progress=second, stop=StopSignal()))
    # 24 images in 4 batches, 3 views; 8 of validation in 2.
    assert (first.computed, second.computed) == (5, 4 * 3 + 2 - 6)
    assert [row["loss"] for row in classifier.history] == [row["loss"] for row in whole.history]
    assert not list(workspace.storage.list(f"runs/{job.run}/transfer/features/"))


def test_features_without_room_in_memory_lie_on_scratch(head_job, workspace, monkeypatch):
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.0)
    progress = Kept()
    on_scratch, _ = run(head_job("on"), replace(workspace, progress=progress))
    assert told(progress, "features of the frozen layers")[0]["kept_in"] == "scratch"
    in_memory, _ = run(head_job("on", epochs=6), workspace)
    assert [row["loss"] for row in on_scratch.history] == [row["loss"] for row in in_memory.history][:5]


def test_features_without_room_are_done_without_or_refused(head_job, workspace, monkeypatch):
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(placement, "FREE_SHARE", 0.0)
    progress = Kept()
    classifier, _ = run(head_job("auto"), replace(workspace, progress=progress))
    assert len(classifier.history) == 5
    assert told(progress, "feature cache")[1]["reason"].startswith("the features take 0.0 GiB: more than a quarter of")
    with pytest.raises(SettingError, match=r"^featureCache of transfer is on, but the features take 0\.0 GiB"):
        run(head_job("on"), workspace)


def test_free_memory_is_that_of_the_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2000 kB\nMemAvailable: 1000 kB\n")
    assert free_memory(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("200000\n")
    assert free_memory(tmp_path) == 300_000
