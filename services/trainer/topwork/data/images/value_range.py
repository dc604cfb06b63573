"""The value range of a dataset: which values of images with more than 8 bits per channel become black and white."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from topwork.errors import DataError

if TYPE_CHECKING:  # imports Pillow, which is not installed where jobs are only submitted
    from topwork.data.images.high_bit_depth import PixelValues

ValueRange = tuple[float, float]
"""The values that become 0 and 255. Values outside are clipped."""

FULL_RANGE: ValueRange = (0.0, 65535.0)

DATASET_OUTLIERS = 0.01
"""Share of the images that may exceed the automatic range, so that a few unusual images do not darken all others."""

_DARK = 0.1


class ValueStatistics(BaseModel):
    """Pixel values of the images with more than 8 bits per channel in a dataset.

    Attributes:
        images: Number of these images.
        minimum: The smallest value.
        maximum: The largest value.
        images_by_bits: Number of images by the bits that hold their values: 8, 10, 12, 14 or 16. Outliers in an image
            are ignored. Images with values outside 0..65535 or fractions are not counted.
        bulk: In half of the images, 99 % of the values are at or below this one.
        automatic_range: The range that `valueRange: auto` uses.
    """

    model_config = ConfigDict(frozen=True)

    images: int
    minimum: float
    maximum: float
    images_by_bits: dict[int, int]
    bulk: float
    automatic_range: ValueRange


def summarize_values(values: Sequence["PixelValues"]) -> ValueStatistics | None:
    """Summarize the pixel values of a dataset and choose its automatic range.

    If all values are integers from 0 to 65535, the range is 0 to the largest number of 8, 10, 12, 14 or 16 bits.
    Otherwise, it is the range of the values, widened to two significant digits of its width. In both cases, one image
    in a hundred may exceed it. More images of the same kind therefore do not change the range.

    Args:
        values: One entry per image with more than 8 bits per channel.

    Returns:
        The statistics; None without such images.

    Example:
        >>> summarize_values([image.values for image in validated if image.values]).automatic_range
        (0.0, 4095.0)
    """
    if not values:
        return None
    outliers = int(DATASET_OUTLIERS * len(values))
    low = sorted(value.low for value in values)[outliers]
    high = sorted(value.high for value in values)[-1 - outliers]
    automatic = (0.0, float(high)) if all(value.is_16_bit for value in values) else _widen(low, high)
    bits = Counter(int(value.high).bit_length() for value in values if value.is_16_bit)
    return ValueStatistics(
        images=len(values),
        minimum=min(value.minimum for value in values),
        maximum=max(value.maximum for value in values),
        images_by_bits=dict(sorted(bits.items())),
        bulk=sorted(value.bulk for value in values)[(len(values) - 1) // 2],
        automatic_range=automatic,
    )


def resolve_value_range(
    setting: Literal["auto", "full"] | ValueRange, statistics: ValueStatistics | None
) -> ValueRange:
    """Resolve `spec.dataset.valueRange` for a dataset.

    Args:
        setting: The setting.
        statistics: Pixel values of the dataset; None if all images have 8 bits per channel.

    Returns:
        The values that become black and white.

    Raises:
        DataError: If the setting is full, but the dataset contains values that are not integers from 0 to 65535.
    """
    if not isinstance(setting, str):
        return (float(setting[0]), float(setting[1]))
    if statistics is None:
        return FULL_RANGE
    if setting == "auto":
        return statistics.automatic_range
    if sum(statistics.images_by_bits.values()) < statistics.images:
        raise DataError(
            f"spec.dataset.valueRange is full, which is 0 to 65535, but the dataset contains images with other values: "
            f"from {statistics.minimum:g} to {statistics.maximum:g}. Set valueRange: auto, or [low, high]."
        )
    return FULL_RANGE


def describe_value_range(value_range: ValueRange, statistics: ValueStatistics) -> tuple[str, ...]:
    """Describe a value range and what it does to the images of a dataset.

    Args:
        value_range: The values that become black and white.
        statistics: Pixel values of the dataset.

    Returns:
        The range and the values of the images, then a warning for each reason why it may be unsuitable.
    """
    low, high = value_range
    bits = ", ".join(f"{count} of {number} bits" for number, count in statistics.images_by_bits.items())
    found = f"{statistics.images} images have more than 8 bits per channel{f' ({bits})' if bits else ''}"
    lines = [
        f"{found}, with values from {statistics.minimum:g} to {statistics.maximum:g}. Values from {low:g} to {high:g} "
        "are mapped to 0 to 255."
    ]
    needed = max(1, int(high)).bit_length()
    dark = sum(count for number, count in statistics.images_by_bits.items() if low == 0 and number <= needed - 3)
    if (statistics.bulk - low) < _DARK * (high - low):
        lines.append(
            f"In half of these images, 99 % of the values are at most {statistics.bulk:g}, so they are almost black. "
            "If the brighter pixels do not matter, set spec.dataset.valueRange to a smaller range."
        )
    elif dark:
        lines.append(f"{dark} of these images use less than an eighth of the range and are dark.")
    if statistics.minimum < low or statistics.maximum > high:
        lines.append(
            "Values outside the range are clipped. If they matter, set spec.dataset.valueRange to a larger range."
        )
    return tuple(lines)


def _widen(low: float, high: float) -> ValueRange:
    width = high - low
    if width <= 0:
        return (low, low + 1.0)
    step = 10.0 ** (math.floor(math.log10(width)) - 1)
    return (float(f"{math.floor(low / step) * step:.12g}"), float(f"{math.ceil(high / step) * step:.12g}"))
