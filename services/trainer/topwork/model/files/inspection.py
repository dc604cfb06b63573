"""Inspects untrusted model and weights files before Keras opens them or allocates memory for them."""

import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from topwork.disk_space import report_full_disk, require_free_space
from topwork.errors import DataError, shorten

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
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_VERSION_LENGTH, _MAX_SHOWN_NAME = 20, 100
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1  # flag bit of a zip entry
_READ_BYTES = 1 << 20
_PARTS = {"metadata.json": MAX_CONFIG_BYTES, "config.json": MAX_CONFIG_BYTES, "model.weights.h5": MAX_WEIGHTS_BYTES}


class UnsafeFileError(DataError):
    """A file is not a model or weights file, or contains content that does not belong in such a file."""


@dataclass(frozen=True)
class ModelFile:
    """The content of a model file that is read before the model is built.

    Attributes:
        path: The file.
        config: The architecture.
        values: Number of values in all arrays.
        keras_version: Version of Keras that wrote the file; empty if the file does not contain it.
    """

    path: Path
    config: Any
    values: int
    keras_version: str

    @property
    def is_keras_format(self) -> bool:
        """Whether the file has the `.keras` format, and not the legacy HDF5 format."""
        return is_keras_format(self.path)

    @property
    def is_legacy(self) -> bool:
        """Whether Keras 2 or an older version wrote the file. Files without a version are from before 2.0."""
        major = self.keras_version.partition(".")[0]
        return int(major) < 3 if major.isdigit() else not self.is_keras_format

    @contextmanager
    def open_weights(self) -> Iterator[Any]:
        """Open the HDF5 file with the weights."""
        import h5py  # type: ignore[import-untyped]

        if not self.is_keras_format:
            with h5py.File(self.path, "r") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, _unpack_weights(archive) as weights, h5py.File(weights) as file:
            yield file


def inspect_model(path: Path) -> ModelFile:
    """Inspect a model file.

    Args:
        path: `.keras` file, or legacy `.h5` file of a complete model.

    Returns:
        Its architecture.

    Raises:
        UnsafeFileError: If it contains content that does not belong in a model, or exceeds a limit.
        Exception: Any exception that the libraries raise for a corrupt file.
    """
    file = inspect_keras_file(path) if is_keras_format(path) else inspect_h5_model(path)
    if path.name.endswith(".keras") and not file.is_keras_format and not file.is_legacy:
        raise UnsafeFileError(f"{path.name} is an HDF5 file. Rename it to {path.stem}.h5.")
    return file


def is_keras_format(path: Path) -> bool:
    """Return whether a file is read as `.keras`: by its name, as in Keras.

    A file can be both valid ZIP and valid HDF5, with a different model in each. Up to version 2.12, Keras wrote HDF5 to
    files of any name; these are recognized by their first bytes, and Keras 3 never reads them.
    """
    return path.name.endswith(".keras") and not is_hdf5(path)


def is_hdf5(path: Path) -> bool:
    """Return whether a file starts as HDF5 files do."""
    with path.open("rb") as file:
        return file.read(len(HDF5_SIGNATURE)) == HDF5_SIGNATURE


def inspect_keras_file(path: Path) -> ModelFile:
    """Inspect a `.keras` file.

    Args:
        path: The file.

    Returns:
        Its architecture.

    Raises:
        UnsafeFileError: If its parts are not exactly those of a model, or it exceeds a limit.
        Exception: Any exception that the libraries raise for a corrupt file.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if len(entries) < len(archive.filelist) or set(entries) != set(_PARTS):
            shown = shorten(", ".join(sorted(entries)[:5]), _MAX_SHOWN_NAME) or "nothing"
            raise UnsafeFileError(
                f"{path.name} contains {shown}, but a .keras file contains {', '.join(_PARTS)}, each once. Other files "
                "are never read."
            )
        for name, info in entries.items():
            if info.file_size > min(_PARTS[name], max(FREE_BYTES, MAX_RATIO * info.compress_size)):
                raise _limit_exceeded(
                    path.name, f"{name} with {info.file_size} bytes, compressed to {info.compress_size}"
                )
        config, metadata = json.loads(archive.read("config.json")), json.loads(archive.read("metadata.json"))
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        with _unpack_weights(archive) as weights:
            return ModelFile(path, config, inspect_h5(weights, path.name), _version(version))


@contextmanager
def _unpack_weights(archive: zipfile.ZipFile) -> Iterator[IO[bytes]]:
    """Open the weights for random access. Keras stores them uncompressed; others are unpacked next to the archive.

    A job has its files on scratch, and /tmp of its pod is much smaller.
    """
    entry, path = archive.getinfo("model.weights.h5"), Path(str(archive.filename))
    if entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & _ENCRYPTED:
        with archive.open(entry) as packed:
            while packed.read(_READ_BYTES):  # verifies the checksum
                pass
        with path.open("rb") as file:
            yield _FileRange(file, _data_offset(file, entry), entry.file_size)  # type: ignore[misc] # has what h5py needs
        return
    directory = path.parent if os.access(path.parent, os.W_OK) else Path(tempfile.gettempdir())
    require_free_space(directory, entry.file_size, f"Unpacking the weights of {path.name}")
    with (
        report_full_disk(directory),
        archive.open(entry) as packed,
        tempfile.TemporaryFile(dir=directory) as weights,
    ):
        shutil.copyfileobj(packed, weights)
        yield weights


def _data_offset(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Return where the data of a zip entry starts: its local header repeats its name and its extra fields."""
    file.seek(entry.header_offset)
    signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(_LOCAL_HEADER_BYTES))
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile("invalid local header")
    return entry.header_offset + _LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)


class _FileRange(io.RawIOBase):
    """A range of a file as a file, for random access without a copy."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size = file, offset, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _version(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
    return "".join(character for character in text[:_MAX_VERSION_LENGTH] if character.isalnum() or character in ".-+")


def inspect_h5_model(path: Path) -> ModelFile:
    """Inspect a legacy `.h5` file of a complete model.

    Args:
        path: The file.

    Returns:
        Its architecture.

    Raises:
        UnsafeFileError: If it contains content that does not belong in a model, or exceeds a limit.
        Exception: Any exception that the libraries raise for a corrupt file.
    """
    import h5py

    values = inspect_h5(path, path.name)
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise UnsafeFileError(_without_architecture(file, path.name))
        config = file.attrs["model_config"]
        if len(config) > MAX_CONFIG_BYTES:
            raise _limit_exceeded(path.name, f"an architecture of {len(config)} bytes")
        return ModelFile(path, json.loads(config), values, _version(file.attrs.get("keras_version")))


def _without_architecture(file: Any, name: str) -> str:
    has_weights = (
        "layer_names" in file.attrs
        or "layers" in file
        or any(key in file for key in ("_layer_checkpoint_dependencies", "vars"))
    )
    found = (
        "contains only weights, as from model.save_weights" if has_weights else "is an HDF5 file without a Keras model"
    )
    return (
        f"{name} {found}. Save the complete model: model.save('model.keras'). For weights of a model of "
        "keras.applications, use spec.model.base.application and weights instead."
    )


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
                raise _limit_exceeded(
                    name, f"the array {shorten(array.name, _MAX_SHOWN_NAME)} with {shape} values in {stored} bytes"
                )
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
                target = shorten(f"{group.name}/{key}", _MAX_SHOWN_NAME)
                raise UnsafeFileError(f"{name} contains a link, {target}, instead of an array. Save the model again.")
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
        problem = f"values of type {shorten(str(array.dtype), _MAX_SHOWN_NAME)}"
    elif array.is_virtual or array.external:
        problem = "values stored in another file"
    else:
        properties = array.id.get_create_plist()
        filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
        if filters - _FILTERS:
            problem = f"values compressed with an unknown filter ({min(filters - _FILTERS)})"
    if problem:
        where = shorten(array.name, _MAX_SHOWN_NAME)
        raise UnsafeFileError(
            f"{name} contains {problem} at {where}, but a model contains only arrays of numbers. Save it again."
        )


def _limit_exceeded(name: str, content: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{name} is rejected: it contains {content}. This looks like a decompression bomb. Limits: compression ratio "
        f"{MAX_RATIO}, {MAX_WEIGHTS_BYTES} bytes for all arrays, {MAX_CONFIG_BYTES} bytes for the architecture."
    )
