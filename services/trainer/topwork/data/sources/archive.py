"""Images in an archive of class folders, over http(s), on S3 or on a local disk."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from topwork.data.image_validation import UNSAFE, Rejection
from topwork.data.sources.archive_limits import MAX_DEPTH, MAX_NAME
from topwork.data.sources.archive_members import Member, members, path_parts
from topwork.data.sources.download import Download
from topwork.data.sources.source import TRAIN, Item, Room, class_of, last_part, slug
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import ArchiveSource
from topwork.workspace import Workspace

_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")


class Archive:
    """`<root>/<class>/<image>` in a zip, or in a tar with any of its compressions."""

    def __init__(self, source: ArchiveSource, workspace: Workspace) -> None:
        self._source = source
        self._workspace = workspace
        is_remote = source.uri.startswith(("http://", "https://"))
        self._download = Download(source.uri, workspace.metrics.progress) if is_remote else None
        self._shown = self._download.shown if self._download else source.uri
        self._root = path_parts(source.root)
        self._found: tuple[tuple[str, ...], int] | None = None
        self._checked: Path | None = None
        name = last_part(self._shown)
        suffix = max((end for end in _SUFFIXES if name.lower().endswith(end)), key=len, default="")
        self.name = slug(name[: len(name) - len(suffix)])

    def description(self) -> dict[str, Any]:
        """Say where the archive is, without credentials."""
        return {"archive": {"uri": self._shown, "root": "/".join(self._root), "sha256": self._source.sha256}}

    def digest(self) -> str:
        """Stand for the archive: its SHA-256 where the spec gives it, else what its place says of its state."""
        if self._source.sha256:
            return self._source.sha256
        if self._download:
            # A server that says nothing of the state leaves only the content.
            return self._download.state() or _sha256(self._local())
        if self._source.uri.startswith("s3://"):
            parent, _, key = self._source.uri.rpartition("/")
            for stored in self._workspace.storage.at(parent).list(key):
                if stored.key == key:
                    return f"{stored.etag} {stored.size}"
            raise self._missing()
        state = self._local().stat()
        return f"{state.st_mtime_ns} {state.st_size}"

    def room(self) -> Room | None:
        """Take the size of the archive for that of its images: they are compressed already."""
        size = self._size()
        if size is None:
            return None
        is_local = self._download is None and not self._source.uri.startswith("s3://")
        return Room(fetched=0 if is_local else size, images=size)

    def _size(self) -> int | None:
        if self._download:
            return self._download.size()
        if self._source.uri.startswith("s3://"):
            parent, _, key = self._source.uri.rpartition("/")
            return self._workspace.storage.at(parent).size(key)
        return Path(self._source.uri).stat().st_size if Path(self._source.uri).is_file() else None

    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, sorted."""
        return self._summary()[0]

    def splits(self) -> Mapping[str, int | None]:
        """One split with all images."""
        return {TRAIN: self._summary()[1]}

    def items(self, split: str) -> Iterator[Item]:
        """Yield the images in the order of the archive."""
        with members(self._local(), self._shown, with_data=True) as files:
            for member in files:
                label = self._class_of(member)
                if not member.parts:
                    yield Item(member.name, "", partial(_refuse, member.name))
                elif label is not None:
                    yield Item("/".join(member.parts), label, member.read)

    def _summary(self) -> tuple[tuple[str, ...], int]:
        if self._found is None:
            classes: set[str] = set()
            tops: set[str] = set()
            count = 0
            with members(self._local(), self._shown, with_data=False) as files:
                for member in files:
                    label = self._class_of(member)
                    if label is not None:
                        classes.add(label)
                        count += 1
                    elif len(tops) < 10:
                        tops.add("/".join(member.parts[:-1]) or ".")
            if not count:
                raise DataError(
                    f"{self._shown} holds no image in a class folder below {'/'.join(self._root) or 'its root'}. "
                    f"It holds files in {', '.join(sorted(tops)) or 'no folder'}. Expected <root>/<class>/<image>; "
                    f"name the folder that holds one folder a class in spec.dataset.source.archive.root."
                )
            self._found = tuple(sorted(classes)), count
        return self._found

    def _class_of(self, member: Member) -> str | None:
        if member.parts[: len(self._root)] != self._root:
            return None
        return class_of(member.parts[len(self._root) :])

    def _local(self) -> Path:
        """Give the archive on a local disk, fetched if it has to be, its digest checked."""
        if self._checked is None:
            path = self._fetched()
            expected = self._source.sha256
            if expected and (found := _sha256(path)) != expected:
                if path != Path(self._source.uri):
                    path.unlink()
                raise DataError(
                    f"{self._shown} has the SHA-256 {found}, but spec.dataset.source.archive.sha256 is {expected}. It "
                    f"is another file, or was damaged on its way."
                )
            self._checked = path
        return self._checked

    def _fetched(self) -> Path:
        uri = self._source.uri
        if self._download is None and not uri.startswith("s3://"):
            if not Path(uri).is_file():
                raise self._missing()
            return Path(uri)
        path = self._workspace.scratch / "pull" / "archive"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if self._download:
            self._download.fetch(path)
        else:
            parent, _, key = uri.rpartition("/")
            storage = self._workspace.storage.at(parent)
            if storage.size(key) is None:
                raise self._missing()
            storage.download(key, path)
        return path

    def _missing(self) -> DataError:
        return DataError(f"The archive {self._shown} of spec.dataset.source.archive.uri does not exist.")


def _refuse(name: str) -> bytes:
    raise Rejection(
        UNSAFE,
        f"the path {name[:100]!r} is absolute, leads out of the archive, has more than {MAX_NAME} characters or "
        f"{MAX_DEPTH} folders",
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnavailableError(f"{path} can't be read: {error.strerror}.") from error
