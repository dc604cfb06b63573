"""Files that a base is made from: weights and saved models in storage, and the mirror of ImageNet weights."""

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import keras
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.errors import DataError, SpecError, UnavailableError
from topwork.model.backbones import backbone
from topwork.spec.model import Base
from topwork.workspace import Workspace

ATTEMPTS = 3
LONGEST_WAIT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
# Weights without a head are the same for every image size; MobileNet warns of any but its own sides.
SIDE = 224


def base_file(base: Base, workspace: Workspace) -> Path | None:
    """Bring the file that the spec's base is made from to scratch.

    Args:
        base: `spec.model.base`.
        workspace: Storage, where downloaded ImageNet weights are kept for the next run, and scratch.

    Returns:
        The saved model or the weights; None where the base needs no file.

    Raises:
        DataError: If there's no such file.
        UnavailableError: If storage can't be reached, or ImageNet weights could not be downloaded.
    """
    if base.saved:
        return _fetched(base.saved.uri, "spec.model.base.saved.uri", workspace)
    if base.weights not in {None, "imagenet", "none"}:
        return _fetched(base.weights, "spec.model.base.weights", workspace)
    if not base.needs_imagenet:
        return None
    name = str(base.application)
    mirror_weights(name, workspace)
    path = workspace.scratch / Path(mirror_key(name)).name
    workspace.storage.download(mirror_key(name), path)
    return path


def mirror_key(name: str) -> str:
    """Give the key of the mirrored ImageNet weights of a model of keras.applications."""
    return f"weights/imagenet/{name}.weights.h5"


def mirror_weights(name: str, workspace: Workspace, file: Path | None = None) -> bool:
    """Bring ImageNet weights into storage, unless they are there: jobs then need no internet for them.

    Args:
        name: Name of the model in keras.applications.
        workspace: Storage, progress and scratch.
        file: Weights of the model without its head; None downloads Keras' own.

    Returns:
        Whether they were there.

    Raises:
        DataError: If the file doesn't hold this model's weights.
        UnavailableError: If the download or storage failed.
    """
    key = mirror_key(name)
    if workspace.storage.size(key) is not None:
        return True
    model = backbone(name).build((SIDE, SIDE), file) if file else _downloaded(name, workspace)
    path = workspace.scratch / Path(key).name
    model.save_weights(path)
    workspace.storage.upload(path, key)
    path.unlink()
    return False


def _downloaded(name: str, workspace: Workspace) -> keras.Model:
    retrying = Retrying(
        retry=retry_if_exception_type(UnavailableError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(max=LONGEST_WAIT_SECONDS),
        reraise=True,
    )
    workspace.progress.note("downloading ImageNet weights", model=name)
    try:
        return retrying(_download, name)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error} Where there is no internet, run `topwork mirror weights {workspace.storage.uri} {name}` on a "
            "machine that has it, or give it a file of these weights with --file."
        ) from error


def _download(name: str) -> keras.Model:
    # Keras shows its progress on standard output, which belongs to the commands.
    with contextlib.redirect_stdout(io.StringIO()), _impatient():
        try:
            return backbone(name).build((SIDE, SIDE), "imagenet")
        except (SpecError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            if isinstance(error, SpecError) and "file hash" not in str(error):
                raise
            raise UnavailableError(f"The ImageNet weights of {name} could not be downloaded: {error}.") from error


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Let no server that falls silent hold up a download for ever: Keras sets no time limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _fetched(uri: str, where: str, workspace: Workspace) -> Path:
    if not uri.startswith("s3://"):
        path = Path(uri.removeprefix("file://"))
        if not path.is_file():
            raise DataError(f"{where} is {uri}, and there's no such file here. Name a local file or an s3:// object.")
        return path
    folder, _, name = uri.rpartition("/")
    source = workspace.storage.at(folder)
    if source.size(name) is None:
        raise DataError(f"{where} is {uri}, and there's no such object in storage.")
    path = workspace.scratch / name
    source.download(name, path)
    return path
