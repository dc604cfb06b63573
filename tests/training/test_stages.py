"""Transfer and fine-tune on one device: what is trained, what is kept, what is stored."""

import keras
import numpy as np
import pytest

from topwork.model.freezing import leaves
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer


def load(classifier, workspace):
    path = workspace.scratch / f"{classifier.stage}-loaded.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return keras.models.load_model(path, compile=False, safe_mode=True)


def test_a_small_base_from_scratch_learns_and_is_stored(make_job, workspace):
    job = make_job(transfer={"train": "all", "epochs": 3, "batchSize": 5, "optimizer": {"learningRate": 0.01}})
    classifier = transfer(job, pull(job, workspace), workspace)
    assert [(row["stage"], row["epoch"]) for row in classifier.history] == [("transfer", n) for n in (1, 2, 3)]
    assert set(classifier.history[0]) == {
        "stage", "epoch", "loss", "accuracy", "validation_loss", "validation_accuracy",
        "learning_rate", "seconds", "images_per_second",
    }  # fmt: skip
    assert classifier.history[-1]["loss"] < classifier.history[0]["loss"]
    model = load(classifier, workspace)
    assert [layer.name for layer in model.layers] == ["image", "input_scaling", "base", "pooling", "logits"]
    assert model.output_shape == (None, 1)
    assert not model.compiled
