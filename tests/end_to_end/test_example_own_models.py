"""Bases from files: a model of one's own, reused and never changed, and a functional one with several paths."""

import hashlib

import numpy as np
import pytest
from tests.end_to_end.example_systems import random_image, are_identical, layer_weights

SHOES = {"sandal": (120, 90, 40), "shirt": (40, 60, 130)}


def sha256(examples, key):
    return hashlib.sha256(examples.storage.read(key)).hexdigest()


def model_a():
    """A trained classifier of eight classes, with batch normalization in a model within the model."""
    import keras

    keras.utils.set_random_seed(4)
    layers = keras.layers
    maps = keras.Input((28, 28, 3))
    normal = layers.BatchNormalization()(layers.Conv2D(6, 3, use_bias=False)(maps))
    trunk = keras.Model(maps, layers.GlobalAveragePooling2D()(layers.ReLU()(normal)), name="trunk")
    model = keras.Sequential(
        [
            keras.Input((28, 28, 3)),
            layers.Rescaling(1 / 255),
            trunk,
            layers.Dense(12, activation="relu", name="thinking"),
            layers.Dense(8, activation="softmax", name="eight"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    random = np.random.default_rng(4)
    model.fit(random.integers(0, 256, (64, 28, 28, 3)), random.integers(0, 8, 64), batch_size=32, verbose=0)
    return model


@pytest.fixture(scope="module")
def model(examples):
    """A, and its file where the example looks for it; the `.h5` lies on this machine."""
    made = model_a()
    for name in ("model_a.keras", "model_a.h5"):
        made.save(examples.directory / name)
    examples.storage.upload(examples.directory / "model_a.keras", "bases/model_a.keras")
    return made


@pytest.fixture(scope="module")
def before(examples, model):
    return sha256(examples, "bases/model_a.keras")


@pytest.fixture(scope="module")
def reused(examples, before):
    random = np.random.default_rng(6)
    photos = examples.storage.at("s3://ml-artifacts/photos/sandals-or-shirts")
    for name, hue in SHOES.items():
        for index in range(20):
            random_image(random, 28, hue).save(examples.directory / "photo.png")
            photos.upload(examples.directory / "photo.png", f"{name}/{index}.png")
    return examples.run_one(
        "reuse-own-model",
        "spec.dataset.splits.perClass={train: 10, validation: 4, test: 6}",
        "spec.transfer.epochs=2",
        "spec.transfer.batchSize=10",
        "spec.fineTune.epochs=2",
        "spec.publish.formats=[keras]",
    )


# Reuse of an own model.


def test_a_itself_never_changes(examples, before, reused):
    assert reused.job.spec.model.base.saved.uri == examples.storage.uri_of("bases/model_a.keras")
    assert sha256(examples, "bases/model_a.keras") == before


def test_all_layers_of_a_but_the_last_are_the_base_of_b(model, reused):
    given, taken = layer_weights(model), layer_weights(reused.model("transfer").get_layer("base"))
    assert [name.split()[1] for name in taken] == ["Conv2D", "BatchNormalization", "Dense"]
    assert list(taken) == list(given)[:-1]
    assert all(are_identical(taken[name], given[name]) for name in taken)
    assert reused.model("transfer").get_layer("base").output_shape == (None, 12)


def test_legacy_h5_gives_the_same_base(examples, model):
    from topwork.model.saved_base import load_saved_base

    bases = [load_saved_base(examples.directory / name, -2, (28, 28)) for name in ("model_a.keras", "model_a.h5")]
    keras_file, h5_file = map(layer_weights, bases)
    assert keras_file.keys() == h5_file.keys()
    assert all(are_identical(keras_file[name], h5_file[name]) for name in keras_file)


def test_b_answers_with_a_sigmoid(reused):
    logits, sigmoid = reused.published_model.get_layer("logits"), reused.published_model.get_layer("second_class")
    assert (logits.units, logits.input.shape) == (1, (None, 12))
    assert sigmoid.activation.__name__ == "sigmoid"
    pixels = reused.dataset.test.load_images(np.arange(12)).astype("float32")
    answer = 1 / (1 + np.exp(-reused.model("fine-tune").predict(pixels, verbose=0)[:, 0]))
    assert reused.published_model.predict(pixels, verbose=0)[:, 1] == pytest.approx(answer, abs=1e-6)


def test_a_is_frozen_for_the_first_epochs_at_every_depth(reused):
    (groups,) = reused.parameter_counts("transfer")
    assert groups.pop("head") == (12 + 1, 0)
    assert sum(trainable for trainable, _ in groups.values()) == 0
    assert sum(frozen for _, frozen in groups.values()) == 3 * 3 * 3 * 6 + 4 * 6 + 6 * 12 + 12
    assert [row["epoch"] for row in reused.history("transfer")] == [1, 2]


def test_then_a_is_unfrozen_and_compiled_anew(model, reused):
    (groups,) = reused.parameter_counts("fine-tune")
    assert sum(frozen for _, frozen in groups.values()) == 4 * 6  # batch normalization
    assert [row["learning_rate"] for row in reused.history("transfer")] == pytest.approx([0.01] * 2)
    assert [row["learning_rate"] for row in reused.history("fine-tune")] == pytest.approx([0.0001] * 2)
    given, trained = layer_weights(model), layer_weights(reused.model("fine-tune").get_layer("base"))
    assert {name.split()[1]: are_identical(given[name], trained[name]) for name in trained} == {
        "Conv2D": False,
        "BatchNormalization": True,
        "Dense": False,
    }


# Functional models.


def two_paths():
    """The model that the example shows, with a top of its own."""
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
def paths(examples):
    model = two_paths()
    model.save(examples.directory / "two_paths.keras")
    examples.storage.upload(examples.directory / "two_paths.keras", "bases/two_paths.keras")
    return model


@pytest.fixture(scope="module")
def functional(examples, paths):
    examples.mirror_flowers()
    return examples.run_one(
        "functional-model",
        "spec.transfer.epochs=1",
        "spec.transfer.batchSize=20",
        "spec.fineTune.epochs=1",
        "spec.publish.formats=[keras]",
    )


def test_a_functional_model_is_cut_at_the_layer_that_is_named(functional):
    base = functional.model("transfer").get_layer("base")
    names = [layer.name for layer in base.layers]
    assert {"fine", "coarse", "joined"} <= set(names)
    assert "above" not in names
    assert names[-1] == "joined"
    assert base.output_shape == (None, 48, 48, 64)


def test_both_paths_bring_their_weights(functional, paths):
    base = functional.model("transfer").get_layer("base")
    for name in ("fine", "coarse"):
        assert are_identical(base.get_layer(name).get_weights(), paths.get_layer(name).get_weights())


def test_the_base_answers_as_the_model_did_at_that_layer(functional, paths):
    import keras

    pixels = functional.dataset.test.load_images(np.arange(4)).astype("float32")
    wanted = keras.Model(paths.inputs[0], paths.get_layer("joined").output)(pixels).numpy()
    assert functional.model("transfer").get_layer("base")(pixels).numpy() == pytest.approx(wanted, abs=1e-5)


def test_both_paths_are_trained_once_they_are_unfrozen(functional, paths):
    base = functional.model("fine-tune").get_layer("base")
    for name in ("fine", "coarse"):
        assert not are_identical(base.get_layer(name).get_weights(), paths.get_layer(name).get_weights())
    assert functional.metrics["evaluation"]["split"] == "test"
