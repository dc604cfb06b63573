"""Training on several nodes has the same result as on one node with the same number of replicas, bit for bit."""

import signal
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tests.nodes.processes import NodeProcesses, Trained
from tests.preloaded_python import PreloadedPython

from topwork.clients.s3.storage import StorageSettings
from topwork.errors import Stopped, UnavailableError
from topwork.spec import TransferJob

BUCKET = "topwork-test"

# 23 training and 11 validation images: not multiples of the batch size, the replicas or the nodes.
SPLITS = {"train": "train[:23]", "validation": "train[23:34]", "test": "train[34:]"}

# Every feature with state, or that replicas could do differently: augmentation, dropout, class weights, clipping, a
# moving average, a schedule, gradual unfreezing, early stopping on AUC.
SPEC = {
    "augmentation": {"flip": "both", "rotation": 0.1, "mixUp": 0.3},
    "model": {"base": {"cnn": {"filters": [4, 6]}}, "head": {"hidden": [8], "dropout": 0.4}},
    "transfer": {
        "train": "all", "epochs": 2, "batchSize": 8, "classWeights": "balanced", "featureCache": "off",
        "earlyStopping": {"monitor": "auc", "patience": 2},
        "optimizer": {
            "learningRate": 0.01, "schedule": {"name": "cosine", "warmupEpochs": 1}, "ema": {"momentum": 0.8},
            "globalClipnorm": 0.5,
        },
    },
    "fineTune": {
        "featureCache": "off",
        "unfreeze": {"steps": [{"layers": 1, "epochs": 1, "learningRate": 0.005},
                               {"layers": 2, "epochs": 2, "learningRate": 0.002}]},
        "optimizer": {"name": "rmsprop", "momentum": 0.5},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def processes(preloaded_python: PreloadedPython, s3_settings: StorageSettings) -> Iterator[NodeProcesses]:
    started = NodeProcesses(preloaded_python, s3_settings, f"s3://{BUCKET}/parity-{uuid.uuid4().hex[:12]}")
    yield started
    started.close()


@pytest.fixture
def make_uneven_job(make_job: Callable[..., TransferJob]) -> Callable[..., TransferJob]:
    def make(**overrides: object) -> TransferJob:
        dataset = {**make_job().spec.dataset.model_dump(by_alias=True, exclude_unset=True), "splits": SPLITS}
        return make_job(**{**SPEC, "dataset": dataset, **overrides})

    return make


@pytest.fixture(scope="module")
def train_on_two_replicas(processes: NodeProcesses) -> Callable[[TransferJob], Trained]:
    """Train the job of `SPEC` on one node with two replicas, once."""
    trained: list[Trained] = []

    def train(job: TransferJob) -> Trained:
        if not trained:
            trained.extend(processes.run(job, nodes=1, replicas=2, run="reference"))
        return trained[0]

    return train


def assert_identical(results: list[Trained]) -> None:
    """Require that all nodes have trained the same, bit for bit."""
    first, *others = results
    assert first.history
    for other in others:
        assert other.history == first.history
        for one, two in zip(first.weights, other.weights, strict=True):
            np.testing.assert_array_equal(one, two)


def test_two_nodes_train_like_two_replicas(processes, make_uneven_job, train_on_two_replicas):
    job = make_uneven_job()
    assert_identical([train_on_two_replicas(job), *processes.run(job, nodes=2, run="two")])


def test_two_and_four_nodes_train_like_four_replicas(processes, make_uneven_job):
    job = make_uneven_job(
        augmentation={"flip": "both"},
        transfer={"train": "all", "epochs": 1, "batchSize": 8, "featureCache": "off"},
        # The features are computed by both nodes, and each reads those of the other one from storage.
        fineTune={
            "epochs": 2, "unfreeze": {"layers": 1}, "featureCache": "on", "optimizer": {"learningRate": 0.01},
        },
        compute={"gpus": 0, "precision": "mixed_float16"},
    )  # fmt: skip
    layouts = {"one-by-four": (1, 4), "two-by-two": (2, 2), "four-by-one": (4, 1)}
    assert_identical([node for run, layout in layouts.items() for node in processes.run(job, *layout, run=run)])


def test_run_resumes_with_another_number_of_nodes(processes, make_uneven_job, train_on_two_replicas):
    job = make_uneven_job(compute={"gpus": 0, "checkpointMinutes": 1e-6})
    # A lost node: the other one ends by itself.
    chief, peer = processes.start(job, nodes=2, run="resumed", step_seconds=0.2)
    peer.wait_for_event("step", of="transfer", number=3)
    peer.process.kill()
    assert chief.wait() == UnavailableError.exit_code, chief.error_text()
    assert "Lost node 1" in chief.error_text()
    # A stop request on one node: all nodes end after the same step, and the checkpoint is stored.
    nodes = processes.start(job, nodes=2, run="resumed", step_seconds=0.2)
    nodes[1].wait_for_event("step", of="fine-tune", number=1)
    nodes[1].process.send_signal(signal.SIGTERM)
    assert [node.wait() for node in nodes] == [Stopped.exit_code] * 2, nodes[0].error_text()
    steps = [[event["number"] for event in node.events() if event.get("of") == "fine-tune"] for node in nodes]
    assert steps[0] == steps[1]
    assert_identical([train_on_two_replicas(job), *processes.run(job, nodes=1, replicas=2, run="resumed")])
