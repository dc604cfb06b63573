"""Random weights that depend only on the names and shapes of tensors, for PyTorch and Keras alike."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def draw_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draw a state dict with values that keep activations in a normal range through deep models.

    Variances are small, so that a wrong epsilon changes the features visibly.

    Args:
        shapes: Shape of each tensor.
    """
    return {name: _draw(name, tuple(shape)) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.array(7, np.int64)
    if kind == "running_var":
        values = random.uniform(0.02, 0.1, shape)
    elif kind in ("running_mean", "bias"):
        values = random.normal(0, 0.1, shape)
    elif kind in ("gamma", "layer_scale"):
        values = random.uniform(0.2, 0.6, shape)
    elif len(shape) == 1:
        values = random.uniform(0.2, 0.35, shape)
    else:
        values = random.normal(0, 1 / math.sqrt(math.prod(shape[1:])), shape)
    return values.astype(np.float32)


def make_image(height: int, width: int) -> np.ndarray:
    """Make an image with different values in every row, column and channel: uint8 (height, width, 3)."""
    rows, columns, channels = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    waves = np.sin(rows / (3 + channels)) + np.cos(columns / (5 - channels)) + rows / height - columns / width
    noise = np.random.default_rng(0).uniform(-1, 1, waves.shape)
    return np.clip(waves * 45 + noise * 40 + 118 + 15 * channels, 0, 255).astype(np.uint8)
