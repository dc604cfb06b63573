"""Loads untrusted Keras models: the architecture is checked before anything is built, and code is never run."""

from math import prod
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.file_inspection import UnsafeFileError, inspect_h5_model, inspect_keras_file

# Layers and objects that contain code: Python code, or a wrapped model of another library.
_CODE_CLASSES = frozenset(
    {"Lambda", "__lambda__", "function", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
)
# Layers that read a vocabulary from a path given in the architecture.
_VOCABULARY_CLASSES = frozenset({"StringLookup", "IntegerLookup", "TextVectorization"})
# Keras modules whose classes may occur in an architecture. Others contain functions with side effects.
_ALLOWED_MODULES = frozenset(
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
        "quantizers",
        "regularizers",
    }
)
# Top-level Keras names that may occur in an architecture.
_ALLOWED_TOP_LEVEL_NAMES = frozenset(
    {"DTypePolicy", "DTypePolicyMap", "Functional", "KerasTensor", "Model", "Sequential"}
)
# Number of values that may be missing in the file: not every format stores the state of random layers.
_MAX_MISSING_VALUES = 2**20
MAX_NESTING_LEVELS = 200
"""Limit of nesting levels in an architecture. A model nested ten models deep has about 60."""


def load_model_safely(path: Path) -> keras.Model:
    """Load a model that consists of built-in layers.

    Args:
        path: `.keras` file, or legacy `.h5` file of a complete model.

    Returns:
        The functional or sequential model, with a known input shape.

    Raises:
        DataError: If the file is not a Keras model of built-in layers, or it contains code.
    """
    config, values = _architecture(path)
    rejected = sorted(_find_disallowed(config))
    if rejected:
        raise DataError(
            f"{path.name} contains {', '.join(rejected)}. A base may contain only built-in image layers of Keras: code "
            "from a model file is never run, and no other file is read. Replace these layers with built-in ones."
        )
    try:
        _check_size(config, values, path)
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # layers raise any kind of error for an invalid architecture
        raise DataError(f"{path.name} cannot be loaded as a Keras model: {_first_line(error)}") from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise DataError(
            f"{path.name} is not a functional or sequential model with a known input shape, so it cannot be cut. Save "
            "a model that starts with keras.Input((height, width, 3))."
        )
    return model


def _architecture(path: Path) -> tuple[dict[str, Any], int]:
    """Read the architecture without building anything, and count the values in the arrays."""
    try:
        # Chosen by file name, as in Keras: a file can be both valid ZIP and valid HDF5, with a different model in each.
        config, values = inspect_keras_file(path) if path.name.endswith(".keras") else inspect_h5_model(path)
        # The compile config is ignored: a model with a custom loss may still consist of built-in layers.
        return {key: value for key, value in config.items() if key != "compile_config"}, values
    except UnsafeFileError:
        raise
    except Exception as error:  # HDF5 raises many kinds of errors for corrupt files
        raise DataError(
            f"{path.name} is not a Keras model. Expected a .keras file, or a legacy .h5 file of a complete model "
            f"(model.save, not model.save_weights): {_first_line(error)}"
        ) from error


def _check_size(config: dict[str, Any], values: int, path: Path) -> None:
    """Reject an architecture that needs more memory than its weights, before allocating any."""
    from keras.src.backend.common import global_state
    from keras.src.legacy.saving.saving_utils import model_from_config
    from keras.src.saving.serialization_lib import SafeModeScope

    # In this scope Keras computes the shapes of all variables without allocating them.
    with SafeModeScope(True), keras.StatelessScope(initialize_variables=False):
        try:
            is_legacy = not path.name.endswith(".keras")
            model = model_from_config(config) if is_legacy else keras.saving.deserialize_keras_object(config)
            expected = sum(prod(variable.shape) for variable in model.variables)
        finally:
            # Otherwise Keras would initialize them together with the next pending variables.
            global_state.set_global_attribute("uninitialized_variables", [])
    if expected > values + _MAX_MISSING_VALUES:
        raise DataError(
            f"{path.name} describes layers with {expected} parameters but contains {values}: the file is incomplete "
            "or crafted to exhaust memory. Save the model again."
        )


def _find_disallowed(config: Any, level: int = 0) -> set[str]:
    """Find layers with code, and classes from outside Keras, in an architecture."""
    if level > MAX_NESTING_LEVELS:
        return {f"more than {MAX_NESTING_LEVELS} levels of layers"}
    found: set[str] = set()
    if isinstance(config, dict):
        kind, module, registered = (config.get(key) for key in ("class_name", "module", "registered_name"))
        if str(kind) in _CODE_CLASSES | _VOCABULARY_CLASSES:
            found.add(f"a {kind} ({config.get('name') or _inner_name(config)})")
        elif isinstance(module, str) and not _is_layer_class(module, str(kind)):
            found.add(f"{module}.{kind}")
        elif ">" in str(registered or kind):
            found.add(str(registered or kind))
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            found |= _find_disallowed(value, level + 1)
    return found


def _is_layer_class(module: str, kind: str) -> bool:
    """Return whether a class may occur in an architecture, such as one of keras.layers or tensorflow.keras.layers."""
    parts = module.split(".")
    while parts and parts[0] in ("tensorflow", "python"):
        parts.pop(0)
    if not parts or parts.pop(0) != "keras":
        return False
    if parts and parts[0] == "src":
        parts.pop(0)
    return parts[0] in _ALLOWED_MODULES if parts else kind in _ALLOWED_TOP_LEVEL_NAMES


def _inner_name(config: dict[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "")) if isinstance(inner, dict) else str(inner)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
