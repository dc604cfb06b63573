"""Images that may be useless: blank, blurred or tiny."""

import numpy as np
import numpy.typing as npt

from topwork.audit.near_duplicates import ThumbnailSource

BLANK_CONTRAST = 2.0
"""Standard deviation of the gray values of a thumbnail below which an image is blank."""

BLURRED_DEVIATIONS = 4.0
"""An image is blurred if the logarithm of its sharpness is so many deviations (1.48 times the median of absolute
differences) below the median of the dataset, and its sharpness is below a tenth of the median."""

TINY_SHARE = 0.5
"""An image is tiny if a side is shorter than this share of the side in `spec.dataset.imageSize`."""

_BLOCK = 2048

Mask = npt.NDArray[np.bool_]


def find_blank(thumbnails: ThumbnailSource) -> Mask:
    """Find images of one color.

    Args:
        thumbnails: uint8 (n, side, side).

    Returns:
        bool (n,).
    """
    starts = range(0, len(thumbnails), _BLOCK)
    return np.concatenate([thumbnails[first : first + _BLOCK].std((1, 2)) < BLANK_CONTRAST for first in starts])


def find_blurred(sharpness: npt.NDArray[np.float32], is_blank: Mask) -> Mask:
    """Find images that are much less sharp than the others of the dataset.

    Args:
        sharpness: Variance of the Laplace operator, (n,).
        is_blank: Images that do not count, bool (n,).

    Returns:
        bool (n,).
    """
    if is_blank.all():
        return np.zeros_like(is_blank)
    logarithm = np.log(sharpness.astype(np.float64) + 1e-3)
    median = np.median(logarithm[~is_blank])
    deviation = 1.4826 * np.median(np.abs(logarithm[~is_blank] - median))
    limit = min(median - BLURRED_DEVIATIONS * deviation, median - np.log(10))
    return np.asarray((logarithm < limit) & ~is_blank)


def find_tiny(
    width: npt.NDArray[np.unsignedinteger], height: npt.NDArray[np.unsignedinteger], image_size: tuple[int, int]
) -> Mask:
    """Find images that are enlarged to more than twice their size.

    Args:
        width: Width in pixels, (n,).
        height: Height in pixels, (n,).
        image_size: Height and width to which they are resized.

    Returns:
        bool (n,).
    """
    return np.asarray((height < TINY_SHARE * image_size[0]) | (width < TINY_SHARE * image_size[1]))
