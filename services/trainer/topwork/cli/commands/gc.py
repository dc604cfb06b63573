"""`topwork gc`: delete unneeded objects from object storage."""

import json
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topwork.cli.options import State
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
    state: State = None,
) -> None:
    """Delete incomplete datasets, versions and uploads, unreferenced datasets and results, and old checkpoints.

    Everything that a manifest, latest.json or a run references is kept, as are checkpoints of unfinished stages and
    mirrored datasets and weights.
    """
    from topwork.registry.garbage_collection import delete_leftovers, find_leftovers

    min_age = _duration(older_than)
    with open_storage(storage_uri, state) as storage:
        leftovers = find_leftovers(storage, min_age)
        if not dry_run:
            leftovers = list(delete_leftovers(storage, leftovers))
    if as_json:
        items = [_as_json(leftover) for leftover in leftovers]
        typer.echo(json.dumps({"dryRun": dry_run, "bytes": _total(leftovers), "found": items}))
        return
    _print(leftovers)
    if leftovers:
        count = f"{len(leftovers)} leftover{'s' if len(leftovers) > 1 else ''}"
        size = format_bytes(_total(leftovers))
        typer.echo(f"{'Would free' if dry_run else 'Freed'} {size}: {count} in {storage_uri}.")
    else:
        typer.echo(f"Nothing to delete in {storage_uri} that is older than {older_than}.")


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if not match:
        raise SettingError(
            f"--older-than is {text!r}: expected a whole number of minutes, hours or days, such as 90m, 24h or 7d."
        )
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def _total(leftovers: "list[Leftover]") -> int:
    return sum(leftover.size for leftover in leftovers)


def _as_json(leftover: "Leftover") -> dict[str, Any]:
    return {
        "kind": leftover.kind,
        "key": leftover.prefix,
        "objects": len(leftover.keys),
        "bytes": leftover.size,
        "newest": leftover.newest.isoformat(),
    }


def _print(leftovers: "list[Leftover]") -> None:
    for leftover in leftovers:
        newest = f"{leftover.newest:%Y-%m-%d %H:%M}"
        typer.echo(f"{leftover.kind:<20}  {format_bytes(leftover.size):>10}  {newest}  {leftover.prefix}")
