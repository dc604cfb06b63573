"""Detects diverged training: finds the first loss that is NaN or infinite, and builds the error message."""

import math
from collections.abc import Sequence
from typing import Any

from topwork.errors import DataError

MAX_NAMES = 20
"""Maximum number of images in the error message; the log lists all of them."""


def first_non_finite(results: Sequence[Any]) -> tuple[int, float] | None:
    """Find the first running mean of the loss that is NaN or infinite.

    Reading a result waits for the device. A running mean that becomes NaN or infinite stays so, therefore all of them
    are read only if the last one is not finite.

    Args:
        results: Results of `make_step_function` in the order of their steps; at least one. The first value of each is
            the loss.

    Returns:
        Index and value of that loss; None if all are finite.
    """
    if math.isfinite(results[-1].numpy()[0]):
        return None
    losses = (float(result.numpy()[0]) for result in results)
    return next((index, loss) for index, loss in enumerate(losses) if not math.isfinite(loss))


def diverged_error(observation: str, images: Sequence[str]) -> DataError:
    """Build the error for training that diverged.

    Args:
        observation: The NaN or infinite value, with its epoch and step.
        images: Names of the images in that step.

    Returns:
        The error to raise.
    """
    more = f" and {len(images) - MAX_NAMES} more, see the log" if len(images) > MAX_NAMES else ""
    return DataError(
        f"{observation}: training diverged. Use a smaller learningRate (a tenth), or clip the gradients with "
        f"optimizer.clipnorm: 1.0, and check these images: {', '.join(images[:MAX_NAMES])}{more}. "
        "The last good checkpoint is kept."
    )
