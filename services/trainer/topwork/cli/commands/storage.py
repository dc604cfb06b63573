"""`topwork storage check`: check that an object storage supports everything that jobs need."""

from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.runtime.environment import is_in_pod, validate_aws_variables
from topwork.cli.runtime.storage import open_configured_storage, open_pod_storage

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage

app = typer.Typer(help="Check access to object storage.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Check access to object storage."""


@app.command()
def check(
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as in spec.storage.")],
) -> None:
    """Try every operation that jobs need on small objects, with the credentials of the environment.

    Jobs run the same check before they start. Exit codes: 2 a setting is wrong, or the server lacks a feature that jobs
    need; 75 it can't be reached, or rejects the credentials.
    """
    from topwork.clients.s3.storage_check import check_storage

    validate_aws_variables()
    storage = _open(storage_uri)
    check_storage(storage, lambda operation, seconds: print(f"  {operation} ({seconds * 1000:.0f} ms)"))
    if storage.server.deletion.mode == "single":
        print("  deletes objects one by one: the server does not support DeleteObjects")
    if not storage.server.uses_checksums:
        print("  uploads without checksums: the server does not support them, or they are disabled")
    print(f"{storage_uri} ok")


def _open(uri: str) -> "Storage":
    if not is_in_pod():
        return open_configured_storage(uri)
    from topwork.clients.s3.connection import NullTransferCounter

    return open_pod_storage(uri, NullTransferCounter())
