"""The classification models of keras.applications, each with the input scaling that its weights were trained on."""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import keras

from topwork.errors import SpecError, UnavailableError
from topwork.model.weights import load_weights
from topwork.spec.applications import APPLICATIONS, Scaling

# ImageNet in keras.applications.imagenet_utils: RGB in 0..1 for torch, BGR in 0..255 for caffe.
_TORCH_MEAN, _TORCH_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Backbone:
    """A model of keras.applications by name."""

    name: str

    @property
    def scaling(self) -> Scaling:
        """Scaling of raw pixels that the model's weights expect."""
        return APPLICATIONS[self.name].scaling

    def build(self, image_size: tuple[int, int], weights: Literal["imagenet"] | Path | None) -> keras.Model:
        """Build the model without its classification head.

        Args:
            image_size: Height and width in pixels.
            weights: "imagenet" (downloaded by Keras), a file of weights of this model without its head, or None for
                random ones.

        Returns:
            The model, named "base"; its input is what `scaled` gives.

        Raises:
            SpecError: If the model can't take images of this size.
            DataError: If the file doesn't hold this model's weights.
            UnavailableError: If the download failed.
        """
        base = self._build(image_size, "imagenet" if weights == "imagenet" else None)
        if isinstance(weights, Path):
            load_weights(base, weights, self.name)
        return base

    def _build(self, image_size: tuple[int, int], weights: str | None) -> keras.Model:
        application = getattr(keras.applications, self.name)
        try:
            # Named "base" later: by the name Keras finds the file of EfficientNet and the scaling of EfficientNetV2.
            model = application(include_top=False, weights=weights, input_shape=(*image_size, 3))
        except ValueError as error:
            raise SpecError(
                f"spec.model.base.application {self.name} can't be built for spec.dataset.imageSize "
                f"[{image_size[0]}, {image_size[1]}]: {error}"
            ) from error
        except Exception as error:
            # keras.utils.get_file raises a bare Exception for whatever ends a download.
            if "URL fetch failure" not in str(error):
                raise
            raise UnavailableError(f"The ImageNet weights of {self.name} could not be downloaded: {error}.") from error
        return keras.Model(model.inputs[0], model.outputs[0], name="base")


def backbone(name: str) -> Backbone:
    """Find a model of keras.applications.

    Raises:
        SpecError: If there's no classification model of that name.
    """
    if name not in APPLICATIONS:
        near = get_close_matches(name, APPLICATIONS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(sorted(APPLICATIONS))}."
        raise SpecError(f"spec.model.base.application is {name}, which keras.applications doesn't have.{hint}")
    return Backbone(name)


def scaled(image: Any, scaling: Scaling) -> Any:
    """Scale raw pixels with built-in layers, so that a plain `keras.models.load_model` knows them all.

    Args:
        image: KerasTensor float32 (batch, height, width, 3), RGB in 0..255.
        scaling: What the weights expect.

    Returns:
        KerasTensor of the same shape.
    """
    rescaling = keras.layers.Rescaling
    if scaling == "tf":
        return rescaling(1 / 127.5, offset=-1.0, name="input_scaling")(image)
    if scaling == "torch":
        scale = [1 / (255 * deviation) for deviation in _TORCH_DEVIATION]
        offset = [-mean / deviation for mean, deviation in zip(_TORCH_MEAN, _TORCH_DEVIATION, strict=True)]
        return rescaling(scale, offset=offset, name="input_scaling")(image)
    if scaling == "caffe":
        offset = [-mean for mean in _CAFFE_MEAN]
        return rescaling(1.0, offset=offset, name="input_scaling")(keras.ops.flip(image, axis=-1))
    return image
