"""`topwork datasets`: list, show and compare stored datasets."""

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer

from topwork.artifacts import read_manifest
from topwork.cli.options import State
from topwork.cli.output.tables import format_table
from topwork.cli.runtime.storage import open_storage
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import DATASETS_PREFIX, StoredDataset, dataset_prefix
from topwork.data.sources.source import SourceEntry, sanitize_name
from topwork.errors import SettingError
from topwork.registry import versions
from topwork.registry.dataset_changes import DatasetChanges, compare_entries
from topwork.registry.datasets import list_datasets, read_entries, read_stored_dataset

app = typer.Typer(help="List, show and compare stored datasets.", no_args_is_help=True, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StorageUri = Annotated[str, typer.Argument(metavar="STORAGE", help="s3://bucket/prefix, like spec.storage.")]
DATASET = "NAME or NAME/FINGERPRINT, as in the list. Without the fingerprint, the newest dataset of this name."
MEBIBYTE = 2**20


@app.command("list")
def list_command(storage_uri: StorageUri, as_json: Json = False, state: State = None) -> None:
    """List stored datasets, the newest last, with the models trained on them."""
    with open_storage(storage_uri, state) as storage:
        datasets, models = list_datasets(storage), _models_by_dataset(storage)
    if as_json:
        content = [_summary(dataset, models) for dataset in datasets]
        typer.echo(json.dumps(content, indent=2))
        return
    if not datasets:
        typer.echo(f"No datasets are stored in {storage_uri}.")
        return
    rows = [
        (
            _address(dataset),
            dataset.metadata.origin,
            ", ".join(models.get(dataset.prefix, ())),
            str(len(dataset.metadata.class_names)),
            str(dataset.metadata.images),
        )
        for dataset in datasets
    ]
    for line in format_table(("DATASET", "SOURCE", "MODELS", "CLASSES", "IMAGES"), rows, text_columns=3):
        typer.echo(line)


@app.command()
def show(
    storage_uri: StorageUri,
    address: Annotated[str, typer.Argument(metavar="DATASET", help=DATASET)],
    as_json: Json = False,
    state: State = None,
) -> None:
    """Show a stored dataset: source, images of each class and split, and the models trained on it."""
    with open_storage(storage_uri, state) as storage:
        dataset, models = _find_dataset(storage, address), _models_by_dataset(storage)
        manifest = read_manifest(storage, dataset.prefix)
        total = sum(entry.size for entry in manifest.files.values()) if manifest else 0
    if as_json:
        content = {**_summary(dataset, models), "bytes": total, "splits": dataset.metadata.splits}
        typer.echo(json.dumps(content, indent=2))
        return
    metadata = dataset.metadata
    lines = {
        "uri": f"{storage_uri.rstrip('/')}/{dataset.prefix}",
        "source": json.dumps(metadata.source),
        "images": f"{metadata.images}, {total / MEBIBYTE:.1f} MiB",
        "rejected": str(len(metadata.rejected)),
        "duplicates": str(metadata.duplicates),
        "models": ", ".join(models.get(dataset.prefix, ())) or "none",
    }
    for label, value in lines.items():
        typer.echo(f"{label:<10}  {value}")
    for note in metadata.class_selection.describe() if metadata.class_selection else ():
        typer.echo(f"{'classes':<10}  {note}")
    typer.echo("")
    rows = [(name, *(str(counts.get(name, 0)) for counts in metadata.splits.values())) for name in metadata.class_names]
    for line in format_table(("CLASS", *map(str.upper, metadata.splits)), rows):
        typer.echo(line)


@app.command()
def diff(
    storage_uri: StorageUri,
    before: Annotated[str, typer.Argument(metavar="BEFORE", help=DATASET)],
    after: Annotated[str, typer.Argument(metavar="AFTER", help=DATASET)],
    as_json: Json = False,
    state: State = None,
) -> None:
    """List the images that were added, removed, relabeled, changed or moved between two datasets."""
    with open_storage(storage_uri, state) as storage:
        datasets = [_find_dataset(storage, address) for address in (before, after)]
        changes = compare_entries(*(_read_listing(storage, dataset) for dataset in datasets))
    selections = [dataset.metadata.class_setting for dataset in datasets]
    if as_json:
        typer.echo(json.dumps({**asdict(changes), "class_settings": selections}, indent=2))
        return
    for line in _format_changes(changes):
        typer.echo(line)
    if selections[0] != selections[1]:
        shown = [json.dumps(setting, ensure_ascii=False) if setting else "unset" for setting in selections]
        typer.echo(sanitize_name(f"spec.dataset.classes: {' -> '.join(shown)}"))
    typer.echo(changes.describe() or "The datasets have the same images.")


def _format_changes(changes: DatasetChanges) -> list[str]:
    """Return one line for each image, which begins like those of `diff`."""
    return [
        *(f"- {_format(entry)}" for entry in changes.removed),
        *(f"+ {_format(entry)}" for entry in changes.added),
        *(f"! {_format(one)} -> {sanitize_name(other.label or 'no class')}" for one, other in changes.relabeled),
        *(f"* {_format(entry)}: content changed" for _, entry in changes.changed),
        *(f"> {_format(one)}: {_place(one)} -> {_place(other)}" for one, other in changes.moved),
    ]


def _format(entry: SourceEntry) -> str:
    return f"{sanitize_name(entry.path)} ({sanitize_name(entry.label or 'no class')})"


def _place(entry: SourceEntry) -> str:
    return sanitize_name("/".join(filter(None, (entry.split, entry.group))) or "no split")


def _read_listing(storage: Storage, dataset: StoredDataset) -> list[SourceEntry]:
    entries = read_entries(dataset, storage)
    if entries is None:
        raise SettingError(
            f"The dataset {_address(dataset)} has no listing of its source. Only datasets of folders, tables and local "
            "zip files can be compared."
        )
    return entries


def _find_dataset(storage: Storage, address: str) -> StoredDataset:
    name, _, fingerprint = re.sub(f"^(s3://.*/)?{DATASETS_PREFIX}/", "", address).rstrip("/").partition("/")
    if fingerprint:
        dataset = read_stored_dataset(storage, dataset_prefix(name, fingerprint))
    else:
        dataset = next(reversed(list_datasets(storage, name)), None)
    if dataset is None:
        found = ", ".join(map(_address, list_datasets(storage))) or "none"
        raise SettingError(f"{storage.uri} has no dataset {address}. Stored datasets: {found}.")
    return dataset


def _address(dataset: StoredDataset) -> str:
    return dataset.prefix.removeprefix(f"{DATASETS_PREFIX}/")


def _summary(dataset: StoredDataset, models: dict[str, list[str]]) -> dict[str, object]:
    metadata = dataset.metadata
    return {
        "name": metadata.name,
        "fingerprint": metadata.fingerprint,
        "source": metadata.source,
        "images": metadata.images,
        "classes": metadata.class_counts,
        "class_selection": metadata.class_selection.model_dump(mode="json") if metadata.class_selection else None,
        "rejected": len(metadata.rejected),
        "duplicates": metadata.duplicates,
        "models": models.get(dataset.prefix, []),
    }


def _models_by_dataset(storage: Storage) -> dict[str, list[str]]:
    """Return the published versions, such as `cats/3`, by the key prefix of their dataset."""
    models: dict[str, list[str]] = {}
    for name, numbers in versions.list_models(storage).items():
        for number in numbers:
            if version := versions.read_version(storage, name, number):
                models.setdefault(version.dataset, []).append(f"{name}/{number}")
    return models
