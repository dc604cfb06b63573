"""examples/lab-1-flowers-base.yaml and lab-2-cifar10.yaml: a base trained from scratch and transferred to CIFAR-10."""

import numpy as np
import pytest
from tests.end_to_end.example_systems import FLOWERS, layer_weights

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OVERRIDES = ("spec.transfer.epochs=2", "spec.transfer.batchSize=20")


@pytest.fixture(scope="module")
def labs(examples):
    examples.mirror_flowers()
    examples.mirror_tfds("cifar10", version="3.0.2", classes=CIFAR10, splits={"train": 200, "test": 50}, size=(32, 32))
    return examples.run("lab-1-flowers-base lab-2-cifar10", *OVERRIDES)


@pytest.fixture(scope="module")
def flowers(labs):
    return labs[0]


@pytest.fixture(scope="module")
def cifar(labs):
    return labs[1]


def convolution_layers(model):
    return [layer for layer in model.layers if type(layer).__name__ == "Conv2D"]


# Lab 1: a base trained from scratch.


def test_number_of_classes_comes_from_the_tfds_metadata(flowers):
    assert flowers.dataset_metadata.source == {"tfds": "tf_flowers/3.0.1"}
    assert tuple(flowers.dataset_metadata.class_names) == FLOWERS
    assert flowers.model("transfer").get_layer("logits").units == 5


def test_model_scales_32x32_images_by_255(flowers):
    model = flowers.model("transfer")
    assert model.input_shape == (None, 32, 32, 3)
    assert model.get_layer("input_scaling").scale == pytest.approx(1 / 255)
    assert model.get_layer("input_scaling").offset == 0


def test_base_has_three_5x5_same_padded_relu_convolutions_with_pooling(flowers):
    base = flowers.model("transfer").get_layer("base")
    classes = [type(layer).__name__ for layer in base.layers[1:]]
    assert classes == ["Conv2D", "MaxPooling2D"] * 3
    for layer in convolution_layers(base):
        assert (layer.kernel_size, layer.padding, layer.activation.__name__) == ((5, 5), "same", "relu")
    assert base.output_shape == (None, 4, 4, 128)


def test_head_is_a_dense_layer_of_128_and_a_softmax(flowers):
    names = [layer.name for layer in flowers.published_model.layers]
    assert names == ["image", "input_scaling", "base", "flatten", "hidden_1", "logits", "probabilities"]
    hidden = flowers.published_model.get_layer("hidden_1")
    assert (hidden.units, hidden.activation.__name__) == (128, "relu")
    assert type(flowers.published_model.get_layer("probabilities")).__name__ == "Softmax"


def test_transfer_trains_all_layers_and_reduces_the_loss(flowers, examples):
    (groups,) = flowers.parameter_counts("transfer")
    assert groups.keys() == {"base/convolution_1", "base/convolution_2", "base/convolution_3", "head"}
    assert {frozen for _, frozen in groups.values()} == {0}
    rows = flowers.history("transfer")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["loss"] < rows[0]["loss"]
    assert examples.read("lab-1-flowers-base").spec.transfer.epochs == 10


def test_model_is_published_where_lab_2_expects_it(flowers, cifar):
    uri = cifar.job.spec.model.base.saved.uri
    assert uri == flowers.storage.uri_of(f"{flowers.version_key}/model.keras")


# Lab 2: transfer to a new task.


def test_base_is_the_saved_model_up_to_its_last_convolution(flowers, cifar):
    base = cifar.model("transfer").get_layer("base")
    classes = [name.split()[1] for name in layer_weights(base)]
    assert classes == ["Conv2D"] * 3
    assert base.output_shape == (None, 4, 4, 128)


def test_output_layer_of_a_saved_base_can_be_an_index(flowers, examples):
    from topwork.model.saved_base import load_saved_base

    path = flowers.directory / "lab_1.keras"
    examples.storage.download(f"{flowers.version_key}/model.keras", path)
    by_index, by_name = load_saved_base(path, -4, (32, 32)), load_saved_base(path, "flatten", (32, 32))
    assert by_index.output_shape == by_name.output_shape == (None, 2048)


def test_trained_convolutions_are_transferred(flowers, cifar):
    trained = [layer.get_weights()[0] for layer in convolution_layers(flowers.model("transfer").get_layer("base"))]
    transferred = layer_weights(cifar.model("transfer").get_layer("base"))
    for before, (after, _) in zip(trained, transferred.values(), strict=True):
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.9


def test_new_head_is_a_dense_layer_of_128_and_a_softmax_of_10(flowers, cifar):
    new, old = cifar.published_model.get_layer("hidden_1"), flowers.published_model.get_layer("hidden_1")
    assert (new.units, new.activation.__name__) == (128, "relu")
    assert abs(np.corrcoef(new.get_weights()[0].ravel(), old.get_weights()[0].ravel())[0, 1]) < 0.1
    assert cifar.published_model.get_layer("logits").units == 10
    assert type(cifar.published_model.get_layer("probabilities")).__name__ == "Softmax"
    assert tuple(cifar.dataset_metadata.class_names) == CIFAR10


def test_transfer_trains_the_whole_model(flowers, cifar):
    (groups,) = cifar.parameter_counts("transfer")
    assert sum(trainable for trainable, _ in groups.values()) == cifar.model("transfer").count_params()
    assert {frozen for _, frozen in groups.values()} == {0}
    before, after = (layer_weights(run.model("transfer").get_layer("base")).values() for run in (flowers, cifar))
    assert all(np.any(old[0] != new[0]) for old, new in zip(before, after, strict=True))


def test_transfer_uses_sparse_categorical_cross_entropy_and_adam(cifar):
    import keras

    transfer, validation = cifar.job.spec.transfer, cifar.dataset.validation
    assert (transfer.loss, transfer.optimizer.name) == ("sparseCategoricalCrossentropy", "adam")
    logits = cifar.model("transfer").predict(validation.load_images(np.arange(20)).astype("float32"), verbose=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(validation.labels, logits)
    best = cifar.history("transfer")[cifar.stage_result("transfer").best_epoch - 1]
    assert best["validation_loss"] == pytest.approx(float(loss), rel=1e-3)


def test_model_is_evaluated_on_all_test_images(cifar):
    assert (cifar.metrics["evaluation"]["split"], cifar.metrics["evaluation"]["images"]) == ("test", 50)
