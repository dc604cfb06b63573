"""`spec.model` and `spec.augmentation`: the trained base, the new head and the views of an image."""

from typing import Annotated, Literal

from pydantic import Field

from topwork.spec.part import Part

Units = Annotated[int, Field(ge=1, le=65536)]


class SavedBase(Part):
    """A model that somebody saved: `.keras`, or legacy `.h5`."""

    uri: str = Field(description="S3 object or local path of the saved model.")
    cut_at: str | int | None = Field(
        default=None, description="Last layer that is kept, by name or index; without it the layer before the head."
    )


class Cnn(Part):
    """A small convolutional base that is trained from scratch."""

    filters: tuple[Units, ...] = Field(min_length=1, max_length=12, description="Filters of each convolution.")
    kernel_size: int = Field(default=3, ge=1, le=15, description="Side of each convolution's kernel in pixels.")


class Base(Part):
    """Exactly one of application, saved and cnn."""

    application: str | None = Field(default=None, description="A classification model of keras.applications.")
    weights: str | None = Field(
        default=None, description="With application: imagenet (default), none, or s3://…/x.weights.h5."
    )
    saved: SavedBase | None = Field(default=None, description="A model that somebody saved.")
    cnn: Cnn | None = Field(default=None, description="A small convolutional base, trained from scratch.")


class Head(Part):
    """The new top: pooling, hidden layers, dropout, one output a class (one in all for two classes)."""

    pooling: Literal["avg", "max", "flatten"] = Field(default="avg", description="How feature maps become a vector.")
    hidden: tuple[Units, ...] = Field(default=(), max_length=8, description="Units of each hidden relu layer.")
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0, description="Share of features dropped in training.")


class Model(Part):
    """The classifier: a base that is kept and a head that is new."""

    base: Base = Field(description="What is kept.")
    head: Head = Field(default=Head(), description="What is new.")


class RandAugment(Part):
    """RandAugment (Cubuk et al. 2019): a number of random operations, each of one magnitude."""

    operations: int = Field(default=2, ge=1, le=10, description="Operations an image.")
    magnitude: float = Field(default=0.5, ge=0.0, le=1.0, description="Strength of each operation.")


class Augmentation(Part):
    """Random changes of the training images. Evaluation sees the images as they are."""

    flip: Literal["none", "horizontal", "vertical", "both"] = Field(default="none", description="Random mirroring.")
    rotation: float = Field(default=0.0, ge=0.0, le=1.0, description="Largest rotation, as a share of a full turn.")
    zoom: float = Field(default=0.0, ge=0.0, lt=1.0, description="Largest zoom in or out, as a share of the image.")
    translation: float = Field(default=0.0, ge=0.0, lt=1.0, description="Largest shift, as a share of the side.")
    contrast: float = Field(default=0.0, ge=0.0, le=1.0, description="Largest change of contrast.")
    brightness: float = Field(default=0.0, ge=0.0, le=1.0, description="Largest change of brightness.")
    rand_augment: RandAugment | None = Field(default=None, description="RandAugment.")
    mix_up: float = Field(default=0.0, ge=0.0, le=10.0, description="Alpha of MixUp (Zhang et al. 2017); 0 is off.")
    cut_mix: float = Field(default=0.0, ge=0.0, le=10.0, description="Alpha of CutMix (Yun et al. 2019); 0 is off.")
