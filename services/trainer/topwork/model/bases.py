"""The base of a classifier: a model of keras.applications, one that somebody saved, or a small new one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from topwork.model.backbones import backbone, scaled
from topwork.spec.model import Base, Cnn


@dataclass(frozen=True)
class Features:
    """What a head is put on.

    Attributes:
        image: KerasTensor of the input, float32 (batch, height, width, 3), RGB in 0..255, named "image".
        output: KerasTensor of the base's output.
    """

    image: Any
    output: Any


def features(settings: Base, image_size: tuple[int, int], file: Path | None) -> Features:
    """Build input, input scaling and base.

    Args:
        settings: Kind of base.
        image_size: Height and width in pixels.
        file: Weights of the application, or the saved model, where the spec names one.

    Returns:
        Input and output of the base; the base is a nested model named "base".

    Raises:
        SpecError: If the base can't be built for this image size.
        DataError: If the file isn't what the spec says.
        UnavailableError: If ImageNet weights could not be downloaded.
    """
    image = keras.Input((*image_size, 3), name="image")
    if settings.saved:
        from topwork.model.saved import cut

        if file is None:
            raise ValueError("a saved base needs its file")
        base = cut(file, settings.saved.cut_at, image_size)
        return Features(image, base(image))
    if settings.cnn:
        return Features(image, _cnn(settings.cnn, image_size)(_unit(image)))
    model = backbone(settings.application or "")
    base = model.build(image_size, file or ("imagenet" if settings.needs_imagenet else None))
    return Features(image, base(scaled(image, model.scaling)))


def _unit(image: Any) -> Any:
    return keras.layers.Rescaling(1 / 255, name="input_scaling")(image)


def _cnn(settings: Cnn, image_size: tuple[int, int]) -> keras.Model:
    """Same-padded relu convolutions, each followed by pooling: every one halves the side."""
    pixels = keras.Input((*image_size, 3), name="pixels")
    maps = pixels
    for index, filters in enumerate(settings.filters, start=1):
        maps = keras.layers.Conv2D(
            filters, settings.kernel_size, padding="same", activation="relu", name=f"convolution_{index}"
        )(maps)
        if min(maps.shape[1:3]) > 1:
            maps = keras.layers.MaxPooling2D(name=f"pooling_{index}")(maps)
    return keras.Model(pixels, maps, name="base")
