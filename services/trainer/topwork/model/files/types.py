"""Recognizes files that are not Keras models, by their first bytes, to explain what they are."""

import zipfile
from pathlib import Path

from topwork.model.files.inspection import HDF5_SIGNATURE

_HEADER_BYTES = 64
_ZIP = b"PK\x03\x04"
_SAVE_AGAIN = "Save the complete model with Keras: model.save('model.keras')."
_OTHER_FRAMEWORK = "Only Keras models can be a base. Convert it to Keras, and save it with model.save('model.keras')."


def explain_wrong_type(path: Path) -> str | None:
    """Explain what a file is if it is neither a `.keras` nor an `.h5` file.

    Args:
        path: The file.

    Returns:
        What it is and what to do, as two sentences without a subject; None if it looks like a Keras model.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header:
        return f"is empty. Copy it again. {_SAVE_AGAIN}"
    if header.startswith(HDF5_SIGNATURE):
        return None
    if zipfile.is_zipfile(path) and header.startswith(_ZIP):
        return _explain_zip(path)
    return _explain_header(path, header) or _explain_suffix(path)


def _explain_zip(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return f"is a PyTorch file. {_OTHER_FRAMEWORK}"
    if "config.json" in names:
        return None if path.name.endswith(".keras") else "is a .keras file. Rename it to .keras."
    models = [name for name in names if name.endswith((".h5", ".keras"))]
    if models:
        return f"is a ZIP archive. Unpack it, and use {models[0][:80]}."
    if any(name.endswith("saved_model.pb") for name in names):
        return f"is an archive of a TensorFlow SavedModel. {_SAVE_AGAIN}"
    if any(name.endswith(".tflite") for name in names):
        return f"is an archive of a TensorFlow Lite model. {_SAVE_AGAIN}"
    if any(name.endswith(".npy") for name in names):
        return f"is a NumPy archive. {_SAVE_AGAIN}"
    return None


def _explain_header(path: Path, header: bytes) -> str | None:
    text = header.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "is a web page. The download probably needed a login or a confirmation. Download the file again."
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer. Run git lfs pull to download the file."
    if header[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model, which cannot be trained. {_SAVE_AGAIN}"
    if header.startswith(b"\x80") and header[1:2] in b"\x02\x03\x04\x05":
        return f"is a pickle file, as from PyTorch, and code in it is never run. {_OTHER_FRAMEWORK}"
    if header[8:9] == b"{" and int.from_bytes(header[:8], "little") < path.stat().st_size:
        return f"is a safetensors file. {_OTHER_FRAMEWORK}"
    if text.startswith((b"{", b"[")):
        return f"is a JSON file, which has no weights. {_SAVE_AGAIN}"
    if header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "is a compressed archive. Unpack it, and use the .keras or .h5 file in it."
    if header.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"%PDF")):
        return f"is an image or document. {_SAVE_AGAIN}"
    return None


def _explain_suffix(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return f"is an ONNX model. {_OTHER_FRAMEWORK}"
    if suffix in (".pth", ".pt", ".ckpt", ".safetensors", ".bin"):
        return f"is a file of PyTorch or another framework. {_OTHER_FRAMEWORK}"
    if suffix == ".pb":
        return f"is the graph of a TensorFlow SavedModel. {_SAVE_AGAIN}"
    return f"is a TensorFlow Lite model, which cannot be trained. {_SAVE_AGAIN}" if suffix == ".tflite" else None
