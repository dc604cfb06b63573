"""`topwork gc`: delete from a storage what nobody needs."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topwork.cli.runtime.storage import open_storage
from topwork.disk_space import format_bytes
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.registry.garbage_collection import Leftover

UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def gc(
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, as spec.storage.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")] = False,
    older_than: Annotated[
        str, typer.Option(help="Leave what was written in this time, such as 90m, 24h or 7d: a run may be at work.")
    ] = "24h",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the embedded S3 [default: ~/.local/state/topwork].")
    ] = None,
) -> None:
    """Delete half-written datasets, versions and uploads, unreferenced datasets, and checkpoints of finished stages.

    Stays: what a manifest, a pointer or a run names, checkpoints of stages that are not done, mirrored datasets and
    weights.
    """
    from topwork.registry.garbage_collection import leftovers, remove

    limit = _duration(older_than)
    with open_storage(storage_uri, state) as storage:
        found = leftovers(storage, limit)
        if not dry_run:
            found = list(remove(storage, found))
    if as_json:
        typer.echo(json.dumps({"dryRun": dry_run, "bytes": _total(found), "found": [_told(one) for one in found]}))
        return
    _print(found)
    if found:
        what = f"{len(found)} leftover{'s' if len(found) > 1 else ''}"
        typer.echo(f"{'Would free' if dry_run else 'Freed'} {format_bytes(_total(found))}: {what} in {storage_uri}.")
    else:
        typer.echo(f"Nothing in {storage_uri} is left over that is older than {older_than}.")


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if not found:
        raise SettingError(
            f"--older-than is {text!r}: expected a whole number of minutes, hours or days, such as 90m, 24h or 7d."
        )
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _total(found: "list[Leftover]") -> int:
    return sum(leftover.size for leftover in found)


def _told(leftover: "Leftover") -> dict[str, Any]:
    return {
        "kind": leftover.kind,
        "key": leftover.prefix,
        "objects": len(leftover.keys),
        "bytes": leftover.size,
        "newest": leftover.newest.isoformat(),
    }


def _print(found: "list[Leftover]") -> None:
    for leftover in found:
        when = f"{leftover.newest:%Y-%m-%d %H:%M}"
        typer.echo(f"{leftover.kind:<20}  {format_bytes(leftover.size):>10}  {when}  {leftover.prefix}")
