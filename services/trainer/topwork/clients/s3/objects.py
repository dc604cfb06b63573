"""What storage holds, and how it is named; a part of `edge.storage`."""

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from topwork.errors import SettingError

READ_BYTES = 1 << 20
NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing tells it; `size` in bytes, `modified` as the server's clock tells it."""

    key: str
    size: int
    etag: str
    modified: datetime = field(default=NEVER, compare=False)


class FileEntry(BaseModel):
    """What a file must be: `size` in bytes and its SHA-256 in hex."""

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


def entry_of(path: Path) -> FileEntry:
    """Measure a local file: its size and digest, with flat memory."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size=size, sha256=digest.hexdigest())


def split(uri: str) -> tuple[str, str]:
    """Split the URI of a storage into bucket and beginning of the keys.

    Raises:
        SettingError: If it is not one.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment:
        raise SettingError(f"{uri!r} is not a storage URI: expected s3://bucket or s3://bucket/prefix.")
    prefix = parts.path.strip("/")
    return parts.netloc, f"{prefix}/" if prefix else ""
