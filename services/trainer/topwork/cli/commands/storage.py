"""`topwork storage check`: check that an object storage supports everything that jobs need."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.runtime.environment import is_in_pod, validate_aws_variables
from topwork.cli.runtime.storage import open_configured_storage, open_pod_storage
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage

app = typer.Typer(help="Check access to object storage.", no_args_is_help=True, rich_markup_mode=None)

PREFIX = ".topwork-check"


@app.callback()
def _group() -> None:
    """Check access to object storage."""


@app.command()
def check(
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as in spec.storage.")],
) -> None:
    """Write, read and delete an object as jobs do, with the credentials of the environment.

    Exit codes: 2 a setting is wrong, or the server lacks a feature that jobs need; 75 it can't be reached.
    """
    validate_aws_variables()
    storage = _open(storage_uri)
    key, data = f"{PREFIX}/{uuid.uuid4().hex}", os.urandom(64 * 1024)
    with _print_step(f"wrote {storage.uri_of(key)}"):
        storage.write(key, data, only_if_absent=True)
    try:
        with _print_step("read it back"):
            _check_contents(storage, key, data)
        with _print_step("conditional write did not overwrite it"):
            _check_conditional_write(storage, key, data)
    finally:
        storage.delete([key])
    with _print_step("deleted it"):
        _check_deleted(storage, key)
    print(f"{storage_uri} ok")


def _open(uri: str) -> "Storage":
    if not is_in_pod():
        return open_configured_storage(uri)
    from topwork.clients.s3.connection import NullTransferCounter

    return open_pod_storage(uri, NullTransferCounter())


@contextmanager
def _print_step(description: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"  {description} ({(time.monotonic() - started) * 1000:.0f} ms)")


def _check_contents(storage: "Storage", key: str, data: bytes) -> None:
    stored = storage.read(key)
    if stored != data:
        received = "nothing" if stored is None else f"{len(stored)} different bytes"
        raise SettingError(
            f"{storage.uri} returned {received} after {len(data)} bytes were stored. A proxy between here and the "
            "server may change the data, or the server does not store objects reliably."
        )


def _check_conditional_write(storage: "Storage", key: str, data: bytes) -> None:
    """Check that only one of two writers can win: manifests are written only if none exists."""
    if storage.write(key, data[::-1], only_if_absent=True) or storage.read(key) != data:
        raise SettingError(
            f"{storage.uri} ignores If-None-Match: * and overwrote an existing object. Jobs rely on conditional "
            "writes: without them, two jobs could write the same model version. Use a server or version that supports "
            "them."
        )


def _check_deleted(storage: "Storage", key: str) -> None:
    if storage.size(key) is not None:
        raise SettingError(f"{storage.uri_of(key)} still exists after it was deleted. Is the bucket locked?")
