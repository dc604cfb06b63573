"""Exhausted memory of a device: reports it with a batch size that is likely to fit, or predicts in smaller parts."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import structlog
import tensorflow as tf

from topwork.disk_space import disk_full_error, format_bytes
from topwork.errors import SpecError

log = structlog.get_logger(__name__)

_SHAPE = re.compile(r"allocating tensor with shape\[([\d,]+)\] and type (\w+)")
_BYTES = re.compile(r"allocate (\d+) bytes")
_DEVICE = re.compile(r"device:(GPU|CPU):\d+")
# CUDA and cuDNN report exhausted memory as an internal or unknown error.
_CUDA_MESSAGES = re.compile(r"CUDA_ERROR_OUT_OF_MEMORY|CUDNN_STATUS_ALLOC_FAILED|out of memory", re.IGNORECASE)


@contextmanager
def report_exhausted_memory(key: str, batch_size: int, replicas: int) -> Iterator[None]:
    """Convert errors of TensorFlow that exhausted memory causes in the block to an error for the user.

    Args:
        key: Key of the batch size in the spec.
        batch_size: Its value: images per step over all replicas.
        replicas: Number of replicas.

    Raises:
        SpecError: If the memory of a device is exhausted. A retry with the same batch size would fail again.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not is_exhausted_memory(error):
            raise
        raise SpecError(_explain(str(error), key, batch_size, replicas)) from error


def is_exhausted_memory(error: BaseException) -> bool:
    """Return whether an error of TensorFlow means that memory is exhausted. A full disk is a different problem."""
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return disk_full_error(error) is None
    is_cuda = isinstance(error, tf.errors.InternalError | tf.errors.UnknownError)
    return is_cuda and bool(_CUDA_MESSAGES.search(str(error)))


def suggest_batch_size(
    batch_size: int, replicas: int, requested: int | None = None, available: int | None = None
) -> int | None:
    """Suggest the largest batch size that is likely to fit.

    A step needs at least the memory that was available and the allocation that failed, and in proportion to the batch.

    Args:
        batch_size: Batch size that did not fit, over all replicas.
        replicas: Number of replicas; the result is a multiple.
        requested: Size of the allocation that failed, in bytes; None if unknown.
        available: Memory that a step can use, in bytes; None if unknown.

    Returns:
        At most half of the batch size; None if it cannot be smaller.

    Example:
        >>> suggest_batch_size(64, 4)
        32
    """
    share = available / (available + requested) if requested and available else 0.5
    return int(batch_size * min(share, 0.5)) // replicas * replicas or None


def predict_in_parts(forward: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Make a function of a batch split batches that do not fit into memory.

    Args:
        forward: From images (batch, …) to values (batch, …), each depending on its image only.

    Returns:
        The same function; it still fails if a single image does not fit.
    """

    def call(images: Any) -> np.ndarray:
        try:
            return forward(images)
        except tf.errors.OpError as error:
            if len(images) == 1 or not is_exhausted_memory(error):
                raise
        half = len(images) // 2
        log.warning("memory is exhausted", images=len(images), retry=half)
        return np.concatenate([call(images[:half]), call(images[half:])])

    return call


def _explain(message: str, key: str, batch_size: int, replicas: int) -> str:
    found = _DEVICE.search(message)
    device = found[1] if found else "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    requested = _requested_bytes(message)
    smaller = suggest_batch_size(batch_size, replicas, requested, _available_bytes(found[0] if found else ""))
    failed = f" ({format_bytes(requested)} could not be allocated)" if requested else ""
    share = f", {batch_size // replicas} on each of {replicas} replicas" if replicas > 1 else ""
    fixes = [
        *([f"set {key} to {smaller} or less"] if smaller else []),
        "reduce spec.dataset.imageSize",
        "choose a smaller base",
        f"use a {device} with more memory" if device == "GPU" else "raise spec.compute.memory",
    ]
    advice = f"{', '.join(fixes[:-1])}, or {fixes[-1]}"
    return (
        f"The memory of the {device} is exhausted{failed}: a step with {key} {batch_size}{share} does not fit. "
        f"{advice[0].upper()}{advice[1:]}."
    )


def _requested_bytes(message: str) -> int | None:
    if found := _SHAPE.search(message):
        return prod(map(int, found[1].split(","))) * _bytes_per_value(found[2])
    found = _BYTES.search(message)
    return int(found[1]) if found else None


def _bytes_per_value(dtype: str) -> int:
    try:
        return int(tf.as_dtype(dtype).size)
    except TypeError:
        return 4


def _available_bytes(device: str) -> int | None:
    """Return the memory that a step can use on a GPU: its peak, which is about the limit, minus what stays in use."""
    name = device.removeprefix("device:")
    if not name.startswith("GPU"):
        return None
    usage = tf.config.experimental.get_memory_info(name)
    return max(0, int(usage["peak"]) - int(usage["current"])) or None
