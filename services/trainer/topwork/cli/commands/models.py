"""`topwork models`: list, show and download published models."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from topwork.artifacts import download_artifact, read_manifest
from topwork.cli.model_address import open_version, parse_model_address
from topwork.cli.options import State
from topwork.cli.runtime.storage import open_storage
from topwork.errors import SettingError
from topwork.registry import versions
from topwork.registry.cross_validation import format_images, format_mean
from topwork.registry.versions import Version

app = typer.Typer(help="List, show and download published models.", no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Number = Annotated[int | None, typer.Option("--version", min=1, help="Version of the model [default: the latest].")]
WHERE = "s3://bucket/prefix of the models, or s3://bucket/prefix/models/NAME[/VERSION]."
MEBIBYTE = 2**20


@app.command("list")
def list_models(
    storage_uri: Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, like spec.storage.")],
    as_json: Json = False,
    state: State = None,
) -> None:
    """List published models with their latest version."""
    with open_storage(storage_uri, state) as storage:
        models = {
            name: (numbers, versions.read_latest(storage, name) or versions.read_version(storage, name, numbers[-1]))
            for name, numbers in versions.list_models(storage).items()
        }
    if as_json:
        content = [
            {"name": name, "versions": numbers, "latest": latest.model_dump(mode="json") if latest else None}
            for name, (numbers, latest) in models.items()
        ]
        typer.echo(json.dumps(content, indent=2))
        return
    if not models:
        typer.echo(f"No models are published in {storage_uri}.")
        return
    table = Table("model", "latest", "versions", "metric", "published", box=None, pad_edge=False)
    for name, (numbers, latest) in models.items():
        table.add_row(name, str(latest.version) if latest else "", str(len(numbers)), *_main_metric(latest))
    Console(highlight=False, soft_wrap=True).print(table)


@app.command()
def show(
    where: Annotated[str, typer.Argument(help=WHERE)],
    name: Annotated[str | None, typer.Argument(help="Name of the model, if WHERE is a storage URI.")] = None,
    version: Number = None,
    as_json: Json = False,
    state: State = None,
) -> None:
    """Show a published version: metrics, origin and files."""
    with open_version(parse_model_address(where, name, version), state) as (storage, published):
        prefix = versions.version_prefix(published.name, published.version)
        manifest = read_manifest(storage, prefix)
        files = manifest.files if manifest else {}
    if as_json:
        sizes = {file: entry.size for file, entry in files.items()}
        typer.echo(json.dumps({**published.model_dump(mode="json"), "files": sizes}, indent=2))
        return
    total = sum(entry.size for entry in files.values()) / MEBIBYTE
    lines = {"model": published.uri, "run": published.run, "published": published.published}
    deviations = published.deviations
    lines |= {metric: format_mean(value, deviations.get(metric)) for metric, value in published.metrics.items()}
    lines |= {"evaluated": format_images(published.images, published.split)}
    if published.excluded_classes:
        lines |= {"classes": f"{published.excluded_classes} without images in the {published.split} split are excluded"}
    lines |= {"files": f"{len(files)}, {total:.1f} MiB: {', '.join(sorted(files))}"}
    width = max(len(label) for label in lines)
    typer.echo(f"{published.name} version {published.version}")
    for label, value in lines.items():
        typer.echo(f"  {label:<{width}}  {value}")


@app.command()
def fetch(
    where: Annotated[str, typer.Argument(help=WHERE)],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME] TARGET", help="Name of the model, if WHERE is a storage URI, and target directory."
        ),
    ],
    version: Number = None,
    state: State = None,
) -> None:
    """Download a published version to a directory. Files are verified; on failure the directory is not created."""
    if len(words) > 2:
        raise SettingError(f"Got {len(words) + 1} arguments. Expected STORAGE NAME TARGET, or MODEL TARGET.")
    target = Path(words[-1])
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SettingError(f"{target} already exists. Use a new or empty directory.")
    with open_version(parse_model_address(where, words[0] if len(words) == 2 else None, version), state) as (
        storage,
        published,
    ):
        part = target.absolute().with_name(f".{target.absolute().name}.part")
        shutil.rmtree(part, ignore_errors=True)  # leftovers of an interrupted command
        try:
            download_artifact(storage, versions.version_prefix(published.name, published.version), part)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    typer.echo(f"Fetched {published.uri} to {target}")


def _main_metric(version: Version | None) -> tuple[str, str]:
    if version is None:
        return "", ""
    value = version.metrics.get(version.main_metric)
    return (f"{version.main_metric} {value:.4f}" if value is not None else ""), version.published
