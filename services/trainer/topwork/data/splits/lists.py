"""Lists of images: text files with one path per line, as published with many benchmarks.

A path is that of the source, without its suffix if this is unambiguous (`apple_pie/1005649`). Text after the path, such
as a label, is ignored. Blank lines, and lines that start with `#`, are skipped.
"""

import csv
import gzip
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.sources.source import normalize_name, sanitize_name
from topwork.data.splits.inputs import SplitList
from topwork.errors import DataError
from topwork.spec.messages import count_noun

MAX_BYTES = 2**28
"""Largest size of a list."""

MAX_NAMES_SHOWN = 5
SAME_PIXELS = "same pixels as an image of another class"

_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_SPACES = re.compile(r"\s+")


def read_split_lists(lists: Mapping[str, str], storage: Storage) -> dict[str, SplitList]:
    """Read the lists of the splits.

    Args:
        lists: URI or local path of the list of each split.
        storage: Storage of the job, which also reads lists on S3.

    Returns:
        The list of each split.

    Raises:
        DataError: If a list does not exist, is too large, or is not UTF-8 text with at least one line.
        UnavailableError: If storage cannot be reached.
    """
    found = {name: SplitList(uri, _read(name, uri, storage)) for name, uri in lists.items()}
    for name, part in found.items():
        if not count_lines(part, name):
            raise DataError(f"{_key(name)} is {part.uri}, which lists no images. List one path per line.")
    return found


def _read(name: str, uri: str, storage: Storage) -> bytes:
    directory, _, key = uri.rpartition("/")
    on_s3 = storage.at(directory) if uri.startswith("s3://") else None
    path = Path(uri)
    size = on_s3.size(key) if on_s3 else path.stat().st_size if path.is_file() else None
    if size is not None and size > MAX_BYTES:
        raise DataError(f"{_key(name)} is {uri}, which has {size} bytes. A list has at most {MAX_BYTES}.")
    content = None if size is None else on_s3.read(key) if on_s3 else path.read_bytes()
    if content is None:
        raise DataError(f"{_key(name)} is {uri}, which does not exist. Use a local file or an s3:// object.")
    return content


def count_lines(part: SplitList, name: str) -> int:
    """Count the lines of a list, without blank lines and comments.

    Args:
        part: The list.
        name: Its split.
    """
    return sum(not line.startswith("#") for _, line in _lines(part, name))


def _lines(part: SplitList, name: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not blank."""
    try:
        text = part.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = part.content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{_key(name)} is {part.uri}, which is not UTF-8 text: line {line} has the byte "
            f"0x{part.content[error.start]:02x}. Save it as plain text in UTF-8, with one path per line."
        ) from error
    for number, content in enumerate(_LINE_BREAK.split(text), start=1):
        if stripped := content.strip():
            yield number, stripped


def _key(name: str) -> str:
    return f"spec.dataset.splits.{name}.list"


class ImageNames:
    """The names of the images of a dataset, which lines of a list refer to.

    Names in different Unicode normalization forms are the same name.
    """

    def __init__(self, names: Sequence[str], root: str = "") -> None:
        """Index the names.

        Args:
            names: Names of the images; a name may occur several times.
            root: Directory that the paths of a list may be relative to, instead of the root of the source.
        """
        self._prefixes = ("", f"{normalize_name(root)}/") if root else ("",)
        self._names = {normalize_name(name): name for name in names}
        # Several names if they differ only in their suffix.
        self._without_suffix: dict[str, tuple[str, ...]] = {}
        for name in self._names.values():
            stem, dot, suffix = normalize_name(name).rpartition(".")
            if dot and "/" not in suffix:
                self._without_suffix[stem] = (*self._without_suffix.get(stem, ()), name)

    def find(self, line: str) -> dict[str, str]:
        """Find the image of a line.

        The whole line counts first, then the text before each of its spaces: names may contain spaces, too.

        Args:
            line: A line without surrounding spaces.

        Returns:
            The names that match, each with the text after the path: none if the dataset has no such image, several if
            the line is ambiguous.

        Example:
            >>> ImageNames(["cat/1.jpg", "cat/2.jpg"]).find("cat/1 0")
            {'cat/1.jpg': '0'}
        """
        # Most names are stored as they are in the source; to sanitize every line would take most of the time.
        return (
            self._find(normalize_name(line))
            or self._find(normalize_name(sanitize_name(line)))
            or self._find(normalize_name(sanitize_name(line.replace("\t", " "))))
        )

    def _find(self, text: str) -> dict[str, str]:
        for form in self._forms(text):
            if form in self._names:
                return {self._names[form]: ""}
        found: dict[str, str] = {}
        for end in (len(text), *(match.start() for match in _SPACES.finditer(text))):
            for form in self._forms(text[:end]):
                exact = (self._names[form],) if form in self._names else ()
                for name in exact or self._without_suffix.get(form, ()):
                    found.setdefault(name, text[end:].strip())
        return found

    def _forms(self, path: str) -> Iterator[str]:
        relative = path.replace("\\", "/")
        while relative.startswith(("./", "/")):
            relative = relative.removeprefix(".").lstrip("/")
        yield path
        for prefix in self._prefixes:
            if (form := prefix + relative) != path:
                yield form


def find_unavailable_images(stored: Iterable[str], metadata: DatasetMetadata, listing: Path) -> dict[str, str]:
    """Find the images of the source that the pull did not store.

    Args:
        stored: Names of the stored images.
        metadata: Metadata of the dataset.
        listing: Listing of the source (`topwork.data.dataset_manifest.ENTRIES_FILE`), which archives do not have.

    Returns:
        The reason for each image, by its name.
    """
    found = {image.name: image.reason for image in metadata.rejected}
    contradictions = metadata.contradictions
    if contradictions and contradictions.dropped:
        dropped = {image.name for group in contradictions.examples for image in group}
        if listing.exists():
            with gzip.open(listing, "rt", encoding="utf-8", newline="") as file:
                dropped |= {sanitize_name(row[0]) for row in csv.reader(file)}
        found = dict.fromkeys(sorted(dropped), SAME_PIXELS) | found
    names = set(stored)
    return {name: reason for name, reason in found.items() if name not in names}


@dataclass
class ListedImages:
    """The images of all lists.

    Attributes:
        split_of: Split of each listed image, by its name.
        notes: What is not obvious about the lists, in sentences for the log and the report.
    """

    split_of: dict[str, str]
    notes: tuple[str, ...]


@dataclass
class _ParsedList:
    """The result of one list.

    Attributes:
        images: Names of the images, each once, in the order of the list.
        missing: Line number and text of lines that name no image.
        ambiguous: Line number, text and matching names of lines that match several images.
        repeated: Number of lines that name an image again.
        ignored: Text after the path, of lines that have one.
        left_out: Number of lines that name images of a class that `spec.dataset.classes` leaves out.
    """

    images: dict[str, None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    repeated: int = 0
    ignored: list[str] = field(default_factory=list)
    left_out: int = 0


def match_lists(
    lists: Mapping[str, SplitList],
    stored: Sequence[str],
    unavailable: Mapping[str, str],
    root: str = "",
    hint: str = "",
    left_out: Container[str] = (),
) -> ListedImages:
    """Find the images of the lists.

    Args:
        lists: The list of each split.
        stored: Names of the stored images.
        unavailable: Images of the source that were not stored, each with the reason.
        root: Directory that the paths of a list may be relative to; see `ImageNames`.
        hint: Another explanation for missing images, for the error message.
        left_out: Classes of the source whose images are not stored. Lines with a directory of such a name are ignored.

    Returns:
        The split of each listed image that is stored.

    Raises:
        DataError: If a line names no image or several, or an image is in two lists.
    """
    names = ImageNames([*stored, *unavailable], root)
    parsed = {split: _parse(part, split, names, left_out) for split, part in lists.items()}
    for split, result in parsed.items():
        _check_lines(result, f"{_key(split)} ({lists[split].uri})", next(iter(stored), ""), hint)
    split_of: dict[str, str] = {}
    twice = []
    for split, result in parsed.items():
        twice += [f"{name} ({split_of[name]}, {split})" for name in result.images if name in split_of]
        split_of |= dict.fromkeys(result.images, split)
    if twice:
        raise DataError(
            f"{count_noun(len(twice), 'image')} in two lists of spec.dataset.splits: {_format(twice)}. The "
            "published metrics would be too high. Remove each from one of the lists."
        )
    not_stored = {name: split for name, split in split_of.items() if name in unavailable}
    stored_names = {name: split for name, split in split_of.items() if name not in unavailable}
    return ListedImages(stored_names, tuple(_write_notes(parsed, not_stored, unavailable)))


def _parse(part: SplitList, split: str, names: ImageNames, left_out: Container[str]) -> _ParsedList:
    result = _ParsedList()
    for number, line in _lines(part, split):
        found = names.find(line)
        if not found and line.startswith("#"):
            continue
        if not found and any(part in left_out for part in sanitize_name(normalize_name(line)).split("/")[:-1]):
            result.left_out += 1
        elif not found:
            result.missing.append(f"{sanitize_name(line)} (line {number})")
        elif len(found) > 1:
            result.ambiguous.append(f"{sanitize_name(line)} (line {number}: {' or '.join(found)})")
        else:
            ((name, ignored),) = found.items()
            result.repeated += name in result.images
            result.images[name] = None
            result.ignored += [ignored] if ignored else []
    return result


def _check_lines(result: _ParsedList, key: str, example: str, hint: str) -> None:
    if result.ambiguous:
        raise DataError(
            f"{key} is ambiguous: {_format(result.ambiguous)}. Write the complete path with its suffix on each line."
        )
    if result.missing:
        raise DataError(
            f"{key} has {count_noun(len(result.missing), 'line')} without an image of the dataset: "
            f"{_format(result.missing)}. Paths are those of the source, such as "
            f"{example}.{hint}"
        )


def _write_notes(
    parsed: Mapping[str, _ParsedList], not_stored: Mapping[str, str], unavailable: Mapping[str, str]
) -> Iterator[str]:
    if not_stored:
        examples = [f"{name} ({split}; {unavailable[name]})" for name, split in not_stored.items()]
        yield f"Not used: {count_noun(len(not_stored), 'listed image')} that the pull rejected: {_format(examples)}."
    for split, result in parsed.items():
        if result.repeated:
            lines = count_noun(result.repeated, "line")
            yield f"Ignored in the {split} list: {lines} with an image that is already listed."
        if result.left_out:
            lines = count_noun(result.left_out, "line")
            yield f"Ignored in the {split} list: {lines} with images of classes that spec.dataset.classes leaves out."
        if result.ignored:
            lines, example = count_noun(len(result.ignored), "line"), result.ignored[0][:40]
            yield (
                f"Ignored in the {split} list: text after the path in {lines}, such as {example}. The class of an "
                "image is that of the source."
            )


def _format(items: Sequence[str]) -> str:
    more = f", and {len(items) - MAX_NAMES_SHOWN} more" if len(items) > MAX_NAMES_SHOWN else ""
    return ", ".join(items[:MAX_NAMES_SHOWN]) + more
