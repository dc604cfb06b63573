"""Files that a base is made from: weights and saved models in storage, and the mirror of ImageNet weights."""

from pathlib import Path

import keras

from topwork.errors import DataError
from topwork.spec.model import Base
from topwork.workspace import Workspace


def base_file(base: Base, workspace: Workspace) -> Path | None:
    """Bring the file that the spec's base is made from to scratch.

    Args:
        base: `spec.model.base`.
        workspace: Storage and scratch.

    Returns:
        The saved model or the weights; None where there's no file, or ImageNet weights aren't mirrored yet.

    Raises:
        DataError: If there's no such file.
        UnavailableError: If storage can't be reached.
    """
    if base.saved:
        return _fetched(base.saved.uri, "spec.model.base.saved.uri", workspace)
    if base.weights and base.weights.startswith("s3://"):
        return _fetched(base.weights, "spec.model.base.weights", workspace)
    if (key := _mirror_key(base)) and workspace.storage.size(key) is not None:
        path = workspace.scratch / Path(key).name
        workspace.storage.download(key, path)
        return path
    return None


def mirror(base: Base, model: keras.Model, workspace: Workspace) -> None:
    """Keep downloaded ImageNet weights in storage: the next run needs no internet.

    Args:
        base: `spec.model.base`.
        model: The base as it was downloaded.
        workspace: Storage and scratch.
    """
    key = _mirror_key(base)
    if key is None or workspace.storage.size(key) is not None:
        return
    path = workspace.scratch / Path(key).name
    model.save_weights(path)
    workspace.storage.upload(path, key)
    path.unlink()


def _mirror_key(base: Base) -> str | None:
    wanted = base.application and base.weights in {None, "imagenet"}
    return f"weights/imagenet/{base.application}.weights.h5" if wanted else None


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
