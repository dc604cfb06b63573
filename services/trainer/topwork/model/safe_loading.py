"""Loads untrusted Keras models: the architecture is checked before anything is built, and code is never run."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError, TopworkError, quote_error, shorten
from topwork.model.files.inspection import ModelFile, inspect_model
from topwork.model.files.types import explain_wrong_type
from topwork.model.legacy.architecture import CUSTOM_SCALE_LAYER, build_model
from topwork.model.legacy.errors import UpgradeError
from topwork.model.legacy.weights import load_h5_weights, load_keras_weights
from topwork.model.weights import finalize_normalization

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
# Lengths of quoted parts, so that a message stays below 300 characters.
_MAX_SHOWN, _MAX_SHOWN_LAYER, _MAX_SHOWN_FILE, _MAX_REASON = 2, 34, 48, 110
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
    file = _inspect(path)
    rejected = sorted(_find_disallowed(file.config, legacy=file.is_legacy))
    if rejected:
        shown = ", ".join(map(_shorten_name, rejected[:_MAX_SHOWN]))
        more = f" and {len(rejected) - _MAX_SHOWN} more" if len(rejected) > _MAX_SHOWN else ""
        raise DataError(
            f"{_describe_file(file)} contains {shown}{more}. A base may contain only built-in image layers of Keras: "
            "code in a file is never run, and no other file is read. Replace these layers."
        )
    try:
        _check_size(file)
        model = _load_legacy(file) if file.is_legacy else keras.models.load_model(path, compile=False, safe_mode=True)
    except (TopworkError, MemoryError):
        raise
    except UpgradeError as error:
        raise DataError(_upgrade_failed(file, str(error))) from error
    except Exception as error:  # layers raise any kind of error for an invalid architecture
        raise DataError(_load_failed(file, error)) from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise DataError(
            f"{path.name} is not a functional or sequential model with a known input shape, so it cannot be cut. Save "
            "a model that starts with keras.Input((height, width, 3))."
        )
    return model


def _inspect(path: Path) -> ModelFile:
    """Read the architecture without building anything."""
    explanation = explain_wrong_type(path)
    if explanation:
        raise DataError(f"{path.name} {explanation}")
    try:
        file = inspect_model(path)
        # The compile config is ignored: a model with a custom loss may still consist of built-in layers.
        return replace(file, config={key: value for key, value in file.config.items() if key != "compile_config"})
    except (TopworkError, MemoryError):
        raise
    except Exception as error:  # HDF5 raises many kinds of errors for corrupt files
        raise DataError(
            f"{path.name} is not a Keras model. Expected a .keras file, or a legacy .h5 file of a complete model "
            f"(model.save, not model.save_weights): {quote_error(error)}"
        ) from error


def _load_legacy(file: ModelFile) -> keras.Model:
    """Build the model with layers of Keras 3 and load its weights."""
    from keras.src.saving.serialization_lib import SafeModeScope

    with SafeModeScope(True):
        model = build_model(file.config)
    if not model.built:
        return model
    with file.open_weights() as weights:
        if file.is_keras_format:
            load_keras_weights(model, file.config["config"], weights)
        else:
            load_h5_weights(model, weights)
    finalize_normalization(model)
    return model


def _upgrade_failed(file: ModelFile, reason: str) -> str:
    version = f"Keras {file.keras_version}" if file.keras_version else "an old version of Keras"
    return (
        f"{shorten(file.path.name, _MAX_SHOWN_FILE)} was saved by {version}: {shorten(reason, _MAX_REASON)}. In that "
        "version, replace the layer by built-in layers that Keras 3 has, too, and save the model again."
    )


def _load_failed(file: ModelFile, error: Exception) -> str:
    return f"{_describe_file(file)} cannot be loaded as a Keras model: {quote_error(error, _MAX_REASON)}"


def _shorten_name(name: str) -> str:
    """Shorten a layer such as `a Lambda (resize)` at its end, and a class such as `my.module.Layer` at its start."""
    if name.startswith("a ") or len(name) <= _MAX_SHOWN_LAYER:
        return shorten(name, _MAX_SHOWN_LAYER)
    return f"…{shorten(name[1 - _MAX_SHOWN_LAYER :], _MAX_SHOWN_LAYER - 1)}"


def _describe_file(file: ModelFile) -> str:
    version = f" (saved by Keras {file.keras_version})" if file.is_legacy and file.keras_version else ""
    return f"{shorten(file.path.name, _MAX_SHOWN_FILE)}{version}"


def _check_size(file: ModelFile) -> None:
    """Reject an architecture that needs more memory than its weights, before allocating any."""
    from keras.src.backend.common import global_state
    from keras.src.legacy.saving.saving_utils import model_from_config
    from keras.src.saving.serialization_lib import SafeModeScope

    # In this scope Keras computes the shapes of all variables without allocating them.
    with SafeModeScope(True), keras.StatelessScope(initialize_variables=False):
        try:
            if file.is_legacy:
                model = build_model(file.config)
            elif file.is_keras_format:
                model = keras.saving.deserialize_keras_object(file.config)
            else:
                model = model_from_config(file.config)
            expected = sum(prod(variable.shape) for variable in model.variables)
        finally:
            # Otherwise Keras would initialize them together with the next pending variables.
            global_state.set_global_attribute("uninitialized_variables", [])
    if expected > file.values + _MAX_MISSING_VALUES:
        raise DataError(
            f"{file.path.name} describes layers with {expected} parameters but contains {file.values}: the file is "
            "incomplete or crafted to exhaust memory. Save the model again."
        )


def _find_disallowed(config: Any, level: int = 0, *, legacy: bool = False) -> set[str]:
    """Find layers with code, and classes from outside Keras, in an architecture."""
    if level > MAX_NESTING_LEVELS:
        return {f"more than {MAX_NESTING_LEVELS} levels of layers"}
    found: set[str] = set()
    if isinstance(config, dict):
        kind, module, registered = (config.get(key) for key in ("class_name", "module", "registered_name"))
        if str(kind) in _CODE_CLASSES | _VOCABULARY_CLASSES:
            found.add(f"a {kind} ({config.get('name') or _inner_name(config)})")
        elif isinstance(module, str) and not _is_layer_class(module, str(kind), legacy=legacy):
            found.add(f"{module}.{kind}")
        elif ">" in str(registered or kind) and not (legacy and kind == CUSTOM_SCALE_LAYER):
            found.add(str(registered or kind))
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            found |= _find_disallowed(value, level + 1, legacy=legacy)
    return found


def _is_layer_class(module: str, kind: str, *, legacy: bool) -> bool:
    """Return whether a class may occur in an architecture, such as one of keras.layers or tensorflow.keras.layers."""
    parts = module.split(".")
    if legacy and parts[0] == "tf_keras":
        parts[0] = "keras"
    while parts and parts[0] in ("tensorflow", "python"):
        parts.pop(0)
    if not parts or parts.pop(0) != "keras":
        return False
    if parts and parts[0] == "src":
        parts.pop(0)
    if legacy and parts == ["mixed_precision"]:
        # The dtype policy of a layer, which is not used: the base is computed in float32.
        return kind == "Policy"
    return parts[0] in _ALLOWED_MODULES if parts else kind in _ALLOWED_TOP_LEVEL_NAMES


def _inner_name(config: dict[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "")) if isinstance(inner, dict) else str(inner)
