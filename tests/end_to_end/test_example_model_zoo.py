"""examples/model-zoo.yaml and `topwork backbones`: all classification models of keras.applications."""

import inspect
import json

import keras
import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

from topwork.model.classifier import build_classifier

# The models in the documentation, from MobileNet to NASNetLarge.
DOCUMENTED = (
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
    completed = examples.topwork("backbones", "--json")
    assert completed.returncode == 0, completed.stderr
    return {backbone["name"]: backbone for backbone in json.loads(completed.stdout)}


def test_backbones_lists_all_classification_models_of_keras_and_efficientnet_lite0(listed):
    available = {name for name, value in vars(keras.applications).items() if inspect.isfunction(value)}
    assert set(listed) == available | {"EfficientNetLite0"}
    assert len(DOCUMENTED) == 18
    assert set(DOCUMENTED) <= set(listed)


def test_backbones_reports_size_accuracy_parameters_and_depth(examples, listed):
    for backbone in listed.values():
        assert backbone["sizeMB"] > 1
        assert 0.5 < backbone["top1"] < 1
        assert backbone["top5"] is None or backbone["top1"] < backbone["top5"] < 1
        assert backbone["parameters"] > backbone["parametersWithoutTop"] > 100_000
        assert backbone["depth"] > 10
    text = examples.topwork("backbones").stdout
    assert f"{listed['Xception']['parameters']:,}" in text
    assert all(name in text for name in listed)


def test_listed_parameter_counts_are_correct(zoo, listed):
    """Checks three models; tests/unit/test_model_backbones.py builds all of them."""
    for run in zoo:
        base, entry = run.model("transfer").get_layer("base"), listed[run.job.spec.model.base.application]
        assert entry["parametersWithoutTop"] == base.count_params()
        assert entry["parameters"] == base.count_params() + 1000 * (base.output_shape[-1] + 1)


def test_one_file_runs_one_job_per_backbone(zoo):
    assert [run.job.spec.model.base.application for run in zoo] == list(ZOO)
    for run in zoo:
        assert run.metrics["evaluation"]["images"] == 10


@pytest.mark.parametrize("index", range(len(ZOO)), ids=list(ZOO))
def test_model_includes_the_input_scaling_of_its_backbone(zoo, index):
    model, module = zoo[index].model("transfer"), list(ZOO.values())[index]
    scaled = model.get_layer("base")._inbound_nodes[-1].input_tensors[0]
    pixels = zoo[index].dataset.test.load_images(np.arange(3)).astype("float32")
    actual = pixels if scaled is model.input else keras.Model(model.input, scaled)(pixels).numpy()
    assert actual == pytest.approx(module.preprocess_input(pixels.copy()), abs=1e-4)


@pytest.mark.parametrize("index", range(len(ZOO)), ids=list(ZOO))
def test_imagenet_weights_are_loaded_from_the_mirror(zoo, examples, index):
    name = list(ZOO)[index]
    before, after = (
        layer_weights(examples.backbones[name]),
        layer_weights(zoo[index].model("transfer").get_layer("base")),
    )
    assert before.keys() == after.keys()
    assert all(are_identical(before[layer], after[layer]) for layer in before)


def test_backbone_without_weights_is_randomly_initialized(zoo):
    model_spec = zoo[0].job.spec.model.model_copy(
        update={"base": zoo[0].job.spec.model.base.model_copy(update={"weights": "none"})}
    )
    assert model_spec.base.is_pretrained is False
    random, pretrained = (
        layer_weights(model.get_layer("base"))
        for model in (build_classifier(model_spec, (32, 32), 5, None), zoo[0].model("transfer"))
    )
    assert random.keys() == pretrained.keys()
    assert not are_identical(random["000 Conv2D"], pretrained["000 Conv2D"])


def test_run_ends_with_a_comparison_of_all_models(zoo):
    header, *rows = zoo[0].output.partition("\n\n")[2].splitlines()
    assert header.split()[0] == "MODEL"
    assert [row.split()[0] for row in rows] == [f"{run.job.metadata.name}/1" for run in zoo]
    assert min(float(row.split()[-1]) for row in rows) == 1.0
