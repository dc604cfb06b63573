"""Transfer and fine-tune on one device: changed weights, and stored results."""

import json

import keras
import numpy as np
import pytest
from structlog.testing import capture_logs

from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.model.layer_tree import leaf_layers
from topwork.report.documents import render_model_card, render_report
from topwork.report.held_out_evaluation import evaluate_classifier
from topwork.report.results import metrics_json
from topwork.spec.optimizer import Optimizer
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.trainer import train


def load_model(classifier, workspace):
    path = workspace.scratch / f"{classifier.stage}-loaded.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return keras.models.load_model(path, compile=False, safe_mode=True)


def test_small_base_learns_from_scratch_and_is_stored(make_job, workspace):
    job = make_job(transfer={"train": "all", "epochs": 3, "batchSize": 5, "optimizer": {"learningRate": 0.01}})
    classifier = transfer(job, pull(job, workspace), workspace)
    assert [(row["stage"], row["epoch"]) for row in classifier.history] == [("transfer", n) for n in (1, 2, 3)]
    assert set(classifier.history[0]) == {
        "stage", "epoch", "loss", "accuracy", "validation_loss", "validation_accuracy",
        "learning_rate", "seconds", "images_per_second", "input_wait_seconds",
    }  # fmt: skip
    assert classifier.history[-1]["loss"] < classifier.history[0]["loss"]
    series = workspace.metrics.registry.get_sample_value
    seconds, waited = (sum(row[name] for row in classifier.history) for name in ("seconds", "input_wait_seconds"))
    assert (series("topwork_steps_total"), series("topwork_images_total")) == (3 * 4, 3 * 4 * 5)
    assert series("topwork_step_duration_seconds_count") == 3 * 4
    assert series("topwork_step_duration_seconds_sum") == pytest.approx(seconds)
    assert series("topwork_input_wait_seconds_total") == pytest.approx(waited)
    assert series("topwork_step_compute_seconds_total") == pytest.approx(seconds - waited, abs=0.01)
    model = load_model(classifier, workspace)
    assert [layer.name for layer in model.layers] == ["image", "input_scaling", "base", "pooling", "logits"]
    assert model.output_shape == (None, 1)
    assert not model.compiled


def save_small_model(path):
    """Save a functional model like one of a user: two branches, batch normalization, raw pixels, three classes."""
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3))
    pixels = keras.layers.Rescaling(1 / 255, name="scale")(image)
    left = keras.layers.Conv2D(4, 3, padding="same", name="left")(pixels)
    right = keras.layers.Conv2D(4, 5, padding="same", name="right")(pixels)
    both = keras.layers.Concatenate(name="both")([left, right])
    both = keras.layers.BatchNormalization(name="norm")(both)
    maps = keras.layers.Conv2D(6, 3, strides=2, activation="relu", name="deep")(both)
    top = keras.layers.Dense(3, name="classes")(keras.layers.Flatten(name="flat")(maps))
    model = keras.Model(image, top)
    # Statistics that differ from those of the images: batch normalization in training mode would change them.
    model.get_layer("norm").moving_mean.assign(np.linspace(-1, 1, 8))
    model.save(path)
    return path


def weights_by_layer(model):
    return {layer.name: [np.array(value) for value in layer.get_weights()] for layer in leaf_layers(model)}


def changed_layers(before, after):
    assert before.keys() == after.keys()
    same = {name: all(np.array_equal(a, b) for a, b in zip(before[name], after[name], strict=True)) for name in before}
    return {name for name in before if before[name] and not same[name]}


@pytest.fixture
def saved_job(make_job, tmp_path):
    file = save_small_model(tmp_path / "model_a.keras")

    def make(**overrides):
        return make_job(
            **{
                "model": {"base": {"saved": {"uri": str(file), "cutAt": "deep"}}, "head": {"pooling": "avg"}},
                "transfer": {"epochs": 1, "batchSize": 5, "optimizer": {"learningRate": 0.01}},
                **overrides,
            }
        )

    return make


def test_each_stage_changes_its_trained_layers_and_no_bit_of_the_others(saved_job, workspace, tmp_path):
    original = (tmp_path / "model_a.keras").read_bytes()
    # Without a validation split the last epoch is the best: the weights of every phase are kept.
    splits = {"train": "train[:60%]", "test": "train[60%:]"}
    job = saved_job(
        dataset={**saved_job().spec.dataset.model_dump(by_alias=True), "splits": splits},
        fineTune={
            "unfreeze": {"steps": [{"layers": 1, "epochs": 1, "learningRate": 0.01},
                                   {"layers": 2, "epochs": 2, "learningRate": 0.005}]},
        }
    )  # fmt: skip
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    source = weights_by_layer(keras.models.load_model(tmp_path / "model_a.keras"))
    transferred = load_model(first, workspace)
    after_transfer = weights_by_layer(transferred)
    assert {name: after_transfer[name][0].shape for name in ("left", "right", "deep")} == {
        "left": (3, 3, 3, 4), "right": (5, 5, 3, 4), "deep": (3, 3, 8, 6),
    }  # fmt: skip
    for name in ("left", "right", "norm", "deep"):
        for expected, actual in zip(source[name], after_transfer[name], strict=True):
            np.testing.assert_array_equal(actual, expected)
    assert first.parameters.model_dump() == {"trainable": 7, "frozen": 112 + 304 + 32 + 438}

    second = fine_tune(job, first, dataset, workspace)
    tuned = load_model(second, workspace)
    # The top two layers are deep and norm, and batch normalization of the base stays frozen.
    assert changed_layers(after_transfer, weights_by_layer(tuned)) == {"deep", "logits"}
    assert [(row["stage"], row["epoch"]) for row in second.history] == [
        ("transfer", 1), ("fine-tune", 1), ("fine-tune", 2), ("fine-tune", 3),
    ]  # fmt: skip
    assert [row["learning_rate"] for row in second.history] == pytest.approx([0.01, 0.01, 0.005, 0.005])
    assert (tmp_path / "model_a.keras").read_bytes() == original


def test_unfreezing_all_layers_trains_everything_except_batch_normalization(saved_job, workspace):
    job = saved_job(fineTune={"epochs": 1, "keep": "last", "optimizer": {"learningRate": 0.01}})
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    second = fine_tune(job, first, dataset, workspace)
    before, after = weights_by_layer(load_model(first, workspace)), weights_by_layer(load_model(second, workspace))
    assert changed_layers(before, after) == {"left", "right", "deep", "logits"}
    assert second.parameters.model_dump() == {"trainable": 112 + 304 + 438 + 7, "frozen": 32}


HARMFUL = {
    "all": {"epochs": 2, "optimizer": {"name": "sgd", "learningRate": 1.0}},
    "ema": {"epochs": 2, "optimizer": {"name": "sgd", "learningRate": 1.0, "ema": {"momentum": 0.01}}},
    "steps": {
        "unfreeze": {"steps": [{"layers": 1, "epochs": 1, "learningRate": 1.0},
                               {"layers": 2, "epochs": 1, "learningRate": 1.0}]},
        "optimizer": {"name": "sgd"}, "earlyStopping": {"monitor": "accuracy"}, "featureCache": "on",
    },
}  # fmt: skip


def harmful_job(saved_job, **fine_tune_settings):
    """A job whose transfer reaches a good result that its fine-tuning destroys."""
    optimizer = {"name": "sgd", "learningRate": 2.0}
    return saved_job(
        transfer={"epochs": 12, "batchSize": 8, "optimizer": optimizer},
        fineTune=fine_tune_settings,
        evaluate={"metrics": ["accuracy"]},
    )


def warnings_of(events):
    return [event["reason"] for event in events if event["event"] == "fine-tuning did not improve the model"]


@pytest.mark.parametrize("settings", [HARMFUL["ema"], HARMFUL["steps"]], ids=["ema", "steps"])
def test_weights_of_transfer_are_kept_if_fine_tuning_does_not_improve_them(saved_job, workspace, settings):
    job = harmful_job(saved_job, **settings)
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    with capture_logs() as events:
        second = fine_tune(job, first, dataset, workspace)
    before, after = weights_by_layer(load_model(first, workspace)), weights_by_layer(load_model(second, workspace))
    assert changed_layers(before, after) == set()
    assert len(second.rows) == 2
    assert (second.best_epoch, second.kept.stage, second.kept.epoch) == (0, "transfer", first.best_epoch)
    monitor = "accuracy" if "earlyStopping" in settings else "loss"
    best = first.rows[first.best_epoch - 1][f"validation_{monitor}"]
    assert second.kept.start[monitor] == pytest.approx(best, rel=1e-4)
    assert warnings_of(events) == [second.kept.note]
    reason = f"Fine-tuning did not improve the validation {monitor} of transfer ({best:.4f})"
    assert second.kept.note.startswith(reason)
    assert f", so the weights are those of transfer, epoch {first.best_epoch}." in second.kept.note
    series = workspace.metrics.registry.get_sample_value
    labels = {"stage": "fine-tune", "name": "accuracy", "split": "validation"}
    assert series("topwork_best_metric", labels) == second.kept.start["accuracy"]


def test_report_names_the_stage_and_epoch_of_the_weights(saved_job, workspace, tmp_path):
    job = harmful_job(saved_job, **HARMFUL["all"])
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    classifier = fine_tune(job, first, dataset, workspace)
    before, after = (weights_by_layer(load_model(result, workspace)) for result in (first, classifier))
    assert changed_layers(before, after) == set()
    results = evaluate_classifier(job, classifier, dataset, workspace, tmp_path).results
    epoch = classifier.kept.epoch
    assert json.loads(metrics_json(results))["weights"] == {"stage": "transfer", "epoch": epoch}
    for document in (render_report(results), render_model_card(results)):
        assert "Fine-tuning did not improve the validation loss of transfer" in document
        assert f"transfer, epoch {epoch} (the best by validation loss)" in document


def test_weights_of_the_last_epoch_are_kept_on_request_with_a_warning(saved_job, workspace):
    job = harmful_job(saved_job, **HARMFUL["all"], keep="last")
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    with capture_logs() as events:
        second = fine_tune(job, first, dataset, workspace)
    assert (second.best_epoch, str(second.kept)) == (2, "fine-tune, epoch 2")
    last = second.rows[-1]["validation_loss"]
    assert last > second.kept.start["loss"]
    assert evaluate(load_model(second, workspace), job, dataset, workspace) == pytest.approx(last, rel=1e-5)
    (reason,) = warnings_of(events)
    assert reason.startswith(
        f"Fine-tuning made the model worse on the validation split: loss from {second.kept.start['loss']:.4f} to"
    )
    assert reason.endswith("The weights are those of fine-tune, epoch 2, because spec.fineTune.keep is last.")


def test_weights_of_an_improving_fine_tuning_are_kept_without_a_warning(saved_job, workspace):
    job = saved_job(fineTune={"epochs": 3, "optimizer": {"learningRate": 0.003}})
    dataset = pull(job, workspace)
    with capture_logs() as events:
        classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    losses = [classifier.kept.start["loss"], *(row["validation_loss"] for row in classifier.rows)]
    assert classifier.best_epoch == int(np.argmin(losses)) > 0
    assert str(classifier.kept) == f"fine-tune, epoch {classifier.best_epoch}"
    assert warnings_of(events) == []


def test_loss_is_scaled_in_float16_so_that_small_gradients_do_not_underflow(make_job, workspace):
    def build_model():
        keras.utils.set_random_seed(0)
        image = keras.Input((32, 32, 3), name="image")
        pixels = keras.Input((32, 32, 3))
        maps = keras.layers.Conv2D(2, 3, padding="same", activation="relu", name="deep")(pixels)
        features = keras.Model(pixels, maps, name="base")(keras.layers.Rescaling(1 / 255, name="input_scaling")(image))
        vector = keras.layers.GlobalAveragePooling2D(name="pooling")(features)
        # The gradient of a value of the feature maps is about 1e-4 / (24 * 32 * 32): below the smallest float16 number.
        return keras.Model(
            image, keras.layers.Dense(1, kernel_initializer=keras.initializers.Constant(1e-4), name="logits")(vector)
        )

    job = make_job(compute={"gpus": 0, "precision": "mixed_float16"})
    phase = TrainingPhase("all", 1, Optimizer(name="sgd", learning_rate=10.0, clipnorm=0.1))
    plan = TrainingPlan("transfer", (phase,), 24, "auto", False, None, 1, FeatureCachePolicy())
    classifier = train(StageContext(job, plan, "0" * 16, workspace), pull(job, workspace), build_model)
    kernel = build_model().get_layer("base").get_layer("deep").get_weights()[0]
    trained = load_model(classifier, workspace).get_layer("base").get_layer("deep").get_weights()[0]
    # The only step of the epoch has changed it.
    assert (trained != kernel).any()


def test_completed_stage_is_skipped_without_fetching_its_data(saved_job, workspace, monkeypatch):
    job = saved_job()
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    monkeypatch.setattr("topwork.training.trainer.fetch_dataset", lambda *_: pytest.fail("fetched again"))
    assert transfer(job, dataset, workspace) == first
    series, stage = workspace.metrics.registry.get_sample_value, {"stage": "transfer"}
    assert series("topwork_epoch", stage) == 1.0
    assert series("topwork_stage_start_timestamp_seconds", stage) == pytest.approx(first.started.timestamp())
    duration = (first.finished - first.started).total_seconds()
    assert series("topwork_stage_duration_seconds", stage) == pytest.approx(duration)


def test_input_bound_epoch_is_logged_with_advice(make_job, workspace, monkeypatch):
    monkeypatch.setattr("topwork.training.input_stalls.MIN_INPUT_WAIT_SECONDS", 0.0)
    monkeypatch.setattr("topwork.training.input_stalls.INPUT_BOUND_SHARE", 0.0)
    job = make_job(transfer={"train": "all", "epochs": 1, "batchSize": 8}, augmentation={"rotation": 0.1})
    with capture_logs() as events:
        row = transfer(job, pull(job, workspace), workspace).history[0]
    assert [event for event in events if event["event"] == "training is input-bound"] == [
        {
            "event": "training is input-bound",
            "log_level": "warning",
            "stage": "transfer",
            "epoch": 1,
            "waited": f"{row['input_wait_seconds'] / row['seconds']:.0%}",
            "advice": "remove rotation from spec.augmentation; "
            "raise spec.compute.cpu above 4, or use a machine with more cores",
        }
    ]


def test_early_stopping_ends_the_stage_and_keeps_the_best_weights(make_job, workspace):
    rate = {"name": "sgd", "learningRate": 5.0}
    job = make_job(
        transfer={"train": "all", "epochs": 8, "batchSize": 8, "optimizer": rate, "earlyStopping": {"patience": 2}}
    )
    dataset = pull(job, workspace)
    classifier = transfer(job, dataset, workspace)
    losses = [row["validation_loss"] for row in classifier.history]
    best = int(np.argmin(losses)) + 1
    assert classifier.best_epoch == best
    assert len(losses) == best + 2 < 8
    assert evaluate(load_model(classifier, workspace), job, dataset, workspace) == pytest.approx(
        losses[best - 1], rel=1e-5
    )


def evaluate(model, job, dataset, workspace):
    """Compute the loss on the validation split with Keras only."""
    split = fetch_dataset(dataset, job, workspace).validation
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    images = split.load_images(np.arange(split.size)).astype(np.float32)
    return model.evaluate(images, split.labels[:, None].astype(np.float32), batch_size=split.size, verbose=0)


def test_moving_average_of_the_weights_is_validated_and_kept(make_job, workspace):
    optimizer = {"name": "sgd", "learningRate": 0.1, "ema": {"momentum": 0.9}}
    job = make_job(
        transfer={"train": "all", "epochs": 3, "batchSize": 8, "optimizer": optimizer, "classWeights": "balanced"}
    )
    dataset = pull(job, workspace)
    classifier = transfer(job, dataset, workspace)
    loss = classifier.history[classifier.best_epoch - 1]["validation_loss"]
    assert evaluate(load_model(classifier, workspace), job, dataset, workspace) == pytest.approx(loss, rel=1e-5)
    without = make_job(
        transfer={"train": "all", "epochs": 3, "batchSize": 8, "optimizer": {"name": "sgd", "learningRate": 0.1}}
    )
    plain = transfer(without, dataset, workspace)
    # The training itself is the same without the average: only the validated and kept weights differ.
    assert [row["loss"] for row in plain.history] == pytest.approx([row["loss"] for row in classifier.history], 1e-6)
    assert plain.history[0]["validation_loss"] != pytest.approx(classifier.history[0]["validation_loss"], rel=1e-3)


def test_mixed_precision_model_is_stored_in_float32(make_job, workspace):
    job = make_job(compute={"gpus": 0, "precision": "mixed_bfloat16"})
    model = load_model(transfer(job, pull(job, workspace), workspace), workspace)
    assert {layer.dtype_policy.name for layer in leaf_layers(model)} == {"float32"}


def test_diverged_loss_is_an_error_that_suggests_a_fix(make_job, workspace):
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(2, 1, kernel_initializer="ones")])
    model.layers[0].kernel.assign(np.full((1, 1, 3, 2), np.inf))
    path = workspace.scratch / "broken.keras"
    model.save(path)
    job = make_job(model={"base": {"saved": {"uri": str(path), "cutAt": -1}}}, transfer={"epochs": 2, "batchSize": 8})
    with pytest.raises(
        DataError, match=r"The loss is (nan|inf) in epoch 1 at step 1: training diverged\. Use a smaller learningRate"
    ):
        transfer(job, pull(job, workspace), workspace)
