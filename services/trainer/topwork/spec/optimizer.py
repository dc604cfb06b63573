"""Optimizers of Keras by name with their parameters, and how the learning rate moves."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from topwork.spec.messages import listed, shown
from topwork.spec.section import Number, Part, Refusal, Whole, YesNo, rule

LearningRate = Annotated[Number, Field(gt=0.0, le=10.0)]
Share = Annotated[Number, Field(ge=0.0, lt=1.0)]
Positive = Annotated[Number, Field(gt=0.0, le=1e6)]
AtEpoch = Annotated[Whole, Field(ge=1, le=10000)]

# Which optimizers of Keras 3.15 take a parameter that not all of them take; a test compares this with their signatures.
TAKERS: dict[str, tuple[str, ...]] = {
    "momentum": ("rmsprop", "sgd"),
    "nesterov": ("sgd",),
    "beta1": ("adam", "adamax", "adamw", "lion", "nadam"),
    "beta2": ("adam", "adamax", "adamw", "lion", "nadam"),
    "rho": ("adadelta", "rmsprop"),
    "epsilon": ("adadelta", "adagrad", "adam", "adamax", "adamw", "nadam", "rmsprop"),
}
# Which courses of the learning rate take which parameter.
SCHEDULE_TAKERS: dict[str, tuple[str, ...]] = {
    "warmupEpochs": ("cosine",),
    "finalFraction": ("cosine",),
    "rate": ("exponential", "inverseTime"),
    "factor": ("step",),
    "atEpochs": ("step",),
}
SCHEDULE_NEEDS = {"exponential": ("rate",), "inverseTime": ("rate",), "step": ("factor", "atEpochs")}


class Schedule(Part):
    """How the learning rate moves over the epochs of a stage."""

    name: Literal["constant", "cosine", "exponential", "step", "inverseTime"] = Field(description="Kind of course.")
    warmup_epochs: Number = Field(
        default=0.0, ge=0.0, le=10000.0, description="Epochs of linear rise from 0; with cosine only."
    )
    final_fraction: Number = Field(default=0.0, ge=0.0, le=1.0, description="Cosine: share left at the end.")
    rate: Positive | None = Field(
        default=None, description="Exponential: factor an epoch. inverseTime: decay a step, rate/(1+decay*step)."
    )
    factor: Annotated[Number, Field(gt=0.0, lt=1.0)] | None = Field(
        default=None, description="Step: factor at each of atEpochs."
    )
    at_epochs: tuple[AtEpoch, ...] = Field(
        default=(), max_length=100, description="Step: epochs, counted from 1, after which the rate falls."
    )


class Ema(Part):
    """Exponential moving average of the weights; evaluation and the result use the average."""

    momentum: Number = Field(default=0.99, gt=0.0, lt=1.0, description="Share of the old average kept at each step.")


class Optimizer(Part):
    """An optimizer of Keras by name, with its parameters."""

    name: Literal[
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ftrl", "lion", "nadam", "rmsprop", "sgd"
    ] = Field(default="adam", description="Optimizer of keras.optimizers.")
    learning_rate: LearningRate = Field(default=0.001, description="Learning rate at its peak.")
    schedule: Schedule = Field(
        default=Schedule(name="constant"),
        description="Course of the learning rate; each of unfreeze.steps begins anew.",
    )
    momentum: Share | None = Field(default=None, description="sgd, rmsprop: momentum.")
    nesterov: YesNo | None = Field(default=None, description="sgd: Nesterov momentum.")
    beta1: Share | None = Field(default=None, description="adam family, lion: decay of the mean.")
    beta2: Share | None = Field(default=None, description="adam family, lion: decay of the square.")
    rho: Share | None = Field(default=None, description="adadelta, rmsprop: decay of the square.")
    epsilon: Positive | None = Field(default=None, description="Small constant for stability.")
    weight_decay: Share | None = Field(default=None, description="Decoupled weight decay a step.")
    clipnorm: Positive | None = Field(default=None, description="Largest norm of one gradient.")
    global_clipnorm: Positive | None = Field(
        default=None, description="Largest norm of all gradients together; on one GPU only."
    )
    clipvalue: Positive | None = Field(default=None, description="Largest absolute value in a gradient.")
    gradient_accumulation_steps: Annotated[Whole, Field(ge=2, le=10000)] | None = Field(
        default=None, description="Steps a weight update; on one GPU only."
    )
    ema: Ema | None = Field(default=None, description="Average the weights.")


def _given(part: Part, keys: Iterable[str]) -> dict[str, object]:
    """Values of those keys that differ from their default."""
    fields = {field.alias: (name, field.default) for name, field in type(part).model_fields.items()}
    values = {key: (getattr(part, fields[key][0]), fields[key][1]) for key in keys}
    return {key: value for key, (value, default) in values.items() if value != default}


@rule(Schedule)
def schedule_takes_its_own_parameters(schedule: Schedule) -> Iterator[Refusal]:
    """A parameter of another course would be ignored without a word."""
    for key, value in _given(schedule, SCHEDULE_TAKERS).items():
        if schedule.name not in SCHEDULE_TAKERS[key]:
            takers = listed(list(SCHEDULE_TAKERS[key]))
            yield Refusal(
                key, f"{shown(value)} goes with {takers}, not with {schedule.name}. Take it out or change the name."
            )


@rule(Schedule)
def schedule_has_what_it_needs(schedule: Schedule) -> Iterator[Refusal]:
    """These courses have no sensible default."""
    given = _given(schedule, SCHEDULE_TAKERS)
    for key in SCHEDULE_NEEDS.get(schedule.name, ()):
        if key not in given:
            yield Refusal(key, f"missing, and {schedule.name} needs it: {_description(key)}")


@rule(Schedule)
def exponential_schedule_falls(schedule: Schedule) -> Iterator[Refusal]:
    """A factor of 1 or more would let the rate stand or grow without end."""
    if schedule.name == "exponential" and schedule.rate is not None and schedule.rate >= 1.0:
        yield Refusal("rate", f"{shown(schedule.rate)} is not below 1: the rate would never fall. Try 0.9.")


@rule(Schedule)
def steps_go_forward(schedule: Schedule) -> Iterator[Refusal]:
    """The rate falls once after each epoch that is named."""
    for index, (one, other) in enumerate(pairwise(schedule.at_epochs)):
        if other <= one:
            yield Refusal(
                f"atEpochs.{index + 1}", f"{other} is not after {one}, which stands before it. Sort the list."
            )


@rule(Optimizer)
def optimizer_takes_its_own_parameters(optimizer: Optimizer) -> Iterator[Refusal]:
    """Keras would fail on a parameter that the optimizer doesn't have, once the data is pulled."""
    for key, value in _given(optimizer, TAKERS).items():
        if optimizer.name not in TAKERS[key]:
            takers = listed(list(TAKERS[key]))
            yield Refusal(
                key, f"{shown(value)} goes with {takers}, not with {optimizer.name}. Take it out or change the name."
            )


@rule(Optimizer)
def nesterov_needs_momentum(optimizer: Optimizer) -> Iterator[Refusal]:
    """Nesterov's method looks ahead along the momentum."""
    if optimizer.name == "sgd" and optimizer.nesterov and not optimizer.momentum:
        yield Refusal("nesterov", "true needs momentum, which is 0. Set momentum, such as 0.9.")


@rule(Optimizer)
def one_way_of_clipping(optimizer: Optimizer) -> Iterator[Refusal]:
    """Keras takes at most one of them."""
    given = list(_given(optimizer, ("clipnorm", "globalClipnorm", "clipvalue")))
    if len(given) > 1:
        yield Refusal(given[-1], f"stands beside {listed(given[:-1])}, and Keras clips in one way only. Keep one.")


def _description(key: str) -> str:
    return next(field.description or "" for field in Schedule.model_fields.values() if field.alias == key)
