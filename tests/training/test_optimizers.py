"""Optimizers, schedules and losses of the spec, compared with Keras' own values."""

import keras
import numpy as np
import pytest

from topwork.errors import DataError, SettingError, SpecError
from topwork.spec.training import Loss, Optimizer, Schedule
from topwork.training.losses import accuracy, balanced_class_weights, correct, loss, targets
from topwork.training.optimizers import CLASSES, averages, learning_rate, optimizer
from topwork.training.strategy import check_replicas, strategy


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_each_optimizer_takes_the_steps_of_keras(name):
    made = optimizer(Optimizer(name=name, learning_rate=0.1, weight_decay=0.01), steps_per_epoch=3, epochs=2)
    expected = getattr(keras.optimizers, CLASSES[name])(learning_rate=0.1, weight_decay=0.01)
    assert type(made) is type(expected)
    ended = []
    for one in (made, expected):
        variable = keras.Variable([1.0, -2.0])
        for gradient in ([0.5, 0.1], [-0.2, 0.3]):
            one.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        ended.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_array_equal(*ended)
    assert not np.array_equal(ended[0], [1.0, -2.0])


def test_parameters_arrive_under_their_names_in_keras():
    given = Optimizer(
        name="adam", beta1=0.8, beta2=0.9, epsilon=1e-5, clipnorm=2.0, gradient_accumulation_steps=2,
        ema={"momentum": 0.7},
    )  # fmt: skip
    config = optimizer(given, steps_per_epoch=1, epochs=1).get_config()
    assert {key: config[key] for key in ("beta_1", "beta_2", "epsilon", "clipnorm", "gradient_accumulation_steps")} == {
        "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-5, "clipnorm": 2.0, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    assert (config["use_ema"], config["ema_momentum"]) == (True, 0.7)
    config = optimizer(Optimizer(name="sgd", momentum=0.9, nesterov=True), steps_per_epoch=1, epochs=1).get_config()
    assert (config["momentum"], config["nesterov"]) == (0.9, True)
    config = optimizer(Optimizer(name="rmsprop", rho=0.8, momentum=0.1), steps_per_epoch=1, epochs=1).get_config()
    assert (config["rho"], config["momentum"]) == (0.8, 0.1)


def rates(schedule, steps_per_epoch=4, epochs=3, peak=0.8):
    rate = learning_rate(peak, Schedule.model_validate(schedule), steps_per_epoch=steps_per_epoch, epochs=epochs)
    return [float(rate(step)) if callable(rate) else rate for step in range(steps_per_epoch * epochs)]


def test_schedules_move_the_rate_as_described():
    assert rates({"name": "constant"}) == [0.8] * 12
    cosine = rates({"name": "cosine", "warmupEpochs": 1, "finalFraction": 0.25})
    assert cosine[:5] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert cosine[4:] == pytest.approx([0.8 * (0.25 + 0.75 * (1 + np.cos(np.pi * n / 8)) / 2) for n in range(8)])
    assert rates({"name": "cosine"})[0] == pytest.approx(0.8)
    assert rates({"name": "exponential", "rate": 0.5}) == pytest.approx([0.8 * 0.5 ** (n / 4) for n in range(12)])
    assert rates({"name": "step", "factor": 0.1, "atEpochs": [1, 2]}) == pytest.approx(
        [0.8] * 4 + [0.08] * 4 + [0.008] * 4
    )
    assert rates({"name": "inverseTime", "rate": 0.01}) == pytest.approx([0.8 / (1 + 0.01 * n) for n in range(12)])


def test_averages_pair_each_variable_with_its_average():
    made = optimizer(Optimizer(name="sgd", learning_rate=1.0, ema={"momentum": 0.75}), steps_per_epoch=1, epochs=1)
    variable = keras.Variable([0.0])
    for _ in range(2):
        made.apply([keras.ops.convert_to_tensor([-1.0])], [variable])
    ((trained, average),) = averages(made)
    assert trained is variable
    # Keras begins the average with the first weights: 1, then 0.75 * 1 + 0.25 * 2.
    assert float(keras.ops.convert_to_numpy(average)[0]) == pytest.approx(1.25)
    assert averages(optimizer(Optimizer(), steps_per_epoch=1, epochs=1)) == []


LOGITS3 = np.array([[2.0, -1.0, 0.5], [0.0, 0.1, -3.0]], np.float32)
ONE_HOT3 = np.eye(3, dtype=np.float32)[[0, 2]]
LOGITS2 = np.array([[1.5], [-0.3]], np.float32)
ONE_HOT2 = np.eye(2, dtype=np.float32)[[1, 1]]


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["auto", "categoricalCrossentropy", "sparseCategoricalCrossentropy"])
def test_cross_entropies_are_those_of_the_probabilities(name):
    expected = -np.log(probabilities(LOGITS3)[[0, 1], [0, 2]]).mean()
    assert float(loss(name, 3)(targets(ONE_HOT3), LOGITS3)) == pytest.approx(expected, rel=1e-5)
    # One logit z is the pair of logits (0, z).
    two = probabilities(np.concatenate([np.zeros_like(LOGITS2), LOGITS2], axis=1))
    expected = -np.log(two[:, 1]).mean()
    assert float(loss(name, 2)(targets(ONE_HOT2), LOGITS2)) == pytest.approx(expected, rel=1e-5)


def test_smoothing_and_focal_losses_are_those_of_their_papers():
    chances = probabilities(LOGITS3)
    smooth = ONE_HOT3 * 0.8 + 0.2 / 3
    expected = -(smooth * np.log(chances)).sum(axis=1).mean()
    named = Loss(name="categoricalCrossentropy", label_smoothing=0.2)
    assert float(loss(named, 3)(ONE_HOT3, LOGITS3)) == pytest.approx(expected, rel=1e-5)
    true = chances[[0, 1], [0, 2]]
    expected = -((1 - true) ** 3 * np.log(true)).mean()
    assert float(loss(Loss(name="focal", gamma=3.0), 3)(ONE_HOT3, LOGITS3)) == pytest.approx(expected, rel=1e-4)
    true = 1 / (1 + np.exp(-LOGITS2[:, 0]))
    expected = -((1 - true) ** 2 * np.log(true)).mean()
    assert float(loss(Loss(name="focal"), 2)(targets(ONE_HOT2), LOGITS2)) == pytest.approx(expected, rel=1e-4)


def test_binary_cross_entropy_is_for_two_classes():
    assert isinstance(loss("binaryCrossentropy", 2), keras.losses.BinaryCrossentropy)
    with pytest.raises(DataError) as error:
        loss("binaryCrossentropy", 5)
    assert str(error.value) == (
        "spec.transfer.loss is binaryCrossentropy, which is for two classes, but the dataset has 5. "
        "Use auto or categoricalCrossentropy."
    )


def test_accuracy_counts_the_class_with_the_largest_share():
    mixed = np.array([[0.6, 0.4], [0.2, 0.8]], np.float32)
    assert np.array(correct(targets(mixed), np.array([[-1.0], [-1.0]], np.float32))).tolist() == [1.0, 0.0]
    metric = accuracy()
    metric.update_state(ONE_HOT3, LOGITS3)
    assert float(metric.result()) == 0.5


def test_balanced_weights_let_each_class_count_alike():
    labels = np.array([0] * 6 + [1] * 2 + [2] * 4)
    weights = balanced_class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([12 / 18, 2.0, 1.0])
    assert weights[labels].mean() == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"classes \[3\] have none in the training split"):
        balanced_class_weights(labels, 4)


@pytest.mark.parametrize(
    ("batch_size", "settings", "message"),
    [
        (10, {}, "batchSize 10 can't be divided by the 4 replicas that train here. Use 8."),
        (3, {}, "batchSize 3 can't be divided by the 4 replicas that train here. Use 4."),
        (
            8, {"gradient_accumulation_steps": 2},
            "optimizer.gradientAccumulationSteps is 2, but with 4 replicas Keras crashes (keras#20582). "
            "Take it out or train on one GPU (clipnorm and clipvalue work everywhere).",
        ),
        (
            8, {"global_clipnorm": 1.0},
            "optimizer.globalClipnorm is 1.0, but with 4 replicas each replica clips before the gradients are added "
            "up. Take it out or train on one GPU (clipnorm and clipvalue work everywhere).",
        ),
    ],
)  # fmt: skip
def test_what_replicas_cannot_do_is_refused(batch_size, settings, message):
    with pytest.raises(SpecError) as error:
        check_replicas(4, batch_size, Optimizer(**settings))
    assert str(error.value) == message
    check_replicas(1, batch_size, Optimizer(**settings))


def test_one_strategy_a_process():
    assert strategy(None) is strategy(1)
    with pytest.raises(SettingError, match="trains on 1 replicas and can't train on 2 too"):
        strategy(2)
