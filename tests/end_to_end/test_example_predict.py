"""Use of the result: probabilities of new images from the raw file, with nothing to preprocess outside the model."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from tests.end_to_end.example_systems import FLOWERS, random_image
from tests.end_to_end.test_example_labs import labs  # noqa: F401 - the fixture

# A server that knows TensorFlow alone, which loads Keras by itself: none of topwork.
PLAIN = """
import json, sys
import tensorflow as tf
folder, *pictures = sys.argv[1:]
served = tf.saved_model.load(folder)
answer = served.signatures["encoded"](bytes=tf.constant([open(picture, "rb").read() for picture in pictures]))
told = {name: value.numpy().astype(str).tolist() for name, value in answer.items()}
print(json.dumps({"topwork": "topwork" in sys.modules, **told}))
"""


@pytest.fixture(scope="module")
def flowers(labs):  # noqa: F811
    return labs[0]


@pytest.fixture(scope="module")
def photos(flowers):
    """Photos of many sizes, as JPEG and PNG files in folders, and one that is none."""
    random = np.random.default_rng(5)
    folder = flowers.directory / "photos"
    for index, side in enumerate((32, 57, 90, 120)):
        path = folder / f"{index % 2}" / f"{index}.{'png' if index == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_image(random, side, (60 * index, 150 - 40 * index, 30)).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def predict(examples, flowers, photos):
    def call(*options):
        ended = examples.topwork("predict", flowers.storage.uri_of(flowers.version_key), photos, *options)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return call


@pytest.fixture(scope="module")
def answers(predict):
    """Probabilities of all classes by image, as `--json` gives them."""
    lines = [json.loads(line) for line in predict("--json", "--top", "5").splitlines()]
    return {line["image"]: {one["class"]: one["probability"] for one in line["classes"]} for line in lines}


def images(photos):
    return [str(path) for path in sorted(photos.rglob("*.*g"))]


def test_the_model_is_evaluated_on_held_back_data(flowers):
    evaluation = flowers.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 10)
    used = {*flowers.dataset.train.names, *flowers.dataset.validation.names}
    assert used.isdisjoint(flowers.dataset.test.names)


def test_predict_answers_every_image_of_a_folder_with_the_probability_of_each_class(answers, photos):
    assert list(answers) == images(photos)
    for classes in answers.values():
        assert set(classes) == set(FLOWERS)
        assert sum(classes.values()) == pytest.approx(1.0, abs=1e-5)
        assert list(classes.values()) == sorted(classes.values(), reverse=True)


def test_predict_shows_the_likeliest_classes(predict, answers):
    for line, (image, classes) in zip(predict("--top", "2").splitlines(), answers.items(), strict=True):
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in list(classes.items())[:2])
        assert line == f"{image}: {shown}"


def test_predict_writes_csv(predict, answers):
    rows = list(csv.DictReader(io.StringIO(predict("--csv", "--top", "3"))))
    wanted = [
        (image, rank, name)
        for image, classes in answers.items()
        for rank, name in enumerate(list(classes)[:3], start=1)
    ]
    assert [(row["image"], int(row["rank"]), row["class"]) for row in rows] == wanted
    assert [float(row["probability"]) for row in rows] == pytest.approx(
        [answers[image][name] for image, _, name in wanted], abs=1e-6
    )


def test_probabilities_are_those_of_the_model_on_raw_pixels(flowers, answers, photos):
    import tensorflow as tf

    path = images(photos)[0]
    pixels = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
    assert pixels.shape == (32, 32, 3)  # this one needs no resizing
    probabilities = flowers.published_model(tf.cast(pixels, tf.float32)[tf.newaxis]).numpy()[0]
    assert [answers[path][name] for name in FLOWERS] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_plain_tensorflow_serves_raw_files_with_the_same_probabilities(examples, flowers, answers, photos):
    folder = flowers.directory / "fetched"
    ended = examples.topwork("models", "fetch", flowers.storage.uri_of(flowers.version_key), folder)
    assert ended.returncode == 0, ended.stderr
    command = [sys.executable, "-c", PLAIN, str(folder), *images(photos)]
    plain = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert plain.returncode == 0, plain.stderr
    told = json.loads(plain.stdout)
    assert told["topwork"] is False
    for place, classes in enumerate(answers.values()):
        best, probability = next(iter(classes.items()))
        assert told["class"][place] == best
        assert float(told["probability"][place]) == pytest.approx(probability, abs=1e-5)
        served = dict(zip(told["classes"][place], map(float, told["probabilities"][place]), strict=True))
        assert served == pytest.approx(classes, abs=1e-5)
