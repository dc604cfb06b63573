"""Alignment of two thumbnails: the window of one image that shows the same as the other one."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

WHOLE = (1.0, 0.0, 0.0)
WINDOWS = (WHOLE, (0.9, 0.05, 0.05), (0.9, 0.02, 0.02), (0.9, 0.02, 0.08), (0.9, 0.08, 0.02), (0.9, 0.08, 0.08))
"""Size, top and left of windows, relative to the image, from which the search starts: no crop of 90 % is shifted by
more than 3 % of the image against the nearest one."""

_MIN_SIZE = 0.8
_ITERATIONS = 4
_STEP = 0.01
# Contrast below which noise is not amplified, in gray values.
_MIN_CONTRAST = 2.0


def window_weights(pixels: int, size: FloatArray, start: FloatArray, result: int) -> FloatArray:
    """Compute the weights of pixels that average windows of a line.

    Args:
        pixels: Number of pixels of the line.
        size: Length of each window, relative to the line, (n,).
        start: Start of each window, relative to the line, (n,).
        result: Number of pixels of the result.

    Returns:
        (n, result, pixels); each row adds up to 1.
    """
    edges = (start[:, None] + size[:, None] * np.arange(result + 1) / result) * pixels
    pixel = np.arange(pixels)
    overlap = np.minimum(edges[:, 1:, None], pixel + 1) - np.maximum(edges[:, :-1, None], pixel)
    overlap = np.maximum(overlap, 0.0)
    return np.asarray(overlap / np.maximum(overlap.sum(-1, keepdims=True), 1e-9))


def cut_windows(images: FloatArray, windows: FloatArray, result: int) -> FloatArray:
    """Cut a window from each image and resize it, by averaging pixels.

    Args:
        images: (n, height, width).
        windows: Size, top and left of each window, relative to the image, (n, 3) or (1, 3).
        result: Height and width of the result.

    Returns:
        (n, result, result).
    """
    rows = window_weights(images.shape[1], windows[:, 0], windows[:, 1], result)
    columns = window_weights(images.shape[2], windows[:, 0], windows[:, 2], result)
    return np.asarray(rows @ images @ columns.transpose(0, 2, 1))


def normalize(images: FloatArray) -> FloatArray:
    """Remove brightness and contrast.

    Args:
        images: (n, height, width), gray values from 0 to 255.

    Returns:
        (n, height * width) with mean 0, and standard deviation 1 unless the image is nearly flat.
    """
    flat = images.reshape(len(images), -1)
    centered = flat - flat.mean(1, keepdims=True)
    return np.asarray(centered / np.maximum(centered.std(1, keepdims=True), _MIN_CONTRAST))


def align_windows(images: FloatArray, targets: FloatArray, windows: FloatArray, result: int) -> FloatArray:
    """Improve windows by the Gauss-Newton method, so that they look like their targets.

    Args:
        images: Images to cut from, (n, height, width).
        targets: What the windows should look like, (n, height, width).
        windows: First guess, (n, 3).
        result: Height and width at which both are compared.

    Returns:
        Windows (n, 3) that are at least as similar as the first guess.
    """
    expected = normalize(cut_windows(targets, np.array([WHOLE]), result))

    def residual(current: FloatArray) -> FloatArray:
        return np.asarray(normalize(cut_windows(images, current, result)) - expected)

    best, current = windows.copy(), windows.copy()
    here = residual(current)
    least = (here**2).sum(1)
    for _ in range(_ITERATIONS):
        slopes = []
        for index, step in enumerate((-_STEP, _STEP, _STEP)):
            moved = current.copy()
            moved[:, index] += step
            slopes.append((residual(moved) - here) / step)
        jacobian = np.stack(slopes, -1)
        normal = jacobian.transpose(0, 2, 1) @ jacobian + 0.1 * np.eye(3)
        gradient = jacobian.transpose(0, 2, 1) @ here[..., None]
        current = _inside(current - np.linalg.solve(normal, gradient)[..., 0])
        here = residual(current)
        error = (here**2).sum(1)
        best[error < least] = current[error < least]
        least = np.minimum(error, least)
    return best


def _inside(windows: FloatArray) -> FloatArray:
    size = np.clip(windows[:, :1], _MIN_SIZE, 1.0)
    return np.hstack([size, np.clip(windows[:, 1:], 0.0, 1.0 - size)])
