"""A stage that continues a shorter one has exactly the result of a stage that trains all epochs at once."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from tests.training.observer import RunObserver

from topwork.registry.runs import delete_results
from topwork.registry.stage_keys import stage_keys
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training import trainer

# Every feature with state that does not depend on the number of epochs.
OPTIMIZER = {"learningRate": 0.01, "schedule": {"name": "exponential", "rate": 0.8}, "ema": {"momentum": 0.8}}
TRANSFER = {
    "train": "all", "batchSize": 5, "earlyStopping": {"patience": 4}, "classWeights": "balanced",
    "optimizer": OPTIMIZER,
}  # fmt: skip


@pytest.fixture
def make_transfer(make_job):
    """Build a job whose transfer trains a number of epochs; keyword arguments replace keys of `spec.transfer`."""

    def make(epochs, *, kept=True, **transfer):
        return make_job(
            augmentation={"flip": "horizontal", "rotation": 0.1},
            model={"base": {"cnn": {"filters": [4, 6]}}, "head": {"hidden": [8], "dropout": 0.4}},
            transfer=TRANSFER | {"epochs": epochs} | transfer,
            compute={"gpus": 0, "keepCheckpoint": kept},
        )

    return make


@pytest.fixture
def make_trial(make_job):
    """Build a trial that trains the top of a base for a number of epochs, by default on cached features."""

    def make(epochs, *, kept=True, cache="auto", **spec):
        settings = {"epochs": epochs, "unfreeze": {"layers": 1}, "optimizer": {"name": "sgd", "learningRate": 0.01}}
        return make_job(
            augmentation={"flip": "horizontal"},
            model={"base": {"cnn": {"filters": [4, 6]}}, "head": {"hidden": [8], "dropout": 0.4}},
            transfer={"train": "all", "epochs": 1, "batchSize": 5},
            fineTune=settings | {"featureCache": cache, "keep": "last"},
            compute={"gpus": 0, "keepCheckpoint": kept},
            **{"publish": {"enabled": False}} | spec,
        )

    return make


def run(job, workspace):
    """Run the training stages of a job; returns its classifier, its weights and an observer of its log."""
    observer = RunObserver()
    observer.observe_log()
    dataset = pull(job, workspace)
    classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return classifier, keras.models.load_model(path, compile=False).get_weights(), observer


def run_elsewhere(job, workspace):
    """Run a job in another storage, where it finds nothing to continue."""
    return run(job, replace(workspace, storage=workspace.storage.at(f"{workspace.storage.uri}/elsewhere")))


def trained(result, stage="transfer"):
    """Return the epochs that a run trained itself."""
    return [row["epoch"] for row in result[2].fields_of("epoch") if row["stage"] == stage]


def reasons(result, event):
    return [fields["reason"] for fields in result[2].fields_of(event)]


def assert_same(one, other):
    times = {"seconds", "images_per_second", "input_wait_seconds"}
    mine, theirs = ([{**row, **dict.fromkeys(times)} for row in result[0].history] for result in (one, other))
    assert mine == theirs
    assert one[0].best_epoch == other[0].best_epoch
    for first, second in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(first, second)


def test_longer_stage_continues_shorter_ones_bit_for_bit(make_transfer, workspace):
    for epochs, own in ((1, [1]), (2, [2]), (5, [3, 4, 5])):
        result = run(make_transfer(epochs, kept=epochs < 5), workspace)
        assert trained(result) == own
    assert_same(result, run_elsewhere(make_transfer(5, kept=False), workspace))
    # The five epochs were not kept.
    assert trained(run(make_transfer(6), workspace)) == [3, 4, 5, 6]


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_trial_continues_bit_for_bit_with_and_without_cached_features(make_trial, workspace, cache):
    run(make_trial(1, cache=cache), workspace)
    result = run(make_trial(5, cache=cache), workspace)
    assert trained(result, "fine-tune") == [2, 3, 4, 5]
    assert [fields["used"] for fields in result[2].fields_of("feature cache")] == [cache == "auto"]
    assert_same(result, run_elsewhere(make_trial(5, cache=cache, kept=False), workspace))


def test_stage_that_early_stopping_ended_stays_ended(make_transfer, workspace):
    stopping = {"earlyStopping": {"patience": 1, "minDelta": 1000.0}}  # no epoch improves on the first one
    assert trained(run(make_transfer(3, **stopping), workspace)) == [1, 2]
    result = run(make_transfer(6, **stopping), workspace)
    assert trained(result) == []
    assert (len(result[0].rows), result[0].best_epoch) == (2, 1)
    assert_same(result, run_elsewhere(make_transfer(6, **stopping), workspace))


def test_schedule_that_depends_on_the_epochs_starts_over(make_transfer, workspace):
    cosine = {"optimizer": {"learningRate": 0.01, "schedule": {"name": "cosine"}}}
    reason = "the schedule cosine depends on the number of epochs"
    assert reasons(run(make_transfer(1, **cosine), workspace), "checkpoint not kept") == [reason]
    longer = run(make_transfer(2, **cosine), workspace)
    assert trained(longer) == [1, 2]
    assert reasons(longer, "training starts over") == [reason]


def test_stage_with_another_input_starts_over_and_says_why(make_trial, workspace):
    publishes = {"publish": {"formats": ["keras"]}}
    run(make_trial(1, **publishes), workspace)  # one epoch does not cache features
    longer = run(make_trial(6, **publishes), workspace)
    assert trained(longer, "fine-tune") == [1, 2, 3, 4, 5, 6]
    libraries = f"TensorFlow {tf.__version__} and Keras {keras.__version__}"
    [reason] = reasons(longer, "checkpoint of a shorter stage not used")
    short, _, long = reason.partition(", but this one uses ")
    assert short.startswith(f"that stage was trained on images in float32 by {libraries} with frozen weights ")
    assert long.startswith(f"cached features of 4 views in float32 by {libraries} with frozen weights ")


def test_stage_with_another_version_of_keras_starts_over(make_transfer, workspace, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(keras, "__version__", "3.0.0")
        run(make_transfer(1), workspace)
    longer = run(make_transfer(2), workspace)
    assert trained(longer) == [1, 2]
    assert "and Keras 3.0.0 with" in reasons(longer, "checkpoint of a shorter stage not used")[0]


def test_stage_whose_base_was_trained_again_with_another_result_starts_over(make_trial, workspace, monkeypatch):
    run(make_trial(1), workspace)
    # The result of the stage before is lost, and not the same on another GPU.
    workspace.storage.delete([item.key for item in list(workspace.storage.list("stages/transfer/"))])
    with monkeypatch.context() as patched:
        set_seed = keras.utils.set_random_seed
        patched.setattr(keras.utils, "set_random_seed", lambda seed: set_seed(seed + 1))
        longer = run(make_trial(3), workspace)
    assert trained(longer, "fine-tune") == [1, 2, 3]
    assert "frozen weights" in reasons(longer, "checkpoint of a shorter stage not used")[0]


def test_damaged_or_deleted_checkpoint_is_not_used(make_transfer, workspace):
    job = make_transfer(1)
    run(job, workspace)
    key = stage_keys(job, pull(job, workspace).metadata.fingerprint, workspace.storage).transfer
    states = [stored.key for stored in workspace.storage.list(f"stages/transfer/{key}/last-checkpoint/")]
    state = next(name for name in states if name.endswith("state.npz"))
    workspace.storage.write(state, b"damaged")
    result = run(make_transfer(2), workspace)
    assert trained(result) == [1, 2]
    assert "state.npz" in reasons(result, "checkpoint of a shorter stage not used")[0]
    # A restart does not use the checkpoint of the second epoch either.
    delete_results(make_transfer(3), pull(job, workspace), workspace.storage)
    assert trained(run(make_transfer(3), workspace)) == [1, 2, 3]


def test_process_killed_before_the_stage_is_complete_loses_nothing(make_transfer, workspace, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    for function in ("keep_checkpoint", "store_stage_result"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(trainer, function, kill)
            run(make_transfer(2), workspace)
    assert trained(run(make_transfer(2), workspace)) == []
    result = run(make_transfer(3), workspace)
    assert trained(result) == [3]
    assert_same(result, run_elsewhere(make_transfer(3, kept=False), workspace))
