"""Images that a table names: CSV or JSON lines, each row with an image's address and its class."""

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from topwork.data.image_validation import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.source import TRAIN, Item, last_part, printable, slug
from topwork.data.sources.table_reader import Labels, rows_of
from topwork.errors import DataError
from topwork.spec.dataset import TableSource
from topwork.workspace import Workspace


class Table:
    """A table whose rows name an image, relative to the table, on S3 or on a local disk, and its class."""

    def __init__(self, source: TableSource, workspace: Workspace) -> None:
        self._source = source
        self._workspace = workspace
        self._parent = source.uri.rpartition("/")[0] or ("/" if source.uri.startswith("/") else ".")
        self._is_stored = source.uri.startswith("s3://")
        self._path: Path | None = None
        self._found: tuple[tuple[str, ...], int] | None = None
        self._storages = {self._parent: workspace.storage.at(self._parent)} if self._is_stored else {}
        self.name = slug(last_part(source.uri).rpartition(".")[0])

    def description(self) -> dict[str, Any]:
        """Say where the table is and which columns count."""
        return {"table": self._source.model_dump(mode="json")}

    def digest(self) -> str:
        """Stand for the table: images that change behind the same address do not count."""
        with self._local().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def room(self) -> None:
        """Nobody knows without asking for each image."""

    def class_names(self) -> tuple[str, ...]:
        """All classes of the column, sorted."""
        return self._summary()[0]

    def splits(self) -> Mapping[str, int | None]:
        """One split with all rows."""
        return {TRAIN: self._summary()[1]}

    def items(self, split: str) -> Iterator[Item]:
        """Yield the images in the order of the rows."""
        for _, address, label in self._rows():
            yield Item(printable(address), printable(label) or None, partial(self._read, address))

    def _summary(self) -> tuple[tuple[str, ...], int]:
        if self._found is None:
            classes, labels = set(), Labels(self._source.uri)
            for line, address, label in self._rows():
                labels.add(line, address, label)
                if label:
                    classes.add(printable(label))
            if not labels.rows:
                raise DataError(f"The table {self._source.uri} has no row.")
            if labels.repeated:
                self._workspace.progress.note("images named by several rows", rows=labels.repeated)
            self._found = tuple(sorted(classes)), labels.rows
        return self._found

    def _local(self) -> Path:
        if self._path is None:
            path = Path(self._source.uri)
            if self._is_stored:
                key = last_part(self._source.uri)
                path = self._workspace.scratch / "pull" / "table"
                path.parent.mkdir(parents=True, exist_ok=True)
                if self._storages[self._parent].size(key) is None:
                    raise self._missing()
                self._storages[self._parent].download(key, path)
            elif not path.is_file():
                raise self._missing()
            self._path = path
        return self._path

    def _missing(self) -> DataError:
        return DataError(f"The table {self._source.uri} of spec.dataset.source.table.uri does not exist.")

    def _rows(self) -> Iterator[tuple[int, str, str]]:
        """Yield line, address and class of each row."""
        return rows_of(self._local(), self._source)

    def _read(self, address: str) -> bytes:
        if not address:
            raise Rejection(MISSING, "the row names no image")
        if address.startswith("s3://") or self._is_stored:
            return self._read_stored(address)
        return _read_local(Path(self._parent, address))

    def _read_stored(self, address: str) -> bytes:
        bucket, key = address[len("s3://") :].partition("/")[::2] if address.startswith("s3://") else ("", "")
        if not bucket:
            bucket, _, prefix = self._parent[len("s3://") :].partition("/")
            key = posixpath.normpath(posixpath.join("/", prefix, address)).lstrip("/")
        root = f"s3://{bucket}"
        storage = self._storages.get(root) or self._storages.setdefault(root, self._workspace.storage.at(root))
        size = storage.size(key)
        if size is not None and size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{size} bytes, at most {MAX_BYTES}")
        data = storage.read(key) if size is not None else None
        if data is None:
            raise Rejection(MISSING, f"{root}/{key} does not exist")
        return data


def _read_local(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{path.stat().st_size} bytes, at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise Rejection(MISSING, error.strerror or str(error)) from error
