"""Models of keras.applications, and EfficientNet-Lite0: each with the input scaling that its weights expect."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import keras

from topwork.errors import DataError, SpecError, UnavailableError, quote_error
from topwork.model.conversion.converted_file import load_converted, read_variant
from topwork.model.conversion.graph import apply_variant
from topwork.model.conversion.variant import IMAGENET, Normalization, Variant
from topwork.model.efficientnet_lite import build_efficientnet_lite0
from topwork.model.weights import load_weights
from topwork.spec.applications import APPLICATIONS, Scaling

# Mean of ImageNet in keras.applications.imagenet_utils, BGR in 0..255.
_CAFFE_MEAN = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Backbone:
    """A model of `APPLICATIONS`.

    Attributes:
        name: Its name.
    """

    name: str

    @property
    def scaling(self) -> Scaling:
        """How raw pixels are scaled for this model with its own weights."""
        return APPLICATIONS[self.name].scaling

    def find_scaling(self, file: Path | None) -> Scaling | Normalization:
        """Return how raw pixels are scaled: converted weights expect the scaling that they were trained with.

        Args:
            file: Weights file, if any.

        Raises:
            DataError: If the file contains converted weights of another model, or they are not valid.
        """
        variant = self._read_variant(file)
        return (variant and variant.normalization) or self.scaling

    def _read_variant(self, file: Path | None) -> Variant | None:
        variant = read_variant(file) if file else None
        if file and variant and variant.application != self.name:
            raise DataError(
                f"{file.name} contains weights converted to {variant.application}, but spec.model.base.application is "
                f"{self.name}."
            )
        return variant

    def build(self, image_size: tuple[int, int], weights: Literal["imagenet"] | Path | None) -> keras.Model:
        """Build the model without its classification head.

        Args:
            image_size: Height and width in pixels.
            weights: "imagenet" (downloaded by Keras), a weights file of this model without its head, or None for
                random initialization. With converted weights, the model computes as the one that they come from.

        Returns:
            The model, named "base". It expects input scaled by `scale_inputs` with the result of `find_scaling`.

        Raises:
            SpecError: If the model does not support this image size.
            DataError: If the file does not contain this model's weights.
            UnavailableError: If the download failed.
        """
        variant = self._read_variant(weights) if isinstance(weights, Path) else None
        base = self._build(image_size, "imagenet" if weights == "imagenet" else None)
        if isinstance(weights, Path) and variant:
            base = apply_variant(base, variant)
            load_converted(base, weights)
        elif isinstance(weights, Path):
            load_weights(base, weights, self.name)
        return base

    def _build(self, image_size: tuple[int, int], weights: str | None) -> keras.Model:
        application = find_architecture(self.name)
        try:
            # Renamed to "base" below: Keras derives the weights file of EfficientNet and the scaling of EfficientNetV2
            # from the model name.
            model = application(include_top=False, weights=weights, input_shape=(*image_size, 3))
        except ValueError as error:
            raise SpecError(
                f"spec.model.base.application {self.name} cannot be built for spec.dataset.imageSize "
                f"[{image_size[0]}, {image_size[1]}]: {quote_error(error)}"
            ) from error
        except Exception as error:
            # keras.utils.get_file raises a bare Exception for every failed download.
            if "URL fetch failure" not in str(error):
                raise
            raise UnavailableError(
                f"The ImageNet weights of {self.name} could not be downloaded: {quote_error(error)}."
            ) from error
        return keras.Model(model.inputs[0], model.outputs[0], name="base")


def find_architecture(name: str) -> Any:
    """Return the function that builds a model of `APPLICATIONS`, with the signature of those in keras.applications.

    Args:
        name: Its name.
    """
    return build_efficientnet_lite0 if name == "EfficientNetLite0" else getattr(keras.applications, name)


def find_backbone(name: str) -> Backbone:
    """Look up a backbone by its name.

    Raises:
        SpecError: If there is no classification model of that name.

    Example:
        >>> find_backbone("ResNet50").scaling
        'caffe'
    """
    if name not in APPLICATIONS:
        near = get_close_matches(name, APPLICATIONS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else f" Available models: {', '.join(sorted(APPLICATIONS))}."
        raise SpecError(f"spec.model.base.application is {name}, which topwork does not have.{hint}")
    return Backbone(name)


def scale_inputs(image: Any, scaling: Scaling | Normalization) -> Any:
    """Scale raw pixels with built-in layers, so that plain `keras.models.load_model` can load the result.

    Args:
        image: KerasTensor float32 (batch, height, width, 3), RGB in 0..255.
        scaling: Scaling that the weights expect.

    Returns:
        KerasTensor of the same shape.
    """
    rescaling = keras.layers.Rescaling
    if scaling == "torch":
        scaling = IMAGENET
    if isinstance(scaling, Normalization):
        scale = [1 / (255 * deviation) for deviation in scaling.deviation]
        offset = [-mean / deviation for mean, deviation in zip(scaling.mean, scaling.deviation, strict=True)]
        return rescaling(scale, offset=offset, name="input_scaling")(image)
    if scaling == "tf":
        return rescaling(1 / 127.5, offset=-1.0, name="input_scaling")(image)
    if scaling == "caffe":
        offset = [-mean for mean in _CAFFE_MEAN]
        return rescaling(1.0, offset=offset, name="input_scaling")(keras.ops.flip(image, axis=-1))
    return image
