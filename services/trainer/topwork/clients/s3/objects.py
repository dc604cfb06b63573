"""Descriptions of stored objects and of files: size, digest and modification time."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

READ_BYTES = 1 << 20
MIN_TIME = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class StoredObject:
    """An object in a listing.

    Attributes:
        key: Key, relative to the storage.
        size: Size in bytes.
        etag: ETag without quotes.
        modified: Time of the last modification, by the server's clock.
    """

    key: str
    size: int
    etag: str
    modified: datetime = field(default=MIN_TIME, compare=False)


class FileEntry(BaseModel):
    """Expected content of a file, as recorded in a manifest.

    Attributes:
        size: Size in bytes.
        sha256: SHA-256 digest in hexadecimal.
    """

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def partial_path(path: Path) -> Path:
    """Return the path of the incomplete file while a file is downloaded."""
    return path.with_name(f"{path.name}.part")


def describe_file(path: Path) -> FileEntry:
    """Compute the size and digest of a local file, in constant memory.

    Args:
        path: The file.

    Returns:
        The entry of the file in a manifest.
    """
    with path.open("rb") as file:
        return _describe(iter(partial(file.read, READ_BYTES), b""))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> FileEntry:
    """Write a file from chunks, and compute its size and digest, in constant memory.

    Args:
        path: The file, which is replaced if it exists.
        chunks: The content.

    Returns:
        The entry of the file in a manifest.
    """
    with path.open("wb") as file:
        return _describe(_written(chunks, file))


def _written(chunks: Iterable[bytes], file: BinaryIO) -> Iterator[bytes]:
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def _describe(chunks: Iterable[bytes]) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(size=size, sha256=digest.hexdigest())
