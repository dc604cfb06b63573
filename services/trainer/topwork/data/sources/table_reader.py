"""Reads the rows of a CSV or JSON Lines table; malformed rows are rejected with their line number."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from topwork.data.splits.predefined import format_spellings, split_of_name
from topwork.errors import DataError
from topwork.spec.dataset import TableSource

MAX_LINE_LENGTH = 2**20
"""Characters in a line. A file without line breaks would fill the memory."""

_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_EXTRA_FIELDS = "extra fields"


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        line_number: Its last line, from 1.
        image: Path or URI of the image; empty if it is missing.
        label: Class name; empty if it is missing.
        split: train, validation or test; empty without a column of splits.
        group: Group of the image; empty if it is missing, or without a column of groups.
    """

    line_number: int
    image: str
    label: str
    split: str
    group: str


class DuplicateChecker:
    """Finds images that are listed in several rows. Keeps only short hashes in memory.

    Attributes:
        rows: Number of rows.
        duplicates: Number of rows that repeat an image of an earlier row.
    """

    def __init__(self, table_uri: str) -> None:
        """Create a checker without rows.

        Args:
            table_uri: URI of the table for error messages.
        """
        self.rows = self.duplicates = 0
        self._table_uri = table_uri
        self._label_hashes: dict[bytes, bytes] = {}

    def add(self, row: Row) -> None:
        """Add a row.

        Raises:
            DataError: If an earlier row assigns a different class, split or group to the same image.
        """
        self.rows += 1
        if not (row.image and row.label):
            return  # rejected later, with the reason
        label_hash = _short_hash("\0".join((row.label, row.split, row.group)))
        known_hash = self._label_hashes.setdefault(_short_hash(row.image), label_hash)
        if known_hash is label_hash:
            return
        self.duplicates += 1
        if known_hash != label_hash:
            values = {"class": row.label, "split": row.split, "group": row.group}
            given = {name: value[:100] for name, value in values.items() if value}
            raise DataError(
                f"{self._table_uri}, line {row.line_number}: {row.image[:200]} has the "
                f"{' and the '.join(f'{name} {value!r}' for name, value in given.items())}, but another "
                f"{' or '.join(given)} in an earlier row. Keep one of the rows: images with several classes, splits or "
                "groups are not supported."
            )


def _short_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def read_rows(path: Path, source: TableSource, group_column: str | None = None) -> Iterator[Row]:
    """Read the rows of a table.

    Args:
        path: Local path of the table.
        source: Names of the columns, and the URI for error messages.
        group_column: Column with the groups; None for none.

    Yields:
        The rows.

    Raises:
        DataError: If the file is not UTF-8 text or not a table, or a row is malformed or has no valid split.
    """
    # utf-8-sig: spreadsheets start a CSV file with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        parse = _json_rows if source.uri.lower().endswith(_JSON_LINES_SUFFIXES) else _csv_rows
        try:
            for line_number, row in parse(_lines(file, source.uri), source, group_column):
                location = f"{source.uri}, line {line_number}"
                yield Row(
                    line_number,
                    _cell(row, source.image, location),
                    _cell(row, source.label, location),
                    _split(row, source.split, location) if source.split else "",
                    _cell(row, group_column, location) if group_column else "",
                )
        except UnicodeDecodeError as error:
            hint = " It looks like UTF-16." if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise DataError(f"{source.uri} is not UTF-8 text: {error}.{hint} Save it as UTF-8.") from error
        except csv.Error as error:
            raise DataError(f"{source.uri} is not a CSV table: {error}.") from error


def _lines(file: IO[str], table_uri: str) -> Iterator[str]:
    """Yield the lines of a file, each of limited length."""
    number = 0
    while line := file.readline(MAX_LINE_LENGTH):
        number += 1
        if len(line) == MAX_LINE_LENGTH:
            raise DataError(
                f"{table_uri}, line {number}: more than {MAX_LINE_LENGTH} characters. Is this file a table?"
            )
        if "\0" in line:
            raise DataError(f"{table_uri}, line {number}: a NUL byte, so this is not text. Save the table as UTF-8.")
        yield line


def _csv_rows(
    lines: Iterator[str], source: TableSource, group_column: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, restkey=_EXTRA_FIELDS, strict=True)
    columns = list(reader.fieldnames or ())
    duplicates = {name for name in columns if columns.count(name) > 1}
    if used := duplicates & {source.image, source.label, source.split, group_column}:
        raise DataError(f"{source.uri}: several columns are named {used.pop()}. Rename all but one of them.")
    for row in reader:
        # A comma at the end of each line is harmless; a comma in a name shifts the columns.
        if any(row.pop(_EXTRA_FIELDS, ())):
            raise DataError(
                f"{source.uri}, line {reader.line_num}: more fields than the {len(columns)} columns of the first "
                "line. Quote values that contain a comma."
            )
        yield reader.line_num, row


def _json_rows(
    lines: Iterator[str], source: TableSource, _group_column: str | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source.uri}, line {number}: invalid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{source.uri}, line {number}: expected a JSON object, found {line.strip()[:40]}.")
        yield number, row


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("duplicate key")
    return row


def _split(row: dict[str, Any], column: str, location: str) -> str:
    text = _cell(row, column, location)
    if (split := split_of_name(text)) is None:
        raise DataError(
            f"{location}: {column} is {text[:40]!r}, which is not the name of a split. Accepted: {format_spellings()}."
        )
    return split


def _cell(row: dict[str, Any], column: str, location: str) -> str:
    """Return a cell as text: 3 and "3" are the same class."""
    if column not in row:
        raise DataError(f"{location}: no column {column}. The columns are {', '.join(map(str, row))[:500]}.")
    value = row[column]
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(f"{location}: {column} is {json.dumps(value)[:40]}. Expected text or a number.")
    text = "" if value is None else str(value).strip()
    if "\n" in text or "\r" in text:
        raise DataError(f"{location}: {column} contains a line break: {text[:40]!r}. Check the quotes.")
    return text
