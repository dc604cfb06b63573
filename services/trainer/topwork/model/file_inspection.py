"""Inspects untrusted model and weights files before Keras opens them or allocates memory for them."""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

from topwork.errors import DataError

MAX_CONFIG_BYTES = 16 * 2**20
"""Size limit of an architecture as JSON, in bytes. The largest architecture in keras.applications takes 1 MB."""

MAX_WEIGHTS_BYTES = 32 * 2**30
"""Size limit of all arrays of a file, decompressed, in bytes: 8 billion parameters in float32."""

MAX_RATIO = 100
"""Limit of the compression ratio of an array. Keras does not compress; trained weights hardly shrink, unlike zeros."""

FREE_BYTES = 16 * 2**20
"""Arrays up to this size in bytes are exempt from `MAX_RATIO`."""

MAX_OBJECTS = 200_000
"""Limit of groups and arrays in an HDF5 file."""

# NumPy kinds of numbers: no strings, references or Python objects.
_NUMBERS = frozenset("fiub")
# IDs of registered HDF5 filters: gzip, shuffle, checksum and lzf. Any other filter loads a library named by the file.
_FILTERS = frozenset({1, 2, 3, 32000})
_PARTS = {"metadata.json": MAX_CONFIG_BYTES, "config.json": MAX_CONFIG_BYTES, "model.weights.h5": MAX_WEIGHTS_BYTES}


class UnsafeFileError(DataError):
    """A file is not a model or weights file, or contains content that does not belong in such a file."""


def inspect_keras_file(path: Path) -> tuple[Any, int]:
    """Inspect a `.keras` file.

    Args:
        path: The file.

    Returns:
        The architecture, and the number of values in all arrays.

    Raises:
        UnsafeFileError: If its parts are not exactly those of a model, or it exceeds a limit.
        Exception: Any exception that the libraries raise for a corrupt file.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) < len(archive.filelist) or set(entries) != set(_PARTS):
            shown = ", ".join(sorted(entries)[:5]) or "nothing"
            raise UnsafeFileError(
                f"{path.name} contains {shown}, but a .keras file contains {', '.join(_PARTS)}, each once. Other files "
                "are never read."
            )
        for name, info in entries.items():
            if info.file_size > min(_PARTS[name], max(FREE_BYTES, MAX_RATIO * info.compress_size)):
                raise _limit_exceeded(
                    path.name, f"{name} with {info.file_size} bytes, compressed to {info.compress_size}"
                )
        config = json.loads(archive.read("config.json"))
        with archive.open("model.weights.h5") as packed, tempfile.TemporaryFile() as weights:
            shutil.copyfileobj(packed, weights)
            return config, inspect_h5(weights, path.name)


def inspect_h5_model(path: Path) -> tuple[Any, int]:
    """Inspect a legacy `.h5` file of a complete model.

    Args:
        path: The file.

    Returns:
        The architecture, and the number of values in all arrays.

    Raises:
        UnsafeFileError: If it contains content that does not belong in a model, or exceeds a limit.
        Exception: Any exception that the libraries raise for a corrupt file.
    """
    import h5py  # type: ignore[import-untyped]

    values = inspect_h5(path, path.name)
    with h5py.File(path, "r") as file:
        config = file.attrs["model_config"]
        if len(config) > MAX_CONFIG_BYTES:
            raise _limit_exceeded(path.name, f"an architecture of {len(config)} bytes")
        return json.loads(config), values


def inspect_h5(file: Path | IO[bytes], name: str) -> int:
    """Inspect an HDF5 file: it may contain only groups and arrays of numbers that are stored in the file itself.

    Args:
        file: The file.
        name: Its name, for error messages.

    Returns:
        The number of values in all arrays.

    Raises:
        UnsafeFileError: If an array is stored in another file, or exceeds a limit.
        Exception: Any exception that HDF5 raises for a corrupt file.
    """
    import h5py

    values = total_bytes = 0
    with h5py.File(file, "r") as opened:
        for array in _arrays(opened, name):
            _check_array(array, name)
            count = prod(array.shape)
            values += count
            total_bytes += count * array.dtype.itemsize
            stored = int(array.id.get_storage_size())
            if count * array.dtype.itemsize > max(FREE_BYTES, MAX_RATIO * stored) or total_bytes > MAX_WEIGHTS_BYTES:
                shape = "x".join(map(str, array.shape))
                raise _limit_exceeded(name, f"the array {array.name} with {shape} values in {stored} bytes")
    return values


def _arrays(file: Any, name: str) -> Iterator[Any]:
    """Yield all arrays, each once, without following links."""
    import h5py

    seen: set[int] = set()
    pending = [file]
    while pending:
        group = pending.pop()
        for key in group:
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise UnsafeFileError(
                    f"{name} contains a link, {group.name}/{key}, instead of an array. Save the model again."
                )
            item = group[key]
            address = int(h5py.h5o.get_info(item.id).addr)
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise _limit_exceeded(name, f"more than {MAX_OBJECTS} arrays and groups")
            if isinstance(item, h5py.Group):
                pending.append(item)
            else:
                yield item


def _check_array(array: Any, name: str) -> None:
    import h5py

    problem = ""
    if not isinstance(array, h5py.Dataset):
        problem = "a named data type"
    elif array.shape is None or (array.dtype.kind not in _NUMBERS and array.dtype != "V2"):
        problem = f"values of type {array.dtype}"
    elif array.is_virtual or array.external:
        problem = "values stored in another file"
    else:
        properties = array.id.get_create_plist()
        filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
        if filters - _FILTERS:
            problem = f"values compressed with an unknown filter ({min(filters - _FILTERS)})"
    if problem:
        raise UnsafeFileError(
            f"{name} contains {problem} at {array.name}, but a model contains only arrays of numbers. Save it again."
        )


def _limit_exceeded(name: str, content: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{name} is rejected: it contains {content}. This looks like a decompression bomb. Limits: compression ratio "
        f"{MAX_RATIO}, {MAX_WEIGHTS_BYTES} bytes for all arrays, {MAX_CONFIG_BYTES} bytes for the architecture."
    )
