"""Prepared TensorFlow Datasets in storage: a job that finds its own there downloads nothing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from topwork.artifacts import NAME, fetch_whole
from topwork.clients.s3.storage import Storage
from topwork.errors import DataError

ROOT = "mirror/tfds"
_ASKED = re.compile(r"(?P<name>[^/:]+)(?:/(?P<config>[^/:]+))?(?::(?P<version>[0-9.*]+))?")
_FULL = re.compile(r"(?P<name>[^/]+)(?:/(?P<config>[^/]+))?/(?P<version>[0-9]+\.[0-9]+\.[0-9]+)")


@dataclass(frozen=True)
class AskedName:
    """What `spec.dataset.source.tfds` asks for: `name[/config][:version]`.

    Attributes:
        name: Name of the dataset.
        config: Its configuration; None is the dataset's default.
        version: Its version, `*` for any number in it; None is the one that this TFDS makes, or else the newest.
    """

    name: str
    config: str | None
    version: str | None

    @classmethod
    def parse(cls, text: str) -> "AskedName":
        """Take a name apart.

        Raises:
            DataError: If it is no name of a dataset.
        """
        found = _ASKED.fullmatch(text)
        if not found:
            raise DataError(f"{text} is no TFDS dataset: expected name[/config][:version], such as cats_vs_dogs:4.0.1.")
        return cls(found["name"], found["config"], found["version"])

    def pick(self, there: Iterable[str], made: str | None) -> str | None:
        """Choose among prepared datasets.

        Args:
            there: Their full names, `name[/config]/version`.
            made: Full name of what this TFDS would make of the name; None where it does not know the dataset.

        Returns:
            The full name of the one that is meant; None if it isn't there.

        Raises:
            DataError: If several configurations are there, and none is named.
        """
        known = sorted(set(there), key=_age)
        if made is not None:
            return made if made in known else None
        fitting = [full for full in known if self._fits(full)]
        if len({full.rpartition("/")[0] for full in fitting}) > 1:
            raise DataError(f"{self.name} is there as {', '.join(fitting)}. Name the configuration: {self.name}/….")
        return fitting[-1] if fitting else None

    def _fits(self, full: str) -> bool:
        found = _FULL.fullmatch(full)
        if not found or found["name"] != self.name or (self.config and found["config"] != self.config):
            return False
        wanted = (self.version or "*.*.*").split(".")
        return all(part in ("*", number) for part, number in zip(wanted, found["version"].split("."), strict=False))


def _age(full: str) -> tuple[str, list[int]]:
    name, _, version = full.rpartition("/")
    return name, [int(number) for number in version.split(".")]


def prefix_of(full: str) -> str:
    """Give the key of a prepared dataset's folder."""
    return f"{ROOT}/{full}"


def mirrored(storage: Storage, name: str) -> list[str]:
    """List what is mirrored whole of a dataset.

    Args:
        storage: Where the mirror is.
        name: Name of the dataset.

    Returns:
        Full names, `name[/config]/version`.
    """
    keys = (stored.key.removeprefix(f"{ROOT}/") for stored in storage.list(f"{ROOT}/{name}/"))
    ends = (key.removesuffix(f"/{NAME}") for key in keys if key.endswith(f"/{NAME}"))
    return [full for full in ends if _FULL.fullmatch(full)]


def is_prepared(key: str) -> bool:
    """Say whether a key of the mirror belongs to a prepared dataset, and not to a download folder."""
    return _FULL.match(key.removeprefix(f"{ROOT}/")) is not None


def fetch_facts(storage: Storage, full: str, folder: Path) -> Path:
    """Fetch what describes a prepared dataset, without its images.

    Args:
        storage: Where the mirror is.
        full: Full name of the dataset.
        folder: Local folder for datasets.

    Returns:
        The dataset's own folder.
    """
    fetch_whole(storage, prefix_of(full), folder / full, only=lambda file: file.endswith((".json", ".txt")))
    return folder / full


def fetch_images(storage: Storage, full: str, folder: Path) -> None:
    """Fetch the rest of a prepared dataset.

    Args:
        storage: Where the mirror is.
        full: Full name of the dataset.
        folder: Local folder for datasets, as with `fetch_facts`.
    """
    fetch_whole(storage, prefix_of(full), folder / full)


def prepared_in(data_dir: Path, name: str) -> list[str]:
    """List what TFDS has prepared of a dataset in a local folder.

    Args:
        data_dir: As `tfds.load(…, data_dir=…)` takes it.
        name: Name of the dataset.

    Returns:
        Full names, `name[/config]/version`.
    """
    found = (path.parent.relative_to(data_dir).as_posix() for path in (data_dir / name).rglob("dataset_info.json"))
    return [full for full in found if _FULL.fullmatch(full)]
