"""The optimizer of a stage and the course of its learning rate, as `spec` names them, made of Keras' own classes."""

from typing import Any

import keras

from topwork.errors import SpecError
from topwork.spec.training import Optimizer, Schedule

CLASSES: dict[str, str] = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "ftrl": "Ftrl",
    "lion": "Lion",
    "nadam": "Nadam",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
}


def optimizer(settings: Optimizer, *, steps_per_epoch: int, epochs: int) -> keras.optimizers.Optimizer:
    """Make the optimizer.

    Args:
        settings: `spec.transfer.optimizer` or `spec.fineTune.optimizer`.
        steps_per_epoch: Steps of an epoch.
        epochs: Epochs at most, over which the schedule runs.

    Returns:
        A new optimizer of Keras.

    Raises:
        SpecError: If Keras refuses a parameter.
    """
    given = {
        "momentum": settings.momentum,
        "nesterov": settings.nesterov,
        "beta_1": settings.beta1,
        "beta_2": settings.beta2,
        "rho": settings.rho,
        "epsilon": settings.epsilon,
        "weight_decay": settings.weight_decay,
        "clipnorm": settings.clipnorm,
        "global_clipnorm": settings.global_clipnorm,
        "clipvalue": settings.clipvalue,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
    }
    parameters = {name: value for name, value in given.items() if value is not None}
    if settings.ema:
        parameters |= {"use_ema": True, "ema_momentum": settings.ema.momentum}
    rate = learning_rate(settings.learning_rate, settings.schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
    try:
        return getattr(keras.optimizers, CLASSES[settings.name])(learning_rate=rate, **parameters)
    except (TypeError, ValueError) as error:
        raise SpecError(f"optimizer {settings.name} can't be made with {sorted(parameters)}: {error}") from error


def learning_rate(peak: float, schedule: Schedule, *, steps_per_epoch: int, epochs: int) -> Any:
    """Make the course of the learning rate.

    Args:
        peak: Learning rate at its peak.
        schedule: Kind of course.
        steps_per_epoch: Steps of an epoch.
        epochs: Epochs over which the course runs.

    Returns:
        A number, or a learning rate schedule of Keras.

    Raises:
        SpecError: If the schedule lacks its parameter.
    """
    schedules = keras.optimizers.schedules
    if schedule.name == "cosine":
        return _cosine(peak, schedule, steps_per_epoch, epochs)
    if schedule.name == "exponential":
        return schedules.ExponentialDecay(peak, steps_per_epoch, _needed(schedule, "rate", schedule.rate))
    if schedule.name == "inverseTime":
        return schedules.InverseTimeDecay(peak, 1, _needed(schedule, "rate", schedule.rate))
    if schedule.name == "step":
        factor = _needed(schedule, "factor", schedule.factor)
        # Keras keeps a value up to and including its boundary, counted from step 0.
        boundaries = [epoch * steps_per_epoch - 1 for epoch in schedule.at_epochs]
        return schedules.PiecewiseConstantDecay(boundaries, [peak * factor**n for n in range(len(boundaries) + 1)])
    return peak


def _cosine(peak: float, schedule: Schedule, steps_per_epoch: int, epochs: int) -> Any:
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=max(1, epochs * steps_per_epoch - warmup_steps),
        alpha=schedule.final_fraction,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def _needed(schedule: Schedule, key: str, value: float | None) -> float:
    if value is None:
        raise SpecError(f"optimizer.schedule {schedule.name} needs {key}, which is missing.")
    return value


def averages(made: keras.optimizers.Optimizer) -> list[tuple[Any, Any]]:
    """Pair the trained variables with their moving averages; empty without EMA.

    Keras' own SwapEMAWeights reads the same attributes; it swaps at each epoch's end, where a checkpoint needs the
    weights that training goes on from.
    """
    inner = getattr(made, "inner_optimizer", made)  # mixed_float16 wraps it in a LossScaleOptimizer
    if not inner.use_ema:
        return []
    return list(zip(inner._trainable_variables, inner._model_variables_moving_average, strict=True))
