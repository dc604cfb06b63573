"""Published models in storage: `models/<name>/<version>/` with its manifest, and `latest.json` that points to one."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict

from topwork.artifacts import MANIFEST_NAME as MANIFEST
from topwork.artifacts import read_manifest, read_json_record
from topwork.clients.s3.storage import Storage
from topwork.errors import UnavailableError

ROOT = "models"
CLAIM = "claim.json"
LATEST = "latest.json"
# An attempt that was killed is tried again before so many other runs have published.
NEWEST = 20
# A publisher that is overtaken tries again; nobody is overtaken so often.
ROUNDS = 100


class Version(BaseModel):
    """A published version, as its manifest and `latest.json` tell of it.

    Attributes:
        name: Name of the model.
        version: Its number, from 1.
        uri: Where it lies.
        run: The run that made it.
        weights: SHA-256, in hex, of the trained model that it was made from.
        published: When, as ISO 8601 in UTC.
        main_metric: The first metric that its job asked for.
        metrics: All single numbers of its evaluation, by their names in the job spec.
        split: The split that they were measured on.
        images: Images of that split.
        dataset: Key of the stored dataset that it was trained on; empty where an older topwork published it.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    name: str
    version: int
    uri: str
    run: str
    weights: str
    published: str
    main_metric: str
    metrics: dict[str, float]
    split: str
    images: int
    dataset: str = ""


def prefix_of(name: str, version: int) -> str:
    """Key of a version's folder."""
    return f"{ROOT}/{name}/{version}"


def latest(storage: Storage, name: str) -> Version | None:
    """Read which version of a model `latest.json` points to.

    Args:
        storage: Where the models are.
        name: Name of the model.

    Returns:
        The version; None if none is published.

    Raises:
        DataError: If the pointer is not one of topwork.
    """
    key = f"{ROOT}/{name}/{LATEST}"
    data = storage.read(key)
    return None if data is None else _read(data, storage.uri_of(key))


def published(storage: Storage, name: str, version: int) -> Version | None:
    """Read what is known of a version.

    Args:
        storage: Where the models are.
        name: Name of the model.
        version: Its number.

    Returns:
        The version; None if it is not published, or only begun.
    """
    manifest = read_manifest(storage, prefix_of(name, version))
    if manifest is None:
        return None
    return _read(json.dumps(manifest.facts).encode(), storage.uri_of(prefix_of(name, version)))


def numbers(storage: Storage, name: str) -> dict[int, bool]:
    """List the versions of a model, published or only claimed.

    Args:
        storage: Where the models are.
        name: Name of the model.

    Returns:
        Whether it is published, by number, in ascending order.
    """
    found: dict[int, bool] = {}
    for number, file in _files(storage, name):
        found[number] = found.get(number, False) or file == MANIFEST
    return dict(sorted(found.items()))


def models(storage: Storage) -> dict[str, list[int]]:
    """List all models with their published versions.

    Args:
        storage: Where the models are.

    Returns:
        Versions in ascending order, by the name of the model, in its order.
    """
    found: dict[str, list[int]] = {}
    for stored in storage.list(f"{ROOT}/"):
        parts = stored.key.split("/")
        if len(parts) == 4 and parts[2].isdecimal() and parts[3] == MANIFEST:
            found.setdefault(parts[1], []).append(int(parts[2]))
    return {name: sorted(found[name]) for name in sorted(found)}


def claim(storage: Storage, name: str, run: str) -> int:
    """Take the next free version for a run; no other run gets it.

    A claim that an earlier attempt of the same run left without a manifest is taken up again, and what lies below it
    is removed.

    Args:
        storage: Where the models are.
        name: Name of the model.
        run: Name of the run.

    Returns:
        The version.

    Raises:
        UnavailableError: If storage contradicts itself.
    """
    content = json.dumps({"format": 1, "run": run, "claimed": now(), "attempt": uuid.uuid4().hex}).encode()
    for _ in range(ROUNDS):
        found = numbers(storage, name)
        for number in (number for number, whole in found.items() if not whole):
            if _claimant(storage, name, number) == run:
                _clear(storage, name, number)
                return number
        # A number that the pointer ever had is not given again, though its version was deleted.
        standing = latest(storage, name)
        number = max([*found, standing.version if standing else 0]) + 1
        if storage.write(f"{prefix_of(name, number)}/{CLAIM}", content, only_if_absent=True):
            return number
    raise _at_odds(storage, name)


def made_from(storage: Storage, name: str, run: str, weights: str) -> Version | None:
    """Find the version that an earlier attempt of a run published before it could say so.

    Args:
        storage: Where the models are.
        name: Name of the model.
        run: Name of the run.
        weights: SHA-256, in hex, of the trained model.

    Returns:
        The version; None if there is none among the newest ones.
    """
    whole = [number for number, is_whole in numbers(storage, name).items() if is_whole]
    for number in reversed(whole[-NEWEST:]):
        version = published(storage, name, number)
        if version and (version.run, version.weights) == (run, weights):
            return version
    return None


def move_latest(storage: Storage, name: str) -> Version:
    """Let `latest.json` point to the newest published version; it never moves backwards.

    The pointer is looked at again after it was written: whoever of two publishers writes last, it ends at the newer.

    Args:
        storage: Where the models are; at least one version of the model is published.
        name: Name of the model.

    Returns:
        The version that it points to now.

    Raises:
        UnavailableError: If storage contradicts itself.
    """
    for _ in range(ROUNDS):
        newest = max(number for number, whole in numbers(storage, name).items() if whole)
        standing = latest(storage, name)
        if standing is not None and standing.version >= newest:
            return standing
        version = published(storage, name, newest)
        if version is not None:
            data = version.model_dump_json(indent=2).encode() + b"\n"
            storage.write(f"{ROOT}/{name}/{LATEST}", data, content_type="application/json")
    raise _at_odds(storage, name)


def _at_odds(storage: Storage, name: str) -> UnavailableError:
    where = storage.uri_of(f"{ROOT}/{name}")
    return UnavailableError(
        f"Storage does not tell of {where} what was just written there, {ROUNDS} times in a row. Look at what stands "
        "between: a cache or a replica that lags behind. Then try again."
    )


def now() -> str:
    """The time, as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(data: bytes, where: str) -> Version:
    return read_json_record(Version, data, where, "a model published by topwork")


def _claimant(storage: Storage, name: str, number: int) -> Any:
    data = storage.read(f"{prefix_of(name, number)}/{CLAIM}")
    try:
        return json.loads(data or b"{}").get("run")
    except (ValueError, AttributeError):
        return None


def _clear(storage: Storage, name: str, number: int) -> None:
    prefix = prefix_of(name, number)
    stored = [found.key for found in storage.list(f"{prefix}/")]
    storage.delete(key for key in stored if key != f"{prefix}/{CLAIM}")


def _files(storage: Storage, name: str) -> Iterator[tuple[int, str]]:
    for stored in storage.list(f"{ROOT}/{name}/"):
        _, _, number, *file = stored.key.split("/")
        if number.isdecimal() and file:
            yield int(number), "/".join(file)
