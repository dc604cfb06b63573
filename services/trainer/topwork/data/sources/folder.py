"""Images in directories that are named after their class, on S3 or on a local disk."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from topwork.clients.s3.storage import Storage
from topwork.data.image_validation import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.source import (
    TRAIN,
    SourceImage,
    SpaceEstimate,
    base_name,
    class_from_path,
    sanitize_name,
    slugify,
)
from topwork.errors import DataError
from topwork.spec.dataset import FolderSource
from topwork.workspace import Workspace


@dataclass(frozen=True)
class _File:
    parts: tuple[str, ...]
    size: int
    version: str  # ETag or modification time: changes when the content changes

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    @property
    def label(self) -> str | None:
        return class_from_path(tuple(map(sanitize_name, self.parts)))


@dataclass(frozen=True)
class _Summary:
    digest: str
    class_names: tuple[str, ...]
    images: int
    total_bytes: int


class ImageFolder:
    """Images at `<class>/<image>` below a prefix or path; subdirectories belong to their class."""

    def __init__(self, source: FolderSource, workspace: Workspace) -> None:
        self._uri = source.uri.rstrip("/") or "/"
        self._storage = workspace.storage.at(self._uri) if self._uri.startswith("s3://") else None
        self.name = slugify(base_name(str(Path(self._uri).resolve()) if self._storage is None else self._uri))
        self._cached_summary: _Summary | None = None

    def description(self) -> dict[str, Any]:
        """Return the location of the folder."""
        return {"folder": {"uri": self._uri}}

    def digest(self) -> str:
        """Return a digest of the paths, sizes and ETags or modification times of all images."""
        return self._summary().digest

    def estimate_space(self) -> SpaceEstimate:
        """Return the total size of the images in the listing; nothing is downloaded first."""
        return SpaceEstimate(download_bytes=0, image_bytes=self._summary().total_bytes)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class directories, sorted."""
        return self._summary().class_names

    def splits(self) -> Mapping[str, int | None]:
        """Return one split with all images."""
        return {TRAIN: self._summary().images}

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images, ordered by path."""
        for file in self._files():
            label = file.label
            if label is not None:
                yield SourceImage(sanitize_name(file.path), label, partial(self._read, file))

    def _summary(self) -> _Summary:
        """List the files once; memory use does not grow with the number of images."""
        if self._cached_summary is None:
            digest, classes, count, total_bytes = hashlib.sha256(), set(), 0, 0
            for file in self._files():
                label = file.label
                if label is not None:
                    digest.update(f"{file.path}\0{file.size}\0{file.version}\n".encode(errors="surrogateescape"))
                    classes.add(label)
                    count += 1
                    total_bytes += file.size
            if not count:
                raise DataError(
                    f"{self._uri} contains no image in a class directory. Expected <class>/<image> below it, such as "
                    f"{self._uri}/cat/1.jpg."
                )
            self._cached_summary = _Summary(digest.hexdigest(), tuple(sorted(classes)), count, total_bytes)
        return self._cached_summary

    def _files(self) -> Iterator[_File]:
        return _list_s3(self._storage) if self._storage else _list_directory(Path(self._uri))

    def _read(self, file: _File) -> bytes:
        if file.size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{file.size} bytes, the limit is {MAX_BYTES}")
        if self._storage:
            data = self._storage.read(file.path)
            if data is None:
                raise Rejection(MISSING, "the object was deleted after it was listed")
            return data
        try:
            return Path(self._uri, *file.parts).read_bytes()
        except OSError as error:
            raise Rejection(MISSING, error.strerror or str(error)) from error


def _list_s3(storage: Storage) -> Iterator[_File]:
    for stored in storage.list():
        # Some tools write a key that ends with a slash for each directory.
        if not stored.key.endswith("/"):
            yield _File(tuple(stored.key.split("/")), stored.size, stored.etag)


def _list_directory(root: Path) -> Iterator[_File]:
    if not root.is_dir():
        raise DataError(f"The directory {root} of spec.dataset.source.folder.uri does not exist.")
    visited: set[tuple[int, int]] = set()
    for path, directories, names in os.walk(root, followlinks=True):
        stat = Path(path).stat()
        if (stat.st_dev, stat.st_ino) in visited:  # a symbolic link to a parent directory
            directories.clear()
            continue
        visited.add((stat.st_dev, stat.st_ino))
        directories.sort()
        parents = Path(path).relative_to(root).parts
        for name in sorted(names):
            try:
                stat = Path(path, name).stat()
            except OSError:
                yield _File((*parents, name), 0, "unreadable")  # a broken link: rejected when it is read
            else:
                yield _File((*parents, name), stat.st_size, str(stat.st_mtime_ns))
