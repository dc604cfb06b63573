"""`topwork gc`: delete unneeded objects from object storage."""

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
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, like spec.storage.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted without deleting it.")] = False,
    older_than: Annotated[
        str,
        typer.Option(
            help="Minimum age of deleted objects, such as 90m, 24h or 7d; newer ones may belong to an active run."
        ),
    ] = "24h",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="State directory of the embedded S3 server [default: ~/.local/state/topwork].")
    ] = None,
) -> None:
    """Delete incomplete datasets, versions and uploads, unreferenced datasets, and checkpoints of finished stages.

    Everything that a manifest, latest.json or a run references is kept, as are checkpoints of unfinished stages and
    mirrored datasets and weights.
    """
    from topwork.registry.garbage_collection import delete_leftovers, find_leftovers

    limit = _duration(older_than)
    with open_storage(storage_uri, state) as storage:
        found = find_leftovers(storage, limit)
        if not dry_run:
            found = list(delete_leftovers(storage, found))
    if as_json:
        typer.echo(json.dumps({"dryRun": dry_run, "bytes": _total(found), "found": [_as_json(one) for one in found]}))
        return
    _print(found)
    if found:
        what = f"{len(found)} leftover{'s' if len(found) > 1 else ''}"
        typer.echo(f"{'Would free' if dry_run else 'Freed'} {format_bytes(_total(found))}: {what} in {storage_uri}.")
    else:
        typer.echo(f"Nothing to delete in {storage_uri} that is older than {older_than}.")


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if not found:
        raise SettingError(
            f"--older-than is {text!r}: expected a whole number of minutes, hours or days, such as 90m, 24h or 7d."
        )
    return timedelta(**{UNITS[found[2]]: int(found[1])})


def _total(found: "list[Leftover]") -> int:
    return sum(leftover.size for leftover in found)


def _as_json(leftover: "Leftover") -> dict[str, Any]:
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
