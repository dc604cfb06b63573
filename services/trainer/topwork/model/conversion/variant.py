"""How a model that weights were trained in computes, where it differs from the model of keras.applications."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from topwork.errors import DataError

FORMAT = 1
"""Version of the description in a converted file."""

Padding = Literal["same", "symmetric"]
_PADDINGS = ("same", "symmetric")
_CHANNELS = 3
_MAX_SOURCE = 200


@dataclass(frozen=True)
class Normalization:
    """Input normalization: (pixels / 255 - mean) / deviation, one value each for red, green and blue."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def describe(self) -> str:
        """Return both in words: `mean 0.485 0.456 0.406, deviation 0.229 0.224 0.225`."""
        return f"mean {_join(self.mean)}, deviation {_join(self.deviation)}"


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet, as most models of PyTorch use them."""


@dataclass(frozen=True)
class Variant:
    """How to build a model of `APPLICATIONS` so that converted weights compute what they were trained to compute.

    Attributes:
        application: The model.
        source: Model that the weights come from, such as `torchvision/resnet50`.
        padding: Padding of strided convolutions: "same" as in TensorFlow, which pads one pixel more at the bottom and
            right, or "symmetric" as in PyTorch.
        stride_in_3x3: Whether blocks of ResNet have their stride in the 3x3 convolution and not in the first 1x1.
        batch_norm_epsilon: Epsilon of BatchNormalization; None if it is that of the application.
        normalization: Input normalization; None if it is that of the application.
        norm_after_pooling: Whether the last LayerNormalization normalizes pooled features and not each location.
    """

    application: str
    source: str
    padding: Padding = "same"
    stride_in_3x3: bool = False
    batch_norm_epsilon: float | None = None
    normalization: Normalization | None = None
    norm_after_pooling: bool = False

    def to_json(self) -> str:
        """Return the description that a converted file contains."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    def describe(self) -> str:
        """Return the assumptions in one line."""
        parts = []
        if self.application.startswith(("MobileNet", "EfficientNet")):
            parts.append(f"{self.padding} padding of strided convolutions")
        if self.stride_in_3x3:
            parts.append("stride in the 3x3 convolution")
        if self.batch_norm_epsilon is not None:
            parts.append(f"BatchNorm epsilon {self.batch_norm_epsilon:g}")
        if self.normalization is not None:
            parts.append(self.normalization.describe())
        if self.norm_after_pooling:
            parts.append("LayerNorm after pooling")
        return f"{self.source}: {', '.join(parts)}"


def parse_variant(text: str, file_name: str) -> Variant:
    """Parse the description in a converted file.

    Args:
        text: JSON.
        file_name: Name of the file, for error messages.

    Raises:
        DataError: If it is invalid, or a newer version of topwork wrote it.
    """
    try:
        content = json.loads(text)
        written = content.pop("format")
        if written != FORMAT:
            raise DataError(
                f"{file_name} was converted by another version of topwork (format {str(written)[:20]}; this version "
                f"reads {FORMAT}). Convert the original file again: topwork mirror weights STORAGE --from FILE."
            )
        return _check(content)
    except DataError:
        raise
    except Exception as error:  # the file may come from anywhere
        raise DataError(
            f"{file_name} describes no valid conversion ({type(error).__name__}). Convert the original file again: "
            "topwork mirror weights STORAGE --from FILE."
        ) from error


def _check(content: dict[str, Any]) -> Variant:
    normalization = content.pop("normalization")
    if normalization is not None:
        mean, deviation = _triple(normalization["mean"]), _triple(normalization["deviation"])
        if min(deviation) <= 0:
            raise ValueError("deviation must be positive")
        normalization = Normalization(mean, deviation)
    variant = Variant(**content, normalization=normalization)
    epsilon = variant.batch_norm_epsilon
    valid = (
        all(isinstance(text, str) and len(text) < _MAX_SOURCE for text in (variant.application, variant.source))
        and variant.padding in _PADDINGS
        and all(isinstance(flag, bool) for flag in (variant.stride_in_3x3, variant.norm_after_pooling))
        and (epsilon is None or (isinstance(epsilon, float) and 0 < epsilon < 1))
    )
    if not valid:
        raise ValueError("invalid value")
    return variant


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ValueError("values must be finite")
    return red, green, blue


def _join(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
