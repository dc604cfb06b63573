"""Artifacts: directories in storage that become visible when their manifest is written, after all other files.

Writers of the same artifact write identical files, or hold a claim on it. The first manifest wins, and the files of an
artifact that has a manifest are never replaced.
"""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topwork import __version__
from topwork.clients.s3.storage import FileEntry, Storage, describe_file
from topwork.disk_space import require_free_space
from topwork.errors import DataError, FormatError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
MAX_CONCURRENT_FILES = 8
Result = TypeVar("Result")
Record = TypeVar("Record", bound=BaseModel)


class Manifest(BaseModel):
    """The content of an artifact.

    Attributes:
        format: Version of the manifest format.
        files: Size and digest of each file, keyed by its path in the artifact.
        facts: Metadata from the writer of the artifact.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry]
    facts: dict[str, Any] = Field(default_factory=dict)


def write_artifact(
    storage: Storage, prefix: str, directory: Path, facts: dict[str, Any], *, files: Iterable[str] | None = None
) -> Manifest:
    """Upload a directory as an artifact: its files first, its manifest last.

    Args:
        storage: Storage that receives the artifact.
        prefix: Key of the artifact.
        directory: Local directory.
        facts: Metadata for the manifest; must be serializable as JSON.
        files: Paths relative to `directory`; None uploads all files in it.

    Returns:
        The manifest in storage, which is that of another writer if it finished first.

    Example:
        ```python
        write_artifact(storage, "datasets/cats/1a2b3c4d", Path("/scratch/cats"), {"images": 2000})
        download_artifact(storage, "datasets/cats/1a2b3c4d", Path("/scratch/copy"))
        ```
    """
    if (existing := read_manifest(storage, prefix)) is not None:
        return existing
    names = sorted(files if files is not None else _list_files(directory) - {MANIFEST_NAME})

    def upload(name: str) -> FileEntry:
        # Another writer can finish at any time: from then on its files must not change.
        if storage.size(_key(prefix, MANIFEST_NAME)) is not None:
            return describe_file(directory / name)
        return storage.upload(directory / name, _key(prefix, name))

    entries = _run_concurrently(upload, names)
    manifest = Manifest(files=dict(zip(names, entries, strict=True)), facts=facts)
    data = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True).encode()
    if storage.write(_key(prefix, MANIFEST_NAME), data, only_if_absent=True, content_type="application/json"):
        return manifest
    return read_manifest(storage, prefix) or manifest


def read_manifest(storage: Storage, prefix: str) -> Manifest | None:
    """Read the manifest of an artifact.

    Args:
        storage: Storage that contains the artifact.
        prefix: Key of the artifact.

    Returns:
        The manifest; None if the artifact does not exist or is incomplete.

    Raises:
        DataError: If the manifest is invalid or has a newer format.
    """
    key = _key(prefix, MANIFEST_NAME)
    data = storage.read(key)
    return None if data is None else read_json_record(Manifest, data, storage.uri_of(key), "a topwork manifest")


def read_json_record(model: type[Record], data: bytes, uri: str, description: str, hint: str = "") -> Record:
    """Parse a JSON document that topwork has stored, in the current format only.

    Args:
        model: Model of the document.
        data: The JSON text, including its format number.
        uri: URI of the document, for error messages.
        description: What the document should be, such as "a topwork manifest", for error messages.
        hint: Another way to fix the error, for error messages.

    Returns:
        The validated document.

    Raises:
        FormatError: If the document has another format.
        DataError: If the document is invalid.
    """
    alternative, advice = (f", or {hint}", f" You can {hint}.") if hint else ("", "")
    try:
        content = json.loads(data)
        number = content.get("format", FORMAT)  # documents that predate format numbers have none
        if number != FORMAT and isinstance(number, int):
            raise FormatError(
                f"{uri} has format {number}, but topwork {__version__} reads format {FORMAT}. "
                f"Read it with {'a newer' if number > FORMAT else 'an older'} topwork{alternative}."
            )
        return model.model_validate(content)
    except (ValueError, AttributeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{uri} is not {description} ({reason}).{advice}") from error


def download_artifact(
    storage: Storage, prefix: str, directory: Path, *, select: Callable[[str], bool] | None = None
) -> Manifest:
    """Download an artifact concurrently, and verify every file against the manifest.

    Args:
        storage: Storage that contains the artifact.
        prefix: Key of the artifact.
        directory: Local directory. Files that already match the manifest are not downloaded again.
        select: Selects files by their path in the manifest; None selects all.

    Returns:
        The manifest.

    Raises:
        DataError: If the artifact has no manifest, or the manifest contains a path outside `directory`.
        UnavailableError: If a file does not match the manifest, or the disk has too little free space.
    """
    manifest = read_manifest(storage, prefix)
    manifest_uri = storage.uri_of(_key(prefix, MANIFEST_NAME))
    if manifest is None:
        raise DataError(f"{manifest_uri} does not exist: the directory is missing or incomplete.")
    selected = {name: entry for name, entry in manifest.files.items() if select is None or select(name)}
    for name in selected:
        if not _is_relative_path(name):
            raise DataError(f"{manifest_uri} contains {name!r}, a path outside its directory.")

    def download(name: str) -> None:
        path, entry = directory / name, selected[name]
        if not (_has_size(path, entry) and describe_file(path) == entry):
            storage.download(_key(prefix, name), path, entry)

    if missing := sum(entry.size for name, entry in selected.items() if not _has_size(directory / name, entry)):
        directory.mkdir(parents=True, exist_ok=True)
        require_free_space(directory, missing, f"Downloading {storage.uri_of(prefix)}")
    _run_concurrently(download, list(selected))
    return manifest


def _run_concurrently(function: Callable[[str], Result], names: list[str]) -> list[Result]:
    with ThreadPoolExecutor(MAX_CONCURRENT_FILES, thread_name_prefix="storage") as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # If one file failed after all retries, do not start the remaining ones.
            pool.shutdown(cancel_futures=True)
            raise


def _key(prefix: str, name: str) -> str:
    return f"{prefix.strip('/')}/{name}".lstrip("/")


def _has_size(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size


def _list_files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def _is_relative_path(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and path.parts != () and ".." not in path.parts and not set(name) & {"\\", "\0"}
