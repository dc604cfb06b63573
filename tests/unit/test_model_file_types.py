"""Files that are not Keras models: one line says what they are and what to do."""

import io
import json
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.safe_loading import load_model_safely


def make_zip(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return content.getvalue()


def make_npz():
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return content.getvalue()


def make_safetensors():
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


FILES = {
    "empty": (b"", "is empty. Copy it again."),
    "html": (b"\n<!DOCTYPE html><html><title>Sign in", "is a web page. The download probably needed a login"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page."),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer. Run git lfs pull"),
    "tflite": (b"\x1c\x00\x00\x00TFL3\x14\x00", "is a TensorFlow Lite model, which cannot be trained."),
    "torch": (make_zip("archive/data.pkl", "archive/version"), "is a PyTorch file. Only Keras models can be a base."),
    "pickle": (
        pickle.dumps({"state": 1}, protocol=2),
        "is a pickle file, as from PyTorch, and code in it is never run.",
    ),
    "safetensors": (make_safetensors(), "is a safetensors file. Only Keras models can be a base."),
    "json": (b'{"format": "layers-model"}', "is a JSON file, which has no weights."),
    "gzip": (b"\x1f\x8b\x08\x00", "is a compressed archive. Unpack it"),
    "saved model": (make_zip("model/saved_model.pb"), "is an archive of a TensorFlow SavedModel. Save the complete"),
    "teachable machine": (
        make_zip("labels.txt", "keras_model.h5"),
        "is a ZIP archive. Unpack it, and use keras_model.h5.",
    ),
    "npz": (make_npz(), "is a NumPy archive."),
    "png": (b"\x89PNG\r\n\x1a\n", "is an image or document."),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_file_of_another_type_is_explained(tmp_path, kind, name):
    content, explanation = FILES[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_model_safely(tmp_path / name)
    assert str(error.value).startswith(f"{name} {explanation}")
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize(
    ("name", "explanation"),
    [
        ("model.onnx", "is an ONNX model."),
        ("model.pth", "is a file of PyTorch or another framework."),
        ("saved_model.pb", "is the graph of a TensorFlow SavedModel."),
    ],
)
def test_file_of_another_framework_is_recognized_by_its_suffix(tmp_path, name, explanation):
    (tmp_path / name).write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(DataError) as error:
        load_model_safely(tmp_path / name)
    assert str(error.value).startswith(f"{name} {explanation}")


def test_keras_file_with_another_suffix_is_explained(tmp_path):
    (tmp_path / "model.h5").write_bytes(make_zip("config.json", "metadata.json", "model.weights.h5"))
    with pytest.raises(DataError, match=r"^model\.h5 is a \.keras file\. Rename it to \.keras\.$"):
        load_model_safely(tmp_path / "model.h5")


@pytest.mark.parametrize("content", ["layer_names", "layers", "nothing"])
def test_hdf5_file_without_an_architecture_is_explained(tmp_path, content):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        if content == "layer_names":
            file.attrs["layer_names"] = ["dense"]
        elif content == "layers":
            file.create_group("layers/dense/vars")
    found = "is an HDF5 file without a Keras model" if content == "nothing" else "contains only weights"
    with pytest.raises(DataError) as error:
        load_model_safely(tmp_path / "model.h5")
    assert str(error.value).startswith(f"model.h5 {found}")
    assert "spec.model.base.application" in str(error.value)
