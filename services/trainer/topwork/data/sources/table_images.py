"""The images of a table: where the path of a row points to, and what is there."""

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

from topwork.clients.s3.objects import StoredObject
from topwork.clients.s3.storage import Storage
from topwork.data.images.rejection import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.missing_images import explain_missing_file, explain_missing_object
from topwork.data.sources.source import normalize_name
from topwork.errors import DataError, SettingError
from topwork.workspace import Workspace

MAX_SINGLE_REQUESTS = 500
"""Images on S3 up to which each one is requested; more are found by listing their common prefix."""

MAX_LISTED_RATIO = 20
"""Objects per image of the table up to which a prefix is listed, before the remaining images are requested singly."""

_CONCURRENT_REQUESTS = 16

SizeAndVersion = tuple[int | None, str | None]


class TableImages:
    """Images by their path in a table: relative to the table, absolute, or an s3:// URI. Thread-safe.

    File names with accents may be composed or decomposed Unicode, on either side: both forms are tried.
    """

    def __init__(self, parent: str, workspace: Workspace) -> None:
        """Create it; nothing is read yet.

        Args:
            parent: Directory or URI of the directory of the table.
            workspace: Storage.
        """
        self._parent = parent
        self._workspace = workspace
        self._is_on_s3 = parent.startswith("s3://")
        self._storages: dict[str, Storage] = {}

    def read(self, image: str) -> bytes:
        """Return the content of an image.

        Raises:
            Rejection: If it is missing or too large.
        """
        if not image:
            raise Rejection(MISSING, "the row has no image path")
        return self._read_object(image) if self._is_stored(image) else self._read_file(image)

    def versions(self, images: Iterable[str]) -> Callable[[str], SizeAndVersion]:
        """Find the sizes and versions of images on S3 with few requests.

        Args:
            images: All paths of the table.

        Returns:
            A function that returns the size and the ETag or modification time of a path; None for a missing image.
        """
        keys: dict[str, dict[str, SizeAndVersion]] = {}
        for image in images:
            if image and self._is_stored(image):
                root, key = self._locate(image)
                keys.setdefault(root, {}).update(dict.fromkeys(_spellings(key), (None, None)))
        for root, found in keys.items():
            # The images of a bucket that does not exist are missing; the pull rejects them one by one.
            with suppress(SettingError):
                self._find_versions(self._storage(root), found)

        def version(image: str) -> SizeAndVersion:
            if not image:
                return None, None
            if not self._is_stored(image):
                return self._file_version(image)
            root, key = self._locate(image)
            return next((keys[root][name] for name in _spellings(key) if keys[root][name][0] is not None), (None, None))

        return version

    def _find_versions(self, storage: Storage, found: dict[str, SizeAndVersion]) -> None:
        """Fill in the sizes and ETags of keys."""
        remaining = set(found)
        if len(remaining) > MAX_SINGLE_REQUESTS:
            prefix = posixpath.commonprefix(list(remaining)).rpartition("/")[0]
            limit = MAX_LISTED_RATIO * len(remaining) + MAX_SINGLE_REQUESTS
            listed = 0
            for stored in islice(storage.list(f"{prefix}/" if prefix else ""), limit):
                listed += 1
                if stored.key in found:
                    found[stored.key] = stored.size, stored.etag
                    remaining.discard(stored.key)
            if listed < limit:
                return
        with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
            for single in pool.map(lambda key: _find_object(storage, key), sorted(remaining)):
                if single:
                    found[single.key] = single.size, single.etag

    def _is_stored(self, image: str) -> bool:
        return self._is_on_s3 or image.startswith("s3://")

    def _file_version(self, image: str) -> SizeAndVersion:
        try:
            stat = _find_file(Path(self._parent), image).stat()
        except (OSError, ValueError):
            return None, None
        return stat.st_size, str(stat.st_mtime_ns)

    def _read_file(self, image: str) -> bytes:
        try:
            path = _find_file(Path(self._parent), image)
            if (size := path.stat().st_size) > MAX_BYTES:
                raise Rejection(TOO_LARGE, f"{size} bytes, the limit is {MAX_BYTES}")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Rejection(MISSING, explain_missing_file(image, Path(self._parent))) from error
        except OSError as error:
            raise Rejection(MISSING, f"{Path(self._parent, image)}: {error.strerror or error}") from error
        except ValueError as error:  # a lone surrogate or a NUL byte
            raise Rejection(MISSING, f"{ascii(image)[:300]} is not a valid path") from error

    def _locate(self, image: str) -> tuple[str, str]:
        """Return the root of the bucket and the key of an image on S3."""
        bucket, key = image[len("s3://") :].partition("/")[::2] if image.startswith("s3://") else ("", "")
        if not bucket:
            bucket, _, prefix = self._parent[len("s3://") :].partition("/")
            key = posixpath.normpath(posixpath.join("/", prefix, image)).lstrip("/")
        return f"s3://{bucket}", key.encode(errors="backslashreplace").decode()

    def _storage(self, root: str) -> Storage:
        return self._storages.get(root) or self._storages.setdefault(root, self._workspace.storage.at(root))

    def _read_object(self, image: str) -> bytes:
        root, key = self._locate(image)
        storage = self._storage(root)
        for name in _spellings(key):
            size = storage.size(name)
            if size is not None and size > MAX_BYTES:
                raise Rejection(TOO_LARGE, f"{size} bytes, the limit is {MAX_BYTES}")
            if size is not None and (data := storage.read(name)) is not None:
                return data

        def find(uri: str) -> str | None:
            stored = next(iter(storage.list(uri.removeprefix(f"{root}/"))), None)
            return f"{root}/{stored.key}" if stored else None

        parent = self._parent if self._is_on_s3 else root
        try:
            reason = explain_missing_object(image, f"{root}/{key}", parent, find)
        except SettingError as error:
            reason = str(error)
        raise Rejection(MISSING, reason)


def _spellings(name: str) -> tuple[str, ...]:
    """Return a name as it is, and its composed and decomposed forms if they differ."""
    if name.isascii():
        return (name,)
    return tuple(dict.fromkeys((name, normalize_name(name), unicodedata.normalize("NFD", name))))


def _find_object(storage: Storage, key: str) -> StoredObject | None:
    # The key itself is the first one with this prefix. Unlike HEAD, a listing also returns the ETag.
    return next((stored for stored in islice(storage.list(key), 1) if stored.key == key), None)


def _find_file(parent: Path, image: str) -> Path:
    """Return the path of an image, whose directories and file may have composed or decomposed names."""
    path = parent / image
    if image.isascii() or path.exists():
        return path
    found = Path("/") if image.startswith("/") else parent
    for part in Path(image.lstrip("/")).parts:
        found = next((found / name for name in _spellings(part) if (found / name).exists()), None) or _scan(found, part)
    return found


def _scan(directory: Path, name: str) -> Path:
    """Find a name that is neither composed nor decomposed, but a mixture."""
    normalized = normalize_name(name)
    with os.scandir(directory) as entries:
        matches = sorted(entry.name for entry in entries if normalize_name(entry.name) == normalized)
    if len(matches) > 1:
        raise DataError(f"{directory} contains several files named {name} that differ only in their Unicode form.")
    return directory / (matches[0] if matches else name)
