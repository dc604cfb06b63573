"""Models saved by Keras 2.9, 2.12 and 2.15: what they compute, and what cannot be upgraded.

fixtures/make_keras2_models.py wrote the files and recorded the results with these versions.
"""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.layer_tree import walk_layers
from topwork.model.legacy.errors import UpgradeError
from topwork.model.legacy.operations import apply_operation
from topwork.model.safe_loading import load_model_safely
from topwork.model.saved_base import load_saved_base

ARCHIVE = Path(__file__).parent.parent / "fixtures" / "keras2-models.tar.xz"
SIZE = (16, 16)
MODELS = ("augmentation_layers", "operations", "shared_layers", "teachable_machine", "transfer_learning_guide")
# Keras 2.12 writes HDF5 to .keras files, unless the new format was requested. It can't save slices in the new format.
FILES = [*(f"2.9/{model}.h5" for model in MODELS), "2.15/transfer_learning_guide.h5"]
FILES += ["2.12/augmentation_layers-hdf5.keras", "2.12/operations-hdf5.keras"]
FILES += [f"{version}/{model}.keras" for version in ("2.12", "2.15") for model in MODELS if model != "operations"]


@pytest.fixture(scope="module")
def keras2(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keras2")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory


def make_images():
    """Make the images of make_keras2_models.py."""
    images = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3)).astype(np.float32)
    images[1, :5] /= 8
    images[1, :, 7:] = images[1, :, 7:] / 2 + 127
    return images


def recorded(keras2, file):
    name = Path(file).stem.removesuffix("-hdf5")
    return np.load(keras2 / Path(file).parent / f"{name}.npz")


@pytest.mark.parametrize("file", FILES)
def test_model_of_keras_2_computes_the_same_in_keras_3(keras2, file):
    keras.utils.clear_session()
    expected = recorded(keras2, file)
    base = load_saved_base(keras2 / file, "features", SIZE)
    # In steps: outputs of both images differ by 0.003 or more.
    np.testing.assert_allclose(base(make_images()), expected["features"], rtol=1e-4, atol=1e-6)
    assert not any(layer.__class__.__name__.startswith("Random") for _, layer in walk_layers(base))


@pytest.mark.parametrize("file", ["2.9/augmentation_layers.h5", "2.15/teachable_machine.keras"])
def test_predictions_of_the_complete_model_are_the_same(keras2, file):
    expected = recorded(keras2, file)["predictions"]
    model = load_model_safely(keras2 / file)
    np.testing.assert_allclose(model(make_images(), training=False), expected, rtol=1e-4, atol=1e-6)


def test_upgraded_base_can_be_saved_and_loaded_by_keras_3(keras2, tmp_path):
    base = load_saved_base(keras2 / "2.9/operations.h5", None, SIZE)
    base.save(tmp_path / "base.keras")
    loaded = keras.models.load_model(tmp_path / "base.keras")
    np.testing.assert_array_equal(loaded(make_images()), base(make_images()))


def edit(keras2, tmp_path, file, change):
    """Change the architecture in a copy of a file."""
    path = tmp_path / Path(file).name
    shutil.copy(keras2 / file, path)
    with h5py.File(path, "r+") as opened:
        config = json.loads(opened.attrs["model_config"])
        change({layer["config"]["name"]: layer for layer in config["config"]["layers"]})
        opened.attrs["model_config"] = json.dumps(config)
    return path


def load_error(path):
    with pytest.raises(DataError) as error:
        load_saved_base(path, None, SIZE)
    message = str(error.value)
    assert len(message) <= 300
    assert "\n" not in message
    return message


def first_of(layers, kind):
    return next(layer for layer in layers.values() if layer["class_name"] == kind)


ADVICE = "In that version, replace the layer by built-in layers that Keras 3 has, too, and save the model again."


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (
            "Conv2D",
            {"class_name": "LocallyConnected2D"},
            "layer conv2d is a LocallyConnected2D, which Keras 3 does not have",
        ),
        (
            "Conv2D",
            {"config": {"groups_per_channel": 2}},
            "layer conv2d, a Conv2D, has the setting groups_per_channel, which Keras 3 does not have",
        ),
        (
            "Conv2D",
            {"config": {"activation": "exotic " * 10_000}},
            "layer conv2d, a Conv2D, is invalid in Keras 3 (Could not interpret activation function ",
        ),
        (
            "TFOpLambda",
            {"config": {"function": "linalg.inv"}},
            "layer tf.nn.bias_add is the operation tf.linalg.inv, which layers of Keras 3 cannot compute",
        ),
        (
            "TFOpLambda",
            {"config": {"function": "nn.leaky_relu"}},
            "layer tf.nn.bias_add is the operation tf.nn.leaky_relu with unsupported arguments",
        ),
        ("Flatten", {"inbound_nodes": [[["nowhere", 0, 0, {}]]]}, "layer features has no input"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_unsupported_layer_is_named_in_one_line(keras2, tmp_path, kind, change, reason):
    def apply(layers):
        layer = first_of(layers, kind)
        layer["config"].update(change.get("config", {}))
        layer.update({key: value for key, value in change.items() if key != "config"})

    message = load_error(edit(keras2, tmp_path, "2.9/operations.h5", apply))
    assert message.startswith(f"operations.h5 was saved by Keras 2.9.0: {reason}")
    assert message.endswith(ADVICE)


@pytest.mark.parametrize("name", ["Lambda", "TFSMLayer", "StringLookup"])
def test_layer_with_code_is_rejected_in_one_line(keras2, tmp_path, name):
    def apply(layers):
        for layer in layers.values():
            if layer["class_name"] == "TFOpLambda":
                layer["class_name"] = name

    message = load_error(edit(keras2, tmp_path, "2.9/operations.h5", apply))
    assert message.startswith(f"operations.h5 (saved by Keras 2.9.0) contains a {name} (")
    assert "more. A base may contain only built-in" in message


@pytest.mark.parametrize(
    "activation",
    [
        {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "file:///etc/passwd"}},
        {"module": "keras.mixed_precision", "class_name": "set_global_policy", "config": "float16"},
        {"module": "tf_keras.utils", "class_name": "get_file", "config": {}},
        {"module": "os", "class_name": "system", "config": "true"},
        {"class_name": "function", "config": "own"},
    ],
)
def test_hostile_setting_is_rejected(keras2, tmp_path, activation):
    def apply(layers):
        first_of(layers, "Conv2D")["config"]["activation"] = activation

    assert "contains" in load_error(edit(keras2, tmp_path, "2.9/operations.h5", apply))


def test_weights_of_another_shape_are_rejected(keras2, tmp_path):
    def apply(layers):
        layers["dense"]["config"]["units"] = 5

    message = load_error(edit(keras2, tmp_path, "2.9/operations.h5", apply))
    assert "layer dense expects weights of the shapes [(12, 5), (5,)], but the file has [(12, 3), (3,)]" in message


def test_missing_and_additional_weights_are_rejected(keras2, tmp_path):
    path = edit(keras2, tmp_path, "2.9/operations.h5", lambda layers: None)
    with h5py.File(path, "r+") as opened:
        group = opened["model_weights/conv2d_1"]
        group.attrs["weight_names"] = np.array([], "S1")
    assert "layer conv2d_1 has no weights in the file" in load_error(path)
    path = tmp_path / "a.keras"
    with zipfile.ZipFile(keras2 / "2.15/shared_layers.keras") as original, zipfile.ZipFile(path, "w") as changed:
        for name in original.namelist():
            data = original.read(name)
            if name == "model.weights.h5":
                (tmp_path / "w.h5").write_bytes(data)
                with h5py.File(tmp_path / "w.h5", "r+") as opened:
                    del opened["layers/conv2d/vars/1"]
                data = (tmp_path / "w.h5").read_bytes()
            changed.writestr(name, data)
    message = load_error(path)
    assert message.startswith("a.keras was saved by Keras 2.15.0: layer conv2d, a Conv2D, has 1 weights in the file")


def test_file_of_keras_3_with_hdf5_content_is_not_loaded_as_keras(tmp_path):
    model = keras.Sequential([keras.Input((*SIZE, 3)), keras.layers.Conv2D(2, 3)])
    model.save(tmp_path / "a.h5")
    (tmp_path / "a.h5").rename(tmp_path / "a.keras")
    assert load_error(tmp_path / "a.keras") == "a.keras is an HDF5 file. Rename it to a.h5."


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        ("math.truediv", [None], {"y": 127.5}, lambda x: x / 127.5),
        ("math.truediv", [None], {"y": [0.2, 0.3, 0.4]}, lambda x: x / np.array([0.2, 0.3, 0.4])),
        ("math.subtract", [None], {"y": [[[[1.0, 2.0, 3.0]]]]}, lambda x: x - np.array([1, 2, 3])),
        ("math.subtract", [2.0], {"y": None}, lambda x: 2 - x),
        ("math.multiply", [3], {"y": None}, lambda x: 3 * x),
        ("compat.v1.pad", [None], {"paddings": [[0, 0], [1, 0], [0, 2], [0, 0]]}, None),
        ("reverse", [None], {"axis": [-1]}, lambda x: x[..., ::-1]),
        ("clip_by_value", [None], {"clip_value_min": 0, "clip_value_max": 7}, lambda x: np.clip(x, 0, 7)),
        ("math.reduce_max", [None], {"axis": [-3, -2], "keepdims": True}, lambda x: x.max((1, 2), keepdims=True)),
        ("nn.softmax", [None], {"axis": -1}, lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    ],
)
def test_operation_computes_the_same_as_tensorflow(function, args, kwargs, expected):
    image = keras.Input((4, 5, 3))
    values = np.random.default_rng(0).normal(0, 5, (2, 4, 5, 3)).astype(np.float32)
    fill = {key: image if value is None else value for key, value in kwargs.items()}
    output = apply_operation(function, "operation", [image if value is None else value for value in args], fill)
    result = keras.ops.convert_to_numpy(keras.Model(image, output)(values))
    reference = np.pad(values, kwargs["paddings"]) if expected is None else expected(values)
    np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        ("cast", [None], {"dtype": "uint8"}),
        ("math.truediv", [1.0], {"y": None}),
        ("math.truediv", [None], {"y": 0.0}),
        ("clip_by_value", [None], {"clip_value_min": -1, "clip_value_max": 1}),
        ("math.reduce_mean", [None], {"axis": [-1]}),
        ("image.resize", [None], {"size": [8, 8], "method": "area"}),
        ("pad", [None], {"paddings": [[0, 0], [1, 1], [1, 1], [0, 0]], "mode": "REFLECT"}),
        ("nn.gelu", [None], {"approximate": True}),
        ("__operators__.getitem", [None], {"slice_spec": [{"start": 0, "stop": 2, "step": None}]}),
        ("__operators__.getitem", [None], {"slice_spec": [{"start": None, "stop": None, "step": -1}]}),
        ("math.add", [None], {"y": 1.0, "unknown": 2}),
    ],
)
def test_operation_without_equivalent_is_rejected(function, args, kwargs):
    image = keras.Input((4, 5, 3))
    fill = {key: image if value is None else value for key, value in kwargs.items()}
    with pytest.raises(UpgradeError, match=f"layer operation is the operation tf.{function} with"):
        apply_operation(function, "operation", [image if value is None else value for value in args], fill)
