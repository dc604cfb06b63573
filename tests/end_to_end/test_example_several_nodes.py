"""examples/several-nodes.yaml: MobileNetV2 on two nodes, which are processes on one machine here."""

import json

import pytest
from tests.end_to_end.example_systems import ALLOW_MISSING_CLASSES, EXAMPLES

OVERRIDES = (
    ALLOW_MISSING_CLASSES,
    "spec.dataset.imageSize=[32, 32]",
    "spec.transfer.epochs=1",
    "spec.transfer.batchSize=16",
    "spec.fineTune.epochs=1",
    "spec.compute.gpus=0",
)


@pytest.fixture(scope="module")
def completed(examples):
    examples.mirror_flowers()
    examples.mirror_weights("MobileNetV2")
    options = [word for override in OVERRIDES for word in ("--set", override)]
    file = EXAMPLES / "several-nodes.yaml"
    return examples.topwork("run", file, "--nodes", "2", *options, "--log-format", "json")


def test_nodes_publish_one_model(completed, examples):
    assert completed.returncode == 0, f"{completed.stdout}{completed.stderr}"
    assert "Traceback" not in completed.stderr
    assert completed.stdout.count("Published ") == 1
    latest = json.loads(examples.storage.read("models/several-nodes/latest.json"))
    assert latest["version"] == 1


def test_batch_is_divided_among_the_replicas_of_all_nodes(examples):
    spec = examples.read("several-nodes").spec
    assert spec.transfer.batch_size == 32 * spec.compute.replicas
