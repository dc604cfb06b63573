"""Files of the pretrained base: user weights and saved models, and ImageNet weights mirrored to storage."""

import contextlib
import http.client
import io
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import keras
import structlog
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.clients.s3.storage import partial_path
from topwork.disk_space import require_free_space
from topwork.errors import DataError, SpecError, UnavailableError, quote_error
from topwork.model.backbones import find_backbone
from topwork.model.conversion.variant import Variant
from topwork.model.conversion.weights_file import LoadedWeights, load_weights_file
from topwork.registry.imagenet_weights import converted_weights_key, find_converted_weights, mirrored_weights_key
from topwork.spec.applications import NOT_DOWNLOADED
from topwork.spec.model import Base
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 3
MAX_RETRY_WAIT_SECONDS = 2.0
SOCKET_TIMEOUT_SECONDS = 60.0
_SAVE_AS_FILE = "Use a file: save the model with model.save('model.keras'), not as a TensorFlow SavedModel."
# Weights without a head are the same for every image size. MobileNet warns about sizes other than its standard ones.
STANDARD_IMAGE_SIDE = 224


def fetch_base_file(base: Base, workspace: Workspace) -> Path | None:
    """Fetch the file that the base is built from.

    ImageNet weights are downloaded once and then kept in storage for later runs.

    Args:
        base: `spec.model.base`.
        workspace: Storage and scratch directory.

    Returns:
        Path of the saved model or the weights; None if the base needs no file.

    Raises:
        DataError: If the file does not exist.
        UnavailableError: If storage cannot be reached, or ImageNet weights cannot be downloaded.
    """
    if base.saved:
        return _fetch(base.saved.uri, "spec.model.base.saved.uri", workspace)
    if base.has_weights_file:
        return _fetch(str(base.weights), "spec.model.base.weights", workspace)
    if not base.needs_imagenet:
        return None
    return _fetch_mirrored(mirror_weights(str(base.application), workspace).key, workspace)


def _fetch_mirrored(key: str, workspace: Workspace) -> Path:
    path = workspace.scratch / Path(key).name
    workspace.storage.download(key, path)
    return path


def require_mirrored_weights(name: str, workspace: Workspace) -> None:
    """Reject a model whose ImageNet weights are neither in storage nor downloaded by Keras.

    Args:
        name: Name of the model.
        workspace: Storage.

    Raises:
        DataError: If the user has to copy the weights to storage first.
    """
    if name in NOT_DOWNLOADED and workspace.storage.size(mirrored_weights_key(name)) is None:
        storage = workspace.storage.uri
        raise DataError(
            f"The ImageNet weights of {name} are not in {storage}, and Keras cannot download them. Copy them there "
            f"first: topwork mirror weights {storage} --from FILE --as {name}. FILE is a .pth file of "
            f"{NOT_DOWNLOADED[name]}."
        )


@dataclass(frozen=True)
class MirroredWeights:
    """ImageNet weights in storage.

    Attributes:
        key: Their key.
        existed: Whether storage already had them.
        variant: How the model computes that they were converted from, if a file was converted.
    """

    key: str
    existed: bool
    variant: Variant | None = None


def mirror_weights(name: str, workspace: Workspace) -> MirroredWeights:
    """Copy the ImageNet weights of Keras to storage unless it has some, so that jobs do not need internet access.

    Args:
        name: Name of the model in `APPLICATIONS`.
        workspace: Storage and scratch directory.

    Returns:
        The weights in storage. Converted weights take precedence.

    Raises:
        UnavailableError: If the download or storage failed.

    Example:
        `mirror_weights("MobileNetV2", workspace)`
    """
    if find_converted_weights(name, workspace.storage):
        return MirroredWeights(converted_weights_key(name), existed=True)
    key = mirrored_weights_key(name)
    if workspace.storage.size(key) is not None:
        return MirroredWeights(key, existed=True)
    _upload_weights(LoadedWeights(_download(name, workspace), None), key, workspace)
    return MirroredWeights(key, existed=False)


def mirror_weights_file(
    name: str, workspace: Workspace, file: Path, source_model: str | None = None, normalization: str | None = None
) -> MirroredWeights:
    """Copy ImageNet weights from a file to storage, converted if they come from another framework.

    Args:
        name: Name of the model in `APPLICATIONS`.
        workspace: Storage and scratch directory.
        file: Weights of the model, from Keras or PyTorch.
        source_model: Model of a PyTorch library that the weights come from.
        normalization: Input normalization of that model; needed if several are usual.

    Returns:
        The weights in storage.

    Raises:
        DataError: If the file does not contain weights of this model, or storage has other weights of it.
        SettingError: If the model that the weights come from is unclear or unknown.
        UnavailableError: If storage failed.
    """
    weights = load_weights_file(name, (STANDARD_IMAGE_SIDE, STANDARD_IMAGE_SIDE), file, source_model, normalization)
    key = converted_weights_key(name) if weights.variant else mirrored_weights_key(name)
    existed = False
    for stored in (converted_weights_key(name), mirrored_weights_key(name)):
        if workspace.storage.size(stored) is not None:
            _require_equal(weights, name, stored, workspace)
            existed = True
    if not existed:
        _upload_weights(weights, key, workspace)
    return MirroredWeights(key, existed, weights.variant)


def _require_equal(weights: LoadedWeights, name: str, key: str, workspace: Workspace) -> None:
    """Reject a file if storage has other weights: jobs would use those in storage, without a warning."""
    path = _fetch_mirrored(key, workspace)
    stored = load_weights_file(name, (STANDARD_IMAGE_SIDE, STANDARD_IMAGE_SIDE), path)
    path.unlink()
    if not weights.equals(stored):
        uri = workspace.storage.uri_of(key)
        raise DataError(
            f"Storage already has other weights of {name}, which jobs use: {uri}. To replace them, delete that object "
            "first. To use both, copy these weights to another storage, and name the copied file in "
            "spec.model.base.weights."
        )


def _upload_weights(weights: LoadedWeights, key: str, workspace: Workspace) -> None:
    path = workspace.scratch / Path(key).name
    weights.save(path)
    workspace.storage.upload(path, key)
    path.unlink()


def _download(name: str, workspace: Workspace) -> keras.Model:
    require_mirrored_weights(name, workspace)
    retrying = Retrying(
        retry=retry_if_exception_type(UnavailableError),
        stop=stop_after_attempt(MAX_ATTEMPTS),
        wait=wait_random_exponential(max=MAX_RETRY_WAIT_SECONDS),
        reraise=True,
    )
    log.info("downloading ImageNet weights", model=name)
    try:
        return retrying(_download_once, name)
    except UnavailableError as error:
        raise UnavailableError(
            f"{error} Without internet access, run `topwork mirror weights {workspace.storage.uri} {name}` on a "
            f"machine that has it, or pass it a file with these weights: --from FILE --as {name}."
        ) from error


def _download_once(name: str) -> keras.Model:
    # Keras prints its progress to standard output, which is reserved for the output of commands.
    with contextlib.redirect_stdout(io.StringIO()), _socket_timeout():
        try:
            return find_backbone(name).build((STANDARD_IMAGE_SIDE, STANDARD_IMAGE_SIDE), "imagenet")
        except (SpecError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            if isinstance(error, SpecError) and "file hash" not in str(error):
                raise
            reason = quote_error(error)
            raise UnavailableError(f"The ImageNet weights of {name} could not be downloaded: {reason}.") from error


@contextlib.contextmanager
def _socket_timeout() -> Iterator[None]:
    """Set a default socket timeout: Keras sets none, so a server that stops responding would block forever."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _fetch(uri: str, spec_key: str, workspace: Workspace) -> Path:
    if not uri.startswith("s3://"):
        path = Path(uri)
        if path.is_dir():
            raise DataError(f"{spec_key} is {uri}, which is a directory. {_SAVE_AS_FILE}")
        if not path.is_file():
            raise DataError(f"{spec_key} is {uri}, which does not exist. Use a local file or an s3:// object.")
        return path
    directory, _, name = uri.rpartition("/")
    source = workspace.storage.at(directory)
    if (size := source.size(name)) is None:
        if any(source.list(f"{name}/")):
            raise DataError(f"{spec_key} is {uri}, which is a directory. {_SAVE_AS_FILE}")
        raise DataError(f"{spec_key} is {uri}, and storage has no such object.")
    path = workspace.scratch / name
    # A copy that an earlier stage or attempt left must not count as used space.
    path.unlink(missing_ok=True)
    partial_path(path).unlink(missing_ok=True)
    require_free_space(workspace.scratch, size, f"Downloading {uri}", workspace.scratch_limit)
    source.download(name, path)
    return path
