"""Reads state dicts of PyTorch without PyTorch: `.safetensors` files, and what `torch.save` writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from topwork.errors import DataError, quote_error, shorten
from topwork.model.conversion.torch_file import SAVE_ADVICE, is_torch_file, read_torch_file, widen
from topwork.model.files.inspection import HDF5_SIGNATURE, MAX_WEIGHTS_BYTES, UnsafeFileError

# Keys under which training scripts (timm, torchvision, Lightning and others) store the state dict in a checkpoint.
_NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema_state_dict")
# Prefixes that DataParallel, AveragedModel and torch.compile add to every name.
_WRAPPERS = ("module.", "_orig_mod.")
_SAFETENSORS_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "bfloat16",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
_MAX_HEADER_BYTES = 100 * 2**20  # limit of the safetensors format
_MAX_SHOWN_NAME, _MAX_SHOWN_KEYS = 100, 200


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch model.

    The format is recognized by the content of the file. Code in the file is never executed. The state dict may be
    nested in a checkpoint under a usual key, and wrapped by DataParallel, AveragedModel or torch.compile.

    Args:
        path: `.safetensors` file, or file written by `torch.save` (`.pth`, `.pt`, `.bin`) in its zip format or the
            format before PyTorch 1.6.

    Returns:
        Name of each parameter and buffer to its values, in the file's order. bfloat16 is widened to float32; other
        types are unchanged.

    Raises:
        UnsafeFileError: If the file contains anything but tensors, or its sizes are wrong.
        DataError: If it is not such a file, is damaged, or contains no state dict or several ones.
    """
    try:
        content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # corrupt files lead to many kinds of errors
        raise DataError(f"{path.name} is damaged or incomplete: {quote_error(error)}. Copy it again.") from error
    return _unwrap(_select_state_dict(content, path.name), path.name)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts with the length of a JSON object, and the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def _read_torch(path: Path) -> Any:
    if is_torch_file(path):
        return read_torch_file(path)
    with path.open("rb") as file:
        start = file.read(len(HDF5_SIGNATURE))
    found = "an HDF5 file" if start == HDF5_SIGNATURE else f"a file that starts with {start!r}" if start else "empty"
    raise DataError(
        f"{path.name} is {found}, not a state dict of PyTorch. Allowed are .safetensors files, and files written by "
        "torch.save(model.state_dict(), FILE)."
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    import safetensors

    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise UnsafeFileError(f"{path.name} has more than {MAX_WEIGHTS_BYTES} bytes.")
    data = path.read_bytes()
    _reject_repeated_names(data, path.name)
    tensors = {}
    # The library verifies that the tensors cover the file exactly, without overlaps.
    for name, tensor in safetensors.deserialize(data):  # type: ignore[no-untyped-call]
        if (kind := _SAFETENSORS_TYPES.get(tensor["dtype"])) is None:
            raise DataError(
                f"{path.name} contains the tensor {shorten(name, _MAX_SHOWN_NAME)} of type {tensor['dtype']}. Allowed "
                f"are {', '.join(_SAFETENSORS_TYPES)}. Convert it first, for example to float32."
            )
        values = np.frombuffer(tensor["data"], "<u2" if kind == "bfloat16" else kind)
        tensors[name] = widen(values, kind).reshape(tensor["shape"])
    return tensors


def _reject_repeated_names(data: bytes, file: str) -> None:
    """Reject a header that names a tensor twice: it is unclear which one is meant."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(names := dict(pairs)) < len(pairs):
            raise DataError(f"{file} contains two tensors of the same name. Save it again.")
        return names

    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=collect)


def _select_state_dict(content: Any, file: str) -> Mapping[str, np.ndarray]:
    """Return the state dict of a checkpoint: the content itself, or the only state dict under a usual key."""
    if _is_state_dict(content):
        return content  # type: ignore[no-any-return]
    if not isinstance(content, dict):
        raise DataError(f"{file} contains {_describe(content)}, not a state dict. {SAVE_ADVICE}")
    found = [key for key in _NESTED if _is_state_dict(content.get(key))]
    if len(found) > 1:
        raise DataError(
            f"{file} contains several state dicts: {', '.join(found)}. They contain different weights. "
            f"Save the ones that you want to a file of their own: torch.save(checkpoint[{found[-1]!r}], 'weights.pth')."
        )
    if found:
        return content[found[0]]  # type: ignore[no-any-return]
    keys = shorten(", ".join(map(str, list(content)[:5])), _MAX_SHOWN_KEYS) or "nothing"
    odd = next((key for key, value in content.items() if not isinstance(value, np.ndarray)), None)
    where = "" if odd is None else f": {shorten(str(odd), _MAX_SHOWN_NAME)} is {_describe(content[odd])}"
    raise DataError(
        f"{file} contains no state dict{where}. It contains {keys}. A state dict has only tensors, at the "
        f"top level or under {', '.join(_NESTED)}. {SAVE_ADVICE}"
    )


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, np.ndarray) for key, value in content.items())
    )


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "a tensor"
    return "None" if value is None else f"a value of type {type(value).__name__.lstrip('_')}"


def _unwrap(state: Mapping[str, np.ndarray], file: str) -> dict[str, np.ndarray]:
    """Remove the prefix that a wrapper added to every name."""
    for prefix in _WRAPPERS:
        # AveragedModel also counts its updates.
        wrapped = {name: value for name, value in state.items() if name != "n_averaged"}
        if wrapped and all(name.startswith(prefix) for name in wrapped):
            return _unwrap({name.removeprefix(prefix): value for name, value in wrapped.items()}, file)
    if "" in state:
        raise DataError(f"{file} contains a tensor without a name. Save it again.")
    return dict(state)
