"""examples/lab-4-vgg16-gradual.yaml and xception-sgd.yaml: gradual unfreezing, and two stages with SGD."""

import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

BLOCKS = [f"base/block{number}" for number in range(1, 6)]


# VGG16, unfrozen block by block.


@pytest.fixture(scope="module")
def vgg16(examples):
    examples.mirror_weights("VGG16")
    examples.mirror_flowers()
    return examples.run_one(
        "lab-4-vgg16-gradual",
        "spec.dataset.imageSize=[32, 32]",
        "spec.transfer.epochs=1",
        "spec.transfer.batchSize=40",
        *(f"spec.fineTune.unfreeze.steps.{step}.epochs={epochs}" for step, epochs in enumerate((1, 2, 1, 1))),
        "spec.publish.formats=[keras]",
        "spec.dataset.splits.validation=null",
    )


def trained_blocks(groups):
    return [name for name in BLOCKS if groups[name][0]]


def test_transfer_trains_only_the_head(vgg16, examples):
    (groups,) = vgg16.parameter_counts("transfer")
    assert {name for name, (trainable, _) in groups.items() if trainable} == {"head"}
    before, after = layer_weights(examples.backbones["VGG16"]), layer_weights(vgg16.model("transfer").get_layer("base"))
    assert all(are_identical(before[name], after[name]) for name in before)


def test_fine_tune_unfreezes_the_base_from_the_top_block_by_block(vgg16):
    phases = vgg16.parameter_counts("fine-tune")
    assert [trained_blocks(groups) for groups in phases] == [BLOCKS[4:], BLOCKS[3:], BLOCKS[2:], BLOCKS]
    trained = [sum(trainable for trainable, _ in groups.values()) for groups in phases]
    assert trained == sorted(set(trained))
    assert trained[-1] == vgg16.model("fine-tune").count_params()


def test_each_unfreezing_step_has_its_epochs_and_learning_rate(vgg16):
    rows = vgg16.history("fine-tune")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-4, 5e-5, 5e-5, 2e-5, 1e-5])


def test_example_has_four_unfreezing_steps(examples):
    steps = examples.read("lab-4-vgg16-gradual").spec.fine_tune.unfreeze.steps
    assert [(step.layers, step.epochs) for step in steps] == [(3, 4), (6, 4), (9, 3), (13, 3)]
    rates = [step.learning_rate for step in steps]
    assert rates == sorted(rates, reverse=True)


def test_layers_trained_in_more_steps_change_more(vgg16):
    before, after = (layer_weights(vgg16.model(stage).get_layer("base")) for stage in ("transfer", "fine-tune"))
    changes = [float(np.mean(np.abs(after[name][1] - before[name][1]))) for name in before]
    assert len(changes) == 13
    assert 0 < np.mean(changes[:4]) < np.mean(changes[4:7]) < np.mean(changes[7:10]) < np.mean(changes[10:])


# Xception, two stages with SGD.


@pytest.fixture(scope="module")
def xception(examples):
    examples.mirror_weights("Xception", side=71)
    examples.mirror_flowers()
    return examples.run_one(
        "xception-sgd",
        "spec.dataset.imageSize=[71, 71]",
        "spec.transfer.batchSize=25",
        "spec.fineTune.epochs=1",
        # One step: at this learning rate, an untrained base diverges after a few.
        "spec.fineTune.batchSize=75",
        "spec.publish.formats=[keras]",
        "spec.dataset.splits.validation=null",
    )


def test_head_is_average_pooling_and_a_softmax(xception):
    names = [layer.name for layer in xception.published_model.layers]
    assert names == ["image", "input_scaling", "base", "pooling", "logits", "probabilities"]
    classes = [type(layer).__name__ for layer in xception.published_model.layers[2:]]
    assert classes == ["Functional", "GlobalAveragePooling2D", "Dense", "Softmax"]
    probabilities = xception.published_model.predict(
        xception.dataset.test.load_images(np.arange(10)).astype("float32"), verbose=0
    )
    assert probabilities.shape == (10, 5)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(10), abs=1e-5)


def test_transfer_has_five_epochs_with_a_learning_rate_that_decays_from_0_2(xception):
    (groups,) = xception.parameter_counts("transfer")
    assert {name for name, (trainable, _) in groups.items() if trainable} == {"head"}
    rows = xception.history("transfer")
    assert len(rows) == 5
    # 75 images are three steps per epoch.
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [0.2 / (1 + 0.01 * 3 * epoch) for epoch in range(1, 6)]
    )


def test_fine_tune_trains_all_layers_with_learning_rate_0_01(xception):
    (groups,) = xception.parameter_counts("fine-tune")
    assert all(trainable for trainable, _ in groups.values())
    (row,) = xception.history("fine-tune")
    assert row["learning_rate"] == pytest.approx(0.01 / (1 + 0.001))
    before, after = (layer_weights(xception.model(stage).get_layer("base")) for stage in ("transfer", "fine-tune"))
    for name in before:
        assert are_identical(before[name], after[name]) == name.endswith("BatchNormalization"), name


def test_both_stages_use_sgd_with_momentum_0_9(xception):
    from topwork.stages.fine_tune import plan_fine_tune
    from topwork.stages.transfer import plan_transfer
    from topwork.training.optimizers import make_optimizer

    for plan in (plan_transfer(xception.job.spec), plan_fine_tune(xception.job.spec)):
        (phase,) = plan.phases
        optimizer = make_optimizer(phase.optimizer, steps_per_epoch=3, epochs=phase.epochs)
        assert (type(optimizer).__name__, optimizer.momentum, optimizer.nesterov) == ("SGD", 0.9, False)
