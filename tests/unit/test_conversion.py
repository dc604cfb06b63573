"""Conversion of state dicts of PyTorch: the base computes the features that PyTorch computes from the same weights."""

import json
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import convnext, densenet, efficientnet, efficientnet_v2, resnet
from safetensors.numpy import save_file
from tests.conversion.random_weights import draw_state, make_image

from topwork.errors import DataError, SettingError
from topwork.model import backbones
from topwork.model.backbones import find_backbone, scale_inputs
from topwork.model.classifier import build_classifier
from topwork.model.conversion.converted_file import load_converted, read_variant
from topwork.model.conversion.layer_names import find_styles
from topwork.model.conversion.layers import MismatchError, assign_layers
from topwork.model.conversion.source_models import NORMALIZATIONS, SOURCE_MODELS, choose_variant
from topwork.model.conversion.weights_file import load_weights_file
from topwork.spec.model import Model

FIXTURES = json.loads((Path(__file__).parents[1] / "fixtures/conversion.json").read_text())
SIZE = (70, 96)
# Differences in rounding are below 1e-5; the smallest wrong setting changes features by more than 1e-3.
TOLERANCE = 2e-5
SMALL = "timm/mobilenetv3_small_100"


def shallow_resnet(**options):
    def stack(maps):
        maps = resnet.stack_residual_blocks_v1(maps, 64, 2, stride1=1, name="conv2")
        for stage, filters in ((3, 128), (4, 256), (5, 512)):
            maps = resnet.stack_residual_blocks_v1(maps, filters, 1, name=f"conv{stage}")
        return maps

    return resnet.ResNet(stack, preact=False, use_bias=True, **options)


# Models of keras.applications with fewer blocks in each stage, as in timm_reference.py: they are built in less time.
SHALLOW = {
    "ResNet50": shallow_resnet,
    "DenseNet121": lambda **options: densenet.DenseNet([2, 1, 1, 1], **options),
    "EfficientNetB0": lambda **options: efficientnet.EfficientNet(1.0, 0.5, 224, name="efficientnetb0", **options),
    "EfficientNetV2B0": lambda **options: efficientnet_v2.EfficientNetV2(
        1.0, 0.5, 224, name="efficientnetv2-b0", **options
    ),
    "ConvNeXtTiny": lambda **options: convnext.ConvNeXt([1, 1, 2, 1], [96, 192, 384, 768], name="tiny", **options),
}


@pytest.fixture
def shallow(monkeypatch):
    """Build shallow models."""
    original = backbones.find_architecture
    monkeypatch.setattr(backbones, "find_architecture", lambda name: SHALLOW.get(name) or original(name))


def draw(name):
    """Draw the state dict of a fixture."""
    shapes = FIXTURES[name]["shapes"]
    return draw_state({key: [int(side) for side in shape.split("x")] if shape else [] for key, shape in shapes.items()})


def convert(name, directory, size=SIZE):
    """Convert the state dict of a fixture."""
    source_model, _, normalization = name.partition(".")
    path = directory / "model.safetensors"
    save_file(draw(name), path)
    return load_weights_file(application_of(name), size, path, source_model, normalization or "imagenet")


def application_of(name):
    library, _, model = name.partition(".")[0].partition("/")
    return next(source.application for source in SOURCE_MODELS if (source.library, source.name) == (library, model))


def compute_features(base, scaling):
    pixels = keras.Input((*SIZE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(base(scale_inputs(pixels, scaling)))
    return np.asarray(keras.Model(pixels, pooled)(make_image(*SIZE)[None].astype(np.float32)))[0, ::8]


def difference(features, name):
    expected = np.array(FIXTURES[name]["features"], np.float32)
    return np.abs(features - expected).max() / np.abs(expected).max()


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("name", [name for name in FIXTURES if name != SMALL])
def test_base_computes_the_features_of_pytorch(name, tmp_path):
    converted = convert(name, tmp_path)
    base, normalization = converted.model, converted.variant.normalization
    assert difference(compute_features(base, normalization), name) < TOLERANCE
    if name.endswith("convnext_tiny"):  # the only family with operations that are not layers
        base.save(tmp_path / "base.keras")
        loaded = keras.models.load_model(tmp_path / "base.keras")
        assert difference(compute_features(loaded, normalization), name) < TOLERANCE


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A converted model, and its file."""
    directory = tmp_path_factory.mktemp("small")
    converted = convert(SMALL, directory, (32, 32))
    converted.save(directory / "small.weights.h5")
    return converted, directory / "small.weights.h5"


def test_classifier_scales_and_computes_as_the_file_says_at_another_size(small):
    converted, path = small
    assert read_variant(path) == converted.variant
    settings = Model.model_validate({"base": {"application": "MobileNetV3Small", "weights": str(path)}})
    model = build_classifier(settings, SIZE, 3, path)
    features = keras.Model(model.input, model.get_layer("pooling").output)
    image = make_image(*SIZE)[None].astype(np.float32)
    assert difference(np.asarray(features(image))[0, ::8], SMALL) < TOLERANCE


def test_plain_keras_refuses_a_converted_file(small):
    with pytest.raises(Exception, match=r"(?i)layer|weight|variable"):
        small[0].model.load_weights(small[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"application": "MobileNetV3Large"}, r"converted to MobileNetV3Large, but spec\.model\.base\.application is"),
        ({"format": 2}, "converted by another version of topwork"),
        ({"format": None}, "converted by another version of topwork"),
        ({"padding": "reflect"}, "describes no valid conversion"),
        ({"batch_norm_epsilon": -1.0}, "describes no valid conversion"),
        ({"normalization": {"mean": [0, 0, 0], "deviation": [1, 0, 1]}}, "describes no valid conversion"),
        ({"normalization": {"mean": [0, 0], "deviation": [1, 1, 1]}}, "describes no valid conversion"),
        ({"crop": 1}, "describes no valid conversion"),
    ],
)
def test_invalid_description_is_rejected(small, tmp_path, change, message):
    path = tmp_path / "small.weights.h5"
    path.write_bytes(small[1].read_bytes())
    with h5py.File(path, "r+") as file:
        description = json.loads(file.attrs["topwork_conversion"])
        file.attrs["topwork_conversion"] = json.dumps(description | change)
    with pytest.raises(DataError, match=message):
        find_backbone("MobileNetV3Small").build((32, 32), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file["converted_layers"].__delitem__("conv"), "layer conv has weights of shapes"),
        (lambda file: file.create_dataset("converted_layers/other/0", data=[1.0]), "the file has a layer other"),
    ],
)
def test_damaged_file_is_rejected(small, tmp_path, damage, message):
    path = tmp_path / "small.weights.h5"
    path.write_bytes(small[1].read_bytes())
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=message):
        load_converted(small[0].model, path)


def test_converted_weights_without_description_are_rejected(small, tmp_path):
    path = tmp_path / "small.weights.h5"
    path.write_bytes(small[1].read_bytes())
    with h5py.File(path, "r+") as file:
        del file.attrs["topwork_conversion"]
    with pytest.raises(DataError, match=r"^small\.weights\.h5 has converted weights, but no valid description"):
        find_backbone("MobileNetV3Small").build((32, 32), path)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("extra.weight", np.ones(3), r"extra\.weight \(3\) is left over"),
        ("blocks.1.0.conv_dw.weight", None, r"Layer expanded_conv_1_depthwise needs .* which the file lacks"),
        ("blocks.1.0.conv_dw.weight", np.ones((72, 1, 5, 5)), r"\(72, 1, 5, 5\), but layer .*\(72, 1, 3, 3\)"),
        ("conv_stem.bias", np.ones(16), r"conv_stem\.bias \(16\) is left over"),
        ("bn1.weight", np.full(16, np.nan), "contains NaN"),
        ("bn1.weight", np.full(16, 1e300), "too large for float32"),
        ("bn1.running_var", np.full(16, -1.0), "negative values"),
        ("bn1.weight", np.ones(16, np.int64), "int64"),
        ("blocks.0.0.se.conv_reduce.bias", None, "which the file lacks"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(small, key, values, message):
    model = small[0].model
    before = model.get_weights()
    state = {name: values for name, values in {**draw(SMALL), key: values}.items() if values is not None}
    (style,) = (style for style in find_styles("MobileNetV3Small") if "timm" in style.libraries)
    names = style.names([layer.name for layer in model.layers if layer.weights])
    with pytest.raises(MismatchError, match=message):
        assign_layers(model, state, names, ignored=(style.head,))
    for one, two in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Three convolutions in the stem, as in resnet50d.
        ({"conv1.weight": None, "conv1.0.weight": np.ones((32, 3, 3, 3), np.float32)}, r"needs conv1\.weight"),
        (
            {"layer1.0.se.fc1.weight": np.ones((16, 256, 1, 1), np.float32)},
            r"layer1\.0\.se\.fc1\.weight .* is left over",
        ),
    ],
)
def test_other_kinds_of_resnet_are_rejected(tmp_path, change, message):
    state = {name: values for name, values in (draw("timm/resnet50") | change).items() if values is not None}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=rf"^m\.safetensors does not contain the weights of ResNet50\. .*{message}"):
        load_weights_file("ResNet50", (32, 32), tmp_path / "m.safetensors", "timm/resnet50")


@pytest.mark.parametrize(
    ("application", "message"),
    [
        ("MobileNetV3Large", r"It seems to be MobileNetV3Small: use --as MobileNetV3Small\.$"),
        ("ResNet50", r"it has no layer1\.0\.conv1\.weight\. It seems to be MobileNetV3Small: use --as"),
        ("EfficientNetV2M", "cannot be converted to EfficientNetV2M"),
        ("Xception", r"cannot be converted to Xception\. Models that can be converted: ConvNeXtBase"),
    ],
)
def test_wrong_application_is_rejected_with_the_right_one(tmp_path, application, message):
    save_file(draw(SMALL), tmp_path / "m.safetensors")
    with pytest.raises(DataError, match=message):
        load_weights_file(application, (32, 32), tmp_path / "m.safetensors")


TIMM, VISION = ("timm",), ("torchvision",)
BOTH = ("torchvision", "timm")


@pytest.mark.parametrize(
    ("application", "libraries", "source_model", "normalization", "expected"),
    [
        ("ResNet50", BOTH, "resnet50", None, ("same", 1e-5, "imagenet")),
        ("ResNet50", BOTH, "timm/resnet50.a1_in1k", None, ("same", 1e-5, "imagenet")),
        ("MobileNetV2", TIMM, "mobilenetv2_100", None, ("symmetric", 1e-5, "imagenet")),
        ("MobileNetV3Large", VISION, "mobilenet_v3_large", None, ("symmetric", 1e-3, "imagenet")),
        ("MobileNetV3Large", TIMM, "mobilenetv3_large_100.miil_in21k", None, ("symmetric", 1e-5, "none")),
        ("MobileNetV3Large", TIMM, "tf_mobilenetv3_large_100", None, ("same", 1e-3, "half")),
        ("EfficientNetB0", TIMM, "tf_efficientnet_b0.ap_in1k", None, ("same", 1e-3, "half")),
        ("EfficientNetB0", TIMM, "timm/tf_efficientnet_b0", "imagenet", ("same", 1e-3, "imagenet")),
        ("EfficientNetB4", VISION, "torchvision/efficientnet_b4", None, ("symmetric", 1e-5, "imagenet")),
        ("EfficientNetB5", VISION, "efficientnet_b5", None, ("symmetric", 1e-3, "imagenet")),
        ("ConvNeXtBase", TIMM, "convnext_base.clip_laion2b", None, ("same", None, "clip")),
        ("VGG16", BOTH, "torchvision/vgg16.IMAGENET1K_FEATURES", None, ("same", None, "caffe")),
    ],
)
def test_variant_follows_from_the_source_model(application, libraries, source_model, normalization, expected):
    variant = choose_variant(application, libraries, source_model, normalization)
    padding, epsilon, name = expected
    assert (variant.padding, variant.batch_norm_epsilon) == (padding, epsilon)
    assert variant.normalization == NORMALIZATIONS[name]


@pytest.mark.parametrize(
    ("application", "libraries", "source_model", "message"),
    [
        ("EfficientNetB0", TIMM, None, "--source-model timm/efficientnet_b0 or timm/tf_efficientnet_b0"),
        ("ResNet50", BOTH, None, r"--source-model torchvision/resnet50 or timm/resnet50\. Cannot .* timm/resnetaa50"),
        ("ResNet50", BOTH, "timm/resnetaa50", "only from torchvision/resnet50, timm/resnet50"),
        ("EfficientNetB0", TIMM, "efficientnet_blur_b0", "only from timm/efficientnet_b0, timm/tf_efficientnet_b0"),
        ("EfficientNetB0", TIMM, "tf_efficientnet_b0", "does not contain the input normalization.*half"),
        ("EfficientNetB7", TIMM, "efficientnet_b7", "does not contain the input normalization"),
        ("ConvNeXtBase", TIMM, "timm/convnext_base", "does not contain the input normalization.*clip"),
        ("VGG16", BOTH, "vgg16", "does not contain the input normalization.*caffe"),
        ("ResNet50", BOTH, "resnetblur50", "only from torchvision/resnet50, timm/resnet50"),
        ("ResNet50", BOTH, "resnet101", "which is ResNet101"),
        ("EfficientNetB0", VISION, "timm/efficientnet_b0", "only from torchvision/efficientnet_b0"),
        ("ResNet50", BOTH, "resnet50.a9_in1k", r"known weights of resnet50 are IMAGENET1K_V1.*--normalization"),
    ],
)
def test_ambiguous_or_unknown_source_model_is_rejected(application, libraries, source_model, message):
    with pytest.raises(SettingError, match=message):
        choose_variant(application, libraries, source_model, None)
