"""Reads files written by `torch.save`, in both formats, with an unpickler that creates nothing but tensors.

The formats are defined in torch/serialization.py. Since PyTorch 1.6, a file is an uncompressed zip archive with the
pickle `data.pkl` and one entry per storage (the values of one or several tensors). Before, it was a sequence of
pickles: magic number, format version, system information, content, and names of the storages; the storages follow.
"""

import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from topwork.errors import DataError, shorten
from topwork.model.files.inspection import MAX_CONFIG_BYTES, MAX_OBJECTS, MAX_WEIGHTS_BYTES, UnsafeFileError

_ZIP_SIGNATURE, _PICKLE_PROTOCOL = b"PK\x03\x04", b"\x80"
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MAX_DIMENSIONS = 32
# Several names can share a storage (tied weights), but no model uses its parameters more often than this.
_MAX_SHARING = 4
_MAX_SHOWN_NAME, _MAX_LINE_BYTES = 100, 1024

SAVE_ADVICE = "Save only the weights: torch.save(model.state_dict(), 'weights.pth')."
"""How to write a file that `read_torch_file` reads."""

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


@dataclass(frozen=True)
class _StorageType:
    """Type of the values of a storage.

    Attributes:
        kind: NumPy data type in little-endian byte order, or "bfloat16".
    """

    kind: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of the stored bytes."""
        return np.dtype("<u2" if self.kind == "bfloat16" else self.kind)


@dataclass(frozen=True)
class _Storage:
    """Part of a storage, as referenced by the pickle: `count` values from value `start`."""

    type: _StorageType
    key: str
    start: int
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor, as described by the pickle. Offset and strides are in values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict[Any, Any]):
    """An OrderedDict of the file, without the attributes that the file gives to it (`_metadata`)."""

    def __setstate__(self, state: object) -> None:
        pass


def is_torch_file(path: Path) -> bool:
    """Return whether a file starts as those of `torch.save`."""
    with path.open("rb") as file:
        start = file.read(len(_ZIP_SIGNATURE))
    return start == _ZIP_SIGNATURE or start[:1] == _PICKLE_PROTOCOL


def read_torch_file(path: Path) -> Any:
    """Read a file written by `torch.save`.

    Args:
        path: The file.

    Returns:
        Its content; each tensor is a NumPy array of its own. bfloat16 is widened to float32.

    Raises:
        UnsafeFileError: If the file references anything but tensors and their storages, or sizes are wrong.
        Exception: Any exception that corrupt files cause.
    """
    size = path.stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise UnsafeFileError(f"{path.name} has {size} bytes. The limit is {MAX_WEIGHTS_BYTES}.")
    with path.open("rb") as file:
        is_archive = file.read(len(_ZIP_SIGNATURE)) == _ZIP_SIGNATURE
    content, storages = _read_archive(path) if is_archive else _read_legacy(path)
    return _Values(storages, size, path.name).fill(content)


def widen(values: np.ndarray, kind: str) -> np.ndarray:
    """Widen bfloat16 to float32, whose upper half it is.

    Args:
        values: Values of any type; uint16 for bfloat16.
        kind: Data type, or "bfloat16".

    Returns:
        The values, as float32 if they are bfloat16.
    """
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else values


def _read_archive(path: Path) -> tuple[Any, dict[str, bytes]]:
    """Read the pickle and the storages of a zip archive. Checksums are verified."""
    with zipfile.ZipFile(path) as archive:
        entries = _entries(archive, path)
        if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
            raise DataError(
                f"{path.name} is a TorchScript program. Save its weights: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')."
            )
        if "data.pkl" not in entries:
            raise DataError(f"{path.name} is a zip archive without data.pkl, so torch.save did not write it.")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise _big_endian(path.name)
        content = _TensorUnpickler(_PickleBytes(archive.read(entries["data.pkl"]), path.name)).load()
        storages = {name: info for name, info in entries.items() if name.startswith("data/")}
        return content, {name.removeprefix("data/"): archive.read(info) for name, info in storages.items()}


def _entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their names below the only directory of the archive, if their sizes are safe."""
    file = path.name
    if len(archive.filelist) > MAX_OBJECTS:
        raise UnsafeFileError(f"{file} contains more than {MAX_OBJECTS} entries.")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        shown = shorten(info.filename, _MAX_SHOWN_NAME)
        if name in entries:
            raise UnsafeFileError(f"{file} contains {shown} twice. Save it again with torch.save.")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnsafeFileError(
                f"{file} contains {shown} with {info.file_size} bytes, compressed to {info.compress_size}. torch.save "
                "does not compress, and compressed data can be a decompression bomb. Save it again with torch.save."
            )
        if name == "data.pkl" and info.file_size > MAX_CONFIG_BYTES:
            raise UnsafeFileError(f"{file} contains more than {MAX_CONFIG_BYTES} bytes besides its tensors.")
        entries[name] = info
    if sum(info.file_size for info in entries.values()) > path.stat().st_size:
        raise UnsafeFileError(f"{file} contains entries that overlap. Save it again with torch.save.")
    return entries


def _read_legacy(path: Path) -> tuple[Any, dict[str, bytes]]:
    """Read the pickles and the storages of the format before PyTorch 1.6."""
    data, file = path.read_bytes(), path.name
    pickled = _PickleBytes(data, file)
    if _TensorUnpickler(pickled).load() != _LEGACY_MAGIC:
        raise DataError(f"{file} is a pickle that torch.save did not write. {SAVE_ADVICE}")
    if (version := _TensorUnpickler(pickled).load()) != _LEGACY_VERSION:
        raise DataError(
            f"{file} has version {shorten(str(version), 20)} of the old format of torch.save. {SAVE_ADVICE}"
        )
    system = _TensorUnpickler(pickled).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise _big_endian(file)
    unpickler = _TensorUnpickler(pickled)
    content, keys = unpickler.load(), _TensorUnpickler(pickled).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise DataError(f"{file} has no list of storages. {SAVE_ADVICE}")
    return content, _legacy_storages(memoryview(data)[pickled.position :], keys, unpickler.types, file)


def _legacy_storages(
    data: memoryview, keys: list[str], types: Mapping[str, _StorageType], file: str
) -> dict[str, bytes]:
    """Return the storages, each stored after its number of values as int64."""
    storages: dict[str, bytes] = {}
    position = 0
    for key in keys:
        if key not in types or key in storages:
            raise DataError(f"{file} contains a storage that no tensor uses, or the same one twice. {SAVE_ADVICE}")
        count = int.from_bytes(data[position : position + 8], "little", signed=True)
        start, size = position + 8, count * types[key].dtype.itemsize
        if count < 0 or start + size > len(data):
            raise _truncated(file, key, size, max(0, len(data) - start))
        storages[key] = bytes(data[start : start + size])
        position = start + size
    if position != len(data):
        raise DataError(f"{file} has {len(data) - position} bytes after its last tensor. Copy it again.")
    return storages


class _Values:
    """Replaces descriptions of tensors by their values, with checks of all bounds."""

    def __init__(self, storages: Mapping[str, bytes], file_size: int, file: str) -> None:
        self._storages, self._file = storages, file
        self._bytes_left = _MAX_SHARING * file_size

    def fill(self, content: Any) -> Any:
        """Return the content with values. State dicts are at the first or second level; deeper levels are omitted."""
        if not isinstance(content, dict):
            return content
        return {
            key: {name: self._read(item, name) for name, item in value.items()}
            if isinstance(value, dict)
            else self._read(value, key)
            for key, value in content.items()
        }

    def _read(self, item: Any, name: Any) -> Any:
        if not isinstance(item, _Tensor):
            return item
        where = f"{self._file} contains the tensor {shorten(str(name), _MAX_SHOWN_NAME)}"
        storage, dtype = item.storage, item.storage.type.dtype
        if storage.key not in self._storages:
            raise DataError(f"{where} without its values. The file is incomplete: copy it again.")
        stored = self._storages[storage.key]
        end = (storage.start + storage.count) * dtype.itemsize
        if end > len(stored):
            raise _truncated(self._file, storage.key, end, len(stored))
        _check_bounds(item, where)
        self._bytes_left -= prod(item.shape) * dtype.itemsize
        if self._bytes_left < 0:
            raise UnsafeFileError(f"{where}, and its tensors have more than {_MAX_SHARING} times the file's size.")
        values = np.frombuffer(stored, dtype, storage.count, storage.start * dtype.itemsize)
        strides = tuple(stride * dtype.itemsize for stride in item.strides)
        view = np.lib.stride_tricks.as_strided(values[item.offset :], item.shape, strides)
        return widen(view.copy(), storage.type.kind)


def _check_bounds(tensor: _Tensor, where: str) -> None:
    """Reject a tensor that reaches beyond its storage, or repeats values of it."""
    count = prod(tensor.shape)
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    last = tensor.offset + sum(steps) if count else tensor.offset - 1
    if last >= tensor.storage.count or count > tensor.storage.count:
        raise UnsafeFileError(
            f"{where} with shape {tensor.shape}, strides {tensor.strides} and offset {tensor.offset}, but its storage "
            f"has {tensor.storage.count} values. Save it again with torch.save."
        )


class _PickleBytes:
    """The pickles of a file, as the file object of an unpickler. Reads never exceed the data or the size limit."""

    def __init__(self, data: bytes, file: str) -> None:
        self._data, self.file = data, file
        self.position = 0

    def read(self, count: int) -> bytes:
        """Read at most this number of bytes."""
        return self._take(self.position + max(count, 0))

    def readline(self) -> bytes:
        """Read the name of a class or a decimal number."""
        return self._take(self._data.find(b"\n", self.position, self.position + _MAX_LINE_BYTES) + 1)

    def _take(self, end: int) -> bytes:
        if min(end, len(self._data)) > MAX_CONFIG_BYTES:
            raise UnsafeFileError(f"{self.file} contains more than {MAX_CONFIG_BYTES} bytes besides its tensors.")
        taken = self._data[self.position : end]
        self.position += len(taken)
        return taken


# The unpickler in C reserves memory for any index that a file names; the one in Python does not.
class _TensorUnpickler(pickle._Unpickler):
    """Creates dictionaries, lists, numbers, strings, and descriptions of tensors, but no other objects."""

    def __init__(self, data: _PickleBytes) -> None:
        super().__init__(data)
        self._file = data.file
        self.types: dict[str, _StorageType] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a class or function of the file."""
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if (module, name) not in _ALLOWED:
            shown = shorten(f"{module}.{name}", _MAX_SHOWN_NAME)
            raise UnsafeFileError(
                f"{self._file} contains {shown}, but a state dict contains only tensors. Nothing was executed. "
                f"{SAVE_ADVICE}"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage.

        Args:
            pid: "storage", its type, key, device and number of values; in the old format also None, or the key, offset
                and number of values of a view.
        """
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise DataError(f"{self._file} contains an unknown kind of tensor. {SAVE_ADVICE}")
        if self.types.setdefault(key, storage_type) != storage_type:
            raise DataError(f"{self._file} uses the same values with two types. {SAVE_ADVICE}")
        start = 0
        if view and view[0] is not None:
            _, start, count = view[0]
        if not _are_sizes((start, count)):
            raise UnsafeFileError(f"{self._file} contains a storage with an invalid size. {SAVE_ADVICE}")
        return _Storage(storage_type, key, start, count)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Describe a tensor: torch._utils._rebuild_tensor_v2. Its gradient, hooks and metadata are ignored."""
    if (
        not isinstance(storage, _Storage)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or not len(shape) == len(strides) <= _MAX_DIMENSIONS
        or not _are_sizes((offset, *shape, *strides))
    ):
        raise UnsafeFileError(f"A tensor of the file has no valid shape. {SAVE_ADVICE}")
    return _Tensor(storage, offset, shape, strides)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value <= MAX_WEIGHTS_BYTES for value in values)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    """Return the tensor of a parameter: torch._utils._rebuild_parameter."""
    return tensor


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _truncated(file: str, key: str, expected: int, found: int) -> DataError:
    shown = shorten(key, _MAX_SHOWN_NAME)
    return DataError(f"{file} is incomplete: storage {shown} has {found} of {expected} bytes. Copy the file again.")


def _big_endian(file: str) -> DataError:
    return DataError(f"{file} was not written on a little-endian machine. Convert it: torch.load, then torch.save.")
