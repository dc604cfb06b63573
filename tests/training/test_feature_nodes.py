"""The feature cache on several nodes: shared computation, agreement, and units that any number of nodes can use."""

import io
import threading
from dataclasses import replace

import keras
import numpy as np
import pytest
from tests.nodes.thread_nodes import run_on_nodes
from tests.training.observer import RunObserver

from topwork.cancellation import StopRequest
from topwork.data.local_dataset import LocalDataset, Split
from topwork.errors import DataError, SettingError, Stopped, UnavailableError
from topwork.model.augmentation import build_augmentation
from topwork.model.partition import Partition
from topwork.nodes.group import NodeGroup
from topwork.spec.optimizer import Optimizer
from topwork.training import inputs
from topwork.training.feature_cache import extraction, extractor, features, units
from topwork.training.feature_cache.chunks import FeatureChunks
from topwork.training.feature_cache.extractor import FeatureExtractor
from topwork.training.feature_cache.features import compute_features, delete_features
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.training.feature_cache.request import FeatureRequest
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan

BATCHES = 3 * 4 + 2  # 30 training images in 3 views, and 13 validation images


class ImagesInMemory(Split):
    """A split of random images."""

    def __init__(self, size, seed):
        self.size = size
        self.image_size = (16, 16)
        self.labels = np.arange(size, dtype=np.int64) % 2
        self._pixels = np.random.default_rng(seed).integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)
        self._rows = np.arange(size)

    @property
    def digests(self):
        return np.arange(self.size, dtype=np.uint64)


@pytest.fixture(scope="module")
def partition():
    keras.utils.set_random_seed(1)
    image = keras.Input((16, 16, 3))
    maps = keras.layers.Conv2D(4, 3, strides=2, activation="relu")(image / 255.0)
    frozen = keras.Model(image, keras.layers.GlobalAveragePooling2D()(maps), name="frozen_part")
    feature = keras.Input((4,))
    return Partition(frozen, keras.Model(feature, keras.layers.Dense(2)(feature), name="trainable_part"))


@pytest.fixture
def run_nodes(make_job, partition, storage, tmp_path, workspace, monkeypatch):
    """Return a function that computes features on some nodes: the outcome of each, and its observer."""
    monkeypatch.setattr(extraction, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(extraction, "IDLE_SECONDS", 0.01)
    job = make_job(augmentation={"flip": "both", "rotation": 0.2})
    data = LocalDataset(("blue", "red"), ImagesInMemory(30, 1), ImagesInMemory(13, 2), None)

    def request_of(nodes, observer, required=False):
        scratch = tmp_path / f"scratch-{nodes.index}"
        scratch.mkdir(exist_ok=True)
        plan = TrainingPlan(
            stage="transfer",
            phases=(TrainingPhase("head", 5, Optimizer()),),
            batch_size=8,
            loss="auto",
            balance_classes=False,
            early_stopping=None,
            seed=7,
            feature_cache=FeatureCachePolicy(views=3, required=required),
        )
        node = replace(workspace, nodes=nodes, progress=observer, scratch=scratch, stop=StopRequest())
        return FeatureRequest(
            StageContext(job, plan, "0" * 16, node), data, partition, build_augmentation(job.spec.augmentation)
        )

    def run(count, *, stop_node=None, stop_step=("features: train", 2), required=False):
        observers = [RunObserver() for _ in range(count)]

        def compute(nodes):
            request = request_of(nodes, observers[nodes.index], required)
            stop = request.context.workspace.stop
            if nodes.index == stop_node:
                observers[nodes.index].at_step, observers[nodes.index].action = stop_step, stop.set
            with stop.deferred():
                return compute_features(request)

        outcomes = [compute(NodeGroup())] if count == 1 and stop_node is None else run_on_nodes(count, compute)
        return outcomes, [sum(observer.steps.values()) for observer in observers]

    run.request_of = request_of
    return run


def feature_values(dataset):
    return [dataset.train._values, dataset.validation._values]


@pytest.mark.parametrize("count", [2, 4])
def test_nodes_share_the_computation_and_get_the_features_of_a_single_node(run_nodes, storage, count):
    outcomes, steps = run_nodes(count)
    assert sum(steps) == BATCHES
    assert max(steps) - min(steps) <= 2
    delete_features(run_nodes.request_of(NodeGroup(), RunObserver()).context)
    (alone,), _ = run_nodes(1)
    for node in outcomes:
        for first, own, single in zip(*map(feature_values, (outcomes[0], node, alone)), strict=True):
            np.testing.assert_array_equal(own, first)
            np.testing.assert_allclose(own, single, rtol=2e-3)


@pytest.mark.parametrize("numbers_of_nodes", [(2, 1), (1, 2), (4, 2)])
def test_stopped_nodes_stop_together_and_any_number_of_nodes_resumes(run_nodes, numbers_of_nodes):
    first, second = numbers_of_nodes
    stopped, stopped_steps = run_nodes(first, stop_node=first - 1)
    assert [type(outcome) for outcome in stopped] == [Stopped] * first
    assert all("while computing features" in str(outcome) for outcome in stopped)
    resumed, steps = run_nodes(second)
    # The stop came after two steps, in which each node computed and stored a third one.
    assert stopped_steps == [2] * first
    assert sum(steps) == BATCHES - 3 * first
    (again,), no_steps = run_nodes(1)
    assert no_steps == [0]
    for values, expected in zip(feature_values(resumed[-1]), feature_values(again), strict=True):
        np.testing.assert_array_equal(values, expected)


def test_unfinished_units_are_stored_when_nodes_stop(run_nodes, storage, monkeypatch):
    monkeypatch.setattr(units, "MIN_UNITS", 1)
    monkeypatch.setattr(units, "MAX_UNIT_IMAGES", 24)
    _, stopped_steps = run_nodes(2, stop_node=0, stop_step=("features: train", 1))
    assert stopped_steps == [1, 1]
    stored = {stored.key.rsplit("/", 1)[1]: storage.read(stored.key) for stored in storage.list()}
    assert {name: len(np.load(io.BytesIO(data))) for name, data in stored.items()} == {
        "000000.npy": 16,
        "000001.npy": 14,  # the second batch is the last one of a view
    }
    _, steps = run_nodes(2)
    assert sum(steps) == BATCHES - 4


def test_failure_of_a_node_ends_the_others(run_nodes, monkeypatch):
    call = FeatureExtractor.__call__

    def fail_on_node_1(self, images):
        if threading.current_thread().name == "node-1" and self._step is not None:
            raise DataError("the model cannot be used")
        return call(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", fail_on_node_1)
    (survivor, failed), _ = run_nodes(2)
    assert isinstance(failed, DataError)
    assert isinstance(survivor, UnavailableError)
    assert str(survivor) == "Node 1 failed: the model cannot be used"


def test_unit_that_disappears_fails_with_a_retry(run_nodes, monkeypatch):
    monkeypatch.setattr(FeatureChunks, "read", lambda *_: None)
    outcomes, _ = run_nodes(2)
    assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
    assert any("are missing from storage, or are damaged" in str(outcome) for outcome in outcomes)


@pytest.fixture
def full_disk_on_node_1(monkeypatch):
    monkeypatch.setattr(
        features,
        "choose_placement",
        lambda *_: None if threading.current_thread().name == "node-1" else "memory",
    )


def test_cache_is_used_on_all_nodes_or_on_none(run_nodes, full_disk_on_node_1):
    assert run_nodes(4) == ([None] * 4, [0] * 4)


def test_required_cache_without_space_on_one_node_names_it(run_nodes, full_disk_on_node_1):
    outcomes, _ = run_nodes(2, required=True)
    assert [type(outcome) for outcome in outcomes] == [SettingError] * 2
    assert all("of spec.compute.scratch on node 1. Provide more memory" in str(outcome) for outcome in outcomes)


def test_nodes_agree_on_the_type_of_the_features(run_nodes, monkeypatch):
    extract = FeatureRequest.extract

    def extract_larger_ones_on_node_1(self, *arguments):
        scale = 1e6 if threading.current_thread().name == "node-1" else 1
        return (scale * values for values in extract(self, *arguments))

    monkeypatch.setattr(FeatureRequest, "extract", extract_larger_ones_on_node_1)
    outcomes, _ = run_nodes(2)
    assert [values.dtype for outcome in outcomes for values in feature_values(outcome)] == [np.float16] * 4


def test_bfloat16_is_used_on_all_nodes_or_on_none(partition, monkeypatch):
    monkeypatch.setattr(extractor, "MIN_MULTIPLICATIONS_TO_FREEZE", 0)
    monkeypatch.setattr(extractor, "cpu_supports_bfloat16", lambda: threading.current_thread().name == "node-1")
    images = keras.ops.convert_to_tensor(np.full((4, 16, 16, 3), 100, np.float32))

    def extract(nodes):
        return FeatureExtractor(partition.frozen_part, precision="auto", images=4, nodes=nodes)(images)

    first, second = run_on_nodes(2, extract)
    np.testing.assert_array_equal(first, second)


BFLOAT16 = "mixed_bfloat16"


@pytest.mark.parametrize(("policies", "expected"), [((BFLOAT16, "float32"), "float32"), ((BFLOAT16,) * 2, BFLOAT16)])
def test_nodes_agree_on_the_precision(run_nodes, monkeypatch, policies, expected):
    by_node = {f"node-{index}": policy for index, policy in enumerate(policies)}
    monkeypatch.setattr(inputs, "choose_dtype_policy", lambda *_: by_node[threading.current_thread().name])
    monkeypatch.setattr(inputs, "_partition", lambda model, context: None)
    chosen = []
    monkeypatch.setattr(inputs, "with_precision", lambda model, policy: chosen.append(policy) or model)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

    def prepare(nodes):
        inputs.prepare_model(model, run_nodes.request_of(nodes, RunObserver()).context)

    run_on_nodes(2, prepare)
    assert chosen == [expected] * 2


def test_features_of_an_older_layout_are_ignored_and_deleted(run_nodes, storage):
    request = run_nodes.request_of(NodeGroup(), RunObserver())
    expected = feature_values(compute_features(request))
    delete_features(request.context)
    assert not list(storage.list())
    wrong = io.BytesIO()
    np.save(wrong, np.full((30, 4), 5, np.float16))
    storage.write(f"{request.prefix}/train-0000000000.npy", wrong.getvalue())
    for values, wanted in zip(feature_values(compute_features(request)), expected, strict=True):
        np.testing.assert_array_equal(values, wanted)
    delete_features(request.context)
    assert not list(storage.list())
