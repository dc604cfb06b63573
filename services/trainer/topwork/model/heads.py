"""The new top of a classifier: pooling, hidden layers, dropout and logits."""

from typing import Any

import keras

from topwork.errors import DataError
from topwork.spec.model import Head


def logits(features: Any, settings: Head, classes: int) -> Any:
    """Put the head on the output of a base.

    Args:
        features: KerasTensor of the base's output, (batch, height, width, channels) or (batch, channels).
        settings: Pooling, hidden layers and dropout.
        classes: Number of classes.

    Returns:
        KerasTensor of logits, float32 (batch, 1) for two classes, else (batch, classes).

    Raises:
        DataError: If the base gives neither feature maps nor a vector.
    """
    if len(features.shape) == 4:
        features = _pooled(features, settings.pooling)
    elif len(features.shape) != 2:
        raise DataError(
            f"The base's output has the shape {tuple(features.shape)}: a head needs feature maps (batch, height, "
            "width, channels) or a vector (batch, channels). Cut the base at another layer with "
            "spec.model.base.saved.cutAt."
        )
    for index, units in enumerate(settings.hidden, start=1):
        features = keras.layers.Dense(units, activation="relu", name=f"hidden_{index}")(features)
    if settings.dropout:
        features = keras.layers.Dropout(settings.dropout, name="dropout")(features)
    # float32 whatever the precision: a loss over half-precision logits loses its small differences.
    return keras.layers.Dense(output_units(classes), dtype="float32", name="logits")(features)


def output_units(classes: int) -> int:
    """Say how many logits a classifier has: one for two classes, else one a class."""
    return 1 if classes == 2 else classes


def _pooled(maps: Any, pooling: str) -> Any:
    if pooling == "flatten":
        return keras.layers.Flatten(name="flatten")(maps)
    layer = keras.layers.GlobalAveragePooling2D if pooling == "avg" else keras.layers.GlobalMaxPooling2D
    return layer(name="pooling")(maps)
