"""The feature cache on several nodes gives the result of one node with the same number of replicas, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
from tests.nodes.processes import NodeProcesses
from tests.preloaded_python import PreloadedPython

from topwork.clients.s3.storage import Storage, StorageSettings

AUGMENTED = {"flip": "horizontal", "rotation": 0.1, "contrast": 0.2}
TRANSFER = {"train": "all", "epochs": 1, "batchSize": 4, "featureCache": "off"}
FINE_TUNE = {
    "epochs": 4, "unfreeze": {"layers": 1}, "featureCache": {"use": "on", "views": 2},
    "optimizer": {"learningRate": 0.01},
}  # fmt: skip


@pytest.fixture
def processes(
    preloaded_python: PreloadedPython, s3_settings: StorageSettings, storage: Storage
) -> Iterator[NodeProcesses]:
    started = NodeProcesses(preloaded_python, s3_settings, storage.uri)
    yield started
    started.close()


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_two_nodes_train_on_the_same_features_as_two_replicas(processes, make_job, storage, precision):
    compute = {"gpus": 0, "precision": precision}
    job = make_job(augmentation=AUGMENTED, transfer=TRANSFER, fineTune=FINE_TUNE, compute=compute)
    (expected,), nodes = processes.run(job, nodes=1, replicas=2), processes.start(job, nodes=2)
    assert [node.wait() for node in nodes] == [0, 0], "\n".join(node.error_text() for node in nodes)
    for node in nodes:
        (computed,) = [event for event in node.events() if event["event"] == "features computed"]
        assert computed["views"] == 2
        trained = node.read_result()
        assert trained.history == expected.history
        for weights, expected_weights in zip(trained.weights, expected.weights, strict=True):
            np.testing.assert_array_equal(weights, expected_weights)
    assert not [stored.key for stored in storage.list() if "/features/" in stored.key]
