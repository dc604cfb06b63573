"""Members of zip and tar archives, read one at a time; nothing is extracted to disk."""

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
    MAX_PATH_LENGTH,
    LimitedStream,
    LimitedTarInfo,
    LimitedXzFile,
    UncompressedSizeLimit,
    check_zip_directory,
    limit_entries,
)
from topwork.data.sources.source import sanitize_name
from topwork.errors import DataError

# Python's parsers raise these for damaged files, in addition to their own errors: invalid numbers and names, endless
# chains of headers, unknown versions.
_PARSE_ERRORS = (ValueError, struct.error, RecursionError, NotImplementedError, OverflowError, IndexError)
_DAMAGE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, *_PARSE_ERRORS)
_ENCRYPTED_FLAG = 0x1
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ArchiveMember:
    """A file in an archive.

    Attributes:
        name: Its path as the archive stores it, made printable.
        parts: The components of its path; empty if the path is rejected, see `split_member_path`.
        read: Returns the content; raises `Rejection` for links, devices and files that are too large.
    """

    name: str
    parts: tuple[str, ...]
    read: Callable[[], bytes]


@contextmanager
def open_archive(path: Path, display_uri: str, *, with_data: bool) -> Iterator[Iterator[ArchiveMember]]:
    """Open a zip file, or a tar file with any of its compressions; the content decides, not the suffix.

    Args:
        path: The archive.
        display_uri: URI of the archive for error messages.
        with_data: Whether to read the content of the members, or only their names.

    Yields:
        The files in the order of the archive. Only one is in memory at a time.

    Raises:
        DataError: If the file is not an archive, or it is damaged, encrypted or a decompression bomb.
    """
    size_limit = UncompressedSizeLimit(display_uri, path.stat().st_size)
    try:
        if zipfile.is_zipfile(path):
            check_zip_directory(path, display_uri)
            with zipfile.ZipFile(path) as archive:
                size_limit.add(sum(info.file_size for info in archive.infolist()))
                yield _zip_members(archive, display_uri, with_data=with_data)
        else:
            with _decompress(path, size_limit) as stream, _open_tar(stream, display_uri) as archive:
                yield limit_entries(_tar_members(archive, with_data=with_data), display_uri)
                # Compressed files have their checksum at the very end.
                while stream.read(_CHUNK_BYTES):
                    pass
    except _DAMAGE_ERRORS as error:
        raise DataError(
            f"{display_uri} is damaged or truncated: {error or type(error).__name__}. Download or create it again. "
            "Set spec.dataset.source.archive.sha256 to detect damaged copies immediately."
        ) from error


def _decompress(path: Path, size_limit: UncompressedSizeLimit) -> LimitedStream:
    """Open a tar file by its magic number; tarfile's own streams do not detect a truncated gzip file."""
    with path.open("rb") as file:
        magic = file.read(6)
    stream: IO[bytes] | io.RawIOBase
    if magic.startswith(b"\x1f\x8b"):
        stream = cast("IO[bytes]", gzip.open(path))  # noqa: SIM115 - the returned stream closes it
    elif magic.startswith(b"BZh"):
        stream = cast("IO[bytes]", bz2.open(path))  # noqa: SIM115
    elif magic.startswith(b"\xfd7zXZ\0"):
        stream = LimitedXzFile(path)
    else:
        stream = path.open("rb")
    return LimitedStream(cast("IO[bytes]", stream), size_limit)


def _open_tar(stream: LimitedStream, display_uri: str) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|", tarinfo=LimitedTarInfo)
    except tarfile.ReadError as error:
        raise DataError(
            f"{display_uri} is not a readable archive: {error}. Expected zip, tar, tar.gz, tar.bz2 or tar.xz."
        ) from error


def _zip_members(archive: zipfile.ZipFile, display_uri: str, *, with_data: bool) -> Iterator[ArchiveMember]:
    for info in archive.infolist():
        if info.is_dir():
            continue
        if info.flag_bits & _ENCRYPTED_FLAG:
            raise DataError(f"{display_uri} is encrypted ({info.filename}). Create it without a password.")
        read = _zip_reader(archive, info) if with_data else bytes
        yield ArchiveMember(sanitize_name(info.filename)[:MAX_PATH_LENGTH], split_member_path(info.filename), read)


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    file_type = stat.S_IFMT(info.external_attr >> 16)
    if rejection := _check_member(info.file_size, is_file=file_type in (0, stat.S_IFREG)):
        return partial(_raise, rejection)
    try:
        with archive.open(info) as file:
            data = file.read(MAX_BYTES + 1)
    except _DAMAGE_ERRORS as error:
        # The other members have their own checksums and may be intact.
        return partial(_raise, Rejection(UNDECODABLE, f"damaged in the archive: {error}"))
    return lambda: data


def _tar_members(archive: tarfile.TarFile, *, with_data: bool) -> Iterator[ArchiveMember]:
    while (info := archive.next()) is not None:
        if not info.isdir():
            read = _tar_reader(archive, info, with_data=with_data)
            yield ArchiveMember(sanitize_name(info.name)[:MAX_PATH_LENGTH], split_member_path(info.name), read)
        # tarfile keeps every member: a million of them take a gigabyte.
        archive.members.clear()  # type: ignore[attr-defined]


def _tar_reader(archive: tarfile.TarFile, info: tarfile.TarInfo, *, with_data: bool) -> Callable[[], bytes]:
    if rejection := _check_member(info.size, is_file=info.isreg()):
        return partial(_raise, rejection)
    if not with_data:
        return bytes
    file = archive.extractfile(info)
    data = file.read() if file else b""
    return lambda: data


def _check_member(size: int, *, is_file: bool) -> Rejection | None:
    if not is_file:
        return Rejection(UNSAFE, "a link or device, not a regular file")
    if size > MAX_BYTES:
        return Rejection(TOO_LARGE, f"{size} bytes, the limit is {MAX_BYTES}")
    return None


def _raise(rejection: Rejection) -> bytes:
    raise rejection


def split_member_path(name: str) -> tuple[str, ...]:
    """Split the path of an archive member into its components.

    Args:
        name: The path as the archive stores it.

    Returns:
        The components; empty if the path is absolute, points outside of the archive, or is too long or too deep.
    """
    # Some Windows tools write backslashes.
    path = sanitize_name(name.replace("\\", "/") if "/" not in name else name)
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or ".." in parts or (parts and len(parts[0]) == 2 and parts[0][1] == ":"):
        return ()
    return parts if len(path) <= MAX_PATH_LENGTH and len(parts) <= MAX_DEPTH + 1 else ()
