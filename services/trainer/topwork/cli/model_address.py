"""How a command names a published model: `STORAGE NAME [--version N]`, or its address in one word."""

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

IN_ONE_WORD = re.compile(r"(?P<storage>s3://.+)/models/(?P<name>[^/]+)(?:/(?P<version>latest|[0-9]+))?/?")


@dataclass(frozen=True)
class ModelAddress:
    """Where a model is published.

    Attributes:
        storage: `s3://bucket[/prefix]`, as `spec.storage`.
        name: Name of the model.
        version: Its version; None is the latest.
    """

    storage: str
    name: str
    version: int | None = None


def model_address(where: str, name: str | None = None, version: int | None = None) -> ModelAddress:
    """Read the address of a model from a command line.

    Args:
        where: The storage, or with `name` None the model: `s3://…/models/<name>[/<version>|/latest]`.
        name: Name of the model.
        version: Its version; None takes what `where` says, or the latest.

    Returns:
        The address.

    Raises:
        SettingError: If no model is named.
    """
    if name is not None:
        return ModelAddress(where.rstrip("/"), name, version)
    found = IN_ONE_WORD.fullmatch(where)
    if not found:
        raise SettingError(
            f"{where} does not name a published model. Give its storage and its name, such as "
            "`s3://bucket/prefix cats-vs-dogs`, or its address, such as `s3://bucket/prefix/models/cats-vs-dogs/3`."
        )
    stated = found["version"]
    if version is None and stated not in (None, "latest"):
        version = int(stated)
    return ModelAddress(found["storage"], found["name"], version)


@contextmanager
def open_version(address: ModelAddress, state: Path | None) -> Iterator[tuple[Storage, Version]]:
    """Open the storage of a model and find its version.

    Args:
        address: The model.
        state: State folder of the embedded storage; None is the default.

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
        storage: Where the models are.
        address: The model.

    Returns:
        The version.

    Raises:
        SettingError: If there is no such model or version; it names those that there are.
    """
    if address.version is None:
        found = versions.read_latest(storage, address.name)
    else:
        found = versions.read_version(storage, address.name, address.version)
    if found:
        return found
    there = versions.list_models(storage)
    if address.name in there:
        numbers = ", ".join(str(number) for number in there[address.name])
        wanted = "latest version" if address.version is None else f"version {address.version}"
        raise SettingError(f"{storage.uri} has no {wanted} of {address.name}. Published: {numbers}.")
    names = ", ".join(there) or "none"
    raise SettingError(f"{storage.uri} has no model {address.name}. Published models: {names}.")
