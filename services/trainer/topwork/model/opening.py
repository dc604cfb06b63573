"""Opens a model file that somebody else made: its architecture is looked through before anything is built."""

import json
import zipfile
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError

# Code in a file: Python's own, or that of another library in a container.
_CODE = frozenset({"Lambda", "__lambda__", "function", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"})
_KNOWN_MODULES = frozenset({"keras", "builtins", "tensorflow"})


def open_model(path: Path) -> keras.Model:
    """Load a model of built-in layers.

    Args:
        path: `.keras` file, or legacy `.h5` of a whole model.

    Returns:
        The model, functional or sequential, with a known input.

    Raises:
        DataError: If the file is no such model, or holds code, which is never run.
    """
    refused = sorted(_foreign(_architecture(path)))
    if refused:
        raise DataError(
            f"{path.name} holds {', '.join(refused)}: a base is made of Keras' built-in layers alone, because code "
            "from a file is never run. Save the model with built-in layers in their place."
        )
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} can't be loaded as a Keras model: {_first_line(error)}") from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise DataError(
            f"{path.name} isn't a functional or sequential model with a known input: it can't be cut. Save one that "
            "starts with keras.Input((height, width, 3))."
        )
    return model


def _architecture(path: Path) -> Any:
    """Read the architecture without building anything."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                config = json.loads(archive.read("config.json"))
        else:
            import h5py  # type: ignore[import-untyped]

            with h5py.File(path, "r") as file:
                config = json.loads(file.attrs["model_config"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path.name} is no Keras model: expected a .keras file, or a legacy .h5 that holds a whole model "
            f"(model.save, not model.save_weights): {_first_line(error)}"
        ) from error
    # How it was compiled isn't read: with a loss of their own, people still have built-in layers.
    return {key: value for key, value in config.items() if key != "compile_config"}


def _foreign(config: Any) -> set[str]:
    """Find layers that hold code and classes from outside Keras in an architecture."""
    found: set[str] = set()
    if isinstance(config, dict):
        kind, module, registered = (config.get(key) for key in ("class_name", "module", "registered_name"))
        if kind in _CODE:
            found.add(f"a {kind} ({config.get('name') or _inner_name(config)})")
        elif isinstance(module, str) and module.split(".")[0] not in _KNOWN_MODULES:
            found.add(f"{module}.{kind}")
        elif ">" in str(registered or kind):
            found.add(str(registered or kind))
        for value in config.values():
            found |= _foreign(value)
    elif isinstance(config, list):
        for value in config:
            found |= _foreign(value)
    return found


def _inner_name(config: dict[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "")) if isinstance(inner, dict) else str(inner)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
