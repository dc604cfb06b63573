"""`topwork predict`: ask a published model, or one in a file, about images."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.artifacts import download_artifact
from topwork.cli.model_address import IN_ONE_WORD, find_version, model_address
from topwork.cli.runtime.storage import open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.s3.storage import Storage
from topwork.errors import DataError, SettingError
from topwork.registry import versions

if TYPE_CHECKING:
    from topwork.report.predictor import Predictor

BATCH = 32
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})


class Shape(StrEnum):
    """How answers are written."""

    text = "text"
    json = "json"
    csv = "csv"


@dataclass(frozen=True)
class Picture:
    """An image that is asked about: its name, and how its bytes are read."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Answer:
    """What the model says of an image: classes with their probabilities, the likeliest first; or why it can't."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict(
    model: Annotated[
        str, typer.Argument(help="s3://…/models/NAME[/VERSION|/latest], folder of a version, or .keras file.")
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, s3:// objects or prefixes/.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes that are shown of each image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with one row for each class that is shown.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Folder of the embedded S3 [default: ~/.local/state/topwork].")
    ] = None,
) -> None:
    """Print the class and its probability for each image; an image that can't be read is reported, the rest go on."""
    if as_json and as_csv:
        raise SettingError("--json and --csv exclude each other. Give one of them.")
    write = _WRITERS[Shape.json if as_json else Shape.csv if as_csv else Shape.text]()
    failed = count = 0
    with ExitStack() as stack:
        storages = _Storages(stack, state)
        answering = _load(model, storages, stack)
        for answer in _answers(answering, _pictures(images, storages), top):
            write(answer)
            count += 1
            failed += bool(answer.error)
    if failed or not count:
        raise DataError(f"{failed} of {count} images could not be read." if count else "No image was found.")


class _Storages:
    """Storages by address; all of them share the settings of the first."""

    def __init__(self, stack: ExitStack, state: Path | None) -> None:
        self._stack, self._state = stack, state
        self._first: Storage | None = None

    def at(self, uri: str) -> Storage:
        if self._first is None:
            self._first = self._stack.enter_context(open_storage(uri, self._state))
        return self._first.at(uri)


def _load(model: str, storages: _Storages, stack: ExitStack) -> "Predictor":
    path = Path(model)
    if model.startswith("s3://"):
        path = _fetched(model, storages, Path(stack.enter_context(TemporaryDirectory(prefix="topwork-"))))
    with quiet_tensorflow_import():
        from topwork.report.predictor import Predictor

        return Predictor(path)


def _fetched(model: str, storages: _Storages, folder: Path) -> Path:
    if not IN_ONE_WORD.fullmatch(model) and model.endswith(".keras"):
        parent, name = model.rsplit("/", 1)
        storages.at(parent).download(name, folder / name)
        return folder / name
    address = model_address(model)
    storage = storages.at(address.storage)
    found = find_version(storage, address)
    prefix = versions.version_prefix(found.name, found.version)
    manifest = download_artifact(storage, prefix, folder, select=lambda file: file in {"model.keras", "labels.txt"})
    if "model.keras" not in manifest.files:
        download_artifact(storage, prefix, folder)
    return folder


def _pictures(words: Sequence[str], storages: _Storages) -> Iterator[Picture]:
    for word in words:
        if word.startswith("s3://"):
            yield from _stored(word, storages)
        elif Path(word).is_dir():
            found = sorted(path for path in Path(word).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            yield from (Picture(str(path), path.read_bytes) for path in found)
        else:
            yield Picture(word, Path(word).read_bytes)


def _stored(uri: str, storages: _Storages) -> Iterator[Picture]:
    parent, name = uri.rstrip("/").rsplit("/", 1)
    if uri.endswith("/"):
        storage = storages.at(uri.rstrip("/"))
        keys = [stored.key for stored in storage.list() if Path(stored.key).suffix.lower() in SUFFIXES]
    else:
        storage, keys = storages.at(parent), [name]
    for key in keys:
        yield Picture(storage.uri_of(key), lambda key=key: _read(storage, key))  # type: ignore[misc]


def _read(storage: Storage, key: str) -> bytes:
    data = storage.read(key)
    if data is None:
        raise FileNotFoundError(2, "No such object")
    return data


def _answers(answering: "Predictor", pictures: Iterator[Picture], top: int) -> Iterator[Answer]:
    while batch := list(islice(pictures, BATCH)):
        read = [_usable(picture) for picture in batch]
        files = [data for data in read if isinstance(data, bytes)]
        probabilities = iter(answering.probabilities(files)) if files else iter(())
        for picture, data in zip(batch, read, strict=True):
            if isinstance(data, str):
                yield Answer(picture.name, error=data)
                continue
            row = next(probabilities)
            best = (-row).argsort(kind="stable")[:top]
            yield Answer(picture.name, tuple((answering.class_names[index], float(row[index])) for index in best))


def _usable(picture: Picture) -> bytes | str:
    """Give the image in the form that training saw, or say why there is none."""
    from topwork.data.image_validation import Rejection
    from topwork.report.predictor import validate_file

    try:
        return validate_file(picture.read())
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except Rejection as rejection:
        return f"{rejection.reason} ({rejection.detail})" if rejection.detail else rejection.reason


def _text() -> Callable[[Answer], None]:
    def write(answer: Answer) -> None:
        if answer.error:
            typer.echo(f"{answer.image}: not an image that can be read: {answer.error}", err=True)
        else:
            shown = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in answer.classes)
            typer.echo(f"{answer.image}: {shown}")

    return write


def _json() -> Callable[[Answer], None]:
    def write(answer: Answer) -> None:
        classes = [{"class": name, "probability": probability} for name, probability in answer.classes]
        content = {"error": answer.error} if answer.error else {"classes": classes}
        typer.echo(json.dumps({"image": answer.image, **content}))

    return write


def _csv() -> Callable[[Answer], None]:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["image", "rank", "class", "probability", "error"])

    def write(answer: Answer) -> None:
        for rank, (name, probability) in enumerate(answer.classes, 1):
            rows.writerow([answer.image, rank, name, probability, ""])
        if answer.error:
            rows.writerow([answer.image, "", "", "", answer.error])

    return write


_WRITERS = {Shape.text: _text, Shape.json: _json, Shape.csv: _csv}
