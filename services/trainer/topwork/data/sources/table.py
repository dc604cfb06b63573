"""Images listed in a table: each row of a CSV or JSON Lines file has the path of an image and its class."""

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from topwork.data.image_validation import MAX_BYTES, MISSING, TOO_LARGE, Rejection
from topwork.data.sources.source import TRAIN, SourceImage, base_name, sanitize_name, slugify
from topwork.data.sources.table_reader import DuplicateChecker, read_rows
from topwork.errors import DataError
from topwork.spec.dataset import TableSource
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


class ImageTable:
    """A table with one image per row: a path relative to the table, an absolute path or an s3:// URI."""

    def __init__(self, source: TableSource, workspace: Workspace) -> None:
        self._source = source
        self._workspace = workspace
        self._parent = source.uri.rpartition("/")[0] or ("/" if source.uri.startswith("/") else ".")
        self._is_on_s3 = source.uri.startswith("s3://")
        self._local_path: Path | None = None
        self._classes_and_count: tuple[tuple[str, ...], int] | None = None
        self._storages = {self._parent: workspace.storage.at(self._parent)} if self._is_on_s3 else {}
        self.name = slugify(base_name(source.uri).rpartition(".")[0])

    def description(self) -> dict[str, Any]:
        """Return the location of the table and the names of its columns."""
        return {"table": self._source.model_dump(mode="json")}

    def digest(self) -> str:
        """Return the SHA-256 of the table. Images that change at the same path do not change it."""
        with self._open_local().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def estimate_space(self) -> None:
        """Return None: the sizes are unknown without a request for each image."""

    def class_names(self) -> tuple[str, ...]:
        """Return all classes in the label column, sorted."""
        return self._summary()[0]

    def splits(self) -> Mapping[str, int | None]:
        """Return one split with all rows."""
        return {TRAIN: self._summary()[1]}

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images in the order of the rows."""
        for _, image, label in self._rows():
            yield SourceImage(sanitize_name(image), sanitize_name(label) or None, partial(self._read, image))

    def _summary(self) -> tuple[tuple[str, ...], int]:
        if self._classes_and_count is None:
            classes, checker = set(), DuplicateChecker(self._source.uri)
            for line_number, image, label in self._rows():
                checker.add(line_number, image, label)
                if label:
                    classes.add(sanitize_name(label))
            if not checker.rows:
                raise DataError(f"The table {self._source.uri} has no rows.")
            if checker.duplicates:
                log.warning("duplicate rows in table", uri=self._source.uri, rows=checker.duplicates)
            self._classes_and_count = tuple(sorted(classes)), checker.rows
        return self._classes_and_count

    def _rows(self) -> Iterator[tuple[int, str, str]]:
        return read_rows(self._open_local(), self._source)

    def _open_local(self) -> Path:
        """Return the local path of the table. Downloads it on the first call."""
        if self._local_path is None:
            path = Path(self._source.uri)
            if self._is_on_s3:
                key = base_name(self._source.uri)
                path = self._workspace.scratch / "pull" / "table"
                path.parent.mkdir(parents=True, exist_ok=True)
                if self._storages[self._parent].size(key) is None:
                    raise self._missing()
                self._storages[self._parent].download(key, path)
            elif not path.is_file():
                raise self._missing()
            self._local_path = path
        return self._local_path

    def _missing(self) -> DataError:
        return DataError(f"The table {self._source.uri} of spec.dataset.source.table.uri does not exist.")

    def _read(self, image: str) -> bytes:
        if not image:
            raise Rejection(MISSING, "the row has no image path")
        if image.startswith("s3://") or self._is_on_s3:
            return self._read_from_s3(image)
        return _read_file(Path(self._parent, image))

    def _read_from_s3(self, image: str) -> bytes:
        bucket, key = image[len("s3://") :].partition("/")[::2] if image.startswith("s3://") else ("", "")
        if not bucket:
            bucket, _, prefix = self._parent[len("s3://") :].partition("/")
            key = posixpath.normpath(posixpath.join("/", prefix, image)).lstrip("/")
        root = f"s3://{bucket}"
        storage = self._storages.get(root) or self._storages.setdefault(root, self._workspace.storage.at(root))
        size = storage.size(key)
        if size is not None and size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{size} bytes, the limit is {MAX_BYTES}")
        data = storage.read(key) if size is not None else None
        if data is None:
            raise Rejection(MISSING, f"{root}/{key} does not exist")
        return data


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Rejection(TOO_LARGE, f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise Rejection(MISSING, error.strerror or str(error)) from error
