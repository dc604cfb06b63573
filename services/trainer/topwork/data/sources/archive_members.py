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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, cast

from topwork.data.images.rejection import MAX_BYTES, TOO_LARGE, UNDECODABLE, UNSAFE, Rejection
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
from topwork.data.sources.name_encoding import MAX_NAMES, guess_encoding, is_utf8
from topwork.data.sources.source import escape_name, sanitize_name
from topwork.data.sources.unexpected_content import describe_unexpected
from topwork.errors import DataError

# Python's parsers raise these for damaged files, in addition to their own errors: invalid numbers and names, endless
# chains of headers, unknown versions.
_PARSE_ERRORS = (ValueError, struct.error, RecursionError, NotImplementedError, OverflowError, IndexError)
_DAMAGE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, OSError, *_PARSE_ERRORS)
_ENCRYPTED_FLAG = 0x1
_UTF8_FLAG = 0x800
_UNICODE_PATH = 0x7075
_CHUNK_BYTES = 2**20

IsRead = Callable[[tuple[str, ...]], bool]
"""Whether the content of the file with a path is read."""


def _read_none(_parts: tuple[str, ...]) -> bool:
    return False


@dataclass(frozen=True)
class ArchiveMember:
    """A file or directory in an archive.

    Attributes:
        name: Its path as the archive stores it, made printable.
        parts: The components of its path; empty if the path is rejected, see `split_member_path`.
        read: Returns the content; raises `Rejection` for links, devices and files that are too large.
        is_directory: Whether it is a directory.
        size: Uncompressed size in bytes.
        checksum: CRC-32 of the content in hex; None in a tar file, which has no checksums.
    """

    name: str
    parts: tuple[str, ...]
    read: Callable[[], bytes]
    is_directory: bool = False
    size: int = 0
    checksum: str | None = None


class NameDecoder:
    """Decodes the names of members whose encoding the archive does not declare.

    Example:
        >>> decoder = NameDecoder()
        >>> for member in read_members(decoder): ...  # as UTF-8
        >>> if (encoding := decoder.guess()) != decoder.encoding:
        ...     decoder = NameDecoder(guessed=encoding)  # read the names again
    """

    def __init__(self, declared: str | None = None, guessed: str = "utf-8") -> None:
        """Create a decoder.

        Args:
            declared: Encoding that the spec sets; None if it sets none.
            guessed: Encoding to use otherwise. Bytes that are invalid in it become backslash escapes.
        """
        self.encoding = declared or guessed
        self._declared = declared
        self._components: dict[bytes, None] = {}
        self._has_other_names = False

    def decode(self, name: bytes) -> str:
        """Decode a name and remember it for `guess`.

        Raises:
            DataError: If the name is invalid in the encoding that the spec sets.
        """
        if name.isascii():
            return name.decode()
        if self._declared:
            return self._decode_declared(name, self._declared)
        self._has_other_names |= self.encoding == "utf-8" and not is_utf8(name)
        if len(self._components) < MAX_NAMES:
            self._components.update(dict.fromkeys(part for part in name.split(b"/") if not part.isascii()))
        return name.decode(self.encoding, errors="backslashreplace")

    def _decode_declared(self, name: bytes, encoding: str) -> str:
        try:
            return name.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                f"spec.dataset.source.archive.encoding is {encoding}, but the file name {ascii(name[:100])[1:]} in the "
                "archive is not valid in it. Remove encoding to have it guessed."
            ) from error

    def guess(self) -> str:
        """Return the encoding that the spec sets, or else the one that fits all names so far; `utf-8` if they are."""
        return guess_encoding(self._components) if self._has_other_names else self.encoding


@contextmanager
def open_archive(
    path: Path, display_uri: str, names: NameDecoder, *, is_read: IsRead = _read_none
) -> Iterator[Iterator[ArchiveMember]]:
    """Open a zip file, or a tar file with any of its compressions; the content decides, not the suffix.

    Args:
        path: The archive.
        display_uri: URI of the archive for error messages.
        names: Decodes the names that the archive does not declare as UTF-8.
        is_read: Whether to read the content of the file with this path (`ArchiveMember.parts`). Others are empty.

    Yields:
        The files and directories in the order of the archive. Only one is in memory at a time.

    Raises:
        DataError: If the file is not an archive, or it is damaged, encrypted or a decompression bomb.
    """
    size_limit = UncompressedSizeLimit(display_uri, path.stat().st_size)
    try:
        if zipfile.is_zipfile(path):
            check_zip_directory(path, display_uri)
            with zipfile.ZipFile(path) as archive:
                size_limit.add(sum(info.file_size for info in archive.infolist()))
                yield _zip_members(archive, display_uri, names, is_read)
        else:
            with _decompress(path, size_limit) as stream, _open_tar(stream, path, display_uri) as archive:
                yield limit_entries(_tar_members(archive, names, is_read), display_uri)
                # Compressed files have their checksum at the very end.
                while stream.read(_CHUNK_BYTES):
                    pass
    except _DAMAGE_ERRORS as error:
        raise DataError(
            f"{display_uri} is damaged or truncated: {str(error) or type(error).__name__}. Download or create it "
            "again. Set spec.dataset.source.archive.sha256 to detect damaged copies immediately."
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


def _open_tar(stream: LimitedStream, path: Path, display_uri: str) -> tarfile.TarFile:
    try:
        return tarfile.open(
            fileobj=cast("IO[bytes]", stream),
            mode="r|",
            tarinfo=LimitedTarInfo,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except (tarfile.ReadError, EOFError) as error:
        explanation = describe_unexpected(path)
        reason = f". {explanation}" if explanation else f": {str(error) or type(error).__name__}."
        raise DataError(
            f"{display_uri} is not a readable archive{reason} Expected zip, tar, tar.gz, tar.bz2 or tar.xz."
        ) from error


def _zip_members(
    archive: zipfile.ZipFile, display_uri: str, names: NameDecoder, is_read: IsRead
) -> Iterator[ArchiveMember]:
    for info in archive.infolist():
        name = _zip_name(info, names)
        if info.flag_bits & _ENCRYPTED_FLAG and not info.is_dir():
            raise DataError(f"{display_uri} is encrypted ({escape_name(name)}). Create it without a password.")
        parts = split_member_path(name)
        read = _zip_reader(archive, info) if not info.is_dir() and is_read(parts) else bytes
        yield ArchiveMember(
            sanitize_name(name)[:MAX_PATH_LENGTH],
            parts,
            read,
            is_directory=info.is_dir(),
            size=info.file_size,
            checksum=f"{info.CRC:08x}",
        )


def _zip_name(info: zipfile.ZipInfo, names: NameDecoder) -> str:
    """Return the name of a zip member; zipfile itself decodes it as cp437 unless the UTF-8 flag is set."""
    if info.flag_bits & _UTF8_FLAG:
        return info.filename
    raw = info.orig_filename.encode("cp437")
    return _unicode_path(info.extra, raw) or names.decode(raw.partition(b"\0")[0])


def _unicode_path(extra: bytes, raw_name: bytes) -> str | None:
    """Return the name in the Unicode Path field of Info-ZIP (APPNOTE.TXT, 4.6.9), if it belongs to the raw name."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == _UNICODE_PATH and content[:1] == b"\1" and content[1:5] == struct.pack("<I", zlib.crc32(raw_name)):
            with suppress(UnicodeDecodeError):
                return content[5:].decode().partition("\0")[0]
    return None


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    file_type = stat.S_IFMT(info.external_attr >> 16)
    if rejection := _check_member(info.file_size, is_file=file_type in (0, stat.S_IFREG)):
        return partial(_raise, rejection)
    try:
        with archive.open(info) as file:
            data = file.read(MAX_BYTES + 1)
    except _DAMAGE_ERRORS as error:
        # The other members have their own checksums and may be intact.
        return partial(_raise, Rejection(UNDECODABLE, f"damaged in the archive: {str(error) or type(error).__name__}"))
    return lambda: data


def _tar_members(archive: tarfile.TarFile, names: NameDecoder, is_read: IsRead) -> Iterator[ArchiveMember]:
    while (info := archive.next()) is not None:
        # Pax headers declare UTF-8; invalid bytes are surrogates here.
        is_declared = "path" in info.pax_headers and info.name.isprintable()
        name = info.name if is_declared else names.decode(info.name.encode(errors="surrogateescape"))
        parts = split_member_path(name)
        read = _tar_reader(archive, info) if not info.isdir() and is_read(parts) else bytes
        yield ArchiveMember(
            sanitize_name(name)[:MAX_PATH_LENGTH],
            parts,
            read,
            is_directory=info.isdir(),
            size=info.size,
        )
        # tarfile keeps every member: a million of them take a gigabyte.
        archive.members.clear()  # type: ignore[attr-defined]


def _tar_reader(archive: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], bytes]:
    if rejection := _check_member(info.size, is_file=info.isreg()):
        return partial(_raise, rejection)
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
        The components, not made printable; empty if the path is absolute, points outside of the archive, or is too
        long or too deep.
    """
    # Some Windows tools write backslashes.
    path = name.replace("\\", "/") if "/" not in name else name
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or ".." in parts or (parts and len(parts[0]) == 2 and parts[0][1] == ":"):
        return ()
    return parts if len(path) <= MAX_PATH_LENGTH and len(parts) <= MAX_DEPTH + 1 else ()
