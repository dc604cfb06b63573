"""How much an archive may hold: what is no data set but a bomb ends before it fills memory, disk or hours."""

import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypeVar

from topwork.errors import DataError

MAX_MEMBERS = 2_000_000
"""Entries of an archive: ImageNet has 1.3 million images."""

MAX_DIRECTORY_BYTES = 256 * 2**20
"""Bytes of the directory of a zip, which is read into memory whole: 134 for each of `MAX_MEMBERS`."""

MAX_TOTAL_BYTES = 2 * 2**40
"""Bytes of all files of an archive together: the largest public sets of images have 1.3 TB."""

MAX_RATIO = 200
"""Bytes that come out of an archive for each that is in it. Images hardly shrink; a tar of blank BMP files comes to
some 100. Deflate can reach 1,032, xz 7,000 and bzip2 a million."""

FREE_BYTES = 256 * 2**20
"""Bytes that may come out before `MAX_RATIO` counts: seconds of work, whatever they are."""

MAX_HEADER_BYTES = 2**20
"""Bytes of a header of tar that goes before a file (long names, pax), which is read into memory whole."""

MAX_XZ_MEMORY = 256 * 2**20
"""Memory that an xz file may ask of its decompressor: `xz -9` asks for 65 MiB."""

MAX_DEPTH = 32
"""Folders above a file in an archive."""

MAX_NAME = 1024
"""Characters of the path of a file in an archive."""

_CHUNK = 2**16

T = TypeVar("T")


class Expansion:
    """Counts what comes out of an archive, and refuses a bomb."""

    def __init__(self, shown: str, archive_bytes: int) -> None:
        """Begin to count.

        Args:
            shown: What the archive is called in an error.
            archive_bytes: Size of the archive.
        """
        self._shown = shown
        self._most = min(MAX_TOTAL_BYTES, max(FREE_BYTES, MAX_RATIO * archive_bytes))
        self._bytes = 0

    def add(self, count: int) -> None:
        """Count bytes that came out, or that the archive says will.

        Raises:
            DataError: If they are more than any set of images has.
        """
        self._bytes += count
        if self._bytes > self._most:
            raise DataError(
                f"{self._shown} is refused: more than {self._most} bytes come out of it, {MAX_RATIO} for each byte of "
                f"the archive or {MAX_TOTAL_BYTES} in all. Such an archive is a bomb; images hardly shrink when they "
                "are packed. If it is a good one, unpack it and name the folder."
            )


def counted(entries: Iterator[T], shown: str) -> Iterator[T]:
    """Give the entries of an archive, and end with an error where they are too many.

    Args:
        entries: Files, folders and all else.
        shown: What the archive is called in an error.

    Yields:
        The entries.

    Raises:
        DataError: If there are more than `MAX_MEMBERS`.
    """
    for number, entry in enumerate(entries, 1):
        if number > MAX_MEMBERS:
            raise _too_many(shown)
        yield entry


def check_zip(path: Path, shown: str) -> None:
    """Refuse a zip whose directory is too large, before it is read into memory.

    Args:
        path: The file.
        shown: What it is called in an error.

    Raises:
        DataError: If it holds too many entries.
    """
    with path.open("rb") as file:
        # As zipfile itself finds it; another way to look for it would be another way to be deceived.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
        size, start = (int(end[5]), int(end[9]) - int(end[5])) if end else (0, 0)
        if size > MAX_DIRECTORY_BYTES:
            raise _too_many(shown)
        file.seek(max(0, start))
        # Its own count is a mere claim: every entry begins with these bytes.
        if file.read(size).count(b"PK\x01\x02") > MAX_MEMBERS:
            raise _too_many(shown)


def _too_many(shown: str) -> DataError:
    return DataError(
        f"{shown} is refused: it holds more than {MAX_MEMBERS} entries, or their names are too long. Split it, or "
        "unpack it and name the folder."
    )


class BoundedStream(io.RawIOBase):
    """A decompressed tar that counts what comes out."""

    def __init__(self, stream: IO[bytes], expansion: Expansion) -> None:
        self._stream = stream
        self._expansion = expansion

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read at most that many bytes, and count them."""
        data = self._stream.read(size)
        self._expansion.add(len(data))
        return data

    def close(self) -> None:
        """Close the stream below, too."""
        self._stream.close()
        super().close()


class XzStream(io.RawIOBase):
    """An xz file, decompressed with bounded memory: `lzma.open` takes whatever the file asks for."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = self._fresh()
        self._waiting = b""

    @staticmethod
    def _fresh() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read at most that many bytes; none at the end of the file.

        Raises:
            EOFError: If the file is cut short.
            lzma.LZMAError: If it is damaged or asks for too much memory.
        """
        data = b""
        while not data:
            if self._decompressor.eof and not self._next_stream():
                break
            if not self._waiting and self._decompressor.needs_input:
                self._waiting = self._file.read(_CHUNK)
                if not self._waiting:
                    raise EOFError("it ends in the middle of an xz stream")
            data, self._waiting = self._decompressor.decompress(self._waiting, size), b""
        return data

    def _next_stream(self) -> bool:
        """Go on with the stream that follows the one that is read, with zeros in between."""
        left = self._decompressor.unused_data.lstrip(b"\0")
        while not left:
            chunk = self._file.read(_CHUNK)
            if not chunk:
                return False
            left = chunk.lstrip(b"\0")
        self._decompressor, self._waiting = self._fresh(), left
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


class BoundedInfo(tarfile.TarInfo):
    """A header of tar that is not read where it would fill memory, and no sparse file, whose size is a mere claim."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        before = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        pax = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.size < 0:
            raise tarfile.ReadError(f"a file of {self.size} bytes")
        if self.type in before + pax and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, at most {MAX_HEADER_BYTES} are read")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._no_sparse_files()
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found

    def _no_sparse_files(self, *arguments: object) -> None:
        raise tarfile.ReadError("a sparse file, which no set of images has; make it anew without --sparse")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _no_sparse_files
