"""`spec.model` and `spec.augmentation`: the trained base, the new head and the views of an image."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag

from topwork.spec.applications import APPLICATIONS
from topwork.spec.messages import hint, listed, shown
from topwork.spec.section import Meaning, Number, Part, Refusal, Whole, rule
from topwork.spec.uris import ModelUri, Weights, refused

Units = Annotated[Whole, Field(ge=1, le=65536)]


def check_application(name: str) -> str:
    """Refuse what is no classification model of keras.applications."""
    if name not in APPLICATIONS:
        raise refused(f"{shown(name)} is not allowed.{hint(name, APPLICATIONS)} Allowed: {', '.join(APPLICATIONS)}.")
    return name


Application = Annotated[
    str,
    AfterValidator(check_application),
    Field(json_schema_extra={"enum": list(APPLICATIONS)}),
    Meaning("a classification model of keras.applications, such as Xception or ResNet50"),
]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=200), Meaning("the name of a layer")]
LayerIndex = Annotated[Whole, Field(ge=-10000, le=10000), Meaning("its index, negative from the end")]


def _layer_kind(value: object) -> str:
    return "<name>" if isinstance(value, str) else "<index>"


class SavedBase(Part):
    """A model that somebody saved: `.keras`, or legacy `.h5`."""

    uri: ModelUri = Field(description="S3 object or local path of the saved model.")
    cut_at: (
        Annotated[
            Annotated[LayerName, Tag("<name>")] | Annotated[LayerIndex, Tag("<index>")], Discriminator(_layer_kind)
        ]
        | None
    ) = Field(
        default=None,
        description="Last layer that is kept: its name (`outer/inner` where nested models share a name) or "
        "its index; without it the layer before the head. Layers that augment images are left out.",
    )


class Cnn(Part):
    """A small convolutional base that is trained from scratch."""

    filters: tuple[Units, ...] = Field(min_length=1, max_length=12, description="Filters of each convolution.")
    kernel_size: Whole = Field(default=3, ge=1, le=15, description="Side of each convolution's kernel in pixels.")


class Base(Part):
    """Exactly one of application, saved and cnn."""

    application: Application | None = Field(default=None, description="A classification model of keras.applications.")
    weights: Weights | None = Field(
        default=None, description="With application: imagenet (default), none, or s3://…/x.weights.h5."
    )
    saved: SavedBase | None = Field(default=None, description="A model that somebody saved.")
    cnn: Cnn | None = Field(default=None, description="A small convolutional base, trained from scratch.")

    @property
    def is_pretrained(self) -> bool:
        """Whether the base has learnt anything before this job."""
        return self.saved is not None or (self.application is not None and self.weights != "none")

    @property
    def needs_imagenet(self) -> bool:
        """Whether the base starts from ImageNet weights, which are downloaded unless they are mirrored."""
        return self.application is not None and self.weights in {None, "imagenet"}


class Head(Part):
    """The new top: pooling, hidden layers, dropout, one output a class (one in all for two classes)."""

    pooling: Literal["avg", "max", "flatten"] = Field(default="avg", description="How feature maps become a vector.")
    hidden: tuple[Units, ...] = Field(default=(), max_length=8, description="Units of each hidden relu layer.")
    dropout: Number = Field(default=0.2, ge=0.0, lt=1.0, description="Share of features dropped in training.")


class Model(Part):
    """The classifier: a base that is kept and a head that is new."""

    base: Base = Field(description="What is kept.")
    head: Head = Field(default=Head(), description="What is new.")


class RandAugment(Part):
    """RandAugment (Cubuk et al. 2019): a number of random operations, each of one magnitude."""

    operations: Whole = Field(default=2, ge=1, le=10, description="Operations an image.")
    magnitude: Number = Field(default=0.5, ge=0.0, le=1.0, description="Strength of each operation.")


class Augmentation(Part):
    """Random changes of the training images. Evaluation sees the images as they are."""

    flip: Literal["none", "horizontal", "vertical", "both"] = Field(default="none", description="Random mirroring.")
    rotation: Number = Field(default=0.0, ge=0.0, le=1.0, description="Largest rotation, as a share of a full turn.")
    zoom: Number = Field(default=0.0, ge=0.0, lt=1.0, description="Largest zoom in or out, as a share of the image.")
    translation: Number = Field(default=0.0, ge=0.0, lt=1.0, description="Largest shift, as a share of the side.")
    contrast: Number = Field(default=0.0, ge=0.0, le=1.0, description="Largest change of contrast.")
    brightness: Number = Field(default=0.0, ge=0.0, le=1.0, description="Largest change of brightness.")
    rand_augment: RandAugment | None = Field(default=None, description="RandAugment.")
    mix_up: Number = Field(default=0.0, ge=0.0, le=10.0, description="Alpha of MixUp (Zhang et al. 2017); 0 is off.")
    cut_mix: Number = Field(default=0.0, ge=0.0, le=10.0, description="Alpha of CutMix (Yun et al. 2019); 0 is off.")


@rule(Base)
def exactly_one_base(base: Base) -> Iterator[Refusal]:
    """A classifier stands on one base."""
    given = [kind for kind in ("application", "saved", "cnn") if getattr(base, kind) is not None]
    if len(given) != 1:
        found = f"{listed(given)} are given" if given else "none is given"
        yield Refusal("", f"{found}, exactly one of application, saved and cnn is needed.")


@rule(Base)
def weights_belong_to_an_application(base: Base) -> Iterator[Refusal]:
    """A saved model brings its weights, a cnn has none."""
    if base.weights is not None and base.application is None:
        yield Refusal("weights", "goes with application only: a saved model brings its own, a cnn starts without.")


@rule(Augmentation)
def one_way_of_mixing(augmentation: Augmentation) -> Iterator[Refusal]:
    """Both mix the same pairs of images and labels; one after the other, the labels no longer tell the shares."""
    if augmentation.mix_up and augmentation.cut_mix:
        yield Refusal("cutMix", "stands beside mixUp, and both mix the same images and labels. Set one of them to 0.")
