"""Rebuilds the graph of a Keras 2 model with layers of Keras 3."""

from dataclasses import dataclass, field
from typing import Any

import keras

from topwork.errors import quote_error
from topwork.model.legacy.errors import UpgradeError
from topwork.model.legacy.layers import layer_name, make_layer
from topwork.model.legacy.operations import CLASSES as OPERATION_CLASSES
from topwork.model.legacy.operations import add_scaled, apply_operation

MODEL_CLASSES = frozenset({"Functional", "Model", "Sequential"})
"""Classes of models. Before version 2.3, Keras saved functional models as Model."""
CUSTOM_SCALE_LAYER = "Custom>CustomScaleLayer"
"""The only custom layer that is supported: keras.applications defines it for InceptionResNetV2."""
# Options of calls that do not change the result.
_IRRELEVANT_OPTIONS = ("mask", "initial_state")


def build_model(entry: dict[str, Any]) -> keras.Model:
    """Build a model without the values of its weights.

    Args:
        entry: Architecture of a functional or sequential model as saved by Keras 2: class_name and config.

    Returns:
        The model. Its layers have the names that they have in the file.

    Raises:
        UpgradeError: If a layer has no equivalent in Keras 3.
        Exception: Any exception for an architecture that Keras 2 would not have saved.
    """
    kind, config = entry["class_name"], entry["config"]
    if kind not in MODEL_CLASSES:
        raise UpgradeError(f"the model is a {kind}, not a functional or sequential model")
    model = _build_sequential(config) if kind == "Sequential" else _Graph(config).build()
    if isinstance(config, dict) and config.get("trainable") is False:
        model.trainable = False
    return model


def _build_entry(entry: dict[str, Any]) -> Any:
    return build_model(entry) if entry["class_name"] in MODEL_CLASSES else make_layer(entry)


def _build_sequential(config: Any) -> keras.Sequential:
    # Before version 2.2.3, the config of a sequential model was the list of its layers.
    entries = config if isinstance(config, list) else config["layers"]
    shape = input_shape(config)
    layers = [_build_entry(entry) for entry in entries if entry["class_name"] != "InputLayer"]
    images = [] if shape is None else [keras.Input(batch_shape=shape)]
    return keras.Sequential([*images, *layers], name=_model_name(config))


def input_shape(config: Any) -> list[int | None] | None:
    """Return the input shape of a sequential model, or of the nested model that it starts with.

    Args:
        config: Its configuration.

    Returns:
        The shape with the batch size first; None if the model was saved before its input was known.
    """
    entries = config if isinstance(config, list) else config["layers"]
    first = entries[0] if entries else {"config": {}}
    inner = first["config"]
    for shapes in (inner, {} if isinstance(config, list) else config):
        for key in ("batch_input_shape", "batch_shape", "build_input_shape"):
            if isinstance(shapes, dict) and shapes.get(key):
                return list(shapes[key])
    return input_shape(inner) if first.get("class_name") in MODEL_CLASSES else None


@dataclass
class _Graph:
    """A functional model while it is built.

    Attributes:
        config: Configuration of the model.
        layers: Layers and nested models by name. Operations and inputs are not included.
        tensors: Output of each call, by the name of the layer and the number of the call.
        names: Names of all layers in the file.
    """

    config: dict[str, Any]
    layers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[tuple[str, int], Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def build(self) -> keras.Model:
        entries = {_name(entry): entry for entry in self.config["layers"]}
        self.names = frozenset(entries)
        for name, entry in entries.items():
            if entry["class_name"] == "InputLayer":
                shape = entry["config"].get("batch_input_shape") or entry["config"].get("batch_shape")
                self.tensors[name, 0] = keras.Input(batch_shape=shape, name=layer_name(name))
            elif entry["class_name"] not in {*OPERATION_CLASSES, CUSTOM_SCALE_LAYER}:
                self.layers[name] = _build_entry(entry)
        self._call_all(entries)
        inputs = [self._tensor(reference) for reference in _references(self.config["input_layers"])]
        outputs = [self._tensor(reference) for reference in _references(self.config["output_layers"])]
        return keras.Model(_unpack(inputs), _unpack(outputs), name=_model_name(self.config))

    def _call_all(self, entries: dict[str, Any]) -> None:
        """Call the layers in an order in which their inputs exist."""
        first_calls = {name: self._first_call(entry) for name, entry in entries.items()}
        pending = [
            (entry, first_calls[name] + index, node)
            for name, entry in entries.items()
            for index, node in enumerate(entry.get("inbound_nodes", ()))
        ]
        while pending:
            waiting = [call for call in pending if not self._try_call(*call)]
            if len(waiting) == len(pending):
                raise UpgradeError(f"layer {_name(waiting[0][0])} has no input")
            pending = waiting

    def _first_call(self, entry: dict[str, Any]) -> int:
        """Return the number of the first call: for Keras 2, building a nested model counts as a call."""
        if entry["class_name"] not in MODEL_CLASSES:
            return 0
        name, calls = _name(entry), len(entry.get("inbound_nodes", ()))
        used = [call for inner in self.config["layers"] for call in _calls_of(inner.get("inbound_nodes"), name)]
        used += _calls_of(self.config["output_layers"], name)
        return int(max(used, default=0) >= calls)

    def _try_call(self, entry: dict[str, Any], index: int, node: Any) -> bool:
        """Call a layer if its inputs exist."""
        name = _name(entry)
        if isinstance(node, dict):
            raise UpgradeError(f"layer {name} is called with nested inputs, which cannot be read")
        try:
            args, kwargs = self._arguments(node, name)
        except KeyError:
            return False
        call_name = layer_name(name if index == 0 else f"{name}_{index}")
        self.tensors[name, index] = self._call(entry, call_name, args, kwargs)
        return True

    def _call(self, entry: dict[str, Any], name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if entry["class_name"] in OPERATION_CLASSES:
            return apply_operation(str(entry["config"].get("function")), name, args, kwargs)
        if entry["class_name"] == CUSTOM_SCALE_LAYER:
            return add_scaled(name, args[0], float(entry["config"]["scale"]))
        options = {key: value for key, value in kwargs.items() if key not in _IRRELEVANT_OPTIONS or value is not None}
        layer = self.layers[_name(entry)]
        try:
            return layer(*args, **options)
        except Exception as error:  # layers raise any kind of error for invalid input
            kind, reason = entry["class_name"], quote_error(error, 80)
            raise UpgradeError(f"layer {layer.name}, a {kind}, cannot be called ({reason})") from error

    def _arguments(self, node: Any, name: str) -> tuple[list[Any], dict[str, Any]]:
        """Read the arguments of a call: one reference for an operation, or a list of references."""
        if _is_reference(node):
            return [self._argument(node)], self._options(node)
        if not node:
            raise UpgradeError(f"layer {name} has no input")
        tensors = [self._argument(reference) for reference in node]
        return [_unpack(tensors)], self._options(node[0])

    def _options(self, reference: Any) -> dict[str, Any]:
        options = reference[3] if len(reference) > 3 else {}
        return {key: self._value(value) for key, value in options.items()}

    def _argument(self, reference: Any) -> Any:
        name, call, index = reference[:3]
        # A constant is stored in the place of the index.
        return self._value(index) if name == "_CONSTANT_VALUE" else self._tensor([name, call, index])

    def _value(self, value: Any) -> Any:
        if _is_reference(value) and value[0] in self.names:
            return self._tensor(value)
        if isinstance(value, list):
            return [self._value(inner) for inner in value]
        return value

    def _tensor(self, reference: Any) -> Any:
        name, call, index = reference[:3]
        return keras.tree.flatten(self.tensors[str(name), int(call)])[int(index)]


def _name(entry: dict[str, Any]) -> str:
    return str(entry.get("name") or entry["config"]["name"])


def _model_name(config: Any) -> str | None:
    name = config.get("name") if isinstance(config, dict) else None
    return None if name is None else layer_name(str(name))


def _is_reference(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str) and isinstance(value[1], int)


def _references(value: Any) -> list[Any]:
    """Flatten the inputs or outputs of a model: one reference, or a list or dictionary of them."""
    if _is_reference(value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [reference for part in inner for reference in _references(part)]


def _calls_of(value: Any, name: str) -> list[int]:
    """Find the calls of a layer that inbound nodes or outputs refer to."""
    if _is_reference(value) and value[0] == name:
        return [int(value[1])]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [call for part in inner for call in _calls_of(part, name)]


def _unpack(tensors: list[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else tensors
