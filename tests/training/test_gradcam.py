"""Grad-CAM: heat maps show where an image raises the score of a class."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from topwork.model.classifier import build_classifier, with_precision
from topwork.model.gradcam import compute_heat_maps, find_feature_maps
from topwork.model.saved_base import load_saved_base
from topwork.report.mistakes import explain
from topwork.report.pictures import overlay_heat
from topwork.spec.model import Model

MARK = slice(20, 32)
"""Rows and columns of the watermark."""


def build_cnn(pooling="avg", classes=2, filters=(8, 8), hidden=()):
    keras.utils.set_random_seed(3)
    settings = {"base": {"cnn": {"filters": filters}}, "head": {"pooling": pooling, "hidden": hidden, "dropout": 0.0}}
    return build_classifier(Model.model_validate(settings), (32, 32), classes, None)


def marked_images(number):
    """Noise of two classes; the images of the second one have a white square on black in their lower right corner."""
    random = np.random.default_rng(number)
    images = random.integers(60, 196, (number, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(number) % 2
    images[labels == 1, MARK, MARK] = 0
    images[labels == 1, 22:30, 22:30] = 255
    return images, labels


def balance(model, images):
    """Change the first layer above the pooling so that about half of the image raises each of its outputs."""
    position = [layer.name for layer in model.layers].index("pooling")
    pooled = keras.Model(model.inputs[0], model.layers[position].output)(images.astype(np.float32)).numpy()
    mean, layer = pooled.mean(axis=0), model.layers[position + 1]
    kernel, bias = layer.get_weights()
    layer.set_weights([kernel - np.outer(mean, mean @ kernel) / (mean @ mean), bias])


def share_inside_the_mark(heat_maps):
    cell = 32 // heat_maps.shape[1]
    enlarged = heat_maps.repeat(cell, axis=1).repeat(cell, axis=2)
    return enlarged[:, MARK, MARK].sum(axis=(1, 2)) / enlarged.sum(axis=(1, 2))


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
def test_watermark_of_a_class_lights_up(pooling):
    model = build_cnn(pooling)
    images, labels = marked_images(200)
    model.compile(keras.optimizers.Adam(0.01), keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(images.astype(np.float32), labels[:, np.newaxis], epochs=8, batch_size=16, verbose=0)
    images, labels = marked_images(40)
    assert np.mean((model(images.astype(np.float32)).numpy()[:, 0] > 0) == labels) > 0.95
    marked = images[labels == 1]
    heat_maps = compute_heat_maps(find_feature_maps(model), marked, np.ones(20, np.int64), 8)
    assert heat_maps.shape == (20, 8, 8)
    assert heat_maps.max(axis=(1, 2)) == pytest.approx(np.ones(20))
    # The mark covers 14 % of the image.
    assert share_inside_the_mark(heat_maps).min() > 0.5


def test_what_raises_one_of_two_classes_lowers_the_other():
    model, images = build_cnn(), marked_images(4)[0]
    balance(model, images)
    first, second = (compute_heat_maps(find_feature_maps(model), images, np.full(4, label), 4) for label in (0, 1))
    assert np.any(first > 0)
    assert np.any(second > 0)
    assert not np.any((first > 0) & (second > 0))


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_heat_of_a_model_with_average_pooling_is_that_of_the_recipe_of_keras(hidden):
    model = build_cnn(classes=3, hidden=hidden)
    images, labels = marked_images(6)[0], np.array([0, 1, 2, 0, 1, 2])
    balance(model, images)
    base = model.get_layer("base")
    last = keras.Model(model.inputs[0], [model.layers[model.layers.index(base) + 1].input, model.output])
    with tf.GradientTape() as tape:
        maps, logits = last(images.astype(np.float32))
        scores = tf.gather(logits, labels, batch_dims=1)
    weights = tf.reduce_mean(tape.gradient(scores, maps), axis=(1, 2))
    expected = tf.maximum(tf.einsum("nhwc,nc->nhw", maps, weights), 0).numpy()
    highest = expected.max(axis=(1, 2), keepdims=True)
    assert np.sum(highest > 0) >= 3
    expected /= np.where(highest > 0, highest, 1)
    np.testing.assert_allclose(
        compute_heat_maps(find_feature_maps(model), images, labels, 4), expected, atol=1e-5, rtol=1e-4
    )


def test_image_that_raises_no_score_has_no_heat():
    model = build_cnn()
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([-np.abs(kernel), bias])  # the maps are not negative
    images = marked_images(4)[0]
    heat_maps = compute_heat_maps(find_feature_maps(model), images, np.ones(4, np.int64), 4)
    np.testing.assert_array_equal(heat_maps, np.zeros((4, 8, 8)))
    np.testing.assert_array_equal(overlay_heat(images[0], heat_maps[0]), images[0])


def assert_splits(model, size):
    parts = find_feature_maps(model)
    assert parts.size == size
    images = np.random.default_rng(0).uniform(0, 255, (3, *model.input_shape[1:])).astype(np.float32)
    expected = model(images, training=False)
    np.testing.assert_allclose(parts.above(parts.below(images, training=False), training=False), expected, rtol=1e-5)


@pytest.mark.parametrize("application", ["MobileNetV2", "EfficientNetLite0"])
def test_last_feature_maps_of_an_application_are_found(application):
    settings = Model.model_validate({"base": {"application": application, "weights": "none"}})
    assert_splits(build_classifier(settings, (64, 64), 3, None), (2, 2))


def test_maps_of_one_pixel_are_not_the_last_feature_maps():
    assert_splits(build_cnn(filters=(4, 4, 4, 4, 4), classes=3), (2, 2))


def test_last_feature_maps_inside_of_a_saved_base_that_ends_in_a_vector_are_found(tmp_path):
    inner = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, name="convolution"), keras.layers.GlobalMaxPooling2D()],
        name="inner",
    )
    image = keras.Input((32, 32, 3))
    vector = keras.layers.Dense(5, activation="relu")(inner(keras.layers.Rescaling(1 / 255)(image)))
    keras.Model(image, keras.layers.Dense(3)(vector)).save(tmp_path / "own.keras")
    base = load_saved_base(tmp_path / "own.keras", None, (32, 32))
    assert base.output_shape == (None, 5)
    pixels = keras.Input((32, 32, 3), name="image")
    assert_splits(keras.Model(pixels, keras.layers.Dense(1, name="logits")(base(pixels))), (30, 30))


def test_model_that_was_trained_in_half_precision_is_explained():
    model = build_cnn()
    half = with_precision(model, "mixed_bfloat16")
    images, labels = marked_images(4)
    expected = compute_heat_maps(find_feature_maps(model), images, labels, 4)
    actual = compute_heat_maps(find_feature_maps(with_precision(half, "float32")), images, labels, 4)
    np.testing.assert_array_equal(actual, expected)


def test_model_without_feature_maps_is_reported():
    image = keras.Input((32, 32, 3), name="image")
    flat = keras.layers.Dense(4, activation="relu")(keras.layers.Flatten()(image))
    explanation = explain(keras.Model(image, keras.layers.Dense(1)(flat)), *marked_images(2), 2)
    assert explanation.heat_maps is None
    assert explanation.note.startswith("There are no heat maps (Grad-CAM): the model has no feature maps with several ")


def test_rows_are_not_mistaken_for_channels():
    image = keras.Input((32, 32, 3), name="image")
    maps = keras.layers.Permute((3, 1, 2))(keras.layers.Conv2D(4, 3)(image))
    vector = keras.layers.GlobalAveragePooling2D(data_format="channels_first")(maps)
    assert explain(keras.Model(image, keras.layers.Dense(1)(vector)), *marked_images(2), 2).heat_maps is None


def test_layer_with_two_outputs_is_no_place_to_split():
    image = keras.Input((32, 32, 3), name="image")
    maps = keras.layers.Conv2D(4, 3)(image)
    row, state = keras.layers.SimpleRNN(5, return_state=True)(keras.layers.Reshape((900, 4))(maps))
    assert_splits(keras.Model(image, keras.layers.Dense(1)(keras.layers.Add()([row, state]))), (30, 30))


def test_failure_of_grad_cam_is_reported_and_fails_no_run(monkeypatch):
    def fail(*arguments):
        raise tf.errors.UnimplementedError(None, None, "this operation has no gradient")

    monkeypatch.setattr("topwork.report.mistakes.compute_heat_maps", fail)
    explanation = explain(build_cnn(), *marked_images(2), 2)
    assert explanation.heat_maps is None
    assert explanation.note == ("There are no heat maps (Grad-CAM): UnimplementedError: this operation has no gradient")


def test_heat_colors_the_hot_part_of_a_picture():
    gray = np.full((40, 60, 3), 100, np.uint8)
    picture = overlay_heat(gray, np.array([[0.0, 1.0]], np.float32))
    np.testing.assert_array_equal(picture[:, 0], gray[:, 0])
    assert picture[20, -1, 0] > picture[20, -1, 2]  # red
