"""The rows of a table, CSV or JSON lines: what can't be meant is refused with its line."""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from topwork.errors import DataError
from topwork.spec.dataset import TableSource

MAX_LINE = 2**20
"""Characters of a line: a line without an end would fill the memory."""

_JSON_LINES = (".jsonl", ".ndjson")
_FURTHER = "further columns"


class Labels:
    """Finds addresses that several rows name. 8 bytes of each are kept."""

    def __init__(self, table: str) -> None:
        """Begin with no row.

        Args:
            table: Address of the table, for errors.
        """
        self.rows = self.repeated = 0
        self._table = table
        self._seen: dict[bytes, bytes] = {}

    def add(self, line: int, address: str, label: str) -> None:
        """Add a row.

        Raises:
            DataError: If an earlier row gives the same image another class: nobody can tell which one is right.
        """
        self.rows += 1
        if not (address and label):
            return  # it is left out, with that as the reason
        key, short = _short(address), _short(label)
        if (before := self._seen.setdefault(key, short)) is short:
            return
        self.repeated += 1
        if before != short:
            raise DataError(
                f"{self._table}, line {line}: {address[:200]} is of the class {label[:100]!r} here and of another one "
                "further up. Keep one of the rows; an image of several classes is none for this classifier."
            )


def _short(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


def rows_of(path: Path, source: TableSource) -> Iterator[tuple[int, str, str]]:
    """Read the rows of a table.

    Args:
        path: The table on a local disk.
        source: Which columns count, and what the table is called.

    Yields:
        Line, address of the image and class of each row; the latter two may be empty.

    Raises:
        DataError: If it is no UTF-8 text, no table, or a row can't be what somebody meant.
    """
    # utf-8-sig: spreadsheets begin a CSV file with a byte order mark.
    with path.open(encoding="utf-8-sig", newline="") as file:
        parsed = _json_rows if source.uri.lower().endswith(_JSON_LINES) else _csv_rows
        try:
            for line, row in parsed(_lines(file, source.uri), source):
                yield line, _cell(row, source.image, line, source), _cell(row, source.label, line, source)
        except UnicodeDecodeError as error:
            found = " It looks like UTF-16." if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
            raise DataError(f"{source.uri} is not UTF-8 text: {error}.{found} Save it as UTF-8.") from error
        except csv.Error as error:
            raise DataError(f"{source.uri} is not a CSV table: {error}.") from error


def _lines(file: IO[str], table: str) -> Iterator[str]:
    """Yield the lines of a file, none of them without end."""
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise DataError(f"{table}, line {number}: more than {MAX_LINE} characters. Is this a table?")
        if "\0" in line:
            raise DataError(f"{table}, line {number}: a NUL byte, which no text has. Save the table as UTF-8 text.")
        yield line


def _csv_rows(lines: Iterator[str], source: TableSource) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(lines, restkey=_FURTHER, strict=True)
    twice = {name for name in reader.fieldnames or () if (reader.fieldnames or ()).count(name) > 1}
    if twice & {source.image, source.label}:
        raise DataError(f"{source.uri}: several columns are called {min(twice)}. Give each a name of its own.")
    for row in reader:
        # A comma at the end of each line means nothing; one in a name shifts the columns.
        if any(row.pop(_FURTHER, ())):
            raise DataError(
                f"{source.uri}, line {reader.line_num}: more fields than the {len(reader.fieldnames or ())} columns of "
                "the first line. Put quotes around what holds a comma."
            )
        yield reader.line_num, row


def _json_rows(lines: Iterator[str], source: TableSource) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source.uri}, line {number}: not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DataError(f"{source.uri}, line {number}: expected an object, found {line.strip()[:40]}.")
        yield number, row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice")
    return row


def _cell(row: dict[str, Any], column: str, line: int, source: TableSource) -> str:
    """Turn a cell into text: 3 and "3" name one class."""
    where = f"{source.uri}, line {line}"
    if column not in row:
        raise DataError(f"{where}: no column {column}. There are {', '.join(map(str, row))[:500]}.")
    value = row[column]
    if value is not None and not isinstance(value, str | int | float):
        raise DataError(f"{where}: {column} is {json.dumps(value)[:40]}. Expected a text or number.")
    text = "" if value is None else str(value).strip()
    if "\n" in text or "\r" in text:
        raise DataError(f"{where}: {column} holds a line break: {text[:40]!r}. Is a quote missing or one too many?")
    return text
