"""The export check sends unmodified source files to the exported model."""

import dataclasses
import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from topwork.data.dataset_manifest import DatasetMetadata, OriginalFile, StoredDataset
from topwork.data.images.decoding import Preprocessing, is_decodable
from topwork.data.images.image_validation import validate_image
from topwork.model.export import add_probabilities, export_model
from topwork.report.export_check import CheckProcess, compare_predictions, write_check_inputs
from topwork.report.source_files import write_source_files

SIZE, RANGE = (24, 24), (0.0, 4095.0)
RANDOM = np.random.default_rng(3)


def encode(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def source_files() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = np.zeros((30, 40, 4), np.uint8)
    transparent[5:12, 5:12] = (200, 100, 50, 200)
    photo = np.zeros((30, 40, 3), np.uint8)
    photo[:10] = (250, 20, 20)
    deep = np.linspace(0, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)
    return [
        encode(transparent, "PNG"),
        encode(transparent, "WEBP", lossless=True),
        encode(photo, "JPEG", exif=exif),
        encode(deep, "PNG"),
        encode(deep, "TIFF"),
    ]


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(1)
    image = keras.Input((*SIZE, 3), name="image")
    features = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
    return add_probabilities(keras.Model(image, keras.layers.Dense(3)(features)), 3)


@pytest.fixture
def inputs(classifier, tmp_path):
    """Inputs of the export check, with source files."""
    originals = []
    for number, content in enumerate(source_files()):
        (tmp_path / f"{number}").write_bytes(content)
        kind = validate_image(content).kind
        originals.append(
            OriginalFile(file=f"{number}", kind=kind, name="", label="a", is_servable=is_decodable(content))
        )
    metadata = DatasetMetadata(
        name="photos", fingerprint="0" * 16, source={}, class_names=("a", "b", "c"), splits={}, images=5, rejected=(),
        duplicates=0, originals=tuple(originals),
    )  # fmt: skip
    images = RANDOM.integers(0, 256, (4, *SIZE, 3), np.uint8)
    probabilities = classifier(images.astype(np.float32)).numpy()
    write_check_inputs(tmp_path / "inputs", images, probabilities, probabilities.argmax(axis=1), [], 1e-4)
    write_source_files(
        tmp_path / "inputs",
        StoredDataset("", metadata),
        tmp_path,
        SIZE,
        Preprocessing(RANGE, "crop"),
        lambda batch: classifier(batch).numpy(),
    )
    return tmp_path / "inputs"


def export(classifier, preprocessing, folder):
    folder.mkdir()
    export_model(classifier, ("a", "b", "c"), ("keras", "savedModel"), preprocessing, folder)
    return folder


def test_source_files_are_predicted_like_stored_images(classifier, inputs, tmp_path):
    version = export(classifier, Preprocessing(RANGE, "crop"), tmp_path / "version")
    result = compare_predictions(version, inputs, ("keras", "savedModel"))
    assert max(result.largest_difference.values()) < 1e-5
    assert set(result.largest_difference) == {
        "keras",
        "savedModel",
        "topwork predict",
        "encoded (PNG RGBA, transparency)",
        "encoded (WEBP RGBA, transparency)",
        "encoded (JPEG RGB, EXIF orientation)",
        "encoded (PNG 16-bit grayscale)",
    }


@dataclasses.dataclass(frozen=True)
class _PlainPreprocessing(Preprocessing):
    """Decodes without alpha, orientation and value range, as `tf.io.decode_image` does."""

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        return tf.repeat(tf.io.decode_image(encoded, expand_animations=False), 3, axis=-1)[..., :3]


def test_export_that_decodes_source_files_differently_is_rejected(classifier, inputs, tmp_path):
    version = export(classifier, _PlainPreprocessing(), tmp_path / "version")
    with CheckProcess() as process, pytest.raises(RuntimeError) as raised:
        process.check(version, inputs, ("keras", "savedModel"))
    for kind in ("PNG RGBA, transparency", "JPEG RGB, EXIF orientation", "PNG 16-bit grayscale"):
        assert f"encoded ({kind}) by" in str(raised.value)
    assert "topwork predict by" in str(raised.value)  # preprocessing.json contains another range


def test_export_with_another_fit_is_detected(classifier, inputs, tmp_path):
    version = export(classifier, Preprocessing(RANGE, "pad"), tmp_path / "version")
    result = compare_predictions(version, inputs, ("keras", "savedModel"))
    wrong = {name for name, value in result.largest_logit_difference.items() if value > result.logit_tolerance}
    assert {"topwork predict", "encoded (JPEG RGB, EXIF orientation)"} <= wrong
