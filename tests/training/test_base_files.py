"""Weights and saved models in storage, and the mirror of downloaded weights."""

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.freezing import leaves
from topwork.spec.model import Base
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
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


def test_a_mirrored_backbone_goes_through_both_stages_with_its_statistics_untouched(make_job, workspace):
    source = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in leaves(source):
        if isinstance(layer, keras.layers.BatchNormalization):
            # Unlike those of the images: one normalization that is not in inference mode would move them.
            layer.moving_mean.assign(np.full(layer.moving_mean.shape, 0.1))
    mirror(Base(application="MobileNetV2"), source, workspace)
    job = make_job(
        model={"base": {"application": "MobileNetV2"}},
        transfer={"epochs": 2, "batchSize": 8, "optimizer": {"learningRate": 0.01}},
        fineTune={"unfreeze": {"from": "block_15_expand"}, "epochs": 1, "optimizer": {"learningRate": 0.001}},
    )
    dataset = pull(job, workspace)
    classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    ended = {layer.name: layer.get_weights() for layer in leaves(keras.models.load_model(path, compile=False))}
    moved = {
        layer.name
        for layer in leaves(source)
        if layer.weights
        and any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), ended[layer.name], strict=True))
    }
    # What an untrained backbone gives its lower layers to learn from may round to nothing; no other may move at all.
    convolutions = {f"block_{block}_{part}" for block in (15, 16) for part in ("expand", "depthwise", "project")}
    assert {"Conv_1"} <= moved <= {"Conv_1"} | convolutions
