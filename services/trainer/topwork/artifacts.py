"""Artifacts: directories in storage that become visible when their manifest is written, after all other files.

Several writers may write the same artifact at the same time, with different content: two pulls can reject different
images, for example. Their files never mix, in any order of requests:

1. A file is created only if its key is absent (`Storage.create`). An existing object is never replaced, except by 5.
2. A writer whose files all exist with its own content writes the manifest, which names these files.
3. If a file exists with other content, the writer uploads all of its files again to `attempt-<id>/`, a directory that
   only this writer uses, and its manifest names that directory.
4. The manifest is created only if it is absent: the first one wins, and it is never replaced. So the objects that a
   manifest names have the content that it describes, and they never change.
5. A winner from step 3 then also copies its files to their plain keys, so that the directory can be used without
   topwork. Nobody else replaces these objects: other writers only create absent ones (1) and find the manifest (4).

A manifest without `directory`, including those of earlier versions of topwork, names the plain keys.
"""

import json
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from topwork import __version__
from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.storage import FileEntry, Storage, describe_file, partial_path
from topwork.disk_space import require_free_space
from topwork.errors import DataError, FormatError, UnavailableError

log = structlog.get_logger(__name__)

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
        directory: Directory in the artifact that contains the files; empty if they are at its top level.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    files: dict[str, FileEntry]
    facts: dict[str, Any] = Field(default_factory=dict)
    directory: str = Field(default="", pattern="^(attempt-[0-9a-f]{32})?$")

    def key_of(self, prefix: str, name: str) -> str:
        """Return the storage key of a file.

        Args:
            prefix: Key of the artifact.
            name: Path of the file in the artifact.
        """
        return _key(_key(prefix, self.directory), name)


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
    entries = _run_concurrently(lambda name: describe_file(directory / name), names)
    own = Manifest(files=dict(zip(names, entries, strict=True)), facts=facts)

    def create(name: str) -> bool | None:
        # Another writer can finish at any time, and these files are then not needed.
        if storage.size(_key(prefix, MANIFEST_NAME)) is not None:
            return None
        return storage.create(directory / name, _key(prefix, name), own.files[name])

    outcomes = _run_concurrently(create, names)
    if None in outcomes:
        return _read_manifest_of_other(storage, prefix)
    if not all(outcomes):
        own = own.model_copy(update={"directory": f"attempt-{uuid.uuid4().hex}"})
        log.info("another writer stores different files", uri=storage.uri_of(prefix), directory=own.directory)
        _upload_files(storage, prefix, directory, own)
    return _finish(storage, prefix, directory, own)


def _finish(storage: Storage, prefix: str, directory: Path, own: Manifest) -> Manifest:
    """Write the manifest of an artifact whose files are stored, or delete the files if another writer was first."""
    content = own.model_dump(mode="json", exclude=None if own.directory else {"directory"})
    data = json.dumps(content, indent=1, sort_keys=True).encode()
    if not storage.write(_key(prefix, MANIFEST_NAME), data, only_if_absent=True, content_type="application/json"):
        if own.directory:
            with tolerate_cleanup_failure(f"files of {storage.uri_of(prefix)} that another writer stored first"):
                storage.delete(own.key_of(prefix, name) for name in own.files)
        return _read_manifest_of_other(storage, prefix)
    if own.directory:
        _upload_files(storage, prefix, directory, own.model_copy(update={"directory": ""}))
    # A file of an earlier attempt can be deleted as a leftover until the manifest exists.
    sizes = {stored.key: stored.size for stored in storage.list(_key(prefix, ""))}
    missing = {name: entry for name, entry in own.files.items() if sizes.get(own.key_of(prefix, name)) != entry.size}
    _upload_files(storage, prefix, directory, own.model_copy(update={"files": missing}))
    return own


def _upload_files(storage: Storage, prefix: str, directory: Path, manifest: Manifest) -> None:
    _run_concurrently(
        lambda name: storage.upload(directory / name, manifest.key_of(prefix, name)), list(manifest.files)
    )


def _read_manifest_of_other(storage: Storage, prefix: str) -> Manifest:
    manifest = read_manifest(storage, prefix)
    if manifest is None:
        raise UnavailableError(
            f"{storage.uri_of(_key(prefix, MANIFEST_NAME))} was deleted while this process stored the same files. "
            "Try again."
        )
    return manifest


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


def read_json_record(
    model: type[Record], data: bytes, uri: str, description: str, hint: str = "", expected_format: int = FORMAT
) -> Record:
    """Parse a JSON document that topwork has stored, in the current format only.

    Args:
        model: Model of the document.
        data: The JSON text, including its format number.
        uri: URI of the document, for error messages.
        description: What the document should be, such as "a topwork manifest", for error messages.
        hint: Another way to fix the error, for error messages.
        expected_format: Format number of the document.

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
        if not isinstance(number, int) or isinstance(number, bool):
            raise DataError(f"{uri} is not {description} (format is {number!r}, expected an integer).{advice}")
        if number != expected_format:
            raise FormatError(
                f"{uri} has format {number}, but topwork {__version__} reads format {expected_format}. "
                f"Read it with {'a newer' if number > expected_format else 'an older'} topwork{alternative}."
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
            storage.download(manifest.key_of(prefix, name), path, entry)

    if missing := {name: entry.size for name, entry in selected.items() if not _has_size(directory / name, entry)}:
        directory.mkdir(parents=True, exist_ok=True)
        # Incomplete files are replaced: they must not count as used space.
        for name in missing:
            (directory / name).unlink(missing_ok=True)
            partial_path(directory / name).unlink(missing_ok=True)
        require_free_space(directory, sum(missing.values()), f"Downloading {storage.uri_of(prefix)}")
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
