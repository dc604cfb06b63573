"""Backbones of keras.applications and EfficientNet-Lite0, their input scaling, and heads."""

import importlib

import keras
import numpy as np
import pytest

from topwork.errors import DataError, SpecError, UnavailableError
from topwork.model.backbones import Backbone, find_architecture, find_backbone, scale_inputs
from topwork.model.classifier import build_classifier, with_precision
from topwork.model.layer_tree import leaf_layers
from topwork.spec.applications import APPLICATIONS
from topwork.spec.model import Head, Model

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.float32)
MODULES = {"tf": "xception", "torch": "densenet", "caffe": "vgg16"}


def preprocess_input(name):
    module = getattr(keras.applications, name).__module__.replace("keras.src.", "keras.")
    return importlib.import_module(module).preprocess_input


def test_table_lists_every_classification_model_of_keras():
    models = {name for name in dir(keras.applications) if name[0].isupper()}
    assert set(APPLICATIONS) - models == {"EfficientNetLite0"}
    assert models < set(APPLICATIONS)


def build_without_values(name, **arguments):
    """Build a model whose variables have shapes but no values: ConvNeXtXLarge would take gigabytes."""
    keras.utils.clear_session()
    with keras.StatelessScope(initialize_variables=False):
        return find_architecture(name)(weights=None, **arguments)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_table_matches_the_built_model(name):
    entry = APPLICATIONS[name]
    model = build_without_values(name)
    assert model.count_params() == entry.parameters
    assert sum(bool(layer.weights) for layer in leaf_layers(model)) == entry.depth
    # MobileNetV3 is built for any size; 224 appears only in the names of its weight files.
    assert model.input_shape[1:3] in {(entry.default_side, entry.default_side), (None, None)}


@pytest.mark.parametrize("name", APPLICATIONS)
def test_sizes_and_accuracies_are_plausible(name):
    entry = APPLICATIONS[name]
    # Weight files contain four bytes per parameter; those of EfficientNet contain slightly more.
    assert entry.parameters * 4 / 2**20 <= entry.size_mb * 1.05 <= entry.parameters * 4 / 2**20 * 1.6
    assert 0.65 < entry.top1 < (entry.top5 or 1) < 0.98 or entry.top5 is None


@pytest.mark.parametrize("name", sorted(set(APPLICATIONS) - {"EfficientNetLite0"}))
def test_input_scaling_matches_preprocess_input_of_keras(name):
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, scale_inputs(image, APPLICATIONS[name].scaling))
    expected = preprocess_input(name)(PIXELS.copy())
    np.testing.assert_allclose(model.predict_on_batch(PIXELS), expected, rtol=1e-5, atol=2e-5)


def test_model_with_input_scaling_survives_save_and_load(tmp_path):
    settings = Model.model_validate({"base": {"application": "VGG16", "weights": "none"}, "head": {"hidden": [4]}})
    model = build_classifier(settings, (32, 32), 3, None)
    names = [layer.name for layer in model.layers]
    assert names == ["image", "input_scaling", "base", "pooling", "hidden_1", "dropout", "logits"]
    assert model.output_shape == (None, 3)
    # Only the input scaling is saved: the file of the whole model would be large and the test slow.
    image = keras.Input((8, 8, 3))
    small = keras.Model(image, scale_inputs(image, "caffe"))
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded.predict_on_batch(PIXELS), small.predict_on_batch(PIXELS))
    mixed_precision_model = with_precision(model, "mixed_bfloat16")
    assert mixed_precision_model.get_layer("base").layers[1].compute_dtype == "bfloat16"
    assert (
        mixed_precision_model.get_layer("logits").compute_dtype
        == mixed_precision_model.get_layer("input_scaling").compute_dtype
        == "float32"
    )
    assert with_precision(model, "float32") is model


def test_weights_without_a_head_are_loaded_from_a_file(tmp_path):
    settings = {"base": {"application": "MobileNetV2", "weights": "none"}}
    source = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    file = tmp_path / "mobile.weights.h5"
    source.save_weights(file)
    model = build_classifier(Model.model_validate(settings), (48, 48), 2, file)
    for actual, expected in zip(model.get_layer("base").get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert model.output_shape == (None, 1)


def test_weights_of_another_model_are_rejected(tmp_path):
    file = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save_weights(file)
    with pytest.raises(
        DataError, match=r"^other\.weights\.h5 does not contain the weights of MobileNet without its head"
    ):
        Backbone("MobileNet").build((32, 32), file)


def test_unknown_model_is_rejected_with_the_nearest_name():
    with pytest.raises(SpecError) as error:
        find_backbone("Xeption")
    assert str(error.value) == (
        "spec.model.base.application is Xeption, which topwork does not have. Did you mean Xception?"
    )


def test_too_small_image_size_is_rejected():
    with pytest.raises(SpecError, match=r"Xception cannot be built for spec\.dataset\.imageSize \[32, 48\]"):
        Backbone("Xception").build((32, 48), None)


def test_failed_download_is_reported(monkeypatch):
    def fail_download(**_):
        raise Exception("URL fetch failure on https://host/x.h5: None -- timed out")  # noqa: TRY002 - as Keras does

    monkeypatch.setattr(keras.applications, "Xception", fail_download)
    with pytest.raises(UnavailableError, match=r"^The ImageNet weights of Xception could not be downloaded: URL"):
        Backbone("Xception").build((96, 96), "imagenet")


@pytest.mark.parametrize(("pooling", "names"), [("avg", ["pooling"]), ("max", ["pooling"]), ("flatten", ["flatten"])])
def test_cnn_base_halves_the_side_with_each_convolution(pooling, names):
    settings = {"base": {"cnn": {"filters": [2, 3, 4], "kernelSize": 5}}, "head": {"pooling": pooling, "dropout": 0}}
    model = build_classifier(Model.model_validate(settings), (32, 40), 10, None)
    base = model.get_layer("base")
    assert base.output_shape == (None, 4, 5, 4)
    assert [layer.name for layer in model.layers] == ["image", "input_scaling", "base", *names, "logits"]
    assert base.get_layer("convolution_1").kernel.shape == (5, 5, 3, 2)
    assert model.output_shape == (None, 10)


def test_base_without_feature_maps_or_vector_is_rejected():
    from topwork.model.classifier import build_head

    with pytest.raises(
        DataError, match=r"^The output of the base has shape \(None, 4, 3\), but a head needs feature maps"
    ):
        build_head(keras.Input((4, 3)), Head(), 3)
