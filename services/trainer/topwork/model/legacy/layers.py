"""Creates a layer of Keras 3 from its configuration in Keras 2."""

import inspect
from collections.abc import Iterable
from typing import Any

import keras

from topwork.errors import quote_error
from topwork.model.cloning import is_augmentation_name
from topwork.model.legacy.errors import UpgradeError

RENAMED = {
    "AvgPool2D": "AveragePooling2D",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "Convolution2D": "Conv2D",
    "Convolution2DTranspose": "Conv2DTranspose",
    "DepthwiseConvolution2D": "DepthwiseConv2D",
    "GlobalAvgPool2D": "GlobalAveragePooling2D",
    "GlobalMaxPool2D": "GlobalMaxPooling2D",
    "MaxPool2D": "MaxPooling2D",
    "SeparableConvolution2D": "SeparableConv2D",
    "SyncBatchNormalization": "BatchNormalization",
}
# Keys of Keras 2 that do not change what a layer computes.
_IRRELEVANT = frozenset(
    {
        *{"batch_input_shape", "dtype", "experimental_autocast", "fused", "force_generator", "rng_type", "sparse"},
        *{"query_shape", "key_shape", "value_shape", "experimental_attribute", "optional"},
    }
)
# Values with which any other unknown key has no effect, such as renorm: false, or groups: 1 of DepthwiseConv2D.
_OFF: tuple[tuple[str | None, Any], ...] = ((None, None), (None, False), ("groups", 1))
# Keras 2 accepted these for every layer, and ignored them in layers that have no such weights.
_TRAINING_ONLY = ("_regularizer", "_constraint")
# keras.applications.convnext defines layers of its own.
_CONVNEXT_LAYERS = frozenset({"LayerScale", "StochasticDepth"})
# Keras 2 computed clip(0.2 x + 0.5, 0, 1), Keras 3 computes clip(x / 6 + 0.5, 0, 1).
_HARD_SIGMOID_SLOPE, _HARD_SIGMOID_OFFSET = 0.2, 0.5


def make_layer(entry: dict[str, Any]) -> keras.layers.Layer:
    """Create a layer.

    Args:
        entry: The layer as in the architecture of a model: class_name and config.

    Returns:
        The unbuilt layer with the same name. Augmentation layers, which change nothing in inference, keep only their
        name.

    Raises:
        UpgradeError: If Keras 3 has no such layer, or a setting of it that would change its result.
    """
    kind, config = str(entry["class_name"]), dict(entry["config"])
    kind = RENAMED.get(kind.rpartition(">")[2], kind.rpartition(">")[2])
    name = config["name"] = layer_name(str(config.get("name") or kind))
    if is_augmentation_name(kind):
        return keras.layers.RandomFlip(name=name)
    if kind == "ThresholdedReLU":
        return keras.layers.ReLU(threshold=float(_plain(config.get("theta", 1.0))), name=name)
    activation = config.get("activation")
    if activation == "hard_sigmoid":
        config["activation"] = "linear"
    if isinstance(config.get("layer"), dict):
        config["layer"] = make_layer(config["layer"])
    layer = _create(_find_class(kind, name), kind, name, config)
    return _with_hard_sigmoid(layer) if activation == "hard_sigmoid" else layer


def layer_name(name: str) -> str:
    """Return the name of a layer in Keras 3, which allows no slash: `conv1/bn` of DenseNet becomes `conv1_bn`."""
    return name.replace("/", "_")


def _find_class(kind: str, name: str) -> Any:
    if kind in _CONVNEXT_LAYERS:
        from keras.src.applications import convnext

        return getattr(convnext, kind)
    found = getattr(keras.layers, kind, None)
    if not inspect.isclass(found) or not issubclass(found, keras.layers.Layer):
        raise UpgradeError(f"layer {name} is a {kind}, which Keras 3 does not have")
    return found


def _create(layer_class: Any, kind: str, name: str, config: dict[str, Any]) -> keras.layers.Layer:
    accepted = _accepted_keys(layer_class)
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if key in _IRRELEVANT or key.endswith("_initializer") or (key not in accepted and key.endswith(_TRAINING_ONLY)):
            # The weights are in the file, so their initial values do not matter.
            continue
        if key in accepted:
            settings[key] = _value(key, value)
        elif kind == "LeakyReLU" and key == "alpha":
            settings["negative_slope"] = _plain(value)
        elif not any(option in (None, key) and value == off for option, off in _OFF):
            raise UpgradeError(f"layer {name}, a {kind}, has the setting {key}, which Keras 3 does not have")
    if kind == "BatchNormalization" and isinstance(settings.get("axis"), list | tuple):
        (settings["axis"],) = settings["axis"]
    try:
        return layer_class(**settings)
    except Exception as error:  # layers raise any kind of error for an invalid setting
        raise UpgradeError(f"layer {name}, a {kind}, is invalid in Keras 3 ({quote_error(error, 80)})") from error


def _accepted_keys(layer_class: Any) -> set[str]:
    parameters = inspect.signature(layer_class.__init__).parameters
    names: Iterable[str] = (key for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD)
    return {*names, "name", "trainable", "activity_regularizer"} - {"self"}


def _value(key: str, value: Any) -> Any:
    """Convert a setting: regularizers and constraints to objects, arrays to lists."""
    if isinstance(value, dict) and key.endswith(("_regularizer", "_constraint")):
        module = keras.regularizers if key.endswith("_regularizer") else keras.constraints
        return module.get({"class_name": value["class_name"], "config": _plain(value["config"])})
    return _plain(value)


def _plain(value: Any) -> Any:
    """Unwrap arrays, which Keras 2 stores as a dictionary with their values."""
    if isinstance(value, dict):
        if "value" in value:
            return _plain(value["value"])
        if isinstance(value.get("config"), dict) and "value" in value["config"]:
            return _plain(value["config"]["value"])
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def _with_hard_sigmoid(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Append the hard sigmoid of Keras 2 to a layer."""
    name = layer.name
    return keras.Sequential(
        [
            layer,
            keras.layers.Rescaling(_HARD_SIGMOID_SLOPE, offset=_HARD_SIGMOID_OFFSET, name=f"{name}_slope"),
            keras.layers.ReLU(max_value=1.0, name=f"{name}_clip"),
        ],
        name=name,
    )
