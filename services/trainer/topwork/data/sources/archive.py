"""Images in an archive of class directories: a zip or tar file over HTTP(S), on S3 or on a local disk."""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from topwork.clients.s3.storage import Storage
from topwork.data.images.rejection import UNSAFE, Rejection
from topwork.data.sources.archive_limits import MAX_DEPTH, MAX_PATH_LENGTH
from topwork.data.sources.archive_members import ArchiveMember, NameDecoder, open_archive, split_member_path
from topwork.data.sources.class_directories import MAX_NAMES_SHOWN, ClassDirectories
from topwork.data.sources.class_selection import ClassSelection
from topwork.data.sources.download import RemoteFile
from topwork.data.sources.source import (
    TRAIN,
    ClassSize,
    SourceEntry,
    SourceImage,
    SpaceEstimate,
    base_name,
    normalize_name,
    sanitize_name,
    slugify,
    split_sizes,
)
from topwork.data.sources.unexpected_content import describe_unexpected
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import ArchiveSource
from topwork.workspace import Workspace

_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")

log = structlog.get_logger(__name__)


class ImageArchive:
    """Images at `<root>/<class>/<image>` or `<root>/<split>/<class>/<image>` in a zip file or a tar file.

    A tar file may be compressed.
    """

    is_listed = False

    def __init__(
        self,
        source: ArchiveSource,
        workspace: Workspace,
        *,
        has_split_directories: bool = False,
        selection: ClassSelection | None = None,
    ) -> None:
        """Create it; nothing is read yet.

        Args:
            source: The settings.
            workspace: Storage and scratch.
            has_split_directories: Whether the top-level directories are splits.
            selection: The classes whose images are unpacked; None for all.
        """
        self._has_splits = has_split_directories
        self._selection = selection or ClassSelection()
        self._source = source
        self._workspace = workspace
        is_remote = source.uri.startswith(("http://", "https://"))
        self._remote = RemoteFile(source.uri, workspace.metrics.record_progress) if is_remote else None
        self._is_on_s3 = source.uri.startswith("s3://")
        self._display_uri = self._remote.display_url if self._remote else source.uri
        self._root = split_member_path(normalize_name(source.root))
        self._names = NameDecoder(source.encoding)
        self._directories: ClassDirectories | None = None
        self._class_names: tuple[str, ...] = ()
        self._local_path: Path | None = None
        name = base_name(self._display_uri)
        suffix = max((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
        self.name = slugify(name[: len(name) - len(suffix)])

    def description(self) -> dict[str, Any]:
        """Return the location of the archive, without credentials."""
        encoding = {"encoding": self._source.encoding} if self._source.encoding else {}
        root = "/".join(self._root)
        return {"archive": {"uri": self._display_uri, "root": root, "sha256": self._source.sha256, **encoding}}

    def digest(self) -> str:
        """Return the SHA-256 of the spec if it is set, otherwise the version that the server or file system reports."""
        if self._source.sha256:
            return self._source.sha256
        if self._remote:
            # Without ETag and modification date, only the content identifies the version.
            return self._remote.version() or _sha256(self._open_local())
        if self._is_on_s3:
            storage, key = self._storage_and_key()
            for stored in storage.list(key):
                if stored.key == key:
                    return f"{stored.etag} {stored.size}"
            raise self._missing()
        stat = self._open_local().stat()
        return f"{stat.st_mtime_ns} {stat.st_size}"

    @property
    def is_versioned(self) -> bool:
        """Whether `digest` is known without downloading the archive."""
        return bool(self._source.sha256) or self._remote is None or bool(self._remote.version())

    def estimate_space(self) -> SpaceEstimate | None:
        """Return the size of the archive, which is close to that of its images: they are already compressed."""
        size = self._size()
        if size is None:
            return None
        return SpaceEstimate(download_bytes=size if self._remote or self._is_on_s3 else 0, image_bytes=size)

    def _size(self) -> int | None:
        if self._remote:
            return self._remote.size()
        if self._is_on_s3:
            storage, key = self._storage_and_key()
            return storage.size(key)
        return Path(self._source.uri).stat().st_size if Path(self._source.uri).is_file() else None

    def entries(self) -> Iterator[SourceEntry] | None:
        """Return the entries of a zip file that is already on this machine; None for all others.

        A tar file would have to be decompressed, and a remote archive downloaded.
        """
        path = self._local_path or Path(self._source.uri)
        if self._local_path is None and (self._remote or self._is_on_s3):
            return None
        return self._read_entries() if path.is_file() and zipfile.is_zipfile(path) else None

    def _read_entries(self) -> Iterator[SourceEntry]:
        directories = self._summary()
        with open_archive(self._open_local(), self._display_uri, self._names) as members:
            for member in members:
                label = self._class_of(member, directories)
                if label is not None:
                    path = "/".join(member.parts).encode(errors="backslashreplace").decode()
                    yield SourceEntry(path, label, member.size, member.checksum)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class directories, sorted."""
        self._summary()
        return self._class_names

    def splits(self) -> Mapping[str, int | None]:
        """Return the splits of the directories, or one split with all images."""
        return split_sizes(self._summary().sizes)

    def class_sizes(self) -> Mapping[str, Mapping[str, ClassSize]]:
        """Return the files in each class directory, by split."""
        return self._summary().sizes

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the archive. Those of classes that are left out are empty."""
        directories = self._summary()

        def is_read(parts: tuple[str, ...]) -> bool:
            below_root = self._below_root(parts)
            label = directories.class_of(below_root)
            is_selected = label is not None and self._selection.class_of(label) is not None
            return is_selected and directories.split_of(below_root) == split

        with open_archive(self._open_local(), self._display_uri, self._names, is_read=is_read) as members:
            for member in members:
                label = self._class_of(member, directories)
                if not member.parts and not member.is_directory and split == TRAIN:
                    yield SourceImage(member.name, "", partial(_reject_path, member.name))
                elif label is not None and directories.split_of(self._below_root(member.parts)) == split:
                    yield SourceImage(sanitize_name("/".join(member.parts)), label, member.read)

    def _summary(self) -> ClassDirectories:
        """Read the names of all members once, or twice if they are not UTF-8."""
        if self._directories is None:
            directories = self._list()
            encoding = self._names.guess()
            if encoding != self._names.encoding:
                self._names = NameDecoder(guessed=encoding)
                directories = self._list()
            self._class_names = directories.finish()
            if encoding not in {"utf-8", self._source.encoding}:
                log.warning(
                    "the archive does not declare the encoding of its file names; this is a guess, which "
                    "spec.dataset.source.archive.encoding overrides",
                    origin=self._display_uri,
                    encoding=encoding,
                    classes=", ".join(self._class_names[:MAX_NAMES_SHOWN]),
                )
            self._directories = directories
        return self._directories

    def _list(self) -> ClassDirectories:
        root, key = "/".join(self._root), "spec.dataset.source.archive.root"
        directories = ClassDirectories(self._display_uri, root, key, self._has_splits)
        with open_archive(self._open_local(), self._display_uri, self._names) as members:
            for member in members:
                parts = self._below_root(member.parts)
                if parts and member.is_directory:
                    directories.add_directory(parts)
                elif parts:
                    directories.add_file(parts, member.size)
                elif member.parts and not member.is_directory:
                    directories.add_outside(member.parts)
        return directories

    def _below_root(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the components of a path below the root; none if it is not below the root."""
        root = tuple(map(normalize_name, parts[: len(self._root)]))
        return parts[len(self._root) :] if root == self._root else ()

    def _class_of(self, member: ArchiveMember, directories: ClassDirectories) -> str | None:
        return None if member.is_directory else directories.class_of(self._below_root(member.parts))

    def _open_local(self) -> Path:
        """Return the local path of the archive. Downloads it and verifies its SHA-256 on the first call."""
        if self._local_path is None:
            path = self._fetch()
            expected = self._source.sha256
            if expected and (actual := _sha256(path)) != expected:
                explanation = describe_unexpected(path) or "It is a different file, or it was damaged in transit."
                if path != Path(self._source.uri):
                    path.unlink()
                raise DataError(
                    f"{self._display_uri} has the SHA-256 {actual}, but spec.dataset.source.archive.sha256 is "
                    f"{expected}. {explanation}"
                )
            self._local_path = path
        return self._local_path

    def _fetch(self) -> Path:
        if not self._remote and not self._is_on_s3:
            if not Path(self._source.uri).is_file():
                raise self._missing()
            return Path(self._source.uri)
        path = self._workspace.scratch / "pull" / "archive"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if self._remote:
            self._remote.download(path)
        else:
            storage, key = self._storage_and_key()
            if storage.size(key) is None:
                raise self._missing()
            storage.download(key, path)
        return path

    def _storage_and_key(self) -> tuple[Storage, str]:
        parent, _, key = self._source.uri.rpartition("/")
        return self._workspace.storage.at(parent), key

    def _missing(self) -> DataError:
        return DataError(f"The archive {self._display_uri} of spec.dataset.source.archive.uri does not exist.")


def _reject_path(name: str) -> bytes:
    raise Rejection(
        UNSAFE,
        f"the path {name[:100]!r} is absolute, points outside of the archive, or is longer than {MAX_PATH_LENGTH} "
        f"characters or {MAX_DEPTH} directories",
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnavailableError(f"Cannot read {path}: {error.strerror}.") from error
