"""Predictions of a published model for raw image files, with topwork and with plain TensorFlow."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tests.end_to_end.example_systems import FLOWERS, random_image
from tests.end_to_end.test_example_labs import labs  # noqa: F401 - a fixture

# A model server that uses only TensorFlow.
SERVE_WITH_TENSORFLOW = """
import json, sys
import tensorflow as tf
directory, *paths = sys.argv[1:]
served = tf.saved_model.load(directory)
response = served.signatures["encoded"](bytes=tf.constant([open(path, "rb").read() for path in paths]))
outputs = {name: value.numpy().astype(str).tolist() for name, value in response.items()}
print(json.dumps({"topwork": "topwork" in sys.modules, **outputs}))
"""


@pytest.fixture(scope="module")
def flowers(labs):  # noqa: F811
    return labs[0]


@pytest.fixture(scope="module")
def photos(flowers):
    """Directories with images of different formats and sizes, and a text file."""
    random = np.random.default_rng(5)
    directory = flowers.directory / "photos"
    for index, side in enumerate((32, 57, 90, 120)):
        path = directory / f"{index % 2}" / f"{index}.{'png' if index == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(random, side, (60 * index, 150 - 40 * index, 30)).save(path)
    transparent = Image.new("RGBA", (40, 50), (0, 0, 0, 0))
    transparent.paste((30, 150, 60, 120), (5, 5, 30, 40))
    transparent.save(directory / "0" / "transparent.png")
    transparent.save(directory / "0" / "transparent.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = random_image(random, 64, (200, 40, 30))
    photo.crop((0, 0, 64, 30)).save(directory / "1" / "rotated.jpg", exif=exif)
    photo.quantize(32).save(directory / "1" / "palette.bmp")
    (directory / "notes.txt").write_text("not an image")
    return directory


@pytest.fixture(scope="module")
def predict(examples, flowers, photos):
    def run(*options):
        completed = examples.topwork("predict", flowers.storage.uri_of(flowers.version_key), photos, *options)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    return run


@pytest.fixture(scope="module")
def predictions(predict):
    """Probabilities of all classes by image, from `--json`."""
    lines = [json.loads(line) for line in predict("--json", "--top", "5").splitlines()]
    return {line["image"]: {entry["class"]: entry["probability"] for entry in line["classes"]} for line in lines}


def image_paths(photos):
    return [str(path) for path in sorted(photos.rglob("*.*")) if path.suffix != ".txt"]


def test_model_is_evaluated_on_held_out_images(flowers):
    evaluation = flowers.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 10)
    used = {*flowers.dataset.train.names, *flowers.dataset.validation.names}
    assert used.isdisjoint(flowers.dataset.test.names)


def test_predict_prints_all_class_probabilities_for_the_images_of_a_directory(predictions, photos):
    assert list(predictions) == image_paths(photos)
    for classes in predictions.values():
        assert set(classes) == set(FLOWERS)
        assert sum(classes.values()) == pytest.approx(1.0, abs=1e-5)
        assert list(classes.values()) == sorted(classes.values(), reverse=True)


def test_predict_prints_the_most_likely_classes(predict, predictions):
    for line, (image, classes) in zip(predict("--top", "2").splitlines(), predictions.items(), strict=True):
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in list(classes.items())[:2])
        assert line == f"{image}: {shown}"


def test_predict_prints_csv(predict, predictions):
    rows = list(csv.DictReader(io.StringIO(predict("--csv", "--top", "3"))))
    expected = [
        (image, rank, name)
        for image, classes in predictions.items()
        for rank, name in enumerate(list(classes)[:3], start=1)
    ]
    assert [(row["image"], int(row["rank"]), row["class"]) for row in rows] == expected
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        [predictions[image][name] for image, _, name in expected], abs=1e-6
    )


def test_predictions_equal_those_of_the_model_on_raw_pixels(flowers, predictions, photos):
    path = image_paths(photos)[0]
    with Image.open(path) as image:
        pixels = np.asarray(image, np.float32)
    assert pixels.shape == (32, 32, 3)  # the input size of the model
    probabilities = flowers.published_model(pixels[np.newaxis]).numpy()[0]
    assert [predictions[path][name] for name in FLOWERS] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_plain_tensorflow_serves_the_same_probabilities(examples, flowers, predictions, photos):
    directory = flowers.directory / "fetched"
    completed = examples.topwork("models", "fetch", flowers.storage.uri_of(flowers.version_key), directory)
    assert completed.returncode == 0, completed.stderr
    command = [sys.executable, "-c", SERVE_WITH_TENSORFLOW, str(directory), *image_paths(photos)]
    plain = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert plain.returncode == 0, plain.stderr
    outputs = json.loads(plain.stdout)
    assert outputs["topwork"] is False
    for index, classes in enumerate(predictions.values()):
        best, probability = next(iter(classes.items()))
        assert outputs["class"][index] == best
        assert float(outputs["probability"][index]) == pytest.approx(probability, abs=1e-5)
        served = dict(zip(outputs["classes"][index], map(float, outputs["probabilities"][index]), strict=True))
        assert served == pytest.approx(classes, abs=1e-5)
