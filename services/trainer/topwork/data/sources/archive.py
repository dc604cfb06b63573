"""Images in an archive of class directories: a zip or tar file over HTTP(S), on S3 or on a local disk."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from topwork.clients.s3.storage import Storage
from topwork.data.image_validation import UNSAFE, Rejection
from topwork.data.sources.archive_limits import MAX_DEPTH, MAX_PATH_LENGTH
from topwork.data.sources.archive_members import ArchiveMember, open_archive, split_member_path
from topwork.data.sources.download import RemoteFile
from topwork.data.sources.source import TRAIN, SourceImage, SpaceEstimate, base_name, class_from_path, slugify
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import ArchiveSource
from topwork.workspace import Workspace

_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_MAX_DIRECTORIES_SHOWN = 10


class ImageArchive:
    """Images at `<root>/<class>/<image>` in a zip file, or in a tar file with any of its compressions."""

    def __init__(self, source: ArchiveSource, workspace: Workspace) -> None:
        self._source = source
        self._workspace = workspace
        is_remote = source.uri.startswith(("http://", "https://"))
        self._remote = RemoteFile(source.uri, workspace.metrics.record_progress) if is_remote else None
        self._is_on_s3 = source.uri.startswith("s3://")
        self._display_uri = self._remote.display_url if self._remote else source.uri
        self._root = split_member_path(source.root)
        self._classes_and_count: tuple[tuple[str, ...], int] | None = None
        self._local_path: Path | None = None
        name = base_name(self._display_uri)
        suffix = max((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
        self.name = slugify(name[: len(name) - len(suffix)])

    def description(self) -> dict[str, Any]:
        """Return the location of the archive, without credentials."""
        return {"archive": {"uri": self._display_uri, "root": "/".join(self._root), "sha256": self._source.sha256}}

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

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class directories, sorted."""
        return self._summary()[0]

    def splits(self) -> Mapping[str, int | None]:
        """Return one split with all images."""
        return {TRAIN: self._summary()[1]}

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images in the order of the archive."""
        with open_archive(self._open_local(), self._display_uri, with_data=True) as members:
            for member in members:
                label = self._class_of(member)
                if not member.parts:
                    yield SourceImage(member.name, "", partial(_reject_path, member.name))
                elif label is not None:
                    yield SourceImage("/".join(member.parts), label, member.read)

    def _summary(self) -> tuple[tuple[str, ...], int]:
        if self._classes_and_count is None:
            classes: set[str] = set()
            other_directories: set[str] = set()
            count = 0
            with open_archive(self._open_local(), self._display_uri, with_data=False) as members:
                for member in members:
                    label = self._class_of(member)
                    if label is not None:
                        classes.add(label)
                        count += 1
                    elif len(other_directories) < _MAX_DIRECTORIES_SHOWN:
                        other_directories.add("/".join(member.parts[:-1]) or ".")
            if not count:
                raise DataError(
                    f"{self._display_uri} contains no image in a class directory below "
                    f"{'/'.join(self._root) or 'its root'}. Directories with files: "
                    f"{', '.join(sorted(other_directories)) or 'none'}. Expected <root>/<class>/<image>; set "
                    "spec.dataset.source.archive.root to the directory that contains the class directories."
                )
            self._classes_and_count = tuple(sorted(classes)), count
        return self._classes_and_count

    def _class_of(self, member: ArchiveMember) -> str | None:
        if member.parts[: len(self._root)] != self._root:
            return None
        return class_from_path(member.parts[len(self._root) :])

    def _open_local(self) -> Path:
        """Return the local path of the archive. Downloads it and verifies its SHA-256 on the first call."""
        if self._local_path is None:
            path = self._fetch()
            expected = self._source.sha256
            if expected and (actual := _sha256(path)) != expected:
                if path != Path(self._source.uri):
                    path.unlink()
                raise DataError(
                    f"{self._display_uri} has the SHA-256 {actual}, but spec.dataset.source.archive.sha256 is "
                    f"{expected}. It is a different file, or it was damaged in transit."
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
