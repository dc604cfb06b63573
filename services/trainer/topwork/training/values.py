"""Values of variables, copied out of a model and put back into it."""

from typing import Any

import numpy as np

from topwork.errors import FormatError


def read_values(variables: list[Any]) -> list[np.ndarray]:
    """Copy the values of variables to memory that training doesn't touch."""
    import keras

    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def write_values(variables: list[Any], values: list[np.ndarray]) -> None:
    """Set variables to values.

    Raises:
        FormatError: If they are not those of these variables.
    """
    shapes = [tuple(variable.shape) for variable in variables]
    if shapes != [value.shape for value in values]:
        raise FormatError(
            "A checkpoint of this run doesn't fit its model: it was written by another version of topwork or Keras. "
            "Start over with --restart."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def all_finite(values: list[np.ndarray]) -> bool:
    """Whether each value is a number; whole numbers always are."""
    return all(np.isfinite(value).all() for value in values if np.issubdtype(value.dtype, np.floating))
