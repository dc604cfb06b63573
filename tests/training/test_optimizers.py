"""Optimizers and learning rate schedules of the spec, compared with Keras' own."""

import keras
import numpy as np
import pytest

from topwork.spec.optimizer import Optimizer, Schedule
from topwork.training.optimizers import OPTIMIZER_CLASSES, make_learning_rate, make_optimizer, moving_averages


@pytest.mark.parametrize("name", sorted(OPTIMIZER_CLASSES))
def test_optimizer_takes_the_same_steps_as_in_keras(name):
    optimizer = make_optimizer(Optimizer(name=name, learning_rate=0.1, weight_decay=0.01), steps_per_epoch=3, epochs=2)
    expected = getattr(keras.optimizers, OPTIMIZER_CLASSES[name])(learning_rate=0.1, weight_decay=0.01)
    assert type(optimizer) is type(expected)
    results = []
    for candidate in (optimizer, expected):
        variable = keras.Variable([1.0, -2.0])
        for gradient in ([0.5, 0.1], [-0.2, 0.3]):
            candidate.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        results.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_array_equal(*results)
    assert not np.array_equal(results[0], [1.0, -2.0])


def test_optimizer_parameters_have_their_keras_names():
    settings = Optimizer(
        name="adam", beta1=0.8, beta2=0.9, epsilon=1e-5, clipnorm=2.0, gradient_accumulation_steps=2,
        ema={"momentum": 0.7},
    )  # fmt: skip
    config = make_optimizer(settings, steps_per_epoch=1, epochs=1).get_config()
    assert {key: config[key] for key in ("beta_1", "beta_2", "epsilon", "clipnorm", "gradient_accumulation_steps")} == {
        "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-5, "clipnorm": 2.0, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    assert (config["use_ema"], config["ema_momentum"]) == (True, 0.7)
    config = make_optimizer(
        Optimizer(name="sgd", momentum=0.9, nesterov=True), steps_per_epoch=1, epochs=1
    ).get_config()
    assert (config["momentum"], config["nesterov"]) == (0.9, True)
    config = make_optimizer(Optimizer(name="rmsprop", rho=0.8, momentum=0.1), steps_per_epoch=1, epochs=1).get_config()
    assert (config["rho"], config["momentum"]) == (0.8, 0.1)


def rates(schedule, steps_per_epoch=4, epochs=3, peak=0.8):
    rate = make_learning_rate(peak, Schedule.model_validate(schedule), steps_per_epoch=steps_per_epoch, epochs=epochs)
    return [float(rate(step)) if callable(rate) else rate for step in range(steps_per_epoch * epochs)]


def test_schedules_set_the_documented_learning_rates():
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


def test_moving_averages_pairs_each_variable_with_its_average():
    optimizer = make_optimizer(
        Optimizer(name="sgd", learning_rate=1.0, ema={"momentum": 0.75}), steps_per_epoch=1, epochs=1
    )
    variable = keras.Variable([0.0])
    for _ in range(2):
        optimizer.apply([keras.ops.convert_to_tensor([-1.0])], [variable])
    ((trained, average),) = moving_averages(optimizer)
    assert trained is variable
    # Keras initializes the average with the first weights: 1, then 0.75 * 1 + 0.25 * 2.
    assert float(keras.ops.convert_to_numpy(average)[0]) == pytest.approx(1.25)
    assert moving_averages(make_optimizer(Optimizer(), steps_per_epoch=1, epochs=1)) == []
