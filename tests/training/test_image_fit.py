"""Training, `topwork predict` and every exported signature get the same pixels from the same file."""

import io
import json
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from topwork.data.images.decoding import Preprocessing
from topwork.data.local_dataset import Split, cache_pixels
from topwork.errors import DataError
from topwork.model.export import export_model
from topwork.report.exported_model import load_format, read_preprocessing
from topwork.report.predictor import Predictor, validate_file
from topwork.spec.dataset import ImageFit

FITS = ImageFit.__args__
SIZE = (20, 16)
PHOTO = np.asarray(Image.effect_mandelbrot((640, 480), (-2.2, -1.4, 1.0, 1.0), 60))
SHAPES = [(480, 640), (333, 91), (20, 16), (9, 7), (1, 5000), (5000, 1), (41, 2)]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_photos() -> list[bytes]:
    """Photographs of several aspect ratios, also rotated by EXIF, transparent, and with 16 bits."""
    colors = Image.fromarray(np.dstack([PHOTO, PHOTO[::-1], PHOTO[:, ::-1]]))
    photos = [colors.resize((width, height)) for height, width in SHAPES]
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = colors.convert("RGBA")
    transparent.putalpha(Image.fromarray(PHOTO))
    return [
        *(encode(photo, "JPEG") for photo in photos),
        *(encode(photo, "PNG") for photo in photos),
        encode(photos[1], "JPEG", exif=exif),
        encode(transparent, "PNG"),
        encode(Image.fromarray(16 * PHOTO.astype(np.uint16)), "PNG"),
    ]


FILES = encode_photos()


@pytest.fixture(scope="module", params=FITS)
def exported(request, tmp_path_factory):
    """Preprocessing, and the directory of a version whose probabilities are the pixels of its input."""
    preprocessing = Preprocessing((0.0, 4095.0), request.param)
    folder = tmp_path_factory.mktemp(request.param)
    image = keras.Input((*SIZE, 3), name="image")
    model = keras.Model(image, keras.layers.Flatten()(image))
    names = [str(index) for index in range(SIZE[0] * SIZE[1] * 3)]
    export_model(model, names, ("keras", "savedModel"), preprocessing, folder)
    return preprocessing, folder


def make_split(preprocessing: Preprocessing) -> Split:
    stored = [validate_file(file) for file in FILES]
    records = SimpleNamespace(labels=np.zeros(len(FILES), np.int64), read_image=stored.__getitem__)
    return Split(records, np.arange(len(FILES)), SIZE, preprocessing)


def flatten(images) -> np.ndarray:
    return np.reshape(images, (len(FILES), -1))


def test_every_path_has_the_same_pixels(exported, workspace, tmp_path):
    preprocessing, folder = exported
    split = make_split(preprocessing)
    indices = np.arange(split.size)
    trained = flatten(split.load_images(indices))
    assert np.array_equal(flatten(split.gather(tf.constant(indices))), trained)
    cache_pixels([split], tmp_path, workspace)
    assert np.array_equal(flatten(split.load_images(indices)), trained)
    assert np.array_equal(flatten(split.gather(tf.constant(indices))), trained)

    assert np.array_equal(Predictor(folder).probabilities([validate_file(file) for file in FILES]), trained)
    served = shutil.copytree(folder, tmp_path / "served", ignore=shutil.ignore_patterns("model.keras"))
    assert np.array_equal(Predictor(served).probabilities([validate_file(file) for file in FILES]), trained)

    saved_model = load_format(folder, "savedModel")
    assert np.array_equal(saved_model.predict_files(FILES), trained)
    decoded = [preprocessing.decode(file).numpy()[np.newaxis] for file in FILES]
    assert np.array_equal(np.concatenate([saved_model.predict(image) for image in decoded]), trained)
    pair = np.concatenate([decoded[0], 255 - decoded[0]])
    assert np.array_equal(saved_model.predict(pair)[0], trained[0])


def test_fits_share_no_pixels_and_no_cache(tmp_path, workspace):
    splits = [make_split(Preprocessing(image_fit=fit)) for fit in FITS]
    for split in splits:
        cache_pixels([split], tmp_path, workspace)
    assert len({split.pixel_file(tmp_path) for split in splits}) == len(FITS)
    first, second, third = (split.load_images(np.array([0])) for split in splits)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert not np.array_equal(second, third)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, Preprocessing()),
        ({"format": 1, "valueRange": [0, 4095]}, Preprocessing((0.0, 4095.0), "stretch")),
        ({"format": 1, "valueRange": [0, 4095], "imageFit": "pad"}, Preprocessing((0.0, 4095.0), "pad")),
    ],
    ids=["topwork 0.1", "before imageFit", "pad"],
)
def test_version_without_image_fit_stretches_images(tmp_path, content, expected):
    if content:
        (tmp_path / "preprocessing.json").write_text(json.dumps(content))
    assert read_preprocessing(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"valueRange": [0, 255], "imageFit": "tile"}',
            r"has the imageFit 'tile', but .* stretch, crop, pad\.",
        ),
        ('{"valueRange": [0, 255], "imageFit": ["crop"]}', r"has the imageFit \['crop'\]"),
        ('{"imageFit": "crop"}', "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_unknown_preprocessing_is_an_error(tmp_path, content, message):
    (tmp_path / "preprocessing.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_preprocessing(tmp_path)
