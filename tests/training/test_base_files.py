"""Weights and saved models in storage, and the mirror of downloaded weights."""

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.spec.model import Base
from topwork.training.base_files import base_file, mirror


def test_downloaded_weights_are_mirrored_once_and_found_again(workspace):
    base = Base(application="MobileNet")
    assert base_file(base, workspace) is None
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="dense")])
    mirror(base, model, workspace)
    file = base_file(base, workspace)
    assert file.name == "MobileNet.weights.h5"
    other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="dense")])
    mirror(base, other, workspace)
    other.load_weights(base_file(base, workspace))
    np.testing.assert_array_equal(other.get_weights()[0], model.get_weights()[0])
    assert base_file(Base(application="MobileNet", weights="none"), workspace) is None


def test_files_come_from_storage_or_from_disk(workspace, tmp_path):
    workspace.storage.write("own/a.weights.h5", b"weights")
    uri = workspace.storage.uri_of("own/a.weights.h5")
    assert base_file(Base(application="MobileNet", weights=uri), workspace).read_bytes() == b"weights"
    (tmp_path / "a.keras").write_bytes(b"model")
    base = Base.model_validate({"saved": {"uri": str(tmp_path / "a.keras")}})
    assert base_file(base, workspace) == tmp_path / "a.keras"


def test_a_file_that_is_not_there_is_named(workspace):
    uri = workspace.storage.uri_of("own/a.keras")
    with pytest.raises(DataError, match=rf"^spec\.model\.base\.saved\.uri is {uri}, and there's no such object"):
        base_file(Base.model_validate({"saved": {"uri": uri}}), workspace)
    with pytest.raises(DataError, match=r"^spec\.model\.base\.saved\.uri is /nowhere/a\.h5, and there's no such file"):
        base_file(Base.model_validate({"saved": {"uri": "/nowhere/a.h5"}}), workspace)
