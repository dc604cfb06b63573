"""Published model versions in storage: `models/<name>/<version>/` and the pointer `models/<name>/latest.json`."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from topwork.artifacts import MANIFEST_NAME as MANIFEST
from topwork.artifacts import read_json_record, read_manifest
from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.storage import Storage
from topwork.errors import UnavailableError

ROOT = "models"
CLAIM = "claim.json"
LATEST = "latest.json"
# Number of newest versions to search for a version that an interrupted attempt of the same run published.
MAX_SEARCHED_VERSIONS = 20
# Maximum number of attempts of a publisher that repeatedly loses a race against other publishers.
MAX_ATTEMPTS = 100


class Version(BaseModel):
    """A published version, as stored in its manifest and in `latest.json`.

    Attributes:
        format: Format version of this record.
        name: Name of the model.
        version: Version number, starting at 1.
        uri: URI of the version.
        run: Run that published it.
        key: Key of evaluation and publishing; empty if topwork 0.1 published it.
        weights: Hexadecimal SHA-256 of the trained model file.
        published: Time of publication, ISO 8601 in UTC.
        main_metric: First metric requested by the job.
        metrics: All scalar metrics of the evaluation, by their names in the job spec.
        split: Split on which they were measured.
        images: Number of images in that split.
        excluded_classes: Number of classes without images in that split, which averaged metrics exclude.
        dataset: Key of the stored dataset; empty if an older version of topwork published it.
        deviations: Standard deviation of the metrics between the folds of cross-validation; empty without.
        duplicates: Number of images in that split with an exact or near duplicate in train; None if not searched.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    name: str
    version: int
    uri: str
    run: str
    key: str = ""
    weights: str
    published: str
    main_metric: str
    metrics: dict[str, float]
    split: str
    images: int
    excluded_classes: int = 0
    dataset: str = ""
    deviations: dict[str, float] = {}
    duplicates: int | None = None


def version_prefix(name: str, version: int) -> str:
    """Return the key prefix of a version."""
    return f"{ROOT}/{name}/{version}"


def read_latest(storage: Storage, name: str) -> Version | None:
    """Read the version that `latest.json` points to.

    Args:
        storage: Storage of the models.
        name: Name of the model.

    Returns:
        The version; None if no version is published.

    Raises:
        DataError: If `latest.json` was not written by topwork.
    """
    key = f"{ROOT}/{name}/{LATEST}"
    data = storage.read(key)
    return None if data is None else _read(data, storage.uri_of(key))


def read_version(storage: Storage, name: str, version: int) -> Version | None:
    """Read a published version.

    Args:
        storage: Storage of the models.
        name: Name of the model.
        version: Version number.

    Returns:
        The version; None if it is not published or incomplete.
    """
    manifest = read_manifest(storage, version_prefix(name, version))
    if manifest is None:
        return None
    return _read(json.dumps(manifest.facts).encode(), storage.uri_of(version_prefix(name, version)))


def list_versions(storage: Storage, name: str) -> dict[int, bool]:
    """List the versions of a model, published or claimed.

    Args:
        storage: Storage of the models.
        name: Name of the model.

    Returns:
        Version number to whether it is published, in ascending order.
    """
    is_published: dict[int, bool] = {}
    for number, file in _files(storage, name):
        is_published[number] = is_published.get(number, False) or file == MANIFEST
    return dict(sorted(is_published.items()))


def list_models(storage: Storage) -> dict[str, list[int]]:
    """List all models with their published versions.

    Args:
        storage: Storage of the models.

    Returns:
        Name of the model to its versions, both in ascending order.
    """
    models: dict[str, list[int]] = {}
    for stored in storage.list(f"{ROOT}/"):
        parts = stored.key.split("/")
        if len(parts) == 4 and parts[2].isdecimal() and parts[3] == MANIFEST:
            models.setdefault(parts[1], []).append(int(parts[2]))
    return {name: sorted(models[name]) for name in sorted(models)}


def claim_version(storage: Storage, name: str, run: str) -> int:
    """Claim the next free version number for a run.

    If an interrupted attempt of the same run left a claim without a manifest, it is reused, and its files are deleted.

    Args:
        storage: Storage of the models.
        name: Name of the model.
        run: Name of the run.

    Returns:
        The version number.

    Raises:
        UnavailableError: If storage returns stale data.
    """
    content = json.dumps({"format": 1, "run": run, "claimed": utc_now(), "attempt": uuid.uuid4().hex}).encode()
    for _ in range(MAX_ATTEMPTS):
        existing = list_versions(storage, name)
        for number in (number for number, is_published in existing.items() if not is_published):
            if _read_claim(storage, name, number) == run:
                _delete_files(storage, name, number)
                return number
        # Never reuse the number that latest.json points to, even if that version was deleted.
        current = read_latest(storage, name)
        number = max([*existing, current.version if current else 0]) + 1
        if storage.write(f"{version_prefix(name, number)}/{CLAIM}", content, only_if_absent=True):
            return number
    raise _stale_storage_error(storage, name)


def find_version_by_key(storage: Storage, name: str, key: str, weights: str) -> Version | None:
    """Find a version with the same weights, metrics and formats, published by another run or an interrupted attempt.

    Args:
        storage: Storage of the models.
        name: Name of the model.
        key: Key of evaluation and publishing; see `topwork.registry.stage_keys`.
        weights: Hexadecimal SHA-256 of the trained model file.

    Returns:
        The version; None if it is not among the newest versions.
    """
    existing = [number for number, is_published in list_versions(storage, name).items() if is_published]
    for number in reversed(existing[-MAX_SEARCHED_VERSIONS:]):
        version = read_version(storage, name, number)
        if version and (version.key, version.weights) == (key, weights):
            return version
    return None


def update_latest(storage: Storage, name: str) -> Version:
    """Point `latest.json` to the newest published version. It never moves backwards.

    The pointer is checked again after every write, so that it ends at the newest version even if two publishers race.

    Args:
        storage: Storage of the models. At least one version of the model is published.
        name: Name of the model.

    Returns:
        The version that `latest.json` points to.

    Raises:
        UnavailableError: If storage returns stale data.
    """
    for _ in range(MAX_ATTEMPTS):
        newest = max(number for number, is_published in list_versions(storage, name).items() if is_published)
        current = read_latest(storage, name)
        if current is not None and current.version >= newest:
            return current
        version = read_version(storage, name, newest)
        if version is not None:
            data = version.model_dump_json(indent=2).encode() + b"\n"
            storage.write(f"{ROOT}/{name}/{LATEST}", data, content_type="application/json")
    raise _stale_storage_error(storage, name)


def _stale_storage_error(storage: Storage, name: str) -> UnavailableError:
    uri = storage.uri_of(f"{ROOT}/{name}")
    return UnavailableError(
        f"Storage returned stale data for {uri} {MAX_ATTEMPTS} times in a row, right after a write. Check for a "
        "cache or a lagging replica in front of the storage, then try again."
    )


def utc_now() -> str:
    """Return the current time, ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(data: bytes, uri: str) -> Version:
    return read_json_record(Version, data, uri, "a model published by topwork")


def _read_claim(storage: Storage, name: str, number: int) -> Any:
    data = storage.read(f"{version_prefix(name, number)}/{CLAIM}")
    try:
        content = json.loads(data or b"{}")
        # The claim of a newer topwork belongs to another attempt: its number is not reused.
        return content.get("run") if content.get("format", 1) == 1 else None
    except (ValueError, AttributeError):
        return None


def _delete_files(storage: Storage, name: str, number: int) -> None:
    prefix = version_prefix(name, number)
    # Files that remain are not in the manifest of this attempt.
    with tolerate_cleanup_failure(f"files of an interrupted attempt in {storage.uri_of(prefix)}"):
        stored = [item.key for item in storage.list(f"{prefix}/")]
        storage.delete(key for key in stored if key != f"{prefix}/{CLAIM}")


def _files(storage: Storage, name: str) -> Iterator[tuple[int, str]]:
    for stored in storage.list(f"{ROOT}/{name}/"):
        _, _, number, *file = stored.key.split("/")
        if number.isdecimal() and file:
            yield int(number), "/".join(file)
