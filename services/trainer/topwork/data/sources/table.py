"""Images listed in a table: each row of a CSV or JSON Lines file has the path of an image and its class."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from topwork.data.sources.class_selection import ClassSelection
from topwork.data.sources.source import (
    TRAIN,
    ClassNames,
    ClassSize,
    SourceEntry,
    SourceImage,
    base_name,
    digest_entries,
    sanitize_name,
    slugify,
    split_sizes,
)
from topwork.data.sources.table_images import TableImages
from topwork.data.sources.table_reader import DuplicateChecker, Row, read_rows
from topwork.data.splits.predefined import match_splits
from topwork.errors import DataError
from topwork.spec.dataset import TableSource
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


class ImageTable:
    """A table with one image per row: a path relative to the table, an absolute path or an s3:// URI."""

    is_listed = True
    is_versioned = True

    def __init__(
        self,
        source: TableSource,
        workspace: Workspace,
        group_column: str | None = None,
        selection: ClassSelection | None = None,
    ) -> None:
        """Create it; nothing is read yet.

        Args:
            source: The settings.
            workspace: Storage and scratch.
            group_column: Column with the groups of images; None for none.
            selection: The classes in which an image must not be listed twice; None for those of the table.
        """
        self._group_column = group_column
        self._selection = selection or ClassSelection()
        self._source = source
        self._workspace = workspace
        self._parent = source.uri.rpartition("/")[0] or ("/" if source.uri.startswith("/") else ".")
        self._is_on_s3 = source.uri.startswith("s3://")
        self._images = TableImages(self._parent, workspace)
        self._classes = ClassNames(source.uri)
        self._digest: str | None = None
        self._local_path: Path | None = None
        self._sizes: dict[str, dict[str, ClassSize]] | None = None
        self.name = slugify(base_name(source.uri).rpartition(".")[0])

    def description(self) -> dict[str, Any]:
        """Return the location of the table and the names of its columns."""
        return {"table": self._source.model_dump(mode="json", exclude_none=True)}

    def digest(self) -> str:
        """Return a digest of the rows in their order, and of the sizes and versions of their images."""
        if self._digest is None:
            self._digest = digest_entries(self.entries())
        return self._digest

    def entries(self) -> Iterator[SourceEntry]:
        """Yield the path, class, size and version of the image of each row; several rows may have the same path.

        Size and version are None if the image does not exist. Rows of classes that are left out are skipped: their
        images may not exist any more.
        """
        self.class_sizes()
        versions = self._images.versions(row.image for row in self._rows() if self._is_selected(row))
        for row in filter(self._is_selected, self._rows()):
            size, version = versions(row.image)
            path = row.image.encode(errors="backslashreplace").decode()
            yield SourceEntry(path, self._class_of(row), size, version, row.split, row.group)

    def estimate_space(self) -> None:
        """Return None: the sizes are unknown without a request for each image."""

    def class_names(self) -> tuple[str, ...]:
        """Return all classes in the label column, sorted."""
        return tuple(sorted({name for classes in self.class_sizes().values() for name in classes if name}))

    def splits(self) -> Mapping[str, int | None]:
        """Return the number of rows of each split; all rows are in one split if the table has no column for it."""
        return split_sizes(self.class_sizes())

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images of a split in the order of the rows."""
        for row in self._rows():
            if (row.split or TRAIN) == split:
                yield SourceImage(sanitize_name(row.image), self._class_of(row), partial(self._images.read, row.image))

    def class_sizes(self) -> Mapping[str, Mapping[str, ClassSize]]:
        """Return the rows of each class and split; the class is empty for rows without a label."""
        if self._sizes is None:
            sizes: dict[str, dict[str, ClassSize]] = {}
            checker = DuplicateChecker(self._source.uri)
            for row in self._rows():
                label = self._class_of(row) or ""
                sizes.setdefault(row.split or TRAIN, {}).setdefault(label, ClassSize()).add(1, 0)
                if (selected := label and self._selection.class_of(label)) is not None:
                    checker.add(row._replace(label=selected))
            if not sizes:
                raise DataError(f"The table {self._source.uri} has no rows.")
            if checker.duplicates:
                log.warning("duplicate rows in table", uri=self._source.uri, rows=checker.duplicates)
            if self._source.split:
                match_splits(sizes, self._source.uri)
            self._sizes = sizes
        return self._sizes

    def _is_selected(self, row: Row) -> bool:
        label = self._class_of(row)
        return label is None or self._selection.class_of(label) is not None

    def _class_of(self, row: Row) -> str | None:
        return self._classes.add(row.label) if row.label else None

    def _rows(self) -> Iterator[Row]:
        return read_rows(self._open_local(), self._source, self._group_column)

    def _open_local(self) -> Path:
        """Return the local path of the table. Downloads it on the first call."""
        if self._local_path is None:
            path = Path(self._source.uri)
            if self._is_on_s3:
                key = base_name(self._source.uri)
                path = self._workspace.scratch / "pull" / "table"
                path.parent.mkdir(parents=True, exist_ok=True)
                storage = self._workspace.storage.at(self._parent)
                if storage.size(key) is None:
                    raise self._missing()
                storage.download(key, path)
            elif not path.is_file():
                raise self._missing()
            self._local_path = path
        return self._local_path

    def _missing(self) -> DataError:
        return DataError(f"The table {self._source.uri} of spec.dataset.source.table.uri does not exist.")
