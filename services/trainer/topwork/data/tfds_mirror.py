"""The mirror of prepared TFDS datasets in storage: dataset names, keys and downloads. Does not import TFDS."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from topwork.artifacts import MANIFEST_NAME, download_artifact
from topwork.clients.s3.storage import Storage
from topwork.errors import DataError

MIRROR_PREFIX = "mirror/tfds"
_NAME = re.compile(r"(?P<name>[^/:]+)(?:/(?P<config>[^/:]+))?(?::(?P<version>[0-9.*]+))?")
_FULL_NAME = re.compile(r"(?P<name>[^/]+)(?:/(?P<config>[^/]+))?/(?P<version>[0-9]+\.[0-9]+\.[0-9]+)")


@dataclass(frozen=True)
class TfdsName:
    """The name of a TFDS dataset in a spec: `name[/config][:version]`.

    Attributes:
        name: Name of the dataset.
        config: Its configuration; None selects the default of the dataset.
        version: Its version, with `*` for any number; None selects the version that the installed TFDS provides,
            or the newest version in the mirror.
    """

    name: str
    config: str | None
    version: str | None

    @classmethod
    def parse(cls, text: str) -> "TfdsName":
        """Parse `name[/config][:version]`.

        Raises:
            DataError: If the text has a different form.
        """
        match = _NAME.fullmatch(text)
        if not match:
            raise DataError(
                f"{text} is not the name of a TFDS dataset: expected name[/config][:version], such as "
                "cats_vs_dogs:4.0.1."
            )
        return cls(match["name"], match["config"], match["version"])

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        version = f":{self.version}" if self.version else ""
        return f"{self.name}{config}{version}"

    def select(self, available: Iterable[str], provided: str | None) -> str | None:
        """Select one of several prepared datasets.

        Args:
            available: Full names of the prepared datasets, `name[/config]/version`.
            provided: Full name of the dataset that the installed TFDS provides under this name; None if it provides
                none.

        Returns:
            The full name of the match; None if it is not available.

        Raises:
            DataError: If several configurations match.
        """
        full_names = sorted(set(available), key=_version_order)
        if provided is not None:
            return provided if provided in full_names else None
        matches = [full_name for full_name in full_names if self._matches(full_name)]
        if len({full_name.rpartition("/")[0] for full_name in matches}) > 1:
            raise DataError(
                f"{self.name} is available as {', '.join(matches)}. Specify the configuration: {self.name}/…."
            )
        return matches[-1] if matches else None

    def _matches(self, full_name: str) -> bool:
        match = _FULL_NAME.fullmatch(full_name)
        if not match or match["name"] != self.name or (self.config and match["config"] != self.config):
            return False
        version = (self.version or "*.*.*").split(".")
        return all(part in ("*", number) for part, number in zip(version, match["version"].split("."), strict=False))


def _version_order(full_name: str) -> tuple[str, list[int]]:
    name, _, version = full_name.rpartition("/")
    return name, [int(number) for number in version.split(".")]


def mirror_prefix(full_name: str) -> str:
    """Return the key prefix of a prepared dataset."""
    return f"{MIRROR_PREFIX}/{full_name}"


def list_mirrored(storage: Storage, name: str) -> list[str]:
    """List the complete prepared datasets in the mirror.

    Args:
        storage: Storage with the mirror.
        name: Name of the dataset.

    Returns:
        Full names, `name[/config]/version`.
    """
    keys = (stored.key.removeprefix(f"{MIRROR_PREFIX}/") for stored in storage.list(f"{MIRROR_PREFIX}/{name}/"))
    full_names = (key.removesuffix(f"/{MANIFEST_NAME}") for key in keys if key.endswith(f"/{MANIFEST_NAME}"))
    return [full_name for full_name in full_names if _FULL_NAME.fullmatch(full_name)]


def is_prepared_key(key: str) -> bool:
    """Return whether a key of the mirror belongs to a prepared dataset and not to a download directory."""
    return _FULL_NAME.match(key.removeprefix(f"{MIRROR_PREFIX}/")) is not None


def download_metadata(storage: Storage, full_name: str, data_dir: Path) -> Path:
    """Download the metadata of a prepared dataset, without its images.

    Args:
        storage: Storage with the mirror.
        full_name: Full name of the dataset.
        data_dir: Local directory for datasets.

    Returns:
        The directory of the dataset inside `data_dir`.
    """
    download_artifact(
        storage, mirror_prefix(full_name), data_dir / full_name, select=lambda file: file.endswith((".json", ".txt"))
    )
    return data_dir / full_name


def download_data(storage: Storage, full_name: str, data_dir: Path) -> None:
    """Download the remaining files of a prepared dataset.

    Args:
        storage: Storage with the mirror.
        full_name: Full name of the dataset.
        data_dir: Local directory for datasets, the same as for `download_metadata`.
    """
    download_artifact(storage, mirror_prefix(full_name), data_dir / full_name)


def list_prepared(data_dir: Path, name: str) -> list[str]:
    """List the versions of a dataset that TFDS has prepared in a local directory.

    Args:
        data_dir: The `data_dir` of `tfds.load`.
        name: Name of the dataset.

    Returns:
        Full names, `name[/config]/version`.
    """
    full_names = (path.parent.relative_to(data_dir).as_posix() for path in (data_dir / name).rglob("dataset_info.json"))
    return [full_name for full_name in full_names if _FULL_NAME.fullmatch(full_name)]
