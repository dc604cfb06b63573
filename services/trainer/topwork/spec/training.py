"""`spec.transfer` and `spec.fineTune`: how the head, then the base, is trained."""

from typing import Annotated, Literal

from pydantic import Field

from topwork.spec.part import Part

LearningRate = Annotated[float, Field(gt=0.0, le=10.0)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Epochs = Annotated[int, Field(ge=1, le=10000)]


class Schedule(Part):
    """How the learning rate moves over the epochs of a stage."""

    name: Literal["constant", "cosine", "exponential", "step", "inverseTime"] = Field(description="Kind of course.")
    warmup_epochs: float = Field(default=0.0, ge=0.0, description="Epochs of linear rise from 0; with cosine only.")
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="Cosine: share left at the end.")
    rate: float | None = Field(
        default=None, gt=0.0, description="Exponential: factor an epoch. inverseTime: decay a step, rate/(1+decay*step)."
    )
    factor: float | None = Field(default=None, gt=0.0, lt=1.0, description="Step: factor at each of atEpochs.")
    at_epochs: tuple[int, ...] = Field(default=(), description="Step: epochs, counted from 1, after which the rate falls.")


class Ema(Part):
    """Exponential moving average of the weights; evaluation and the result use the average."""

    momentum: float = Field(default=0.99, gt=0.0, lt=1.0, description="Share of the old average kept at each step.")


class Optimizer(Part):
    """An optimizer of Keras by name, with its parameters."""

    name: Literal[
        "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ftrl", "lion", "nadam", "rmsprop", "sgd"
    ] = Field(default="adam", description="Optimizer of keras.optimizers.")
    learning_rate: LearningRate = Field(default=0.001, description="Learning rate at its peak.")
    schedule: Schedule = Field(default=Schedule(name="constant"), description="Course of the learning rate.")
    momentum: float | None = Field(default=None, ge=0.0, lt=1.0, description="sgd, rmsprop: momentum.")
    nesterov: bool | None = Field(default=None, description="sgd: Nesterov momentum.")
    beta1: float | None = Field(default=None, ge=0.0, lt=1.0, description="adam family, lion: decay of the mean.")
    beta2: float | None = Field(default=None, ge=0.0, lt=1.0, description="adam family, lion: decay of the square.")
    rho: float | None = Field(default=None, ge=0.0, lt=1.0, description="adadelta, rmsprop: decay of the square.")
    epsilon: float | None = Field(default=None, gt=0.0, description="Small constant for stability.")
    weight_decay: float | None = Field(default=None, ge=0.0, lt=1.0, description="Decoupled weight decay a step.")
    clipnorm: float | None = Field(default=None, gt=0.0, description="Largest norm of one gradient.")
    global_clipnorm: float | None = Field(default=None, gt=0.0, description="Largest norm of all gradients.")
    clipvalue: float | None = Field(default=None, gt=0.0, description="Largest absolute value in a gradient.")
    gradient_accumulation_steps: int | None = Field(default=None, ge=2, description="Steps a weight update.")
    ema: Ema | None = Field(default=None, description="Average the weights.")


class Loss(Part):
    """The loss that training minimises."""

    name: Literal["auto", "binaryCrossentropy", "categoricalCrossentropy", "sparseCategoricalCrossentropy", "focal"] = (
        Field(default="auto", description="auto is binary cross-entropy for two classes, else categorical.")
    )
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0, description="Share of the label spread over classes.")
    gamma: float = Field(default=2.0, ge=0.0, le=10.0, description="focal: how much easy examples count less.")


class EarlyStopping(Part):
    """End a stage when the monitored value no longer gets better, and keep the best weights."""

    monitor: Literal["loss", "accuracy", "auc"] = Field(default="loss", description="Validation value that is watched.")
    patience: int = Field(default=3, ge=1, le=1000, description="Epochs without a gain that are borne.")
    min_delta: float = Field(default=0.0, ge=0.0, description="Least change that counts as a gain.")


class Transfer(Part):
    """Stage 1: the base frozen (or all of it trained, for a base from scratch), the head new."""

    train: Literal["head", "all"] = Field(default="head", description="What is trained: the head alone, or all.")
    epochs: Epochs = Field(default=10, description="Epochs at most.")
    batch_size: BatchSize = Field(default=64, description="Images a step over all replicas (global batch).")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer of the head.")
    loss: Literal["auto", "binaryCrossentropy", "categoricalCrossentropy", "sparseCategoricalCrossentropy", "focal"] | Loss = (
        Field(default="auto", description="Loss by name, or with its parameters.")
    )
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: each class counts alike, however many images it has."
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="When to end before the last epoch.")
    feature_cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="Compute the output of the frozen base once instead of once an epoch."
    )


class UnfreezeLayers(Part):
    """The last layers of the base, counted from the top."""

    layers: int = Field(ge=1, description="Layers with weights, counted from the top of the base.")


class UnfreezeFrom(Part):
    """A layer of the base and all above it."""

    from_layer: str = Field(alias="from", description="Name of the lowest layer that is unfrozen.")


class UnfreezeStep(Part):
    """One step of gradual unfreezing."""

    layers: int = Field(ge=1, description="Layers with weights that are unfrozen in this step, counted from the top.")
    epochs: Epochs = Field(description="Epochs of this step.")
    learning_rate: LearningRate = Field(description="Learning rate of this step.")


class UnfreezeSteps(Part):
    """Gradual unfreezing, from the top of the base downwards."""

    steps: tuple[UnfreezeStep, ...] = Field(min_length=1, max_length=100, description="The steps, in order.")


class FineTune(Part):
    """Stage 2: part or all of the base unfrozen, trained on at a very low learning rate."""

    epochs: Epochs | None = Field(default=None, description="Epochs at most; with unfreeze.steps each step has its own.")
    unfreeze: Literal["all"] | UnfreezeLayers | UnfreezeFrom | UnfreezeSteps = Field(
        default="all", description="What is unfrozen: all, {layers: n}, {from: name} or {steps: […]}."
    )
    batch_size: BatchSize | None = Field(default=None, description="Images a step over all replicas; as in transfer.")
    optimizer: Optimizer = Field(default=Optimizer(learning_rate=1e-5), description="Optimizer of the whole.")
    class_weights: Literal["none", "balanced"] | None = Field(default=None, description="As in transfer.")
    early_stopping: EarlyStopping | None = Field(default=None, description="When to end before the last epoch.")
