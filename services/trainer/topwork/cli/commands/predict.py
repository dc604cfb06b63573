"""`topwork predict`: classify images with a published model or a model file."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
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
from topwork.data.images.rejection import EMPTY, MAX_BYTES, TOO_LARGE, UNKNOWN_FORMAT, Rejection
from topwork.data.sources.folder import ListedFile, list_directory, list_prefix
from topwork.data.sources.source import IMAGE_SUFFIXES, escape_name, is_ignored
from topwork.errors import DataError, SettingError
from topwork.registry import versions

if TYPE_CHECKING:
    from topwork.report.predictor import Predictor

BATCH_SIZE = 32
PREPROCESSING_FILE = "preprocessing.json"
# Files next to a model that change how its predictions are computed and named.
MODEL_SETTINGS = ("labels.txt", PREPROCESSING_FILE)


class OutputFormat(StrEnum):
    """Output format."""

    text = "text"
    json = "json"
    csv = "csv"


@dataclass(frozen=True)
class InputImage:
    """An image to classify.

    Attributes:
        name: Its path or URI, printable.
        read: Returns the content; raises OSError or `Rejection`.
        is_listed: Whether it was found in a directory or below a prefix, and not named by the user.
    """

    name: str
    read: Callable[[], bytes]
    is_listed: bool = False

    @property
    def may_be_other_file(self) -> bool:
        """Whether the name suggests another type of file, such as `notes.txt`, next to the images."""
        suffix = Path(self.name).suffix.lower()
        return self.is_listed and bool(suffix) and suffix not in IMAGE_SUFFIXES


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
    """Print the most probable classes of each image.

    In directories and below prefixes, the content decides which files are images, and the files that a pull ignores are
    ignored (hidden files, __MACOSX, Thumbs.db). Each unreadable image is one line of the output, and the other images
    are predicted; the exit code is then 2.
    """
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
    if path.is_file() and not path.with_name(PREPROCESSING_FILE).is_file():
        typer.echo(
            f"{PREPROCESSING_FILE} is not next to {model}: images are resized without preserving their aspect ratio.",
            err=True,
        )
    with quiet_tensorflow_import():
        from topwork.report.predictor import Predictor

        return Predictor(path)


def _download_model(model: str, storages: _Storages, directory: Path) -> Path:
    if not MODEL_URI.fullmatch(model) and model.endswith(".keras"):
        parent, name = model.rsplit("/", 1)
        storage = storages.at(parent)
        storage.download(name, directory / name)
        for file in MODEL_SETTINGS:
            if (content := storage.read(file)) is not None:
                (directory / file).write_bytes(content)
        return directory / name
    address = parse_model_address(model)
    storage = storages.at(address.storage)
    version = find_version(storage, address)
    prefix = versions.version_prefix(version.name, version.version)
    files = {"model.keras", *MODEL_SETTINGS}
    manifest = download_artifact(storage, prefix, directory, select=lambda file: file in files)
    if "model.keras" not in manifest.files:
        download_artifact(storage, prefix, directory)
    return directory


def _find_images(paths: Sequence[str], storages: _Storages) -> Iterator[InputImage]:
    for name in paths:
        if name.startswith("s3://"):
            yield from _find_stored_images(name, storages)
        elif Path(name).is_dir():
            for file in sorted(_select_files(list_directory(Path(name))), key=lambda file: file.parts):
                path = Path(name, *file.parts)
                yield InputImage(escape_name(str(path)), partial(_read_file, path), is_listed=True)
        else:
            yield InputImage(escape_name(name), partial(_read_file, Path(name)))


def _select_files(files: Iterator[ListedFile]) -> Iterator[ListedFile]:
    """Select files by the rule of the pull stage."""
    return (file for file in files if not file.is_directory and not is_ignored(file.parts))


def _find_stored_images(uri: str, storages: _Storages) -> Iterator[InputImage]:
    parent, name = uri.rstrip("/").rsplit("/", 1)
    if not uri.endswith("/"):
        storage = storages.at(parent)
        yield InputImage(escape_name(uri), partial(_read_object, storage, name))
        return
    storage = storages.at(uri.rstrip("/"))
    for file in _select_files(list_prefix(storage)):
        yield InputImage(
            escape_name(storage.uri_of(file.path)), partial(_read_object, storage, file.path), is_listed=True
        )


def _read_file(path: Path) -> bytes:
    _check_size(path.stat().st_size)
    return path.read_bytes()


def _read_object(storage: Storage, key: str) -> bytes:
    size = storage.size(key)
    _check_size(size or 0)
    data = storage.read(key) if size is not None else None
    if data is None:
        raise FileNotFoundError(2, "No such object; end a prefix with a slash")
    return data


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise Rejection(TOO_LARGE, f"{size} bytes, the limit is {MAX_BYTES}")


def _predict(predictor: "Predictor", images: Iterator[InputImage], top: int) -> Iterator[Prediction]:
    while batch := list(islice(images, BATCH_SIZE)):
        results = [(image, _read_valid_image(image)) for image in batch]
        contents = [(image, data) for image, data in results if data is not None]
        files = [data for _, data in contents if isinstance(data, bytes)]
        probabilities = iter(predictor.probabilities(files)) if files else iter(())
        for image, data in contents:
            if isinstance(data, str):
                yield Prediction(image.name, error=data)
                continue
            row = next(probabilities)
            best = (-row).argsort(kind="stable")[:top]
            yield Prediction(image.name, tuple((predictor.class_names[index], float(row[index])) for index in best))


def _read_valid_image(image: InputImage) -> bytes | str | None:
    """Return the image in the stored format, as in training, the reason why it is unreadable, or None for no image."""
    from topwork.report.predictor import validate_file

    try:
        return validate_file(image.read())
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except Rejection as rejection:
        if image.may_be_other_file and rejection.reason in {UNKNOWN_FORMAT, EMPTY, TOO_LARGE}:
            return None
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
