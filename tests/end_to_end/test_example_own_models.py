"""examples/reuse-own-model.yaml and functional-model.yaml: bases from files of Keras models."""

import hashlib

import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights, random_image

SHOES = {"sandal": (120, 90, 40), "shirt": (40, 60, 130)}


def sha256(examples, key):
    return hashlib.sha256(examples.storage.read(key)).hexdigest()


def build_model_a():
    """Build and train a classifier of eight classes with batch normalization in a nested model."""
    import keras

    keras.utils.set_random_seed(4)
    layers = keras.layers
    maps = keras.Input((28, 28, 3))
    normalized = layers.BatchNormalization()(layers.Conv2D(6, 3, use_bias=False)(maps))
    trunk = keras.Model(maps, layers.GlobalAveragePooling2D()(layers.ReLU()(normalized)), name="trunk")
    model = keras.Sequential(
        [
            keras.Input((28, 28, 3)),
            layers.Rescaling(1 / 255),
            trunk,
            layers.Dense(12, activation="relu", name="hidden"),
            layers.Dense(8, activation="softmax", name="probabilities"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    random = np.random.default_rng(4)
    model.fit(random.integers(0, 256, (64, 28, 28, 3)), random.integers(0, 8, 64), batch_size=32, verbose=0)
    return model


@pytest.fixture(scope="module")
def model(examples):
    """Model A, stored as `.keras` where the example expects it, and as a local `.h5` file."""
    model = build_model_a()
    for name in ("model_a.keras", "model_a.h5"):
        model.save(examples.directory / name)
    examples.storage.upload(examples.directory / "model_a.keras", "bases/model_a.keras")
    return model


@pytest.fixture(scope="module")
def model_a_digest(examples, model):
    return sha256(examples, "bases/model_a.keras")


@pytest.fixture(scope="module")
def reused(examples, model_a_digest):
    random = np.random.default_rng(6)
    photos = examples.storage.at("s3://ml-artifacts/photos/sandals-or-shirts")
    for name, color in SHOES.items():
        for index in range(20):
            random_image(random, 28, color).save(examples.directory / "photo.png")
            photos.upload(examples.directory / "photo.png", f"{name}/{index}.png")
    return examples.run_one(
        "reuse-own-model",
        "spec.dataset.splits.perClass={train: 10, validation: 4, test: 6}",
        "spec.transfer.epochs=2",
        "spec.transfer.batchSize=10",
        "spec.fineTune.epochs=2",
        # With so few images, fine-tuning need not improve on the result of transfer, which would be kept.
        "spec.fineTune.keep=last",
        "spec.publish.formats=[keras]",
    )


# Model B reuses all layers of model A except the last.


def test_file_of_model_a_does_not_change(examples, model_a_digest, reused):
    assert reused.job.spec.model.base.saved.uri == examples.storage.uri_of("bases/model_a.keras")
    assert sha256(examples, "bases/model_a.keras") == model_a_digest


def test_base_of_b_is_model_a_without_its_last_layer(model, reused):
    original, reused_weights = layer_weights(model), layer_weights(reused.model("transfer").get_layer("base"))
    assert [name.split()[1] for name in reused_weights] == ["Conv2D", "BatchNormalization", "Dense"]
    assert list(reused_weights) == list(original)[:-1]
    assert all(are_identical(reused_weights[name], original[name]) for name in reused_weights)
    assert reused.model("transfer").get_layer("base").output_shape == (None, 12)


def test_legacy_h5_file_gives_the_same_base(examples, model):
    from topwork.model.saved_base import load_saved_base

    bases = [load_saved_base(examples.directory / name, -2, (28, 28)) for name in ("model_a.keras", "model_a.h5")]
    keras_file, h5_file = map(layer_weights, bases)
    assert keras_file.keys() == h5_file.keys()
    assert all(are_identical(keras_file[name], h5_file[name]) for name in keras_file)


def test_output_of_b_is_a_sigmoid(reused):
    logits, sigmoid = reused.published_model.get_layer("logits"), reused.published_model.get_layer("second_class")
    assert (logits.units, logits.input.shape) == (1, (None, 12))
    assert sigmoid.activation.__name__ == "sigmoid"
    pixels = reused.dataset.test.load_images(np.arange(12)).astype("float32")
    expected = 1 / (1 + np.exp(-reused.model("fine-tune").predict(pixels, verbose=0)[:, 0]))
    assert reused.published_model.predict(pixels, verbose=0)[:, 1] == pytest.approx(expected, abs=1e-6)


def test_transfer_freezes_all_nested_layers_of_a(reused):
    (groups,) = reused.parameter_counts("transfer")
    assert groups.pop("head") == (12 + 1, 0)
    assert sum(trainable for trainable, _ in groups.values()) == 0
    assert sum(frozen for _, frozen in groups.values()) == 3 * 3 * 3 * 6 + 4 * 6 + 6 * 12 + 12
    assert [row["epoch"] for row in reused.history("transfer")] == [1, 2]


def test_fine_tune_unfreezes_a_and_recompiles_the_model(model, reused):
    (groups,) = reused.parameter_counts("fine-tune")
    assert sum(frozen for _, frozen in groups.values()) == 4 * 6  # batch normalization
    assert [row["learning_rate"] for row in reused.history("transfer")] == pytest.approx([0.01] * 2)
    assert [row["learning_rate"] for row in reused.history("fine-tune")] == pytest.approx([0.0001] * 2)
    original, trained = layer_weights(model), layer_weights(reused.model("fine-tune").get_layer("base"))
    assert {name.split()[1]: are_identical(original[name], trained[name]) for name in trained} == {
        "Conv2D": False,
        "BatchNormalization": True,
        "Dense": False,
    }


# A functional model with two branches.


def build_two_branches():
    """Build the model of the example with a different top."""
    import keras

    keras.utils.set_random_seed(5)
    layers = keras.layers
    image = keras.Input((96, 96, 3))
    pixels = layers.Rescaling(1 / 255)(image)
    fine = layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="fine")(pixels)
    coarse = layers.Conv2D(32, 7, strides=2, padding="same", activation="relu", name="coarse")(pixels)
    joined = layers.Concatenate(name="joined")([fine, coarse])
    top = layers.GlobalMaxPooling2D()(layers.Conv2D(8, 3, name="above")(joined))
    return keras.Model(image, layers.Dense(4, activation="softmax")(top))


@pytest.fixture(scope="module")
def two_branches(examples):
    model = build_two_branches()
    model.save(examples.directory / "two_paths.keras")
    examples.storage.upload(examples.directory / "two_paths.keras", "bases/two_paths.keras")
    return model


@pytest.fixture(scope="module")
def functional(examples, two_branches):
    examples.mirror_flowers()
    return examples.run_one(
        "functional-model",
        "spec.transfer.epochs=1",
        "spec.transfer.batchSize=20",
        "spec.fineTune.epochs=1",
        "spec.fineTune.keep=last",
        "spec.publish.formats=[keras]",
    )


def test_base_of_a_functional_model_ends_at_the_named_layer(functional):
    base = functional.model("transfer").get_layer("base")
    names = [layer.name for layer in base.layers]
    assert {"fine", "coarse", "joined"} <= set(names)
    assert "above" not in names
    assert names[-1] == "joined"
    assert base.output_shape == (None, 48, 48, 64)


def test_both_branches_keep_their_weights_in_transfer(functional, two_branches):
    base = functional.model("transfer").get_layer("base")
    for name in ("fine", "coarse"):
        assert are_identical(base.get_layer(name).get_weights(), two_branches.get_layer(name).get_weights())


def test_base_output_equals_the_output_of_the_named_layer(functional, two_branches):
    import keras

    pixels = functional.dataset.test.load_images(np.arange(4)).astype("float32")
    expected = keras.Model(two_branches.inputs[0], two_branches.get_layer("joined").output)(pixels).numpy()
    assert functional.model("transfer").get_layer("base")(pixels).numpy() == pytest.approx(expected, abs=1e-5)


def test_fine_tune_trains_both_branches(functional, two_branches):
    base = functional.model("fine-tune").get_layer("base")
    for name in ("fine", "coarse"):
        assert not are_identical(base.get_layer(name).get_weights(), two_branches.get_layer(name).get_weights())
    assert functional.metrics["evaluation"]["split"] == "test"
