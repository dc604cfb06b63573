"""The transfer workflow and the end-to-end example: cats and dogs, Xception, the head first and then everything."""

import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

from topwork.spec.model import Augmentation

OVERRIDES = (
    "spec.dataset.imageSize=[75, 75]",
    "spec.transfer.epochs=1",
    "spec.transfer.batchSize=20",
    "spec.fineTune.epochs=1",
    # One step, by which Adam can be told.
    "spec.fineTune.batchSize=40",
    "spec.evaluate.gates=[]",
    "spec.compute.precision=float32",
    "spec.publish.formats=[keras]",
)


@pytest.fixture(scope="module")
def cats(examples):
    examples.mirror_weights("Xception", side=71)
    examples.mirror_tfds("cats_vs_dogs", version="4.0.1", classes=("cat", "dog"), splits={"train": 100}, size=(80, 96))
    return examples.run_one("cats-vs-dogs", *OVERRIDES)


@pytest.fixture(scope="module")
def transferred(cats):
    return cats.model("transfer")


@pytest.fixture(scope="module")
def fine_tuned(cats):
    return cats.model("fine-tune")


@pytest.fixture(scope="module")
def xception(cats, examples):
    """The model that was mirrored as the one with ImageNet weights."""
    return examples.backbones["Xception"]


def norms(model):
    """The batch normalizations among the values of a model."""
    return {name for name in layer_weights(model) if name.endswith("BatchNormalization")}


# The workflow: take layers, freeze them, add new ones, train those, then unfreeze and train on gently.


def test_layers_of_a_trained_model_are_taken_and_frozen(cats, transferred, xception):
    taken, given = layer_weights(transferred.get_layer("base")), layer_weights(xception)
    assert taken.keys() == given.keys()
    assert all(are_identical(taken[name], given[name]) for name in given)
    (groups,) = cats.parameter_counts("transfer")
    assert {trainable for name, (trainable, _) in groups.items() if name.startswith("base/")} == {0}


def test_new_trainable_layers_are_added_and_trained(cats, transferred):
    (groups,) = cats.parameter_counts("transfer")
    assert groups["head"] == (2048 + 1, 0)
    kernel, bias = transferred.get_layer("logits").get_weights()
    assert (kernel.shape, bias.shape) == ((2048, 1), (1,))
    assert bias[0] != 0.0


def test_then_all_of_it_is_trained_on_at_a_very_low_rate(cats):
    (before,), (after,) = cats.history("transfer"), cats.history("fine-tune")
    assert before["learning_rate"] == pytest.approx(1e-3)
    assert after["learning_rate"] == pytest.approx(1e-5)


# The end-to-end example.


def test_splits_are_40_10_and_10_percent(cats):
    assert (cats.dataset.train.size, cats.dataset.validation.size, cats.dataset.test.size) == (40, 10, 10)
    totals = [sum(counts[split] for counts in cats.split_counts.values()) for split in ("train", "validation", "test")]
    assert totals == [40, 10, 10]
    names = [name for split in (cats.dataset.train, cats.dataset.validation, cats.dataset.test) for name in split.names]
    assert len(set(names)) == 60


def test_images_are_resized_in_the_input_pipeline(cats, transferred, examples):
    import tensorflow as tf

    assert tf.io.decode_image(cats.dataset.train.load_encoded(0)).shape == (80, 96, 3)
    assert cats.dataset.train.load_images(np.arange(3)).shape == (3, 75, 75, 3)
    assert transferred.input_shape == (None, 75, 75, 3)
    assert examples.read("cats-vs-dogs").spec.dataset.image_size == (150, 150)


def test_augmentation_flips_horizontally_and_rotates_by_a_tenth(cats):
    assert cats.job.spec.augmentation == Augmentation(flip="horizontal", rotation=0.1)


def test_base_is_xception_without_its_top(transferred, xception):
    kinds = [[type(layer).__name__ for layer in model.layers] for model in (transferred.get_layer("base"), xception)]
    assert kinds[0] == kinds[1]
    assert transferred.get_layer("base").output_shape[1:] == (3, 3, 2048)


def test_raw_pixels_go_in_and_are_scaled_inside_the_model(cats, transferred):
    names = [layer.name for layer in transferred.layers]
    assert names[:3] == ["image", "input_scaling", "base"]
    scaling = transferred.get_layer("input_scaling")
    assert scaling(np.array([[0.0, 127.5, 255.0]])).numpy().tolist() == [[-1.0, 0.0, 1.0]]
    pixels = cats.dataset.test.load_images(np.arange(10))
    assert pixels.dtype == np.uint8
    assert pixels.max() > 100


def test_head_is_average_pooling_dropout_and_one_output_from_logits(transferred):
    head = transferred.layers[3:]
    assert [type(layer).__name__ for layer in head] == ["GlobalAveragePooling2D", "Dropout", "Dense"]
    assert head[1].rate == 0.2
    assert (head[2].units, head[2].activation.__name__) == (1, "linear")


def test_loss_is_binary_cross_entropy_from_logits_and_the_metric_binary_accuracy(cats, transferred):
    import keras

    validation = cats.dataset.validation
    truth = validation.labels[:, np.newaxis].astype("float32")
    logits = transferred.predict(validation.load_images(np.arange(10)).astype("float32"), verbose=0)
    (row,) = cats.history("transfer")
    loss = keras.losses.BinaryCrossentropy(from_logits=True)(truth, logits)
    assert row["validation_loss"] == pytest.approx(float(loss), rel=1e-3)
    accuracy = keras.metrics.BinaryAccuracy(threshold=0.0)
    accuracy.update_state(truth, logits)
    assert row["validation_accuracy"] == pytest.approx(float(accuracy.result()))


def test_the_optimizer_is_adam_in_both_stages(cats, transferred, fine_tuned):
    assert [cats.job.spec.transfer.optimizer.name, cats.job.spec.fine_tune.optimizer.name] == ["adam", "adam"]
    # Adam's first step moves each weight by the learning rate, however large its gradient.
    before, after = transferred.get_layer("logits").get_weights(), fine_tuned.get_layer("logits").get_weights()
    moved = np.abs(after[0].astype("float64") - before[0])
    assert np.median(moved) == pytest.approx(1e-5, rel=0.05)
    assert moved.max() < 1.1e-5


def test_the_whole_base_is_unfrozen_but_for_batch_normalization(cats, transferred, fine_tuned):
    (groups,) = cats.parameter_counts("fine-tune")
    assert all(trainable > 0 for trainable, _ in groups.values())
    kept = norms(transferred.get_layer("base"))
    before, after = layer_weights(transferred.get_layer("base")), layer_weights(fine_tuned.get_layer("base"))
    assert sum(frozen for _, frozen in groups.values()) == sum(array.size for name in kept for array in before[name])
    assert [name for name in before.keys() - kept if are_identical(before[name], after[name])] == []


def test_statistics_of_batch_normalization_are_untouched(transferred, fine_tuned, xception):
    before, after = layer_weights(xception), layer_weights(fine_tuned.get_layer("base"))
    kept = norms(transferred.get_layer("base"))
    assert len(kept) == 40
    assert all(are_identical(before[name], after[name]) for name in kept)


def test_the_test_split_is_evaluated(cats):
    evaluation = cats.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 10)
    probabilities = cats.published_model.predict(cats.dataset.test.load_images(np.arange(10)).astype("float32"), verbose=0)
    labels = cats.dataset.test.labels
    assert evaluation["accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == labels))
    assert evaluation["loss"] == pytest.approx(-np.log(probabilities[np.arange(10), labels]).mean(), rel=1e-3)


# What is said of `trainable`, where the run can tell; more of it is in test_seeds_freezing.py.


def test_run_shows_for_each_stage_what_of_every_layer_group_is_trained(cats, transferred, fine_tuned):
    for stage, model in (("transfer", transferred), ("fine-tune", fine_tuned)):
        (groups,) = cats.parameter_counts(stage)
        assert groups.keys() == {"head", *(f"base/block{number}" for number in range(1, 15))}
        assert sum(trainable + frozen for trainable, frozen in groups.values()) == model.count_params()
    (frozen,), (unfrozen,) = cats.parameter_counts("transfer"), cats.parameter_counts("fine-tune")
    assert {name: sum(counts) for name, counts in frozen.items()} == {
        name: sum(counts) for name, counts in unfrozen.items()
    }
