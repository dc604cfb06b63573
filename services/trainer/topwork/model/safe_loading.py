"""Opens a model file that somebody else made: its architecture is looked through before anything is built."""

from math import prod
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.file_inspection import Refused, read_h5, read_keras

# Code in a file: Python's own, or that of another library in a container.
_CODE = frozenset({"Lambda", "__lambda__", "function", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"})
# Layers that read a vocabulary from a path in the architecture.
_READERS = frozenset({"StringLookup", "IntegerLookup", "TextVectorization"})
# Parts of Keras whose classes an architecture is made of; functions of others (keras.utils.get_file) do things.
_PARTS = frozenset(
    {
        "activations",
        "applications",
        "constraints",
        "dtype_policies",
        "engine",
        "initializers",
        "layers",
        "models",
        "ops",
    }
    | {"quantizers", "regularizers"}
)
# What it names of Keras itself.
_TOP = frozenset({"DTypePolicy", "DTypePolicyMap", "Functional", "KerasTensor", "Model", "Sequential"})
# A few numbers more than the file holds: layers that draw at random have a state that not every format keeps.
_SLACK = 2**20
MAX_NESTING = 200
"""Levels of an architecture: a model ten models deep has some 60."""


def open_model(path: Path) -> keras.Model:
    """Load a model of built-in layers.

    Args:
        path: `.keras` file, or legacy `.h5` of a whole model.

    Returns:
        The model, functional or sequential, with a known input.

    Raises:
        DataError: If the file is no such model, or holds code, which is never run.
    """
    config, values = _architecture(path)
    refused = sorted(_foreign(config))
    if refused:
        raise DataError(
            f"{path.name} holds {', '.join(refused)}: a base is made of Keras' built-in layers for images alone, "
            "because code from a file is never run, and no other file is read. Save the model with built-in layers in "
            "their place."
        )
    try:
        _check_size(config, values, path)
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # layers raise whatever they stumble over in an architecture that is none
        raise DataError(f"{path.name} can't be loaded as a Keras model: {_first_line(error)}") from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise DataError(
            f"{path.name} isn't a functional or sequential model with a known input: it can't be cut. Save one that "
            "starts with keras.Input((height, width, 3))."
        )
    return model


def _architecture(path: Path) -> tuple[dict[str, Any], int]:
    """Read the architecture without building anything, and count the values of the arrays."""
    try:
        # By the name, as Keras does it: a file can be a zip and HDF5 at once, and hold another model as each.
        config, values = read_keras(path) if path.name.endswith(".keras") else read_h5(path)
        # How it was compiled isn't read: with a loss of their own, people still have built-in layers.
        return {key: value for key, value in config.items() if key != "compile_config"}, values
    except Refused:
        raise
    except Exception as error:  # HDF5 raises half a dozen kinds of errors of broken files
        raise DataError(
            f"{path.name} is no Keras model: expected a .keras file, or a legacy .h5 that holds a whole model "
            f"(model.save, not model.save_weights): {_first_line(error)}"
        ) from error


def _check_size(config: dict[str, Any], values: int, path: Path) -> None:
    """Refuse an architecture that takes more memory than its weights, before it takes any."""
    from keras.src.backend.common import global_state
    from keras.src.legacy.saving.saving_utils import model_from_config
    from keras.src.saving.serialization_lib import SafeModeScope

    # In such a scope Keras works out the shapes of all variables and leaves them without values.
    with SafeModeScope(True), keras.StatelessScope(initialize_variables=False):
        try:
            is_legacy = not path.name.endswith(".keras")
            model = model_from_config(config) if is_legacy else keras.saving.deserialize_keras_object(config)
            wanted = sum(prod(variable.shape) for variable in model.variables)
        finally:
            # They would get their values with the next ones that wait.
            global_state.set_global_attribute("uninitialized_variables", [])
    if wanted > values + _SLACK:
        raise DataError(
            f"{path.name} describes layers with {wanted} parameters, and holds {values}: it isn't whole, or made to "
            "fill the memory. Save the model anew."
        )


def _foreign(config: Any, level: int = 0) -> set[str]:
    """Find layers that hold code and classes from outside Keras in an architecture."""
    if level > MAX_NESTING:
        return {f"more than {MAX_NESTING} levels of layers"}
    found: set[str] = set()
    if isinstance(config, dict):
        kind, module, registered = (config.get(key) for key in ("class_name", "module", "registered_name"))
        if str(kind) in _CODE | _READERS:
            found.add(f"a {kind} ({config.get('name') or _inner_name(config)})")
        elif isinstance(module, str) and not _is_of_layers(module, str(kind)):
            found.add(f"{module}.{kind}")
        elif ">" in str(registered or kind):
            found.add(str(registered or kind))
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            found |= _foreign(value, level + 1)
    return found


def _is_of_layers(module: str, kind: str) -> bool:
    """Whether a class is one that layers are made of: keras.layers, keras.src.ops.numpy, tensorflow.keras.layers."""
    parts = module.split(".")
    while parts and parts[0] in ("tensorflow", "python"):
        parts.pop(0)
    if not parts or parts.pop(0) != "keras":
        return False
    if parts and parts[0] == "src":
        parts.pop(0)
    return parts[0] in _PARTS if parts else kind in _TOP


def _inner_name(config: dict[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "")) if isinstance(inner, dict) else str(inner)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
