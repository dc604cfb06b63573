"""Optimizers and learning rate schedules from the spec, built from Keras' own classes."""

from typing import Any

import keras
import tensorflow as tf

from topwork.errors import SpecError, quote_error
from topwork.spec.optimizer import Optimizer, Schedule

OPTIMIZER_CLASSES: dict[str, str] = {
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


def make_optimizer(
    settings: Optimizer, *, steps_per_epoch: int, epochs: int, replicas: int = 1, scale_loss: bool = False
) -> keras.optimizers.Optimizer:
    """Create an optimizer.

    Args:
        settings: `spec.transfer.optimizer` or `spec.fineTune.optimizer`.
        steps_per_epoch: Steps per epoch.
        epochs: Maximum number of epochs; the learning rate schedule spans them.
        replicas: Number of replicas of the strategy whose scope this is called in.
        scale_loss: Whether to scale the loss, so that small gradients do not underflow to 0 in float16. Keras does this
            by itself only if the whole model has the policy mixed_float16, including its logits.

    Returns:
        A new Keras optimizer.

    Raises:
        SpecError: If Keras rejects a parameter.

    Example:
        `make_optimizer(spec.transfer.optimizer, steps_per_epoch=31, epochs=20)`
    """
    keras_arguments = {
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
    parameters = {name: value for name, value in keras_arguments.items() if value is not None}
    if settings.ema:
        parameters |= {"use_ema": True, "ema_momentum": settings.ema.momentum}
    rate = make_learning_rate(settings.learning_rate, settings.schedule, steps_per_epoch=steps_per_epoch, epochs=epochs)
    try:
        optimizer = getattr(keras.optimizers, OPTIMIZER_CLASSES[settings.name])(learning_rate=rate, **parameters)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"optimizer {settings.name} does not accept {sorted(parameters)}: {quote_error(error)}"
        ) from error
    if scale_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return _sum_gradients_first(optimizer) if replicas > 1 else optimizer


def _sum_gradients_first(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Make an optimizer sum the gradients of all replicas before it does anything else with them.

    Keras sums them last. Each replica would clip only its own gradients, and loss scaling would check only those of the
    first replica for infinite values.
    """
    apply = optimizer.apply

    def apply_sums(gradients: Any, trainable_variables: Any = None) -> None:
        apply(_sum_over_replicas(gradients), trainable_variables)

    optimizer.apply = apply_sums
    _inner_optimizer(optimizer)._all_reduce_sum_gradients = lambda gradients_and_variables: gradients_and_variables
    return optimizer


def _sum_over_replicas(gradients: Any) -> list[Any]:
    """Sum each gradient over all replicas; a variable that does not affect the loss has no gradient."""
    context = tf.distribute.get_replica_context()
    sums = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, [g for g in gradients if g is not None]))
    return [None if gradient is None else next(sums) for gradient in gradients]


def _inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer inside a LossScaleOptimizer, otherwise the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def make_learning_rate(peak: float, schedule: Schedule, *, steps_per_epoch: int, epochs: int) -> Any:
    """Create a learning rate schedule.

    Args:
        peak: Highest learning rate.
        schedule: Settings of the schedule.
        steps_per_epoch: Steps per epoch.
        epochs: Number of epochs that the schedule spans.

    Returns:
        The constant learning rate, or a Keras schedule: a function of the step.

    Raises:
        SpecError: If the schedule lacks a required parameter.
    """
    schedules = keras.optimizers.schedules
    if schedule.name == "cosine":
        return _cosine(peak, schedule, steps_per_epoch, epochs)
    if schedule.name == "exponential":
        return schedules.ExponentialDecay(peak, steps_per_epoch, _required(schedule, "rate", schedule.rate))
    if schedule.name == "inverseTime":
        return schedules.InverseTimeDecay(peak, 1, _required(schedule, "rate", schedule.rate))
    if schedule.name == "step":
        factor = _required(schedule, "factor", schedule.factor)
        # Keras applies a value up to and including its boundary; steps count from 0.
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


def _required(schedule: Schedule, key: str, value: float | None) -> float:
    if value is None:
        raise SpecError(f"optimizer.schedule {schedule.name} requires {key}, which is missing.")
    return value


def moving_averages(optimizer: keras.optimizers.Optimizer) -> list[tuple[Any, Any]]:
    """Pair every trained variable with its exponential moving average.

    Keras' own SwapEMAWeights reads the same attributes, but swaps at the end of each epoch, where a checkpoint needs
    the weights that training continues from.

    Args:
        optimizer: A built optimizer.

    Returns:
        Pairs of variable and average; empty without EMA.
    """
    inner = _inner_optimizer(optimizer)
    if not inner.use_ema:
        return []
    return list(zip(inner._trainable_variables, inner._model_variables_moving_average, strict=True))
