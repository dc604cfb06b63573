"""Pictures of the report: thumbnails of images as data URIs, optionally under a heat map."""

import base64
import io

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_PIXELS = 160
# Opacity of the highest heat: the image below stays recognizable.
HEAT_OPACITY = 0.65


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """Shrink an image to a JPEG file of at most 160 pixels per side.

    Args:
        pixels: uint8 (height, width, 3).

    Returns:
        A data URI.
    """
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def overlay_heat(pixels: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Color an image by a heat map: the stronger the heat, the more opaque the color. Without heat, it is unchanged.

    Args:
        pixels: uint8 (height, width, 3).
        heat: float32 (rows, columns) in 0..1, of any size; it is enlarged to that of the image.

    Returns:
        uint8 (height, width, 3).
    """
    height, width = pixels.shape[:2]
    enlarged = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(enlarged)[..., np.newaxis]
    colors = 255 * colormaps["jet"](values[..., 0])[..., :3]
    opacity = HEAT_OPACITY * values
    blended: NDArray[np.uint8] = ((1 - opacity) * pixels + opacity * colors).round().astype(np.uint8)
    return blended
