"""One model of each family, transferred and fine-tuned: frozen layers stay bit-identical.

The families are those of keras.applications, and EfficientNet-Lite0.
"""

import io
import os
import uuid
import zipfile

import h5py
import keras
import numpy as np
import pytest
from PIL import Image

from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.model.backbones import find_backbone
from topwork.model.layer_groups import name_layer_groups
from topwork.model.layer_tree import leaf_layers
from topwork.registry.imagenet_weights import mirrored_weights_key
from topwork.spec import TransferJob
from topwork.spec.applications import MIN_SIDE
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.workspace import Workspace


def numbered(word, first, last):
    return " ".join(f"{word}{number}" for number in range(first, last + 1))


# The smallest model of each family, its `unfreeze` setting, and its layer groups from input to output.
FAMILIES = {
    "ConvNeXtTiny": (
        {"layers": 3},
        "stem stage_0 downsampling_block_0 stage_1 downsampling_block_1 stage_2 downsampling_block_2 stage_3",
    ),
    "DenseNet121": ({"layers": 4}, numbered("conv", 1, 5)),
    "EfficientNetB0": ({"layers": 4}, f"stem {numbered('block', 1, 7)} top"),
    "EfficientNetLite0": ({"layers": 4}, f"stem {numbered('block', 1, 7)} top"),
    "EfficientNetV2B0": ({"from": "block6h_project_conv"}, f"stem {numbered('block', 1, 6)} top"),
    "InceptionResNetV2": ({"layers": 2}, "stem mixed_5b block35 mixed_6a block17 mixed_7a block8"),
    "InceptionV3": ({"layers": 4}, f"stem {numbered('mixed', 0, 9)}"),
    "MobileNet": ({"from": "conv_pw_12"}, f"conv1 {numbered('conv_', 1, 13)}"),
    "MobileNetV2": ({"from": "block_16_project"}, f"Conv1 expanded_conv {numbered('block_', 1, 16)} Conv_1"),
    "MobileNetV3Small": ("all", f"expanded_conv {numbered('expanded_conv_', 1, 10)} conv_1"),
    "NASNetMobile": (
        {"layers": 6},
        f"stem cell_stem_1 cell_stem_2 {numbered('cell_', 0, 3)} cell_reduce_4 {numbered('cell_', 5, 8)} "
        f"cell_reduce_8 {numbered('cell_', 9, 12)}",
    ),
    "ResNet50": ({"from": "conv5_block3_2_conv"}, numbered("conv", 1, 5)),
    "ResNet50V2": ({"layers": 3}, f"{numbered('conv', 1, 5)} post"),
    "VGG16": ("all", numbered("block", 1, 5)),
    "Xception": ({"layers": 4}, numbered("block", 1, 14)),
}


# These models train on cached features, because building the graph of a complete training step takes minutes.
WITH_FEATURE_CACHE = {
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetLite0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "NASNetMobile",
}


# ConvNeXt uses layer instead of batch normalization, EfficientNetV2 scales its input itself, MobileNetV2 does neither.
SHORT_FORM = {"ConvNeXtTiny", "EfficientNetV2B0", "MobileNetV2"}


@pytest.fixture(scope="module")
def environment(s3_settings, tmp_path_factory):
    """Storage, scratch and image directory shared by all families."""
    directory = tmp_path_factory.mktemp("families")
    random = np.random.default_rng(0)
    for channel, name in ((2, "blue"), (0, "red")):
        (directory / "photos" / name).mkdir(parents=True)
        for index in range(10):
            pixels = random.integers(0, 120, (40, 36, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(directory / "photos" / name / f"{index}.png")
    storage = Storage(f"s3://topwork-test/{uuid.uuid4().hex[:12]}", s3_settings)
    (directory / "scratch").mkdir()
    return Workspace(storage, Metrics(), NoProgress(), directory / "scratch"), directory / "photos"


def make_family_job(name, unfreeze, workspace, photos):
    cache = "on" if name in WITH_FEATURE_CACHE else "off"
    spec = {
        "storage": workspace.storage.uri,
        "dataset": {
            "source": {"folder": {"uri": str(photos)}},
            "splits": {"train": "train[:12]", "test": "train[12:]"},
            "imageSize": [MIN_SIDE[name], MIN_SIDE[name]],
        },
        "model": {"base": {"application": name, "weights": "imagenet"}, "head": {"dropout": 0.0}},
        "transfer": {"epochs": 1, "batchSize": 6, "featureCache": cache},
        "fineTune": {"epochs": 1, "unfreeze": unfreeze, "featureCache": cache, "optimizer": {"learningRate": 0.0001}},
        "compute": {"gpus": 0},
    }
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "family"}, "spec": spec}
    )


def upload_weights(name, workspace, directory):
    """Store weights like `topwork mirror weights`, with statistics that any training image would change."""
    model = find_backbone(name).build((MIN_SIDE[name], MIN_SIDE[name]), None)
    random = np.random.default_rng(0)
    for layer in leaf_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(random.normal(0, 0.05, layer.moving_mean.shape))
            layer.moving_variance.assign(random.uniform(0.8, 1.2, layer.moving_variance.shape))
    path = directory / f"{name}.weights.h5"
    model.save_weights(path)
    workspace.storage.upload(path, mirrored_weights_key(name))
    return model, path


def read_arrays_by_layer(file):
    """Read the arrays of each layer from a Keras weights file, without Keras."""
    arrays_by_layer = {}

    def visit(path, item):
        if isinstance(item, h5py.Dataset):
            arrays_by_layer.setdefault(item.parent.attrs["name"], {})[path.rsplit("/", 1)[1]] = item[()]

    with h5py.File(file) as content:
        content.visititems(visit)
    return arrays_by_layer


def read_stored_arrays(classifier, workspace):
    """Read the arrays of each layer of a classifier in storage."""
    with zipfile.ZipFile(io.BytesIO(workspace.storage.read(classifier.key))) as content:
        return read_arrays_by_layer(io.BytesIO(content.read("model.weights.h5")))


def changed_layers(before, after):
    """Return the names of the layers that differ in at least one bit."""
    return {
        name
        for name, arrays in before.items()
        if any(value.tobytes() != after[name][key].tobytes() for key, value in arrays.items())
    }


def unfrozen_layers(model, unfreeze):
    """Return the names of the layers that `spec.fineTune.unfreeze` selects; BatchNormalization stays frozen."""
    layers = [layer for layer in leaf_layers(model) if layer.weights]
    if unfreeze != "all":
        names = [layer.name for layer in layers]
        layers = layers[-unfreeze["layers"] :] if "layers" in unfreeze else layers[names.index(unfreeze["from"]) :]
    return {layer.name for layer in layers if not isinstance(layer, keras.layers.BatchNormalization)}


def families():
    """All families; most run only in the long form, because their graphs take long to build."""
    for name in FAMILIES:
        skipped = name not in SHORT_FORM and not os.environ.get("TOPWORK_LONG")
        yield pytest.param(name, marks=pytest.mark.skipif(skipped, reason="TOPWORK_LONG=1 make test-systems"))


@pytest.mark.parametrize("name", list(families()))
def test_frozen_layers_are_bit_identical_and_the_rest_learns(name, environment):
    workspace, photos = environment
    unfreeze, names = FAMILIES[name]
    keras.utils.clear_session()
    model, file = upload_weights(name, workspace, photos.parent)
    assert list(dict.fromkeys(block for _, block in name_layer_groups(model))) == names.split()
    job = make_family_job(name, unfreeze, workspace, photos)
    dataset = pull(job, workspace)
    first = transfer(job, dataset, workspace)
    second = fine_tune(job, first, dataset, workspace)

    original, transferred, tuned = (
        read_arrays_by_layer(file),
        read_stored_arrays(first, workspace),
        read_stored_arrays(second, workspace),
    )
    # The head was trained: its bias was initialized to zeros.
    assert (transferred["logits"]["1"] != 0).all()
    assert changed_layers(original, transferred) == set()
    expected, changed = unfrozen_layers(model, unfreeze), changed_layers(original, tuned)
    assert changed <= expected
    # A layer with random weights may not change if no signal reaches it.
    assert len(changed) > len(expected) / 2
    assert changed_layers(transferred, tuned) == changed | {"logits"}
