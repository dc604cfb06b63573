"""What a file of a model or of weights may hold: looked through before Keras opens it or takes memory for it."""

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
"""Bytes of an architecture as JSON: the largest of keras.applications has 1 MB."""

MAX_WEIGHTS_BYTES = 32 * 2**30
"""Bytes of all arrays of a file, unpacked: 8 billion parameters in float32."""

MAX_RATIO = 100
"""Bytes of an array for each that is stored. Keras packs nothing; trained weights hardly shrink, zeros without end."""

FREE_BYTES = 16 * 2**20
"""Bytes of arrays before `MAX_RATIO` counts."""

MAX_OBJECTS = 200_000
"""Groups and arrays of an HDF5 file."""

# Numbers, among them bfloat16, which HDF5 knows as two bytes: no text, no reference, no Python object.
_NUMBERS = frozenset("fiub")
# gzip, shuffle, checksum and lzf (HDF5's registered filters): any other loads a library that the file names.
_FILTERS = frozenset({1, 2, 3, 32000})
_PARTS = {"metadata.json": MAX_CONFIG_BYTES, "config.json": MAX_CONFIG_BYTES, "model.weights.h5": MAX_WEIGHTS_BYTES}


class Refused(DataError):  # noqa: N818 - an error by its base
    """A file is no model or weights, or holds what none has."""


def read_keras(path: Path) -> tuple[Any, int]:
    """Look through a `.keras` file.

    Args:
        path: The file.

    Returns:
        Its architecture, and the number of values of its arrays.

    Raises:
        Refused: If it holds other parts than a model, or is a bomb.
        Exception: Whatever the libraries raise of a broken file.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) < len(archive.filelist) or set(entries) != set(_PARTS):
            shown = ", ".join(sorted(entries)[:5]) or "nothing"
            raise Refused(
                f"{path.name} holds {shown}, and a model of image layers holds {', '.join(_PARTS)}, each once. Files "
                "beside them are never read."
            )
        for name, info in entries.items():
            if info.file_size > min(_PARTS[name], max(FREE_BYTES, MAX_RATIO * info.compress_size)):
                raise _bomb(path.name, f"{name} of {info.file_size} bytes in {info.compress_size}")
        config = json.loads(archive.read("config.json"))
        with archive.open("model.weights.h5") as packed, tempfile.TemporaryFile() as weights:
            shutil.copyfileobj(packed, weights)
            return config, check_h5(weights, path.name)


def read_h5(path: Path) -> tuple[Any, int]:
    """Look through a legacy `.h5` file of a whole model.

    Args:
        path: The file.

    Returns:
        Its architecture, and the number of values of its arrays.

    Raises:
        Refused: If it holds what no model has, or is a bomb.
        Exception: Whatever the libraries raise of a broken file.
    """
    import h5py  # type: ignore[import-untyped]

    values = check_h5(path, path.name)
    with h5py.File(path, "r") as file:
        config = file.attrs["model_config"]
        if len(config) > MAX_CONFIG_BYTES:
            raise _bomb(path.name, f"an architecture of {len(config)} bytes")
        return json.loads(config), values


def check_h5(file: Path | IO[bytes], name: str) -> int:
    """Look through all of an HDF5 file: plain arrays of numbers in groups, whose bytes are in the file itself.

    Args:
        file: The file.
        name: Its name, for errors.

    Returns:
        The number of values of all arrays.

    Raises:
        Refused: If an array lies in another file, or is larger than what is stored of it can be.
        Exception: Whatever HDF5 raises of a broken file.
    """
    import h5py

    values = wanted = 0
    with h5py.File(file, "r") as opened:
        for array in _arrays(opened, name):
            _check_array(array, name)
            count = prod(array.shape)
            values += count
            wanted += count * array.dtype.itemsize
            stored = int(array.id.get_storage_size())
            if count * array.dtype.itemsize > max(FREE_BYTES, MAX_RATIO * stored) or wanted > MAX_WEIGHTS_BYTES:
                shape = "x".join(map(str, array.shape))
                raise _bomb(name, f"the array {array.name} of {shape} values in {stored} bytes")
    return values


def _arrays(file: Any, name: str) -> Iterator[Any]:
    """Yield all arrays, each once, without following a link."""
    import h5py

    seen: set[int] = set()
    waiting = [file]
    while waiting:
        group = waiting.pop()
        for key in group:
            link = group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise Refused(f"{name} holds a link, {group.name}/{key}, where a model holds arrays. Save it anew.")
            found = group[key]
            address = int(h5py.h5o.get_info(found.id).addr)
            if address in seen:
                continue
            seen.add(address)
            if len(seen) > MAX_OBJECTS:
                raise _bomb(name, f"more than {MAX_OBJECTS} arrays and groups")
            if isinstance(found, h5py.Group):
                waiting.append(found)
            else:
                yield found


def _check_array(array: Any, name: str) -> None:
    import h5py

    what = ""
    if not isinstance(array, h5py.Dataset):
        what = "a type of its own"
    elif array.shape is None or (array.dtype.kind not in _NUMBERS and array.dtype != "V2"):
        what = f"values of the type {array.dtype}"
    elif array.is_virtual or array.external:
        what = "values that lie in another file"
    else:
        properties = array.id.get_create_plist()
        filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
        if filters - _FILTERS:
            what = f"values that an unknown filter packed ({min(filters - _FILTERS)})"
    if what:
        raise Refused(f"{name} holds {what} at {array.name}, where a model holds numbers of its own. Save it anew.")


def _bomb(name: str, what: str) -> Refused:
    return Refused(
        f"{name} is refused: it holds {what}. Arrays may take {MAX_RATIO} times what is stored of them, and "
        f"{MAX_WEIGHTS_BYTES} bytes in all; an architecture may take {MAX_CONFIG_BYTES}."
    )
