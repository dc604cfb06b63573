"""The frozen base runs once for each view of an image, and the head learns as if it ran in every epoch."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from topwork.errors import SpecError
from topwork.model.freezing import leaves
from topwork.progress import Quiet
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.features import views


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
    maps = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="high")(maps)
    top = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D(name="pool")(maps))
    keras.Model(image, top).save(tmp_path / "a.keras")

    def make(cache="auto", cut_at="high", pooling="avg", epochs=5, augmentation=None):
        settings = {
            "epochs": epochs, "batchSize": 7, "featureCache": cache, "optimizer": {"learningRate": 0.02},
            "earlyStopping": {"patience": 5},
        }  # fmt: skip
        base = {"saved": {"uri": str(tmp_path / "a.keras"), "cutAt": cut_at}}
        model = {"base": base, "head": {"pooling": pooling, "hidden": [6], "dropout": 0.0}}
        return make_job(model=model, transfer=settings, augmentation=augmentation or {})

    return make


def run(job, workspace):
    classifier = transfer(job, pull(job, workspace), workspace)
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return classifier, keras.models.load_model(path, compile=False)


@pytest.mark.parametrize(("pooling", "cut_at"), [("avg", "high"), ("flatten", "high"), ("avg", "pool")])
def test_without_augmentation_the_cache_changes_nothing_but_the_time(head_job, workspace, pooling, cut_at):
    with_cache, one = run(head_job("on", cut_at, pooling), workspace)
    without, other = run(head_job("off", cut_at, pooling), workspace)
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
        np.testing.assert_allclose(
            [row[name] for row in with_cache.history], [row[name] for row in without.history], rtol=1e-4, err_msg=name
        )
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5)
    assert with_cache.parameters == without.parameters
    assert [layer.name for layer in leaves(one)] == [layer.name for layer in leaves(other)]


def test_with_augmentation_the_head_sees_several_views(head_job, workspace):
    progress = Kept()
    job = head_job(augmentation={"flip": "both", "rotation": 0.2})
    classifier, _ = run(job, replace(workspace, progress=progress))
    ((_, facts),) = [note for note in progress.notes if note[0] == "features of the frozen base"]
    assert facts["views"] == 4
    assert classifier.history[-1]["loss"] < classifier.history[0]["loss"]


def test_the_cache_is_used_where_it_saves_work(head_job, make_job):
    def count(cache, epochs=8, *, augmented=False):
        return views(head_job(cache, epochs=epochs).spec, augmented=augmented)

    assert [count("off"), count("auto"), count("on"), count("auto", 1)] == [0, 1, 1, 0]
    several = [count("auto", augmented=True), count("auto", 4, augmented=True), count("on", 3, augmented=True)]
    assert several == [4, 0, 3]
    assert views(head_job(augmentation={"mixUp": 0.2}).spec, augmented=True) == 0
    assert views(make_job(transfer={"train": "all", "epochs": 9}).spec, augmented=False) == 0


def test_mixtures_of_images_cannot_be_kept(head_job):
    spec = head_job(augmentation={"mixUp": 0.2}).spec
    asked_for = spec.model_copy(update={"transfer": spec.transfer.model_copy(update={"feature_cache": "on"})})
    with pytest.raises(SpecError, match=r"^spec\.transfer\.featureCache is on, but mixUp and cutMix mix other images"):
        views(asked_for, augmented=True)
