"""examples/cats-vs-dogs.yaml: Xception; transfer trains a new head, and fine-tuning trains the whole model."""

import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

from topwork.spec.model import Augmentation

OVERRIDES = (
    "spec.dataset.imageSize=[75, 75]",
    "spec.transfer.epochs=1",
    "spec.transfer.batchSize=20",
    "spec.fineTune.epochs=1",
    # One step, so that the update of Adam can be checked.
    "spec.fineTune.batchSize=40",
    # One step need not improve on the result of transfer, which would be kept.
    "spec.fineTune.keep=last",
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
    """The model whose weights the mirror serves as the ImageNet weights."""
    return examples.backbones["Xception"]


def batch_normalization_names(model):
    """Return the keys of the batch normalization layers in `layer_weights`."""
    return {name for name in layer_weights(model) if name.endswith("BatchNormalization")}


# The workflow: freeze a pretrained base, train a new head on it, then unfreeze the base and fine-tune.


def test_transfer_freezes_the_pretrained_base(cats, transferred, xception):
    actual, expected = layer_weights(transferred.get_layer("base")), layer_weights(xception)
    assert actual.keys() == expected.keys()
    assert all(are_identical(actual[name], expected[name]) for name in expected)
    (groups,) = cats.parameter_counts("transfer")
    assert {trainable for name, (trainable, _) in groups.items() if name.startswith("base/")} == {0}


def test_transfer_trains_the_new_head(cats, transferred):
    (groups,) = cats.parameter_counts("transfer")
    assert groups["head"] == (2048 + 1, 0)
    kernel, bias = transferred.get_layer("logits").get_weights()
    assert (kernel.shape, bias.shape) == ((2048, 1), (1,))
    assert bias[0] != 0.0


def test_fine_tune_uses_a_very_low_learning_rate(cats):
    (before,), (after,) = cats.history("transfer"), cats.history("fine-tune")
    assert before["learning_rate"] == pytest.approx(1e-3)
    assert after["learning_rate"] == pytest.approx(1e-5)


# The end-to-end example in detail.


def test_splits_are_40_10_and_10_percent(cats):
    assert (cats.dataset.train.size, cats.dataset.validation.size, cats.dataset.test.size) == (40, 10, 10)
    totals = [sum(counts[split] for counts in cats.split_counts.values()) for split in ("train", "validation", "test")]
    assert totals == [40, 10, 10]
    names = [name for split in (cats.dataset.train, cats.dataset.validation, cats.dataset.test) for name in split.names]
    assert len(set(names)) == 60


def test_input_pipeline_resizes_images(cats, transferred, examples):
    import tensorflow as tf

    assert tf.io.decode_image(cats.dataset.train.load_encoded(0)).shape == (80, 96, 3)
    assert cats.dataset.train.load_images(np.arange(3)).shape == (3, 75, 75, 3)
    assert transferred.input_shape == (None, 75, 75, 3)
    assert examples.read("cats-vs-dogs").spec.dataset.image_size == (150, 150)


def test_augmentation_flips_horizontally_and_rotates_by_a_tenth(cats):
    assert cats.job.spec.augmentation == Augmentation(flip="horizontal", rotation=0.1)


def test_base_is_xception_without_top(transferred, xception):
    classes = [[type(layer).__name__ for layer in model.layers] for model in (transferred.get_layer("base"), xception)]
    assert classes[0] == classes[1]
    assert transferred.get_layer("base").output_shape[1:] == (3, 3, 2048)


def test_model_scales_raw_pixels(cats, transferred):
    names = [layer.name for layer in transferred.layers]
    assert names[:3] == ["image", "input_scaling", "base"]
    scaling = transferred.get_layer("input_scaling")
    assert scaling(np.array([[0.0, 127.5, 255.0]])).numpy().tolist() == [[-1.0, 0.0, 1.0]]
    pixels = cats.dataset.test.load_images(np.arange(10))
    assert pixels.dtype == np.uint8
    assert pixels.max() > 100


def test_head_is_average_pooling_dropout_and_one_logit(transferred):
    head = transferred.layers[3:]
    assert [type(layer).__name__ for layer in head] == ["GlobalAveragePooling2D", "Dropout", "Dense"]
    assert head[1].rate == 0.2
    assert (head[2].units, head[2].activation.__name__) == (1, "linear")


def test_history_has_binary_cross_entropy_and_binary_accuracy(cats, transferred):
    import keras

    validation = cats.dataset.validation
    labels = validation.labels[:, np.newaxis].astype("float32")
    logits = transferred.predict(validation.load_images(np.arange(10)).astype("float32"), verbose=0)
    (row,) = cats.history("transfer")
    loss = keras.losses.BinaryCrossentropy(from_logits=True)(labels, logits)
    assert row["validation_loss"] == pytest.approx(float(loss), rel=1e-3)
    accuracy = keras.metrics.BinaryAccuracy(threshold=0.0)
    accuracy.update_state(labels, logits)
    assert row["validation_accuracy"] == pytest.approx(float(accuracy.result()))


def test_both_stages_use_adam(cats, transferred, fine_tuned):
    assert [cats.job.spec.transfer.optimizer.name, cats.job.spec.fine_tune.optimizer.name] == ["adam", "adam"]
    # The first step of Adam changes each weight by the learning rate, independent of the size of its gradient.
    before, after = transferred.get_layer("logits").get_weights(), fine_tuned.get_layer("logits").get_weights()
    changes = np.abs(after[0].astype("float64") - before[0])
    assert np.median(changes) == pytest.approx(1e-5, rel=0.05)
    assert changes.max() < 1.1e-5


def test_fine_tune_trains_the_whole_base_except_batch_normalization(cats, transferred, fine_tuned):
    (groups,) = cats.parameter_counts("fine-tune")
    assert all(trainable > 0 for trainable, _ in groups.values())
    batch_norms = batch_normalization_names(transferred.get_layer("base"))
    before, after = layer_weights(transferred.get_layer("base")), layer_weights(fine_tuned.get_layer("base"))
    assert sum(frozen for _, frozen in groups.values()) == sum(
        array.size for name in batch_norms for array in before[name]
    )
    assert [name for name in before.keys() - batch_norms if are_identical(before[name], after[name])] == []


def test_batch_normalization_keeps_its_pretrained_weights(transferred, fine_tuned, xception):
    before, after = layer_weights(xception), layer_weights(fine_tuned.get_layer("base"))
    batch_norms = batch_normalization_names(transferred.get_layer("base"))
    assert len(batch_norms) == 40
    assert all(are_identical(before[name], after[name]) for name in batch_norms)


def test_model_is_evaluated_on_the_test_split(cats):
    evaluation = cats.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 10)
    probabilities = cats.published_model.predict(
        cats.dataset.test.load_images(np.arange(10)).astype("float32"), verbose=0
    )
    labels = cats.dataset.test.labels
    assert evaluation["accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == labels))
    assert evaluation["loss"] == pytest.approx(-np.log(probabilities[np.arange(10), labels]).mean(), rel=1e-3)


# Reported parameter counts; test_freezing_semantics.py tests `trainable` itself.


def test_each_stage_logs_the_trainable_parameters_of_all_layer_groups(cats, transferred, fine_tuned):
    for stage, model in (("transfer", transferred), ("fine-tune", fine_tuned)):
        (groups,) = cats.parameter_counts(stage)
        assert groups.keys() == {"head", *(f"base/block{number}" for number in range(1, 15))}
        assert sum(trainable + frozen for trainable, frozen in groups.values()) == model.count_params()
    (frozen,), (unfrozen,) = cats.parameter_counts("transfer"), cats.parameter_counts("fine-tune")
    assert {name: sum(counts) for name, counts in frozen.items()} == {
        name: sum(counts) for name, counts in unfrozen.items()
    }
