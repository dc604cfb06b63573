"""Descriptions of stored objects and of files: size, digest and modification time."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

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
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size=size, sha256=digest.hexdigest())
