"""Copies a PyTorch state dict into a Keras model, layer by layer."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from topwork.errors import DataError, shorten
from topwork.model.layer_tree import leaf_layers

StateDict = Mapping[str, np.ndarray]

# Counters of batches: PyTorch stores them in each BatchNorm, and inference does not use them.
UNUSED = r"(^|\.)num_batches_tracked$"
_MAX_SHOWN, _MAX_NAME = 3, 120


class MismatchError(DataError):
    """The tensors of a file do not fit a model."""


def assign_layers(
    model: keras.Model,
    state: StateDict,
    names: Mapping[str, str],
    *,
    ignored: Iterable[str] = (),
    absent_biases_are_zero: bool = False,
) -> None:
    """Copy a state dict into a model. Every layer with weights gets all of them, and no tensor is left over.

    Args:
        model: Model with weights of any values.
        state: Tensors by name, in the layout of PyTorch.
        names: PyTorch prefix of each Keras layer with weights; for a LayerScale, the name of its tensor.
        ignored: Regular expressions of tensors that the model does not need, such as the classification head.
        absent_biases_are_zero: Whether convolutions of the file have no bias where those of the model have one.

    Raises:
        MismatchError: If a layer gets no weights, a tensor is left over or has another shape, or values are not finite.
            The model is then unchanged.

    Example:
        >>> assign_layers(model, {"fc.weight": kernel.T, "fc.bias": bias}, {"predictions": "fc"})
    """
    reader = _StateReader(state, absent_biases_are_zero)
    layers = [layer for layer in leaf_layers(model) if layer.weights]
    assigned = [(layer, _read_layer(layer, names.get(layer.name), reader)) for layer in layers]
    reader.report_unused(ignored)
    if reader.problems:
        raise MismatchError(format_problems(reader.problems))
    for layer, values in assigned:
        layer.set_weights(values)


def format_problems(problems: list[str]) -> str:
    """Join problems to one message that shows only the first ones."""
    more = f" {len(problems) - _MAX_SHOWN} more problems." if len(problems) > _MAX_SHOWN else ""
    return " ".join(problems[:_MAX_SHOWN]) + more


class _StateReader:
    """Reads the tensors of a state dict once each, and collects problems instead of stopping at the first one."""

    def __init__(self, state: StateDict, absent_biases_are_zero: bool) -> None:
        self.problems: list[str] = []
        self.absent_biases_are_zero = absent_biases_are_zero
        self._state, self._used = state, set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def read(self, name: str, layer: Any, shape: tuple[int, ...]) -> np.ndarray | None:
        """Read a tensor of a shape, in the layout of PyTorch; dimensions of size 1 at its end may be absent."""
        if name not in self._state:
            self.problems.append(f"Layer {layer.name} needs {name} {_format_shape(shape)}, which the file lacks.")
            return None
        self._used.add(name)
        tensor = self._state[name]
        if _trim(tensor.shape) != _trim(shape):
            found, expected = _format_shape(tensor.shape), _format_shape(shape)
            self.problems.append(f"{_shown(name)} has shape {found}, but layer {layer.name} needs {expected}.")
            return None
        return self._as_float32(name, tensor, shape)

    def _as_float32(self, name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
        # bfloat16 has kind V or f, depending on the version of ml_dtypes.
        if tensor.dtype.kind in "iubcSUO":
            self.problems.append(f"{_shown(name)} has values of type {tensor.dtype}, but weights are floating point.")
            return None
        with np.errstate(over="ignore"):
            values = np.asarray(tensor).astype(np.float32).reshape(shape)
        if not np.isfinite(values).all():
            self.problems.append(f"{_shown(name)} contains NaN, infinite values, or values too large for float32.")
            return None
        return values

    def report_unused(self, ignored: Iterable[str]) -> None:
        pattern = re.compile("|".join(f"(?:{expression})" for expression in (*ignored, UNUSED)))
        for name in sorted(set(self._state) - self._used):
            if not pattern.search(name):
                shape = _format_shape(self._state[name].shape)
                self.problems.append(f"{_shown(name)} {shape} is left over: no layer of the model has such weights.")


def _read_layer(layer: Any, prefix: str | None, reader: _StateReader) -> list[np.ndarray]:
    if prefix is None:
        reader.problems.append(f"Layer {layer.name} has weights, but no counterpart in the file.")
        return []
    read = next((_READERS[kind.__name__] for kind in type(layer).__mro__ if kind.__name__ in _READERS), None)
    if read is None:
        reader.problems.append(f"Layer {layer.name} of class {type(layer).__name__} cannot be converted.")
        return []
    values = read(layer, prefix, reader)
    return [] if any(value is None for value in values) else [value for value in values if value is not None]


_Values = list[np.ndarray | None]


def _read_conv(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    # (out, in / groups, height, width) to (height, width, in / groups, out)
    height, width, inputs, outputs = layer.kernel.shape
    kernel = reader.read(f"{prefix}.weight", layer, (outputs, inputs, height, width))
    return [_transpose(kernel, (2, 3, 1, 0)), *_read_bias(layer, prefix, reader, outputs)]


def _read_depthwise(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    # PyTorch has (channels x multiplier, 1, height, width), multiplier fastest, as Keras.
    height, width, channels, multiplier = layer.kernel.shape
    kernel = reader.read(f"{prefix}.weight", layer, (channels * multiplier, 1, height, width))
    if kernel is not None:
        kernel = kernel.reshape(channels, multiplier, height, width).transpose(2, 3, 0, 1)
    return [kernel, *_read_bias(layer, prefix, reader, channels * multiplier)]


def _read_dense(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    inputs, outputs = layer.kernel.shape
    kernel = reader.read(f"{prefix}.weight", layer, (outputs, inputs))
    return [_transpose(kernel, (1, 0)), *_read_bias(layer, prefix, reader, outputs)]


def _read_bias(layer: Any, prefix: str, reader: _StateReader, size: int) -> _Values:
    if not layer.use_bias:
        return []
    if reader.absent_biases_are_zero and f"{prefix}.bias" not in reader:
        return [np.zeros(size, np.float32)]
    return [reader.read(f"{prefix}.bias", layer, (size,))]


def _read_batch_norm(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    suffixes = [*(["weight"] if layer.scale else []), *(["bias"] if layer.center else []), "running_mean"]
    shape = tuple(layer.moving_mean.shape)
    variance = reader.read(f"{prefix}.running_var", layer, shape)
    if variance is not None and variance.min(initial=0.0) < 0:
        reader.problems.append(f"{_shown(prefix)}.running_var contains negative values, but it is a variance.")
    return [*(reader.read(f"{prefix}.{suffix}", layer, shape) for suffix in suffixes), variance]


def _read_layer_norm(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    suffixes = [*(["weight"] if layer.scale else []), *(["bias"] if layer.center else [])]
    return [reader.read(f"{prefix}.{suffix}", layer, tuple(layer.weights[0].shape)) for suffix in suffixes]


def _read_layer_scale(layer: Any, prefix: str, reader: _StateReader) -> _Values:
    return [reader.read(prefix, layer, tuple(layer.weights[0].shape))]


_READERS: dict[str, Callable[[Any, str, _StateReader], _Values]] = {
    "DepthwiseConv2D": _read_depthwise,
    "Conv2D": _read_conv,
    "Dense": _read_dense,
    "BatchNormalization": _read_batch_norm,
    "LayerNormalization": _read_layer_norm,
    "LayerScale": _read_layer_scale,
}


def _transpose(values: np.ndarray | None, axes: tuple[int, ...]) -> np.ndarray | None:
    return None if values is None else values.transpose(axes)


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Remove trailing dimensions of size 1: a 1x1 convolution is a dense layer."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _format_shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _shown(name: str) -> str:
    return shorten(name, _MAX_NAME)
