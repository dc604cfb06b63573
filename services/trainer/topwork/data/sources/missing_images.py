"""Finds out why the image of a table row is missing: a suffix, a slash, a drive letter, or the wrong directory."""

import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from topwork.data.sources.source import escape_name, normalize_name

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif")
MAX_ENTRIES = 100_000
"""Entries of a directory that are compared with the name of a missing file."""

MAX_DIRECTORIES = 50
"""Directories next to a table in which a missing file is searched."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def explain_missing_file(image: str, parent: Path) -> str:
    """Explain why a table row has no image on the local disk.

    Args:
        image: The path in the row.
        parent: The directory of the table.

    Returns:
        The path that was tried, and a hint if a similar path exists.
    """
    tried = f"{escape_name(str(parent / image))[:300]} does not exist"
    if hint := _explain_syntax(image):
        return f"{tried}; {hint}"
    for candidate, hint in _local_candidates(image, parent):
        if candidate.is_file():
            return f"{tried}, but {escape_name(str(candidate))[:300]} does; {hint}"
    return tried


def explain_missing_object(image: str, uri: str, root: str, find: Callable[[str], str | None]) -> str:
    """Explain why a table row has no image on S3.

    Args:
        image: The path in the row.
        uri: URI that was tried.
        root: URI of the directory of the table.
        find: Returns the URI of the first object whose URI begins with its argument, or None.

    Returns:
        The URI that was tried, and a hint if a similar object exists.
    """
    tried = f"{escape_name(uri)[:300]} does not exist"
    is_uri = image.startswith("s3://")
    if not is_uri and (hint := _explain_syntax(image)):
        return f"{tried}; {hint}"
    found = find(f"{uri}.")
    if found in {uri + suffix for suffix in SUFFIXES}:
        return f"{tried}, but {escape_name(str(found))[:300]} does; add the suffix"
    if not is_uri:
        for text, hint in (
            (image.replace("\\", "/"), "use forward slashes"),
            (image.lstrip("/"), "remove the leading slash, because paths are relative to the table"),
        ):
            if text != image and find(f"{root}/{text}") == f"{root}/{text}":
                return f"{tried}, but {escape_name(f'{root}/{text}')[:300]} does; {hint}"
    return tried


def _explain_syntax(image: str) -> str:
    if _DRIVE.match(image):
        return "it has a drive letter: use paths relative to the table, with forward slashes"
    scheme = _SCHEME.match(image)
    if scheme and scheme[1].lower() == "file":
        return "remove file:// and use an absolute path, or a path relative to the table"
    if scheme and scheme[1].lower() in {"http", "https"}:
        return "tables cannot download images: copy them to S3 or next to the table"
    if scheme:
        return f"{scheme[1]}:// is not supported: use s3:// URIs, absolute paths or paths relative to the table"
    return ""


def _local_candidates(image: str, parent: Path) -> Iterator[tuple[Path, str]]:
    """Yield paths that the row may mean, each with the correction."""
    path = parent / image
    for suffix in SUFFIXES:
        yield path.with_name(path.name + suffix) if path.name else path, "add the suffix"
    if "\\" in image:
        yield parent / image.replace("\\", "/"), "use forward slashes"
    if image.startswith("/"):
        yield parent / image.lstrip("/"), "remove the leading slash, because paths are relative to the table"
    if path.name and (name := _names_by_case(path.parent).get(normalize_name(path.name).casefold())):
        yield path.parent / name, "upper and lower case differ"
    if path.name:
        for suffix in SUFFIXES:
            yield path.with_suffix(suffix), "the suffix differs"
    if not image.startswith("/"):
        above = parent.absolute().parent / image
        yield above, f"paths are relative to the table: use {_relative(above, parent)}"
        for name in _subdirectories(parent):
            yield parent / name / image, f"paths are relative to the table: use {escape_name(f'{name}/{image}')[:300]}"


def _relative(path: Path, parent: Path) -> str:
    return escape_name(os.path.relpath(path, parent.absolute()))[:300]


@lru_cache(maxsize=64)
def _names_by_case(directory: Path) -> dict[str, str]:
    """Return the names in a directory by their case-insensitive form; empty if it is missing or very large."""
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208 - names only, of many files
    except OSError:
        return {}
    return {normalize_name(name).casefold(): name for name in names} if len(names) <= MAX_ENTRIES else {}


@lru_cache(maxsize=64)
def _subdirectories(directory: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())[:MAX_DIRECTORIES])
    except OSError:
        return ()
