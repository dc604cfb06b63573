"""Values of variables, copied out of a model and put back into it."""

from typing import Any

import keras
import numpy as np

from topwork.errors import FormatError
from topwork.model.freezing import parameter_groups
from topwork.workspace import Workspace


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


def show_parameters(model: keras.Model, stage: str, workspace: Workspace) -> None:
    """Say how many parameters of each layer group are trained and kept.

    Args:
        model: The classifier.
        stage: Name of the stage.
        workspace: Progress and metrics.
    """
    groups = parameter_groups(model)
    for group in groups:
        workspace.progress.note(
            "parameters", stage=stage, layers=group.name, trainable=group.trainable, frozen=group.frozen
        )
    workspace.metrics.parameters(sum(one.trainable for one in groups), sum(one.frozen for one in groups))
