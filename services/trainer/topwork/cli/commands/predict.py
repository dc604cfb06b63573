"""`topwork predict`: classify images with a published model or a model file."""

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
from topwork.cli.model_address import MODEL_URI, find_version, parse_model_address
from topwork.cli.options import State
from topwork.cli.runtime.storage import open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.s3.storage import Storage
from topwork.errors import DataError, SettingError
from topwork.registry import versions

if TYPE_CHECKING:
    from topwork.report.predictor import Predictor

BATCH_SIZE = 32
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"})


class OutputFormat(StrEnum):
    """Output format."""

    text = "text"
    json = "json"
    csv = "csv"


@dataclass(frozen=True)
class InputImage:
    """An image to classify: its name, and a function that reads its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Prediction:
    """Prediction for an image: the most probable classes with their probabilities, or an error."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str = ""


def predict(
    model: Annotated[
        str, typer.Argument(help="s3://…/models/NAME[/VERSION|/latest], directory of a version, or .keras file.")
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, directories, s3:// objects or prefixes/.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to print per image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with one row per class.")] = False,
    state: State = None,
) -> None:
    """Print the most probable classes of each image. Unreadable images are reported, and the exit code is then 2."""
    if as_json and as_csv:
        raise SettingError("--json and --csv are mutually exclusive.")
    write = _WRITERS[OutputFormat.json if as_json else OutputFormat.csv if as_csv else OutputFormat.text]()
    failed = count = 0
    with ExitStack() as stack:
        storages = _Storages(stack, state)
        predictor = _load(model, storages, stack)
        for prediction in _predict(predictor, _find_images(images, storages), top):
            write(prediction)
            count += 1
            failed += bool(prediction.error)
    if failed or not count:
        raise DataError(f"{failed} of {count} images could not be read." if count else "No images found.")


class _Storages:
    """Opens storages by URI; all share the settings of the first one."""

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
        path = _download_model(model, storages, Path(stack.enter_context(TemporaryDirectory(prefix="topwork-"))))
    with quiet_tensorflow_import():
        from topwork.report.predictor import Predictor

        return Predictor(path)


def _download_model(model: str, storages: _Storages, directory: Path) -> Path:
    if not MODEL_URI.fullmatch(model) and model.endswith(".keras"):
        parent, name = model.rsplit("/", 1)
        storages.at(parent).download(name, directory / name)
        return directory / name
    address = parse_model_address(model)
    storage = storages.at(address.storage)
    version = find_version(storage, address)
    prefix = versions.version_prefix(version.name, version.version)
    files = {"model.keras", "labels.txt", "preprocessing.json"}
    manifest = download_artifact(storage, prefix, directory, select=lambda file: file in files)
    if "model.keras" not in manifest.files:
        download_artifact(storage, prefix, directory)
    return directory


def _find_images(paths: Sequence[str], storages: _Storages) -> Iterator[InputImage]:
    for name in paths:
        if name.startswith("s3://"):
            yield from _find_stored_images(name, storages)
        elif Path(name).is_dir():
            files = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            yield from (InputImage(str(path), path.read_bytes) for path in files)
        else:
            yield InputImage(name, Path(name).read_bytes)


def _find_stored_images(uri: str, storages: _Storages) -> Iterator[InputImage]:
    parent, name = uri.rstrip("/").rsplit("/", 1)
    if uri.endswith("/"):
        storage = storages.at(uri.rstrip("/"))
        keys = [stored.key for stored in storage.list() if Path(stored.key).suffix.lower() in SUFFIXES]
    else:
        storage, keys = storages.at(parent), [name]
    for key in keys:
        yield InputImage(storage.uri_of(key), lambda key=key: _read(storage, key))  # type: ignore[misc]


def _read(storage: Storage, key: str) -> bytes:
    data = storage.read(key)
    if data is None:
        raise FileNotFoundError(2, "No such object")
    return data


def _predict(predictor: "Predictor", images: Iterator[InputImage], top: int) -> Iterator[Prediction]:
    while batch := list(islice(images, BATCH_SIZE)):
        contents = [_read_valid_image(image) for image in batch]
        files = [data for data in contents if isinstance(data, bytes)]
        probabilities = iter(predictor.probabilities(files)) if files else iter(())
        for image, data in zip(batch, contents, strict=True):
            if isinstance(data, str):
                yield Prediction(image.name, error=data)
                continue
            row = next(probabilities)
            best = (-row).argsort(kind="stable")[:top]
            yield Prediction(image.name, tuple((predictor.class_names[index], float(row[index])) for index in best))


def _read_valid_image(image: InputImage) -> bytes | str:
    """Return the image in the stored format, as in training, or the reason why it is unreadable."""
    from topwork.data.image_validation import Rejection
    from topwork.report.predictor import validate_file

    try:
        return validate_file(image.read())
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except Rejection as rejection:
        return f"{rejection.reason} ({rejection.detail})" if rejection.detail else rejection.reason


def _text() -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        if prediction.error:
            typer.echo(f"{prediction.image}: cannot be read: {prediction.error}", err=True)
        else:
            classes = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in prediction.classes)
            typer.echo(f"{prediction.image}: {classes}")

    return write


def _json() -> Callable[[Prediction], None]:
    def write(prediction: Prediction) -> None:
        classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
        content = {"error": prediction.error} if prediction.error else {"classes": classes}
        typer.echo(json.dumps({"image": prediction.image, **content}))

    return write


def _csv() -> Callable[[Prediction], None]:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["image", "rank", "class", "probability", "error"])

    def write(prediction: Prediction) -> None:
        for rank, (name, probability) in enumerate(prediction.classes, 1):
            rows.writerow([prediction.image, rank, name, probability, ""])
        if prediction.error:
            rows.writerow([prediction.image, "", "", "", prediction.error])

    return write


_WRITERS = {OutputFormat.text: _text, OutputFormat.json: _json, OutputFormat.csv: _csv}
