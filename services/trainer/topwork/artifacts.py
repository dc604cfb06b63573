"""A folder in storage that appears whole: its files first, its manifest last.

Writers of one prefix write the same bytes, or hold a claim on it: the manifest decides who is done, and nothing is
uploaded below a manifest that stands.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topwork import __version__
from topwork.clients.s3.storage import FileEntry, Storage, entry_of
from topwork.disk_space import require_room
from topwork.errors import DataError, FormatError

FORMAT = 1
NAME = "manifest.json"
PARALLEL_FILES = 8
Result = TypeVar("Result")
Record = TypeVar("Record", bound=BaseModel)


class Manifest(BaseModel):
    """What a whole folder holds.

    Attributes:
        format: Version of this description.
        files: Size and digest of each file, by its path relative to the folder.
        facts: What the writer has to say about the folder.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry]
    facts: dict[str, Any] = Field(default_factory=dict)


def write_whole(
    storage: Storage,
    prefix: str,
    folder: Path,
    facts: dict[str, Any],
    *,
    name: str = NAME,
    files: Iterable[str] | None = None,
) -> Manifest:
    """Store a folder, its manifest last.

    Args:
        storage: Where to.
        prefix: Key of the folder in storage.
        folder: Local folder.
        facts: Kept in the manifest; must be JSON.
        name: Name of the manifest in `prefix`.
        files: Paths relative to `folder`; None takes every file in it.

    Returns:
        The manifest that stands: another writer's, where one was there first.
    """
    if (standing := read_manifest(storage, prefix, name=name)) is not None:
        return standing
    chosen = sorted(files if files is not None else _files_of(folder) - {name})

    def send(file: str) -> FileEntry:
        # Another writer can be done at any time; its files stay as its manifest says.
        if storage.size(_key(prefix, name)) is not None:
            return entry_of(folder / file)
        return storage.upload(folder / file, _key(prefix, file))

    entries = _in_parallel(send, chosen)
    manifest = Manifest(files=dict(zip(chosen, entries, strict=True)), facts=facts)
    data = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    if storage.write(_key(prefix, name), data, only_if_absent=True, content_type="application/json"):
        return manifest
    return read_manifest(storage, prefix, name=name) or manifest


def read_manifest(storage: Storage, prefix: str, *, name: str = NAME) -> Manifest | None:
    """Read the manifest of a folder in storage.

    Args:
        storage: Where from.
        prefix: Key of the folder.
        name: Name of the manifest in `prefix`.

    Returns:
        The manifest; None while the folder is not there or not whole.

    Raises:
        DataError: If it is no manifest, or one of a newer format.
    """
    key = _key(prefix, name)
    data = storage.read(key)
    return None if data is None else read_record(Manifest, data, storage.uri_of(key), "a manifest of topwork")


def read_record(model: type[Record], data: bytes, where: str, what: str, hint: str = "") -> Record:
    """Read something that topwork has written down, of this format and no other.

    Args:
        model: What it is.
        data: JSON, with its format.
        where: Its URI, for the sentence.
        what: What it should be, for the sentence.
        hint: What else to do.

    Returns:
        The content.

    Raises:
        DataError: If it is something else, or of another format.
    """
    or_hint, doing = (f", or {hint}", f" You can {hint}.") if hint else ("", "")
    try:
        content = json.loads(data)
        found = content.get("format", FORMAT)  # what is older than its own format has none
        if found != FORMAT and isinstance(found, int):
            raise FormatError(
                f"{where} has format {found}; topwork {__version__} reads format {FORMAT}. "
                f"Read it with {'a newer' if found > FORMAT else 'an older'} topwork{or_hint}."
            )
        return model.model_validate(content)
    except (ValueError, AttributeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{where} is not {what} ({reason}).{doing}") from error


def fetch_whole(
    storage: Storage,
    prefix: str,
    folder: Path,
    *,
    only: Callable[[str], bool] | None = None,
    name: str = NAME,
) -> Manifest:
    """Fetch a folder that is whole, in parallel, and check every file against the manifest.

    Args:
        storage: Where from.
        prefix: Key of the folder in storage.
        folder: Local folder; files in it that are right already are not fetched again.
        only: Chooses files by their path in the manifest; None takes all.
        name: Name of the manifest in `prefix`.

    Returns:
        The manifest.

    Raises:
        DataError: If there is no manifest, or it names a path outside `folder`.
        UnavailableError: If a file is not what the manifest says, or the disk has no room for it.
    """
    manifest = read_manifest(storage, prefix, name=name)
    if manifest is None:
        raise DataError(
            f"{storage.uri_of(_key(prefix, name))} does not exist: the folder is not there, or not whole yet."
        )
    chosen = {file: entry for file, entry in manifest.files.items() if only is None or only(file)}
    for file in chosen:
        if not _is_inside(file):
            raise DataError(f"{storage.uri_of(_key(prefix, name))} names {file!r}, a path outside of its folder.")

    def fetch(file: str) -> None:
        path, entry = folder / file, chosen[file]
        if not (_has_size(path, entry) and entry_of(path) == entry):
            storage.download(_key(prefix, file), path, entry)

    if missing := sum(entry.size for file, entry in chosen.items() if not _has_size(folder / file, entry)):
        folder.mkdir(parents=True, exist_ok=True)
        require_room(folder, missing, f"Fetching {storage.uri_of(prefix)}")
    _in_parallel(fetch, list(chosen))
    return manifest


def _in_parallel(work: Callable[[str], Result], files: list[str]) -> list[Result]:
    with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="storage") as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # What failed for one file after all retries is not tried again for a thousand others.
            pool.shutdown(cancel_futures=True)
            raise


def _key(prefix: str, name: str) -> str:
    return f"{prefix.strip('/')}/{name}".lstrip("/")


def _has_size(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size


def _files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return (
        not path.is_absolute() and path.parts != () and ".." not in path.parts and "\\" not in file and "\0" not in file
    )
