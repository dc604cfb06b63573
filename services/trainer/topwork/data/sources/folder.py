"""Images in directories that are named after their class, on S3 or on a local disk."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from topwork.clients.s3.storage import Storage
from topwork.data.images.rejection import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.class_directories import MAX_NAMES_SHOWN, ClassDirectories
from topwork.data.sources.source import (
    ClassSize,
    SourceEntry,
    SourceImage,
    SpaceEstimate,
    base_name,
    digest_entries,
    escape_name,
    is_ignored,
    sanitize_name,
    slugify,
    split_sizes,
)
from topwork.errors import DataError
from topwork.spec.dataset import FolderSource
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ListedFile:
    """A file or directory in a listing.

    Attributes:
        parts: Components of the path, relative to the root.
        size: Size in bytes.
        version: ETag or modification time: changes when the content changes.
        is_directory: Whether it is a directory.
    """

    parts: tuple[str, ...]
    size: int
    version: str
    is_directory: bool = False

    @property
    def path(self) -> str:
        """The path, relative to the root."""
        return "/".join(self.parts)


@dataclass(frozen=True)
class _Summary:
    class_names: tuple[str, ...]
    sizes: Mapping[str, Mapping[str, ClassSize]]


class ImageFolder:
    """Images at `<class>/<image>` or `<split>/<class>/<image>` below a prefix or path.

    Subdirectories belong to their class.
    """

    is_listed = True
    is_versioned = True

    def __init__(self, source: FolderSource, workspace: Workspace, *, has_split_directories: bool = False) -> None:
        self._has_splits = has_split_directories
        self._uri = source.uri.rstrip("/") or "/"
        self._storage = workspace.storage.at(self._uri) if self._uri.startswith("s3://") else None
        self.name = slugify(base_name(str(Path(self._uri).resolve()) if self._storage is None else self._uri))
        self._directories = self._new_directories()
        self._cached_summary: _Summary | None = None
        self._digest: str | None = None

    def description(self) -> dict[str, Any]:
        """Return the location of the folder."""
        return {"folder": {"uri": self._uri}}

    def digest(self) -> str:
        """Return a digest of the paths, sizes and ETags or modification times of all images."""
        if self._digest is None:
            self._digest = digest_entries(self.entries())
        return self._digest

    def entries(self) -> Iterator[SourceEntry]:
        """Yield the path, class, size and version of each image, ordered by path. Memory use does not grow with them.

        Raises:
            DataError: At the end, if there are no images or the folder is not the directory of the classes.
        """
        directories = self._new_directories()
        for file in self._files():
            if file.is_directory:
                directories.add_directory(file.parts)
            elif (label := directories.add_file(file.parts, file.size)) is not None:
                path = file.path.encode(errors="surrogateescape").decode(errors="backslashreplace")
                yield SourceEntry(path, label, file.size, file.version)
        self._cached_summary = _Summary(directories.finish(), directories.sizes)
        self._directories = directories

    def estimate_space(self) -> SpaceEstimate:
        """Return the total size of the images in the listing; nothing is downloaded first."""
        sizes = (size for classes in self._summary().sizes.values() for size in classes.values())
        return SpaceEstimate(download_bytes=0, image_bytes=sum(size.bytes for size in sizes))

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class directories, sorted."""
        return self._summary().class_names

    def splits(self) -> Mapping[str, int | None]:
        """Return the splits of the directories, or one split with all images."""
        return split_sizes(self._summary().sizes)

    def class_sizes(self) -> Mapping[str, Mapping[str, ClassSize]]:
        """Return the images in each class directory, by split."""
        return self._summary().sizes

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split, ordered by path."""
        for file in self._files():
            label = None if file.is_directory else self._directories.class_of(file.parts)
            if label is not None and self._directories.split_of(file.parts) == split:
                yield SourceImage(sanitize_name(file.path), label, partial(self._read, file))

    def _new_directories(self) -> ClassDirectories:
        return ClassDirectories(self._uri, self._uri, "spec.dataset.source.folder.uri", self._has_splits)

    def _summary(self) -> _Summary:
        """List the files once."""
        if self._cached_summary is None:
            self.digest()
        assert self._cached_summary
        return self._cached_summary

    def _files(self) -> Iterator[ListedFile]:
        if self._storage:
            return list_prefix(self._storage)
        if not Path(self._uri).is_dir():
            raise DataError(f"The directory {self._uri} of spec.dataset.source.folder.uri does not exist.")
        return list_directory(Path(self._uri))

    def _read(self, file: ListedFile) -> bytes:
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


def list_prefix(storage: Storage) -> Iterator[ListedFile]:
    """List the objects below the URI of a storage, in the order of their keys."""
    for stored in storage.list():
        # Some tools write a key that ends with a slash for each directory.
        is_directory = stored.key.endswith("/")
        parts = tuple(stored.key.removesuffix("/").split("/"))
        yield ListedFile(parts, stored.size, stored.etag, is_directory=is_directory)


def list_directory(root: Path) -> Iterator[ListedFile]:
    """List a local directory, ordered by path. Links are followed, but no directory is listed twice.

    Args:
        root: The directory.

    Yields:
        Files and directories, without the content of ignored directories (`is_ignored`).

    Raises:
        DataError: If a directory does not exist or cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"The directory {root} does not exist.")
    links = _DirectoryLinks(root)
    for path, directories, names in os.walk(root, followlinks=True, onerror=_raise_unreadable):
        read = (name for name in directories if not is_ignored((name,)) and not links.is_repeated(Path(path, name)))
        directories[:] = sorted(read)
        parents = Path(path).relative_to(root).parts
        for name in directories:
            yield ListedFile((*parents, name), 0, "", is_directory=True)
        for name in sorted(names):
            try:
                stat = Path(path, name).stat()
            except OSError:
                yield ListedFile((*parents, name), 0, "unreadable")  # a broken link: rejected when it is read
            else:
                yield ListedFile((*parents, name), stat.st_size, str(stat.st_mtime_ns))
    links.report()


def _raise_unreadable(error: OSError) -> None:
    """Raise instead of skipping the directory, which would lose its images silently."""
    raise DataError(f"The directory {error.filename} cannot be read: {error.strerror}. Fix its permissions.") from error


class _DirectoryLinks:
    """Finds symbolic links to directories that are read anyway: loops, and second names of the same directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directories: set[tuple[int, int]] | None = None
        self._count = 0
        self._skipped: list[str] = []

    def is_repeated(self, path: Path) -> bool:
        """Return whether a directory is a link to one that has its own place below the root, or was linked before."""
        if not path.is_symlink():
            return False
        if self._directories is None:
            # A directory keeps its own name, even if a link to it comes first in the alphabet.
            self._directories = {_identity(Path(parent)) for parent, _, _ in os.walk(self._root)}
        identity = _identity(path)
        if identity in self._directories or self._is_above_root(path):
            self._count += 1
            if len(self._skipped) < MAX_NAMES_SHOWN:
                self._skipped.append(f"{path.relative_to(self._root)} -> {path.resolve()}")
            return True
        # Directories below a link have this link as their only name.
        self._directories |= {_identity(Path(parent)) for parent, _, _ in os.walk(path)}
        return False

    def _is_above_root(self, path: Path) -> bool:
        return self._root.resolve().is_relative_to(path.resolve())

    def report(self) -> None:
        """Log the links that were skipped."""
        if self._count:
            log.warning(
                "links to folders that are read under another name are ignored",
                count=self._count,
                links=", ".join(map(escape_name, self._skipped)),
            )


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino
