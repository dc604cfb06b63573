"""Keras optimizers and learning rate schedules, with the parameters that each of them supports."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from topwork.spec.messages import format_value, join_words
from topwork.spec.spec_model import SpecModel, Violation, rule

LearningRate = Annotated[StrictFloat, Field(gt=0.0, le=10.0)]
Fraction = Annotated[StrictFloat, Field(ge=0.0, lt=1.0)]
Positive = Annotated[StrictFloat, Field(gt=0.0, le=1e6)]
Epoch = Annotated[StrictInt, Field(ge=1, le=10000)]

# Optimizers of Keras 3.15 that support each optional parameter; a test compares this table with their signatures.
OPTIMIZERS_BY_PARAMETER: dict[str, tuple[str, ...]] = {
    "momentum": ("rmsprop", "sgd"),
    "nesterov": ("sgd",),
    "beta1": ("adam", "adamax", "adamw", "lion", "nadam"),
    "beta2": ("adam", "adamax", "adamw", "lion", "nadam"),
    "rho": ("adadelta", "rmsprop"),
    "epsilon": ("adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "rmsprop"),
}
SCHEDULES_BY_PARAMETER: dict[str, tuple[str, ...]] = {
    "warmupEpochs": ("cosine",),
    "finalFraction": ("cosine",),
    "rate": ("exponential", "inverseTime"),
    "factor": ("step",),
    "atEpochs": ("step",),
}
REQUIRED_PARAMETERS = {"exponential": ("rate",), "inverseTime": ("rate",), "step": ("factor", "atEpochs")}


class Schedule(SpecModel):
    """How the learning rate changes over the epochs of a stage."""

    name: Literal["constant", "cosine", "exponential", "step", "inverseTime"] = Field(description="Type of schedule.")
    warmup_epochs: StrictFloat = Field(
        default=0.0,
        ge=0.0,
        le=10000.0,
        description="With cosine: epochs in which the learning rate rises linearly from 0.",
    )
    final_fraction: StrictFloat = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="With cosine: final learning rate, as a fraction of the peak.",
    )
    rate: Positive | None = Field(
        default=None,
        description="With exponential: factor applied after each epoch. With inverseTime: decay per step, as in "
        "learningRate / (1 + rate * step).",
    )
    factor: Annotated[StrictFloat, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="With step: factor applied to the learning rate after each of atEpochs."
    )
    at_epochs: tuple[Epoch, ...] = Field(
        default=(),
        max_length=100,
        description="With step: epochs, counted from 1, after which the learning rate drops.",
    )


class Ema(SpecModel):
    """Exponential moving average of the weights, which is used for evaluation and in the published model."""

    momentum: StrictFloat = Field(
        default=0.99, gt=0.0, lt=1.0, description="Fraction of the previous average kept at each step."
    )


class Optimizer(SpecModel):
    """A Keras optimizer and its parameters. Unset parameters use the Keras defaults."""

    name: Literal[
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ftrl", "lion", "nadam", "rmsprop", "sgd"
    ] = Field(default="adam", description="Name of the optimizer in keras.optimizers.")
    learning_rate: LearningRate = Field(default=0.001, description="Peak learning rate.")
    schedule: Schedule = Field(
        default=Schedule(name="constant"),
        description="Learning rate schedule. It restarts with each of unfreeze.steps.",
    )
    momentum: Fraction | None = Field(default=None, description="With sgd and rmsprop: momentum.")
    nesterov: StrictBool | None = Field(default=None, description="With sgd: whether to use Nesterov momentum.")
    beta1: Fraction | None = Field(
        default=None, description="With adam, adamax, adamw, lion and nadam: decay rate of the first moment."
    )
    beta2: Fraction | None = Field(
        default=None, description="With adam, adamax, adamw, lion and nadam: decay rate of the second moment."
    )
    rho: Fraction | None = Field(
        default=None, description="With adadelta and rmsprop: decay rate of the moving average of squared gradients."
    )
    epsilon: Positive | None = Field(
        default=None,
        description="With adadelta, adagrad, adam, adamax, adamw, nadam and rmsprop: small constant for numerical "
        "stability.",
    )
    weight_decay: Fraction | None = Field(default=None, description="Decoupled weight decay per step.")
    clipnorm: Positive | None = Field(
        default=None, description="Maximum norm of the gradient of each variable, summed over all replicas."
    )
    global_clipnorm: Positive | None = Field(
        default=None, description="Maximum norm of all gradients together, summed over all replicas."
    )
    clipvalue: Positive | None = Field(
        default=None, description="Maximum absolute value of each gradient element, summed over all replicas."
    )
    gradient_accumulation_steps: Annotated[StrictInt, Field(ge=2, le=10000)] | None = Field(
        default=None, description="Steps per weight update. Supported on a single GPU or CPU only."
    )
    ema: Ema | None = Field(default=None, description="Exponential moving average of the weights. Unset: off.")


def _given(model: SpecModel, keys: Iterable[str]) -> dict[str, object]:
    """Return the values of those keys that differ from their default."""
    fields = {field.alias: (name, field.default) for name, field in type(model).model_fields.items()}
    values = {key: (getattr(model, fields[key][0]), fields[key][1]) for key in keys}
    return {key: value for key, (value, default) in values.items() if value != default}


def _check_supported(model: Schedule | Optimizer, supported: dict[str, tuple[str, ...]]) -> Iterator[Violation]:
    for key, value in _given(model, supported).items():
        if model.name not in supported[key]:
            yield Violation(
                key,
                f"{format_value(value)} applies only to {join_words(list(supported[key]))}, not to {model.name}. "
                "Remove it or change the name.",
            )


@rule(Schedule)
def schedule_supports_its_parameters(schedule: Schedule) -> Iterator[Violation]:
    """A parameter of another schedule would be ignored silently."""
    yield from _check_supported(schedule, SCHEDULES_BY_PARAMETER)


@rule(Schedule)
def schedule_has_its_required_parameters(schedule: Schedule) -> Iterator[Violation]:
    """The exponential, inverseTime and step schedules have parameters without a useful default."""
    given = _given(schedule, SCHEDULES_BY_PARAMETER)
    descriptions = {field.alias: field.description for field in Schedule.model_fields.values()}
    for key in REQUIRED_PARAMETERS.get(schedule.name, ()):
        if key not in given:
            yield Violation(key, f"is required if name is {schedule.name}. {descriptions[key]}")


@rule(Schedule)
def exponential_schedule_decreases(schedule: Schedule) -> Iterator[Violation]:
    """With a factor of 1 or more, the learning rate would stay constant or grow without limit."""
    if schedule.name == "exponential" and schedule.rate is not None and schedule.rate >= 1.0:
        yield Violation(
            "rate",
            f"{format_value(schedule.rate)} is not below 1, so the learning rate would never decrease. Try 0.9.",
        )


@rule(Schedule)
def step_epochs_increase(schedule: Schedule) -> Iterator[Violation]:
    """The learning rate drops once after each listed epoch."""
    for index, (earlier, epoch) in enumerate(pairwise(schedule.at_epochs)):
        if epoch <= earlier:
            yield Violation(
                f"atEpochs.{index + 1}",
                f"{epoch} is not above the previous epoch {earlier}. List epochs in ascending order.",
            )


@rule(Optimizer)
def optimizer_supports_its_parameters(optimizer: Optimizer) -> Iterator[Violation]:
    """Keras rejects unsupported parameters, but only after the dataset is pulled."""
    yield from _check_supported(optimizer, OPTIMIZERS_BY_PARAMETER)


@rule(Optimizer)
def nesterov_requires_momentum(optimizer: Optimizer) -> Iterator[Violation]:
    """Nesterov momentum has no effect if momentum is 0."""
    if optimizer.name == "sgd" and optimizer.nesterov and not optimizer.momentum:
        yield Violation("nesterov", "true requires momentum, which is 0. Set momentum, such as 0.9.")


@rule(Optimizer)
def one_clipping_method(optimizer: Optimizer) -> Iterator[Violation]:
    """Keras supports only one clipping method at a time."""
    given = list(_given(optimizer, ("clipnorm", "globalClipnorm", "clipvalue")))
    if len(given) > 1:
        yield Violation(
            given[-1],
            f"cannot be combined with {join_words(given[:-1])}: Keras supports one clipping method. Keep one of them.",
        )
