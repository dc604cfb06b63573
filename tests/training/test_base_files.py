"""Files of the base: user weights and saved models, and mirrored ImageNet weights."""

import functools
import http.server
import shutil
import threading

import h5py
import keras
import numpy as np
import pytest
from keras.src.applications import efficientnet, mobilenet
from keras.src.legacy.saving import legacy_h5_format
from safetensors.numpy import save_file
from tests.conversion.random_weights import draw_state

from topwork.description.describe import describe
from topwork.description.known_dataset import KnownDataset
from topwork.errors import DataError, UnavailableError
from topwork.model.backbones import find_backbone
from topwork.model.classifier import build_classifier, with_precision
from topwork.model.conversion.mobile_blocks import timm_mobilenet_v2
from topwork.model.layer_tree import leaf_layers
from topwork.registry.stage_keys import stage_keys
from topwork.spec.model import Base
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training import base_files
from topwork.training.base_files import fetch_base_file, mirror_weights, mirror_weights_file


@pytest.fixture
def weights(tmp_path):
    """Path of a file with weights of MobileNet without its head, and their values."""
    model = keras.applications.MobileNet(weights=None, include_top=False)
    model.save_weights(tmp_path / "own.weights.h5")
    return tmp_path / "own.weights.h5", model.get_weights()


def test_weights_are_mirrored_once_and_then_fetched(workspace, weights):
    file, values = weights
    assert not mirror_weights_file("MobileNet", workspace, file).existed
    assert mirror_weights_file("MobileNet", workspace, file).existed
    path = fetch_base_file(Base(application="MobileNet"), workspace)
    assert path.name == "MobileNet.weights.h5"
    model = find_backbone("MobileNet").build((64, 48), path)
    for actual, expected in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert fetch_base_file(Base(application="MobileNet", weights="none"), workspace) is None


def test_weights_in_the_spec_can_be_a_local_path_or_in_storage(workspace, weights):
    file, values = weights
    workspace.storage.upload(file, "bases/own.weights.h5")
    for uri in (str(file), f"{workspace.storage.uri}/bases/own.weights.h5"):
        path = fetch_base_file(Base(application="MobileNet", weights=uri), workspace)
        for actual, expected in zip(
            find_backbone("MobileNet").build((32, 32), path).get_weights(), values, strict=True
        ):
            np.testing.assert_array_equal(actual, expected)
    with pytest.raises(DataError, match=r"^spec\.model\.base\.weights is /no/w\.h5, which does not exist"):
        fetch_base_file(Base(application="MobileNet", weights="/no/w.h5"), workspace)


@pytest.fixture
def state_dict(tmp_path):
    """File of a state dict of mobilenetv2_100 of timm."""
    shapes = {}
    model = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3))
    names = timm_mobilenet_v2([layer.name for layer in model.layers if layer.weights])
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            for suffix in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{names[layer.name]}.{suffix}"] = layer.gamma.shape
        elif layer.weights:
            height, width, inputs, outputs = layer.kernel.shape
            is_depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            shape = (inputs, 1, height, width) if is_depthwise else (outputs, inputs, height, width)
            shapes[f"{names[layer.name]}.weight"] = shape
    save_file(draw_state(shapes), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_converted_weights_are_used_by_jobs_and_never_mixed_with_others(workspace, state_dict, make_job, tmp_path):
    job = make_job(model={"base": {"application": "MobileNetV2"}})
    before = stage_keys(job, "0" * 16, workspace.storage).transfer
    mirrored = mirror_weights_file("MobileNetV2", workspace, state_dict, "mobilenetv2_100")
    assert mirrored.key == "weights/imagenet/MobileNetV2.converted.weights.h5"
    assert mirrored.variant.describe() == (
        "timm/mobilenetv2_100: symmetric padding of strided convolutions, BatchNorm epsilon 1e-05, mean 0.485 0.456 "
        "0.406, deviation 0.229 0.224 0.225"
    )
    assert stage_keys(job, "0" * 16, workspace.storage).transfer != before
    assert mirror_weights("MobileNetV2", workspace).key == mirrored.key
    path = fetch_base_file(Base(application="MobileNetV2"), workspace)
    model = build_classifier(job.spec.model, (32, 32), 2, path)
    np.testing.assert_allclose(model.get_layer("input_scaling").scale, [1 / 58.395, 1 / 57.12, 1 / 57.375], rtol=1e-6)
    assert model.get_layer("base").get_layer("bn_Conv1").epsilon == 1e-5
    assert "mean 0.485 0.456 0.406" in describe(job, KnownDataset(2, {}, None, ()), path).base.scaling

    assert mirror_weights_file("MobileNetV2", workspace, state_dict, "mobilenetv2_100").existed
    with pytest.raises(DataError, match=r"^Storage already has other weights of MobileNetV2, which jobs use: s3://"):
        mirror_weights_file("MobileNetV2", workspace, state_dict, "mobilenetv2_100", "half")
    find_backbone("MobileNetV2").build((32, 32), None).save_weights(tmp_path / "keras.weights.h5")
    with pytest.raises(DataError, match=r"^Storage already has other weights"):
        mirror_weights_file("MobileNetV2", workspace, tmp_path / "keras.weights.h5")


def test_state_dict_as_weights_of_a_job_is_rejected(state_dict):
    with pytest.raises(DataError, match=r"^model\.safetensors is a file of PyTorch.*--from model\.safetensors --as"):
        find_backbone("MobileNetV2").build((32, 32), state_dict)


def test_weights_of_another_model_are_rejected_and_not_stored(workspace, weights):
    with pytest.raises(DataError, match=r"^own\.weights\.h5 does not contain the weights of MobileNetV2"):
        mirror_weights_file("MobileNetV2", workspace, weights[0])
    (weights[0].parent / "text.weights.h5").write_text("no weights")
    with pytest.raises(DataError, match=r"^text\.weights\.h5 does not contain the weights of MobileNet without"):
        mirror_weights_file("MobileNet", workspace, weights[0].parent / "text.weights.h5")
    assert list(workspace.storage.list("weights/")) == []


def test_weights_files_of_keras_are_accepted(workspace, tmp_path):
    model = keras.applications.MobileNet(weights=None, include_top=False)
    with h5py.File(tmp_path / "mobilenet_1_0_224_tf_no_top.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    mirror_weights_file("MobileNet", workspace, tmp_path / "mobilenet_1_0_224_tf_no_top.h5")
    other = find_backbone("MobileNet").build((32, 32), fetch_base_file(Base(application="MobileNet"), workspace))
    for actual, expected in zip(other.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def use_empty_keras_home(monkeypatch, directory):
    """Use an empty download cache. Keras reads KERAS_HOME only when it is imported."""
    directory.mkdir(exist_ok=True)
    monkeypatch.setattr(keras.src.backend.config, "_KERAS_DIR", str(directory))


def test_failed_download_is_an_error_that_names_the_mirror_command(workspace, monkeypatch, tmp_path):
    use_empty_keras_home(monkeypatch, tmp_path)
    monkeypatch.setattr(base_files, "MAX_RETRY_WAIT_SECONDS", 0.1)
    # A local port that nothing listens on, instead of Keras' server.
    monkeypatch.setattr(mobilenet, "BASE_WEIGHT_PATH", "http://127.0.0.1:9/")
    with pytest.raises(UnavailableError) as error:
        fetch_base_file(Base(application="MobileNet"), workspace)
    assert f"run `topwork mirror weights {workspace.storage.uri} MobileNet` on a machine that has it" in str(
        error.value
    )
    assert "URL fetch failure on http://127.0.0.1:9/mobilenet_1_0_224_tf_no_top.h5" in str(error.value)


def test_downloaded_weights_are_kept_for_the_next_run(workspace, weights, monkeypatch, tmp_path, capsys):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    model = keras.applications.MobileNet(weights=None, include_top=False)
    with h5py.File(tmp_path / "mobilenet_1_0_224_tf_no_top.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        use_empty_keras_home(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(mobilenet, "BASE_WEIGHT_PATH", f"http://127.0.0.1:{server.server_port}/")
        first = fetch_base_file(Base(application="MobileNet"), workspace).read_bytes()
        server.shutdown()
    shutil.rmtree(tmp_path / "home")
    assert fetch_base_file(Base(application="MobileNet"), workspace).read_bytes() == first
    assert capsys.readouterr().out == ""


def test_efficientnet_weights_from_a_file_predict_like_imagenet_weights_from_keras(workspace, tmp_path, monkeypatch):
    """Keras adds a scaling layer for weights="imagenet", but not for weights from a file."""
    model = keras.applications.EfficientNetB0(weights=None, include_top=False)
    norm = next(layer for layer in model.layers if isinstance(layer, keras.layers.Normalization))
    # Keras' file contains the standard deviation in place of the variance.
    norm.set_weights([np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]), np.int32(0)])
    with h5py.File(tmp_path / "efficientnetb0_notop.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda name, *args, **kwargs: str(tmp_path / name))
    from_keras = keras.applications.EfficientNetB0(weights="imagenet", include_top=False, input_shape=(32, 32, 3))
    mirrored = find_backbone("EfficientNetB0").build(
        (32, 32), fetch_base_file(Base(application="EfficientNetB0"), workspace)
    )
    from_file = find_backbone("EfficientNetB0").build((32, 32), tmp_path / "efficientnetb0_notop.h5")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    expected = from_keras.predict_on_batch(pixels)
    np.testing.assert_allclose(mirrored.predict_on_batch(pixels), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(from_file.predict_on_batch(pixels), expected, rtol=1e-4, atol=1e-6)
    # In mixed precision the model is a copy. Its normalization must not be reset to mean 0 and variance 1.
    image = keras.Input((32, 32, 3), name="image")
    classifier = with_precision(keras.Model(image, mirrored(image)), "mixed_bfloat16")
    norms = [layer for layer in classifier.layers[-1].layers if isinstance(layer, keras.layers.Normalization)]
    np.testing.assert_allclose(np.asarray(norms[0].mean, np.float32).ravel(), [0.485, 0.456, 0.406], rtol=1e-2)


def test_input_scaling_does_not_depend_on_the_model_name():
    """EfficientNetV2 of Keras uses another scaling for names that start with b."""

    def scaling(model):
        kinds = (keras.layers.Rescaling, keras.layers.Normalization)
        return [layer.get_config() | {"name": ""} for layer in model.layers if isinstance(layer, kinds)]

    from_keras = keras.applications.EfficientNetV2S(weights=None, include_top=False, input_shape=(32, 32, 3))
    assert scaling(find_backbone("EfficientNetV2S").build((32, 32), None)) == scaling(from_keras)


def test_files_are_fetched_from_storage_or_disk(workspace, tmp_path):
    workspace.storage.write("own/a.weights.h5", b"weights")
    uri = workspace.storage.uri_of("own/a.weights.h5")
    assert fetch_base_file(Base(application="MobileNet", weights=uri), workspace).read_bytes() == b"weights"
    (tmp_path / "a.keras").write_bytes(b"model")
    base = Base.model_validate({"saved": {"uri": str(tmp_path / "a.keras")}})
    assert fetch_base_file(base, workspace) == tmp_path / "a.keras"


def test_missing_file_is_reported_with_its_spec_key(workspace):
    uri = workspace.storage.uri_of("own/a.keras")
    with pytest.raises(DataError, match=rf"^spec\.model\.base\.saved\.uri is {uri}, and storage has no such object"):
        fetch_base_file(Base.model_validate({"saved": {"uri": uri}}), workspace)
    with pytest.raises(DataError, match=r"^spec\.model\.base\.saved\.uri is /nowhere/a\.h5, which does not exist"):
        fetch_base_file(Base.model_validate({"saved": {"uri": "/nowhere/a.h5"}}), workspace)


def test_directory_is_not_a_saved_model(workspace, tmp_path):
    (tmp_path / "a.keras").mkdir()
    workspace.storage.write("own/a.keras/saved_model.pb", b"graph")
    for uri in (str(tmp_path / "a.keras"), workspace.storage.uri_of("own/a.keras")):
        with pytest.raises(DataError) as error:
            fetch_base_file(Base.model_validate({"saved": {"uri": uri}}), workspace)
        assert str(error.value) == (
            f"spec.model.base.saved.uri is {uri}, which is a directory. Use a file: save the model with "
            "model.save('model.keras'), not as a TensorFlow SavedModel."
        )


def test_mirrored_backbone_keeps_its_statistics_through_both_stages(make_job, workspace, tmp_path):
    source = keras.applications.MobileNetV2(include_top=False, weights=None, input_shape=(32, 32, 3))
    for layer in leaf_layers(source):
        if isinstance(layer, keras.layers.BatchNormalization):
            # These statistics differ from those of the images: batch normalization in training mode would change them.
            layer.moving_mean.assign(np.full(layer.moving_mean.shape, 0.1))
    source.save_weights(tmp_path / "source.weights.h5")
    mirror_weights_file("MobileNetV2", workspace, tmp_path / "source.weights.h5")
    job = make_job(
        model={"base": {"application": "MobileNetV2"}},
        transfer={"epochs": 2, "batchSize": 8, "optimizer": {"learningRate": 0.01}},
        # The untrained backbone gains nothing in one epoch, so by default the weights of transfer would be kept.
        fineTune={
            "unfreeze": {"from": "block_15_expand"},
            "epochs": 1,
            "keep": "last",
            "optimizer": {"learningRate": 0.001},
        },
    )
    dataset = pull(job, workspace)
    classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    trained = {layer.name: layer.get_weights() for layer in leaf_layers(keras.models.load_model(path, compile=False))}
    changed = {
        layer.name
        for layer in leaf_layers(source)
        if layer.weights
        and any(not np.array_equal(a, b) for a, b in zip(layer.get_weights(), trained[layer.name], strict=True))
    }
    # Gradients of the lower unfrozen layers may round to zero in an untrained backbone. No other layer may change.
    convolutions = {f"block_{block}_{part}" for block in (15, 16) for part in ("expand", "depthwise", "project")}
    assert {"Conv_1"} <= changed <= {"Conv_1"} | convolutions
