"""Addresses of published models on the command line: `STORAGE NAME [--version N]`, or a single URI."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from topwork.cli.runtime.storage import open_storage
from topwork.clients.s3.storage import Storage
from topwork.errors import SettingError
from topwork.registry import versions
from topwork.registry.versions import Version

MODEL_URI = re.compile(r"(?P<storage>s3://.+)/models/(?P<name>[^/]+)(?:/(?P<version>latest|[0-9]+))?/?")


@dataclass(frozen=True)
class ModelAddress:
    """Address of a published model.

    Attributes:
        storage: `s3://bucket[/prefix]`, like `spec.storage`.
        name: Name of the model.
        version: Version number; None for the latest.
    """

    storage: str
    name: str
    version: int | None = None


def parse_model_address(where: str, name: str | None = None, version: int | None = None) -> ModelAddress:
    """Parse the address of a model from command line arguments.

    Args:
        where: The storage, or, if `name` is None, the model: `s3://…/models/<name>[/<version>|/latest]`.
        name: Name of the model.
        version: Version number; None for the version in `where`, or the latest.

    Returns:
        The address.

    Raises:
        SettingError: If no model is named.
    """
    if name is not None:
        return ModelAddress(where.rstrip("/"), name, version)
    match = MODEL_URI.fullmatch(where)
    if not match:
        raise SettingError(
            f"{where} is not the URI of a published model. Use the storage and the name, such as "
            "`s3://bucket/prefix cats-vs-dogs`, or the URI, such as `s3://bucket/prefix/models/cats-vs-dogs/3`."
        )
    if version is None and match["version"] not in (None, "latest"):
        version = int(match["version"])
    return ModelAddress(match["storage"], match["name"], version)


@contextmanager
def open_version(address: ModelAddress, state: Path | None) -> Iterator[tuple[Storage, Version]]:
    """Open the storage of a model and read its version.

    Args:
        address: The model.
        state: State directory of the embedded S3 server; None for the default.

    Yields:
        The storage and the version.

    Raises:
        SettingError: If there is no such model or version.
    """
    with open_storage(address.storage, state) as storage:
        yield storage, find_version(storage, address)


def find_version(storage: Storage, address: ModelAddress) -> Version:
    """Find a published version.

    Args:
        storage: Storage of the models.
        address: The model.

    Returns:
        The version.

    Raises:
        SettingError: If there is no such model or version. The message lists the existing ones.
    """
    if address.version is None:
        version = versions.read_latest(storage, address.name)
    else:
        version = versions.read_version(storage, address.name, address.version)
    if version:
        return version
    models = versions.list_models(storage)
    if address.name in models:
        numbers = ", ".join(str(number) for number in models[address.name])
        missing = "latest version" if address.version is None else f"version {address.version}"
        raise SettingError(f"{storage.uri} has no {missing} of {address.name}. Published: {numbers}.")
    names = ", ".join(models) or "none"
    raise SettingError(f"{storage.uri} has no model {address.name}. Published models: {names}.")
