"""`spec.model` and `spec.augmentation`: the pretrained base, the new head and the augmentation of training images."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictFloat, StrictInt, StringConstraints, Tag

from topwork.spec.applications import APPLICATIONS
from topwork.spec.messages import did_you_mean, format_value, join_words
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.uris import ModelUri, Weights, invalid_value

Units = Annotated[StrictInt, Field(ge=1, le=65536)]


def validate_application(name: str) -> str:
    """Return the name if it is one of `APPLICATIONS`, or raise an error."""
    if name not in APPLICATIONS:
        suggestion = did_you_mean(name, APPLICATIONS)
        raise invalid_value(f"{format_value(name)} is not allowed.{suggestion} Allowed: {', '.join(APPLICATIONS)}.")
    return name


Application = Annotated[
    str,
    AfterValidator(validate_application),
    Field(json_schema_extra={"enum": list(APPLICATIONS)}),
    ValueDescription("a classification model, such as Xception or ResNet50"),
]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=200), ValueDescription("the name of a layer")]
LayerIndex = Annotated[StrictInt, Field(ge=-10000, le=10000), ValueDescription("its index, negative from the end")]


InputScaling = Literal["none", "zeroToOne", "minusOneToOne", "torch", "caffe"]


def _layer_tag(value: object) -> str:
    return "<name>" if isinstance(value, str) else "<index>"


class SavedBase(SpecModel):
    """A saved Keras model: `.keras`, or legacy `.h5` or `.hdf5`, of Keras 3 or 2."""

    uri: ModelUri = Field(description="S3 object or local path of the saved model.")
    cut_at: (
        Annotated[
            Annotated[LayerName, Tag("<name>")] | Annotated[LayerIndex, Tag("<index>")], Discriminator(_layer_tag)
        ]
        | None
    ) = Field(
        default=None,
        description="Last layer to keep, by name (`outer/inner` if nested models share a name) or by index. Unset: the "
        "layer before the head. Augmentation layers are always removed.",
    )
    scaling: InputScaling | None = Field(
        default=None,
        description="How pixels in 0..255 are scaled before they enter the model; must match its training. zeroToOne: "
        "divided by 255, as with rescale=1/255. minusOneToOne: divided by 127.5, minus 1, as for MobileNet, Xception, "
        "Inception and Teachable Machine. torch: 0..1, then normalized with the ImageNet mean and standard deviation. "
        "caffe: BGR minus the ImageNet mean, as for VGG and ResNet. none: not scaled. Unset: not scaled, with a "
        "warning if the model has no layer that scales pixels.",
    )


class Cnn(SpecModel):
    """A small convolutional network that is trained from scratch."""

    filters: tuple[Units, ...] = Field(
        min_length=1, max_length=12, description="Number of filters of each convolution, in order."
    )
    kernel_size: StrictInt = Field(
        default=3, ge=1, le=15, description="Height and width of the convolution kernels in pixels."
    )


class Base(SpecModel):
    """The base of the classifier. Set exactly one of application, saved and cnn."""

    application: Application | None = Field(
        default=None,
        description="A classification model of keras.applications, or EfficientNetLite0, whose ImageNet weights are "
        "read from storage: copy them there with topwork mirror weights.",
    )
    weights: Weights | None = Field(
        default=None,
        description="Initial weights of application: imagenet, none (random), or the URI of a weights file such as "
        "s3://…/x.weights.h5. Converted weights are scaled and computed as the model they come from. Unset: imagenet.",
    )
    saved: SavedBase | None = Field(default=None, description="A model that you saved earlier.")
    cnn: Cnn | None = Field(default=None, description="A small convolutional network, trained from scratch.")

    @property
    def is_pretrained(self) -> bool:
        """Whether the base starts with trained weights."""
        return self.saved is not None or (self.application is not None and self.weights != "none")

    @property
    def has_weights_file(self) -> bool:
        """Whether the base starts from a weights file that the spec names."""
        return self.weights not in {None, "imagenet", "none"}

    @property
    def needs_imagenet(self) -> bool:
        """Whether the base starts from ImageNet weights, which are downloaded unless they are mirrored."""
        return self.application is not None and self.weights in {None, "imagenet"}


class Head(SpecModel):
    """The new head: pooling, hidden layers, dropout, and one output per class (a single output for two classes)."""

    pooling: Literal["avg", "max", "flatten"] = Field(
        default="avg",
        description="How feature maps become a vector: global average pooling, global max pooling or flattening.",
    )
    hidden: tuple[Units, ...] = Field(
        default=(), max_length=8, description="Number of units of each hidden ReLU layer, in order."
    )
    dropout: StrictFloat = Field(
        default=0.2, ge=0.0, lt=1.0, description="Fraction of features dropped during training."
    )


class Model(SpecModel):
    """The classifier: a pretrained base and a new head."""

    base: Base = Field(description="Pretrained base that extracts features.")
    head: Head = Field(default=Head(), description="New layers on top of the base.")


class RandAugment(SpecModel):
    """RandAugment (Cubuk et al. 2019): a number of random operations of equal magnitude per image."""

    operations: StrictInt = Field(default=2, ge=1, le=10, description="Number of operations per image.")
    magnitude: StrictFloat = Field(default=0.5, ge=0.0, le=1.0, description="Strength of each operation, from 0 to 1.")


class Augmentation(SpecModel):
    """Random transformations of training images. Validation and test images are never augmented."""

    flip: Literal["none", "horizontal", "vertical", "both"] = Field(
        default="none", description="Axes along which images are flipped at random."
    )
    rotation: StrictFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Maximum rotation in both directions, as a fraction of a full turn."
    )
    zoom: StrictFloat = Field(
        default=0.0, ge=0.0, lt=1.0, description="Maximum zoom in or out, as a fraction of the image."
    )
    translation: StrictFloat = Field(
        default=0.0, ge=0.0, lt=1.0, description="Maximum shift, as a fraction of the height and width."
    )
    contrast: StrictFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Maximum change of contrast, as a fraction from 0 to 1."
    )
    brightness: StrictFloat = Field(
        default=0.0, ge=0.0, le=1.0, description="Maximum change of brightness, as a fraction from 0 to 1."
    )
    rand_augment: RandAugment | None = Field(default=None, description="RandAugment settings. Unset: off.")
    mix_up: StrictFloat = Field(
        default=0.0, ge=0.0, le=10.0, description="Alpha of MixUp (Zhang et al. 2017). 0 turns it off."
    )
    cut_mix: StrictFloat = Field(
        default=0.0, ge=0.0, le=10.0, description="Alpha of CutMix (Yun et al. 2019). 0 turns it off."
    )


@rule(Base)
def exactly_one_base(base: Base) -> Iterator[Violation]:
    """A classifier has exactly one base."""
    given = [kind for kind in ("application", "saved", "cnn") if getattr(base, kind) is not None]
    if len(given) != 1:
        found = f"{join_words(given)} are set" if given else "none is set"
        yield Violation("", f"{found}, but exactly one of application, saved and cnn is required.")


@rule(Base)
def weights_require_an_application(base: Base) -> Iterator[Violation]:
    """A saved model includes its weights, and a cnn starts from random weights."""
    if base.weights is not None and base.application is None:
        yield Violation(
            "weights",
            "applies only to application: a saved model includes its weights, and a cnn starts from random weights. "
            "Remove it.",
        )


@rule(Augmentation)
def mix_up_or_cut_mix(augmentation: Augmentation) -> Iterator[Violation]:
    """Both mix images and labels; applied in sequence, the labels no longer match the images."""
    if augmentation.mix_up and augmentation.cut_mix:
        yield Violation(
            "cutMix", "cannot be combined with mixUp: both mix the same images and labels. Set one of them to 0."
        )
