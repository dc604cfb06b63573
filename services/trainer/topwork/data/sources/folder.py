"""Images in folders that are named for their class, on S3 or on a local disk."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from topwork.clients.s3.storage import Storage
from topwork.data.image_validation import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.source import TRAIN, Item, Room, class_of, last_part, printable, slug
from topwork.errors import DataError
from topwork.spec.dataset import FolderSource
from topwork.workspace import Workspace


@dataclass(frozen=True)
class _File:
    parts: tuple[str, ...]
    size: int
    state: str  # changes when the content does: an ETag, or the time of the last change

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    @property
    def label(self) -> str | None:
        return class_of(tuple(map(printable, self.parts)))


class Folder:
    """`<class>/<image>` below a prefix or path; folders inside a class are part of it."""

    def __init__(self, source: FolderSource, workspace: Workspace) -> None:
        self._uri = source.uri.rstrip("/") or "/"
        self._storage = workspace.storage.at(self._uri) if self._uri.startswith("s3://") else None
        self.name = slug(last_part(str(Path(self._uri).resolve()) if self._storage is None else self._uri))
        self._listed: tuple[str, tuple[str, ...], int, int] | None = None

    def description(self) -> dict[str, Any]:
        """Say where the folder is."""
        return {"folder": {"uri": self._uri}}

    def digest(self) -> str:
        """Stand for the names, sizes and last changes of all images."""
        return self._summary()[0]

    def room(self) -> Room:
        """Sum up what the listing says; nothing is fetched first."""
        return Room(fetched=0, images=self._summary()[3])

    def class_names(self) -> tuple[str, ...]:
        """Names of the class folders, sorted."""
        return self._summary()[1]

    def splits(self) -> Mapping[str, int | None]:
        """One split with all images."""
        return {TRAIN: self._summary()[2]}

    def items(self, split: str) -> Iterator[Item]:
        """Yield the images by path."""
        for file in self._files():
            label = file.label
            if label is not None:
                yield Item(printable(file.path), label, partial(self._read, file))

    def _summary(self) -> tuple[str, tuple[str, ...], int, int]:
        """Go through the names once: what is kept does not grow with the number of images."""
        if self._listed is None:
            digest, classes, count, size = hashlib.sha256(), set(), 0, 0
            for file in self._files():
                label = file.label
                if label is not None:
                    digest.update(f"{file.path}\0{file.size}\0{file.state}\n".encode(errors="surrogateescape"))
                    classes.add(label)
                    count += 1
                    size += file.size
            if not count:
                raise DataError(
                    f"{self._uri} holds no image in a class folder. Expected <class>/<image> below it, such as "
                    f"{self._uri}/cat/1.jpg."
                )
            self._listed = digest.hexdigest(), tuple(sorted(classes)), count, size
        return self._listed

    def _files(self) -> Iterator[_File]:
        return _stored_files(self._storage) if self._storage else _local_files(Path(self._uri))

    def _read(self, file: _File) -> bytes:
        if file.size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{file.size} bytes, at most {MAX_BYTES}")
        if self._storage:
            data = self._storage.read(file.path)
            if data is None:
                raise Rejection(MISSING, "it was deleted meanwhile")
            return data
        try:
            return Path(self._uri, *file.parts).read_bytes()
        except OSError as error:
            raise Rejection(MISSING, error.strerror or str(error)) from error


def _stored_files(storage: Storage) -> Iterator[_File]:
    for stored in storage.list():
        # A key that ends with a slash is the folder that some tools write for a prefix.
        if not stored.key.endswith("/"):
            yield _File(tuple(stored.key.split("/")), stored.size, stored.etag)


def _local_files(root: Path) -> Iterator[_File]:
    if not root.is_dir():
        raise DataError(f"The folder {root} of spec.dataset.source.folder.uri does not exist.")
    seen: set[tuple[int, int]] = set()
    for path, folders, names in os.walk(root, followlinks=True):
        state = Path(path).stat()
        if (state.st_dev, state.st_ino) in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.sort()
        above = Path(path).relative_to(root).parts
        for name in sorted(names):
            try:
                state = Path(path, name).stat()
            except OSError:
                yield _File((*above, name), 0, "unreadable")  # a link that leads nowhere: reading it says so
            else:
                yield _File((*above, name), state.st_size, str(state.st_mtime_ns))
