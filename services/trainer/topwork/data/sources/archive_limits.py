"""Limits on the content of archives, to reject decompression bombs before they exhaust memory, disk space or time."""

import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

from topwork.errors import DataError

MAX_MEMBERS = 2_000_000
"""Entries in an archive. ImageNet has 1.3 million images."""

MAX_ZIP_DIRECTORY_BYTES = 256 * 2**20
"""Size of the central directory of a zip file, which is read into memory: 134 bytes for each of `MAX_MEMBERS`."""

MAX_TOTAL_BYTES = 2 * 2**40
"""Uncompressed size of all files together. The largest public image datasets take up 1.3 TB."""

MAX_RATIO = 200
"""Uncompressed bytes per byte of the archive. Images hardly compress: a tar of blank BMP files reaches about 100.
Deflate can reach 1,032, xz 7,000 and bzip2 a million."""

MIN_LIMIT_BYTES = 256 * 2**20
"""Uncompressed bytes that every archive may have, regardless of its ratio: they take seconds."""

MAX_HEADER_BYTES = 2**20
"""Size of a tar header that precedes a file (long name, pax), which is read into memory."""

MAX_XZ_MEMORY_BYTES = 256 * 2**20
"""Memory that an xz file may request from the decompressor. `xz -9` needs 65 MiB."""

MAX_DEPTH = 32
"""Directories above a file in an archive."""

MAX_PATH_LENGTH = 1024
"""Characters in the path of a file in an archive."""

_CHUNK_BYTES = 2**16

T = TypeVar("T")


class UncompressedSizeLimit:
    """Counts the uncompressed bytes of an archive and rejects decompression bombs."""

    def __init__(self, display_uri: str, archive_bytes: int) -> None:
        """Set the limit for an archive.

        Args:
            display_uri: URI of the archive for error messages.
            archive_bytes: Size of the archive file.
        """
        self._display_uri = display_uri
        self._limit = min(MAX_TOTAL_BYTES, max(MIN_LIMIT_BYTES, MAX_RATIO * archive_bytes))
        self._bytes = 0

    def add(self, count: int) -> None:
        """Add uncompressed bytes that were read, or that the archive declares.

        Raises:
            DataError: If the total exceeds the limit.
        """
        self._bytes += count
        if self._bytes > self._limit:
            raise DataError(
                f"{self._display_uri} unpacks to more than {self._limit} bytes. This looks like a decompression bomb: "
                f"images hardly compress, and the limit is {MAX_RATIO} bytes per byte of the archive and "
                f"{MAX_TOTAL_BYTES} bytes in total. If you trust the archive, unpack it and use "
                "spec.dataset.source.folder."
            )


def limit_entries(entries: Iterator[T], display_uri: str) -> Iterator[T]:
    """Yield the entries of an archive, up to `MAX_MEMBERS`.

    Args:
        entries: The entries to count.
        display_uri: URI of the archive for error messages.

    Yields:
        The entries.

    Raises:
        DataError: If there are more entries.
    """
    for number, entry in enumerate(entries, 1):
        if number > MAX_MEMBERS:
            raise _too_many_entries(display_uri)
        yield entry


def check_zip_directory(path: Path, display_uri: str) -> None:
    """Reject a zip file with a central directory that is too large, before it is read into memory.

    Args:
        path: The zip file.
        display_uri: URI of the archive for error messages.

    Raises:
        DataError: If the directory has too many entries or bytes.
    """
    with path.open("rb") as file:
        # Located by zipfile's own code: a different search could be tricked into finding a different directory.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        size, start = (int(end[5]), int(end[9]) - int(end[5])) if end else (0, 0)
        if size > MAX_ZIP_DIRECTORY_BYTES:
            raise _too_many_entries(display_uri)
        file.seek(max(0, start))
        # The declared number of entries may be false, so their signatures are counted.
        if file.read(size).count(b"PK\x01\x02") > MAX_MEMBERS:
            raise _too_many_entries(display_uri)


def _too_many_entries(display_uri: str) -> DataError:
    return DataError(
        f"{display_uri} has more than {MAX_MEMBERS} entries, or its entry names are too long. Split the archive, or "
        "unpack it and use spec.dataset.source.folder."
    )


class LimitedStream(io.RawIOBase):
    """A decompressed tar stream that counts the bytes that are read."""

    def __init__(self, stream: IO[bytes], size_limit: UncompressedSizeLimit) -> None:
        self._stream = stream
        self._size_limit = size_limit

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes.

        Raises:
            DataError: If the stream exceeds the size limit.
        """
        data = self._stream.read(size)
        self._size_limit.add(len(data))
        return data

    def close(self) -> None:
        """Close the underlying stream as well."""
        self._stream.close()
        super().close()


class LimitedXzFile(io.RawIOBase):
    """An xz file that is decompressed with limited memory; `lzma.open` allocates as much as the file requests."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = self._new_decompressor()
        self._pending = b""

    @staticmethod
    def _new_decompressor() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY_BYTES)

    def readable(self) -> bool:
        """Return True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; returns no bytes at the end of the file.

        Raises:
            EOFError: If the file is truncated.
            lzma.LZMAError: If the file is damaged or requests too much memory.
        """
        data = b""
        while not data:
            if self._decompressor.eof and not self._start_next_stream():
                break
            if not self._pending and self._decompressor.needs_input:
                self._pending = self._file.read(_CHUNK_BYTES)
                if not self._pending:
                    raise EOFError("the file ends in the middle of an xz stream")
            data, self._pending = self._decompressor.decompress(self._pending, size), b""
        return data

    def _start_next_stream(self) -> bool:
        """Continue with the next concatenated stream, after any zero padding."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            chunk = self._file.read(_CHUNK_BYTES)
            if not chunk:
                return False
            rest = chunk.lstrip(b"\0")
        self._decompressor, self._pending = self._new_decompressor(), rest
        return True

    def close(self) -> None:
        """Close the underlying file as well."""
        self._file.close()
        super().close()


class LimitedTarInfo(tarfile.TarInfo):
    """A tar header that rejects oversized extension headers and sparse files, whose declared size can be anything."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        long_names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        pax = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.size < 0:
            raise tarfile.ReadError(f"a file has a size of {self.size} bytes")
        if self.type in long_names + pax and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {self.size} bytes, the limit is {MAX_HEADER_BYTES}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._reject_sparse()
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member

    def _reject_sparse(self, *arguments: object) -> None:
        raise tarfile.ReadError("it contains a sparse file; create the archive without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _reject_sparse
