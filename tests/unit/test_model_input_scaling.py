"""Input scaling of saved bases: the spec key, and the warning if a model receives unscaled pixels."""

import keras
import numpy as np
import pytest
import structlog

from topwork.errors import DataError
from topwork.model.backbones import scale_inputs
from topwork.model.classifier import build_base
from topwork.model.conversion.variant import Normalization
from topwork.model.input_scaling import describe_input_scaling, find_input_scaling
from topwork.spec.model import Base

SIZE = (8, 8)
layers = keras.layers


def make_model(*first):
    image = keras.Input((*SIZE, 3))
    tensor = image
    for layer in first:
        tensor = layer(tensor)
    return keras.Model(image, layers.Conv2D(2, 3, name="features")(tensor))


def batch_norm(mean, variance):
    layer = layers.BatchNormalization()
    layer.build((None, *SIZE, 3))
    layer.set_weights([np.ones(3), np.zeros(3), np.full(3, mean), np.full(3, variance)])
    return layer


applications = keras.applications
SCALED = {
    "0..1": lambda: [layers.Rescaling(1 / 255)],
    "-1..1": lambda: [layers.Rescaling(1 / 127.5, offset=-1.0)],
    "mean": lambda: [layers.Rescaling(1.0, offset=[-123.0, -116.0, -103.0])],
    "behind augmentation": lambda: [layers.RandomFlip(), layers.ZeroPadding2D(), layers.Rescaling(1 / 255)],
    "nested": lambda: [keras.Sequential([keras.Input((*SIZE, 3)), layers.RandomFlip(), layers.Rescaling(1 / 255)])],
    "statistics": lambda: [layers.Normalization(mean=[128.0] * 3, variance=[4000.0] * 3)],
    "batch norm": lambda: [batch_norm(120.0, 4000.0)],
    "new batch norm": lambda: [layers.BatchNormalization()],
    "layer norm": lambda: [layers.LayerNormalization()],
    "division": lambda: [lambda x: x / 255.0],
    "cast": lambda: [lambda x: keras.ops.cast(x, "float32") * (1 / 255)],
    "tf": lambda: [applications.mobilenet_v2.preprocess_input],
    "torch": lambda: [applications.densenet.preprocess_input],
    "caffe": lambda: [applications.resnet50.preprocess_input],
}
UNSCALED = {
    "nothing": list,
    "augmentation": lambda: [layers.RandomFlip(), layers.Resizing(4, 4), layers.Dropout(0.1)],
    "expects 0..1": lambda: [layers.Rescaling(2.0, offset=-1.0)],
    "expects -1..1": lambda: [layers.Rescaling(0.5, offset=0.5)],
    "statistics of 0..1": lambda: [layers.Normalization(mean=[0.5] * 3, variance=[0.05] * 3)],
    "batch norm of 0..1": lambda: [batch_norm(0.5, 0.06)],
    "later": lambda: [layers.Conv2D(3, 3), layers.Rescaling(1 / 255)],
    "one branch": lambda: [lambda x: layers.Add()([x, x / 255.0])],
}


@pytest.mark.parametrize("first", SCALED)
def test_layer_that_scales_pixels_is_found(first):
    assert find_input_scaling(make_model(*SCALED[first]())).scales_pixels


@pytest.mark.parametrize("first", UNSCALED)
def test_model_that_expects_scaled_input_is_found(first):
    assert not find_input_scaling(make_model(*UNSCALED[first]())).scales_pixels


def save(tmp_path, *first):
    model = make_model(*first)
    model.save(tmp_path / "own.keras")
    return model


def build(tmp_path, scaling):
    settings = {"uri": str(tmp_path / "own.keras"), "cutAt": "features"}
    base = Base.model_validate({"saved": settings | ({"scaling": scaling} if scaling else {})})
    with structlog.testing.capture_logs() as lines:
        built = build_base(base, SIZE, tmp_path / "own.keras")
    return keras.Model(built.image, built.output), [line["event"] for line in lines if line["log_level"] == "warning"]


EXPECTED = {
    "none": lambda pixels: pixels,
    "zeroToOne": lambda pixels: pixels / 255,
    "minusOneToOne": lambda pixels: pixels / 127.5 - 1,
    "torch": lambda pixels: applications.imagenet_utils.preprocess_input(pixels.copy(), mode="torch"),
    "caffe": lambda pixels: applications.imagenet_utils.preprocess_input(pixels.copy(), mode="caffe"),
}


@pytest.mark.parametrize("scaling", EXPECTED)
def test_base_receives_pixels_scaled_as_in_its_training(tmp_path, scaling):
    model = save(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.float32)
    base, warnings = build(tmp_path, scaling)
    np.testing.assert_allclose(base(pixels), model(EXPECTED[scaling](pixels)), rtol=1e-4, atol=1e-4)
    assert warnings == []


def test_base_without_scaling_is_a_warning_that_names_the_key(tmp_path):
    save(tmp_path)
    _, (warning,) = build(tmp_path, None)
    assert warning == (
        "own.keras receives pixels in 0..255, because it has no layer that scales its input. If it was trained on "
        "scaled images, its features are wrong: set spec.model.base.saved.scaling to zeroToOne, minusOneToOne, torch "
        "or caffe, as in its training, or to none if it was trained on 0..255"
    )


def test_base_that_scales_its_input_is_not_a_warning(tmp_path):
    save(tmp_path, layers.Rescaling(1 / 255))
    assert build(tmp_path, None)[1] == []


def test_input_is_not_scaled_twice(tmp_path):
    save(tmp_path, layers.Rescaling(1 / 255, name="own_scaling"))
    with pytest.raises(DataError) as error:
        build(tmp_path, "zeroToOne")
    assert str(error.value) == (
        "spec.model.base.saved.scaling is zeroToOne, but own.keras already scales pixels in 0..255 (own_scaling): its "
        "input would be scaled twice. Remove the key."
    )


def test_batch_normalization_and_scaling_are_a_warning(tmp_path):
    save(tmp_path, layers.BatchNormalization())
    assert build(tmp_path, "zeroToOne")[1] == ["the base may scale its input, too: check that it is not scaled twice"]


@pytest.mark.parametrize(
    ("scaling", "description"),
    [
        ("inside", "in the base"),
        ("tf", "pixel * 0.00784314 - 1"),
        ("caffe", "blue * 1 - 103.939, green * 1 - 116.779, red * 1 - 123.68"),
        ("torch", "red * 0.0171248 - 2.1179, green * 0.017507 - 2.03571, blue * 0.0174292 - 1.80444"),
        (Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "pixel * 0.00784314 - 1"),
        (Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "pixel * 0.00392157"),
    ],
)
def test_description_is_what_the_layer_computes(scaling, description):
    image = keras.Input((*SIZE, 3))
    assert describe_input_scaling(keras.Model(image, scale_inputs(image, scaling))) == description
