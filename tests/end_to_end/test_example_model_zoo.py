"""The model zoo: every classification model of keras.applications by name, and several of them side by side."""

import inspect
import json

import keras
import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

from topwork.model.classifier import build_classifier

# What the documents list, from MobileNet to NASNetLarge.
LISTED = (
    *("Xception", "VGG16", "VGG19", "ResNet50", "ResNet101", "ResNet152", "ResNet50V2", "ResNet101V2", "ResNet152V2"),
    *("InceptionV3", "InceptionResNetV2", "MobileNet", "MobileNetV2", "DenseNet121", "DenseNet169", "DenseNet201"),
    *("NASNetMobile", "NASNetLarge"),
)
ZOO = {
    "MobileNetV2": keras.applications.mobilenet_v2,
    "EfficientNetV2B0": keras.applications.efficientnet_v2,
    "DenseNet121": keras.applications.densenet,
}


@pytest.fixture(scope="module")
def zoo(examples):
    examples.mirror_flowers()
    examples.mirror_weights(*ZOO)
    return examples.run(
        "model-zoo",
        "spec.dataset.imageSize=[32, 32]",
        "spec.dataset.splits.validation=null",
        "spec.transfer.epochs=1",
        "spec.transfer.batchSize=40",
    )


@pytest.fixture(scope="module")
def listed(examples):
    ended = examples.topwork("backbones", "--json")
    assert ended.returncode == 0, ended.stderr
    return {one["name"]: one for one in json.loads(ended.stdout)}


def test_backbones_lists_every_classification_model_of_keras(listed):
    known = {name for name, value in vars(keras.applications).items() if inspect.isfunction(value)}
    assert set(listed) == known
    assert len(LISTED) == 18
    assert set(LISTED) <= set(listed)


def test_backbones_shows_size_accuracy_parameters_and_depth(examples, listed):
    for one in listed.values():
        assert one["sizeMB"] > 1
        assert 0.5 < one["top1"] < 1
        assert one["top5"] is None or one["top1"] < one["top5"] < 1
        assert one["parameters"] > one["parametersWithoutTop"] > 100_000
        assert one["depth"] > 10
    text = examples.topwork("backbones").stdout
    assert f"{listed['Xception']['parameters']:,}" in text
    assert all(name in text for name in listed)


def test_parameter_counts_are_measured(zoo, listed):
    """Of these three; tests/unit/test_model_backbones.py builds and counts every one."""
    for ran in zoo:
        base, told = ran.model("transfer").get_layer("base"), listed[ran.job.spec.model.base.application]
        assert told["parametersWithoutTop"] == base.count_params()
        assert told["parameters"] == base.count_params() + 1000 * (base.output_shape[-1] + 1)


def test_one_file_runs_a_job_for_each_backbone_by_its_name(zoo):
    assert [ran.job.spec.model.base.application for ran in zoo] == list(ZOO)
    for ran in zoo:
        assert ran.metrics["evaluation"]["images"] == 10


@pytest.mark.parametrize("place", range(len(ZOO)), ids=list(ZOO))
def test_each_has_its_own_input_scaling_built_in(zoo, place):
    model, module = zoo[place].model("transfer"), list(ZOO.values())[place]
    scaled = model.get_layer("base")._inbound_nodes[-1].input_tensors[0]
    pixels = zoo[place].dataset.test.load_images(np.arange(3)).astype("float32")
    found = pixels if scaled is model.input else keras.Model(model.input, scaled)(pixels).numpy()
    assert found == pytest.approx(module.preprocess_input(pixels.copy()), abs=1e-4)


@pytest.mark.parametrize("place", range(len(ZOO)), ids=list(ZOO))
def test_imagenet_weights_are_taken_where_they_are_asked_for(zoo, examples, place):
    name = list(ZOO)[place]
    before, after = layer_weights(examples.backbones[name]), layer_weights(zoo[place].model("transfer").get_layer("base"))
    assert before.keys() == after.keys()
    assert all(are_identical(before[one], after[one]) for one in before)


def test_without_weights_a_backbone_starts_at_random(zoo):
    without = zoo[0].job.spec.model.model_copy(
        update={"base": zoo[0].job.spec.model.base.model_copy(update={"weights": "none"})}
    )
    assert without.base.is_pretrained is False
    made, given = (
        layer_weights(model.get_layer("base")) for model in (build_classifier(without, (32, 32), 5, None), zoo[0].model("transfer"))
    )
    assert made.keys() == given.keys()
    assert not are_identical(made["000 Conv2D"], given["000 Conv2D"])


def test_at_the_end_they_are_compared(zoo):
    header, *rows = zoo[0].output.partition("\n\n")[2].splitlines()
    assert header.split()[0] == "MODEL"
    assert [row.split()[0] for row in rows] == [f"{ran.job.metadata.name}/1" for ran in zoo]
    assert min(float(row.split()[-1]) for row in rows) == 1.0
