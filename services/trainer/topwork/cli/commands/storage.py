"""`topwork storage`: is the object storage what jobs need?"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.runtime.environment import own_storage
from topwork.cli.runtime.pod_environment import check_variables, pod_storage
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage

app = typer.Typer(help="Check an object storage.", no_args_is_help=True, rich_markup_mode=None)

FOLDER = ".topwork-check"
# In every pod, from the kubelet.
IN_POD = "KUBERNETES_SERVICE_HOST"


@app.callback()
def _group() -> None:
    """Keep `check` a command of its own, as long as it is the only one."""


@app.command()
def check(
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as spec.storage.")],
) -> None:
    """Store, read and delete an object as jobs do, with the credentials of the environment.

    Exit codes: 2 a setting is wrong, or the server lacks what jobs need; 75 it can't be reached.
    """
    check_variables()
    storage = _storage(storage_uri)
    key, data = f"{FOLDER}/{uuid.uuid4().hex}", os.urandom(64 * 1024)
    with _told(f"stored {storage.uri_of(key)}"):
        storage.write(key, data, only_if_absent=True)
    try:
        with _told("read it back"):
            _check_same(storage.read(key), data, storage)
        with _told("it is not overwritten by another writer"):
            _check_kept(storage, key, data)
    finally:
        storage.delete([key])
    with _told("deleted it"):
        _check_gone(storage, key)
    print(f"{storage_uri} ok")


def _storage(uri: str) -> "Storage":
    if not os.environ.get(IN_POD):
        return own_storage(uri)
    from topwork.clients.s3.connection import Unmetered

    return pod_storage(uri, Unmetered())


@contextmanager
def _told(what: str) -> Iterator[None]:
    before = time.monotonic()
    yield
    print(f"  {what} ({(time.monotonic() - before) * 1000:.0f} ms)")


def _check_same(found: bytes | None, data: bytes, storage: "Storage") -> None:
    if found != data:
        came = "nothing" if found is None else f"{len(found)} other bytes"
        raise SettingError(
            f"{storage.uri} gave back {came} where {len(data)} bytes had been stored. What is between here and the "
            "server changes what goes through, or the server is no object storage to rely on."
        )


def _check_kept(storage: "Storage", key: str, data: bytes) -> None:
    """Two writers must never both win: manifests are written on condition that there is none."""
    if storage.write(key, data[::-1], only_if_absent=True) or storage.read(key) != data:
        raise SettingError(
            f"{storage.uri} overwrote an object that was to be written only if absent (If-None-Match: *). Jobs need "
            "that, or two of them could write one model. Use a server or a version of it that keeps to it."
        )


def _check_gone(storage: "Storage", key: str) -> None:
    if storage.size(key) is not None:
        raise SettingError(f"{storage.uri_of(key)} is still there after it was deleted. Is the bucket locked?")
