"""The files inside an archive, one after the other: nothing is ever extracted to a path that the archive names."""

import bz2
import gzip
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from topwork.data.image_validation import MAX_BYTES, TOO_LARGE, UNDECODABLE, UNSAFE, Rejection
from topwork.data.sources.archive_limits import (
    MAX_DEPTH,
    MAX_NAME,
    BoundedInfo,
    BoundedStream,
    Expansion,
    XzStream,
    check_zip,
    counted,
)
from topwork.data.sources.source import printable
from topwork.errors import DataError

# What the parsers of Python raise of damaged files, beside their own errors: numbers and names that are none, headers
# that follow one another without end, versions from the future.
_PARSING = (ValueError, struct.error, RecursionError, NotImplementedError, OverflowError, IndexError)
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, *_PARSING)
_ENCRYPTED = 0x1
_CHUNK = 2**20


@dataclass(frozen=True)
class Member:
    """A file of an archive.

    Attributes:
        name: Its name, as the archive gives it.
        parts: The parts of its path; empty where that is refused, see `path_parts`.
        read: Gives its bytes; raises `Rejection` for what is no plain file.
    """

    name: str
    parts: tuple[str, ...]
    read: Callable[[], bytes]


@contextmanager
def members(path: Path, shown: str, *, with_data: bool) -> Iterator[Iterator[Member]]:
    """Go through an archive: zip, or tar with any of its compressions, told apart by content.

    Args:
        path: The archive.
        shown: What it is called in an error.
        with_data: Whether the members are read, or only named.

    Yields:
        Its files in their order, each read when its turn comes, so that one is in memory at a time.

    Raises:
        DataError: If it is no archive, damaged, encrypted or a bomb.
    """
    expansion = Expansion(shown, path.stat().st_size)
    try:
        if zipfile.is_zipfile(path):
            check_zip(path, shown)
            with zipfile.ZipFile(path) as archive:
                expansion.add(sum(info.file_size for info in archive.infolist()))
                yield _zip_members(archive, shown, with_data=with_data)
        else:
            with _decompressed(path, expansion) as stream, _opened_tar(stream, shown) as archive:
                yield counted(_tar_members(archive, with_data=with_data), shown)
                # To the very end, where compressed files have their checksum.
                while stream.read(_CHUNK):
                    pass
    except _DAMAGE as error:
        raise _damaged(shown, error) from error


def _decompressed(path: Path, expansion: Expansion) -> BoundedStream:
    """Open a tar by the first bytes of its compression. tarfile's own stream takes a cut gzip file for a whole one."""
    with path.open("rb") as file:
        head = file.read(6)
    stream: IO[bytes] | io.RawIOBase
    if head.startswith(b"\x1f\x8b"):
        stream = cast("IO[bytes]", gzip.open(path))  # noqa: SIM115 - closed by the stream that is given back
    elif head.startswith(b"BZh"):
        stream = cast("IO[bytes]", bz2.open(path))  # noqa: SIM115
    elif head.startswith(b"\xfd7zXZ\0"):
        stream = XzStream(path)
    else:
        stream = path.open("rb")
    return BoundedStream(cast("IO[bytes]", stream), expansion)


def _opened_tar(stream: BoundedStream, shown: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", tarinfo=BoundedInfo)
    except tarfile.ReadError as error:
        raise DataError(
            f"{shown} is no archive that can be read: expected zip, tar, tar.gz, tar.bz2 or tar.xz. It begins with: "
            f"{error}."
        ) from error


def _damaged(shown: str, error: BaseException) -> DataError:
    return DataError(
        f"{shown} is damaged or cut short: {error or type(error).__name__}. Fetch or make it anew; with "
        f"spec.dataset.source.archive.sha256 a broken copy is told at once."
    )


def _zip_members(archive: zipfile.ZipFile, shown: str, *, with_data: bool) -> Iterator[Member]:
    for info in archive.infolist():
        if info.is_dir():
            continue
        if info.flag_bits & _ENCRYPTED:
            raise DataError(f"{shown} is encrypted ({info.filename}). Store it without a password.")
        read = _zip_reader(archive, info) if with_data else bytes
        yield Member(printable(info.filename)[:MAX_NAME], path_parts(info.filename), read)


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return partial(_reject, Rejection(UNSAFE, "a link or device, not a file"))
    if info.file_size > MAX_BYTES:
        return partial(_reject, Rejection(TOO_LARGE, f"{info.file_size} bytes, at most {MAX_BYTES}"))
    try:
        with archive.open(info) as file:
            data = file.read(MAX_BYTES + 1)
    except _DAMAGE as error:
        # The other members have checksums of their own: they may well be whole.
        return partial(_reject, Rejection(UNDECODABLE, f"in the archive: {error}"))
    return lambda: data


def _tar_members(archive: tarfile.TarFile, *, with_data: bool) -> Iterator[Member]:
    while (info := archive.next()) is not None:
        if not info.isdir():
            read = _tar_reader(archive, info, with_data=with_data)
            yield Member(printable(info.name)[:MAX_NAME], path_parts(info.name), read)
        # tarfile remembers every member: a million of them are a gigabyte.
        archive.members.clear()  # type: ignore[attr-defined]


def _tar_reader(archive: tarfile.TarFile, info: tarfile.TarInfo, *, with_data: bool) -> Callable[[], bytes]:
    if not info.isreg():
        return partial(_reject, Rejection(UNSAFE, "a link or device, not a file"))
    if info.size > MAX_BYTES:
        return partial(_reject, Rejection(TOO_LARGE, f"{info.size} bytes, at most {MAX_BYTES}"))
    if not with_data:
        return bytes
    file = archive.extractfile(info)
    data = file.read() if file else b""
    return lambda: data


def _reject(rejection: Rejection) -> bytes:
    raise rejection


def path_parts(name: str) -> tuple[str, ...]:
    """Split the name of a member.

    Args:
        name: As the archive gives it.

    Returns:
        The parts of its path; empty where it is absolute or leads upwards, is too long or too deep.
    """
    # Some Windows tools write backslashes.
    path = printable(name.replace("\\", "/") if "/" not in name else name)
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or ".." in parts or (parts and len(parts[0]) == 2 and parts[0][1] == ":"):
        return ()
    return parts if len(path) <= MAX_NAME and len(parts) <= MAX_DEPTH + 1 else ()
