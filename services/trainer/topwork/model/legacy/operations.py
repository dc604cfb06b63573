"""Replaces TensorFlow operations in the graph of a Keras 2 model, such as `x / 127.5 - 1`, by layers of Keras 3."""

from collections.abc import Callable
from typing import Any

import keras

from topwork.model.legacy.errors import UpgradeError

CLASSES = frozenset({"TFOpLambda", "SlicingOpLambda"})
"""Classes of the layers that Keras 2 creates for operations."""

_Tensor = Any
_Apply = Callable[[str, list[Any], dict[str, Any]], _Tensor]


def apply_operation(function: str, name: str, args: list[Any], kwargs: dict[str, Any]) -> _Tensor:
    """Apply a TensorFlow operation with layers of Keras 3.

    Args:
        function: Name of the operation without `tf.`, such as `math.truediv`.
        name: Name of the layer in the Keras 2 model.
        args: Positional arguments: KerasTensors or constants.
        kwargs: Keyword arguments: KerasTensors or constants.

    Returns:
        The resulting KerasTensor.

    Raises:
        UpgradeError: If there is no equivalent, or none for these arguments.
    """
    function = function.removeprefix("compat.v1.")
    apply = _OPERATIONS.get(function)
    if apply is None:
        raise UpgradeError(f"layer {name} is the operation tf.{function}, which layers of Keras 3 cannot compute")
    options = {key: value for key, value in kwargs.items() if key != "name" and value is not None}
    try:
        return apply(name, args, options)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UpgradeError(f"layer {name} is the operation tf.{function} with unsupported arguments") from error


def add_scaled(name: str, tensors: list[Any], scale: float) -> _Tensor:
    """Compute `x + scale * y`, as the layer that keras.applications defines for InceptionResNetV2.

    Args:
        name: Name of the layer.
        tensors: KerasTensors x and y of the same shape.
        scale: The factor.

    Returns:
        The resulting KerasTensor.
    """
    shortcut, residual = tensors
    return keras.layers.Add(name=name)([shortcut, _scale(f"{name}_scale", residual, scale, 0.0)])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _operands(args: list[Any], options: dict[str, Any]) -> tuple[Any, Any]:
    values = [*args, *(options.pop(key) for key in ("x", "y", "value", "bias") if key in options)]
    options.pop("data_format", None)
    if options:
        raise ValueError(f"unknown options {', '.join(options)}")
    first, second = values
    return first, second


def _scale(name: str, tensor: _Tensor, scale: Any, offset: Any) -> _Tensor:
    return keras.layers.Rescaling(scale, offset=offset, name=name)(tensor)


def _constant(value: Any, transform: Callable[[float], float] = float) -> Any:
    """Transform a constant: a number, or one per channel, possibly in nested lists of one element."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return [transform(float(number)) for number in value] if isinstance(value, list) else transform(float(value))


def _add(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    first, second = _operands(args, options)
    if _is_tensor(first) and _is_tensor(second):
        return keras.layers.Add(name=name)([first, second])
    tensor, constant = (first, second) if _is_tensor(first) else (second, first)
    return _scale(name, tensor, 1.0, _constant(constant))


def _subtract(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    first, second = _operands(args, options)
    if _is_tensor(first) and _is_tensor(second):
        return keras.layers.Subtract(name=name)([first, second])
    if _is_tensor(first):
        return _scale(name, first, 1.0, _constant(second, lambda number: -number))
    return _scale(name, second, -1.0, _constant(first))


def _multiply(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    first, second = _operands(args, options)
    if _is_tensor(first) and _is_tensor(second):
        return keras.layers.Multiply(name=name)([first, second])
    tensor, constant = (first, second) if _is_tensor(first) else (second, first)
    return _scale(name, tensor, _constant(constant), 0.0)


def _divide(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    first, second = _operands(args, options)
    if not _is_tensor(first) or _is_tensor(second):
        raise ValueError("only division by a constant is supported")
    return _scale(name, first, _constant(second, lambda number: 1 / number), 0.0)


def _negative(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    return _scale(name, _only(args, options), -1.0, 0.0)


def _only(args: list[Any], options: dict[str, Any], *allowed: str) -> _Tensor:
    """Return the only tensor, and reject options that are not allowed."""
    if set(options) - set(allowed):
        raise ValueError(f"unknown options {', '.join(sorted(set(options) - set(allowed)))}")
    (tensor,) = args
    if not _is_tensor(tensor):
        raise TypeError("not a tensor")
    return tensor


def _activation(function: str) -> _Apply:
    def apply(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
        return keras.layers.Activation(function, name=name)(_only(args, options))

    return apply


def _softmax(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    return keras.layers.Softmax(axis=int(options.get("axis", -1)), name=name)(_only(args, options, "axis"))


def _silu(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    if float(options.get("beta", 1.0)) != 1.0:
        raise ValueError("only beta 1 is supported")
    return keras.layers.Activation("silu", name=name)(_only(args, options, "beta"))


def _gelu(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    if options.get("approximate"):
        raise ValueError("only the exact GELU is supported")
    return keras.layers.Activation("gelu", name=name)(_only(args, options, "approximate"))


def _relu(max_value: float | None) -> _Apply:
    def apply(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
        return keras.layers.ReLU(max_value=max_value, name=name)(_only(args, options))

    return apply


def _leaky_relu(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    slope = float(options.get("alpha", 0.2))
    return keras.layers.LeakyReLU(negative_slope=slope, name=name)(_only(args, options, "alpha"))


def _clip(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    low, high = float(options["clip_value_min"]), float(options["clip_value_max"])
    if low != 0:
        raise ValueError("only clipping at 0 is supported")
    tensor = _only(args, options, "clip_value_min", "clip_value_max")
    return keras.layers.ReLU(max_value=high, name=name)(tensor)


def _identity(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    if str(options.get("dtype", "float32")) not in {"float16", "bfloat16", "float32", "float64"}:
        raise ValueError("only conversion to floating-point numbers is supported")
    return keras.layers.Identity(name=name)(_only(args, options, "dtype"))


def _slice(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    """Reverse the channels, as in `x[..., ::-1]`."""
    tensor = _only(args, options, "slice_spec")
    *leading, last = options["slice_spec"]
    everything = {"start": None, "stop": None, "step": None}
    is_ellipsis = [isinstance(part, dict) and part.get("class_name") == "__ellipsis__" for part in leading]
    if is_ellipsis.count(True) != 1 and len(leading) != len(tensor.shape) - 1:
        raise ValueError("the last axis is not sliced")
    if any(part != everything and not ellipsis for part, ellipsis in zip(leading, is_ellipsis, strict=True)):
        raise ValueError("another axis is sliced")
    if last != {"start": None, "stop": None, "step": -1}:
        raise ValueError("the channels are not reversed")
    return keras.layers.Identity(name=name)(keras.ops.flip(tensor, axis=-1))


def _reverse(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    axes = tuple(int(axis) for axis in _listed(options["axis"]))
    if 0 in axes:
        raise ValueError("the batch cannot be reversed")
    return keras.layers.Identity(name=name)(keras.ops.flip(_only(args, options, "axis"), axis=axes))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _pool(average: bool) -> _Apply:
    def apply(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
        tensor = _only(args, options, "axis", "keepdims")
        axes = {int(axis) % len(tensor.shape) for axis in _listed(options["axis"])}
        if len(tensor.shape) != 4 or axes != {1, 2}:
            raise ValueError("only reduction over height and width is supported")
        layer = keras.layers.GlobalAveragePooling2D if average else keras.layers.GlobalMaxPooling2D
        return layer(keepdims=bool(options.get("keepdims", False)), name=name)(tensor)

    return apply


def _concat(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    if set(options) - {"axis"} or not all(_is_tensor(tensor) for tensor in args[0]):
        raise ValueError("only tensors are supported")
    return keras.layers.Concatenate(axis=int(options["axis"]), name=name)(args[0])


def _add_n(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    if options or not all(_is_tensor(tensor) for tensor in args[0]):
        raise ValueError("only tensors are supported")
    return keras.layers.Add(name=name)(args[0])


def _reshape(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    batch, *shape = (int(size) for size in options["shape"])
    if batch != -1:
        raise ValueError("only an unknown batch size is supported")
    return keras.layers.Reshape(shape, name=name)(_only(args, options, "shape"))


def _pad(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    tensor = _only(args, options, "paddings", "mode", "constant_values")
    batch, rows, columns, channels = options["paddings"]
    if any((*batch, *channels, options.get("constant_values", 0))) or options.get("mode", "CONSTANT") != "CONSTANT":
        raise ValueError("only padding of height and width with zeros is supported")
    return keras.layers.ZeroPadding2D((tuple(rows), tuple(columns)), name=name)(tensor)


def _resize(name: str, args: list[Any], options: dict[str, Any]) -> _Tensor:
    tensor = _only(args, options, "size", "method", "preserve_aspect_ratio", "antialias")
    if options.get("preserve_aspect_ratio") or options.get("antialias"):
        raise ValueError("only plain resizing is supported")
    method = str(options.get("method", "bilinear"))
    if method not in {"bilinear", "nearest", "bicubic"}:
        raise ValueError("unsupported method")
    height, width = (int(side) for side in options["size"])
    return keras.layers.Resizing(height, width, interpolation=method, name=name)(tensor)


_OPERATIONS: dict[str, _Apply] = {
    **dict.fromkeys(("__operators__.add", "math.add", "add", "nn.bias_add"), _add),
    **dict.fromkeys(("__operators__.subtract", "math.subtract", "subtract"), _subtract),
    **dict.fromkeys(("__operators__.multiply", "math.multiply", "multiply"), _multiply),
    **dict.fromkeys(("math.truediv", "math.divide", "divide", "truediv"), _divide),
    **dict.fromkeys(("math.negative", "negative"), _negative),
    **dict.fromkeys(("cast", "identity", "convert_to_tensor"), _identity),
    **dict.fromkeys(("math.reduce_mean", "reduce_mean"), _pool(average=True)),
    **dict.fromkeys(("math.reduce_max", "reduce_max"), _pool(average=False)),
    **dict.fromkeys(("nn.silu", "nn.swish"), _silu),
    **dict.fromkeys(("math.sigmoid", "nn.sigmoid", "sigmoid"), _activation("sigmoid")),
    **dict.fromkeys(("math.tanh", "nn.tanh", "tanh"), _activation("tanh")),
    **dict.fromkeys(("math.softplus", "nn.softplus"), _activation("softplus")),
    **dict.fromkeys(("math.add_n", "add_n"), _add_n),
    "__operators__.getitem": _slice,
    "clip_by_value": _clip,
    "concat": _concat,
    "image.resize": _resize,
    "nn.elu": _activation("elu"),
    "nn.gelu": _gelu,
    "nn.leaky_relu": _leaky_relu,
    "nn.relu": _relu(None),
    "nn.relu6": _relu(6.0),
    "nn.selu": _activation("selu"),
    "nn.softmax": _softmax,
    "pad": _pad,
    "reshape": _reshape,
    "reverse": _reverse,
}
