"""The assignment: an archive with corrupt files, exact counts of each class, VGG16 below layers of one's own."""

import functools
import http.server
import io
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.end_to_end.example_systems import ALLOW_MISSING_CLASSES, random_image, are_identical, layer_weights

CLASSES = {"Cat": (90, 60, 40), "Dog": (40, 70, 120)}
# Each class has a few more than the 1,500 that the example asks for.
GOOD = 1502
CORRUPT = {
    "PetImages/Cat/666.jpg": b"",
    "PetImages/Cat/cut.jpg": None,
    "PetImages/Dog/11702.jpg": b"",
    "PetImages/Dog/words.jpg": b"no picture at all",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The address of an archive as Kaggle's is built, served over HTTP."""
    folder = tmp_path_factory.mktemp("archive")
    random = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "pets.zip", "w") as file:
        file.writestr("readme[1].txt", "Dogs vs. cats")
        for name, hue in CLASSES.items():
            for index in range(GOOD):
                file.writestr(f"PetImages/{name}/{10000 + index}.jpg", jpeg(random, hue))
            file.writestr(f"PetImages/{name}/Thumbs.db", b"\xd0\xcf\x11\xe0 not an image")
        for name, data in CORRUPT.items():
            file.writestr(name, jpeg(random, (90, 60, 40))[:300] if data is None else data)
    handler = functools.partial(Silent, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/pets.zip"
        server.shutdown()


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def jpeg(random, hue):
    data = io.BytesIO()
    random_image(random, 24, hue).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def assignment(examples, archive):
    examples.mirror_weights("VGG16")
    return examples.run_one(
        "assignment-vgg16",
        f"spec.dataset.source.archive.uri={archive}",
        "spec.dataset.imageSize=[32, 32]",
        "spec.dataset.splits.perClass={train: 40, test: 20}",
        "spec.transfer.epochs=1",
        "spec.publish.formats=[keras]",
    )


def test_the_archive_is_the_one_that_is_published(examples):
    """The example names the archive that TFDS takes its cats_vs_dogs from."""
    import tensorflow_datasets as tfds

    source = Path(tfds.__file__).parent / "image_classification" / "cats_vs_dogs.py"
    job = examples.read("assignment-vgg16")
    folder, _, name = job.spec.dataset.source.archive.uri.rpartition("/")
    assert f"{folder.rpartition('/')[2]}/{name}" in source.read_text()
    assert job.spec.dataset.source.archive.root == "PetImages"


def test_corrupt_files_of_the_archive_are_reported_and_skipped(assignment):
    facts = assignment.dataset_metadata
    rejected = {image.name: image.reason for image in facts.rejected}
    assert {f"PetImages/{name}" if not name.startswith("PetImages") else name for name in rejected} >= set(CORRUPT)
    assert facts.class_counts == {"Cat": GOOD, "Dog": GOOD}
    assert assignment.event("dataset")["rejected"] == len(rejected)
    assert "empty 2" in assignment.event("images rejected")["reasons"]


def test_exactly_as_many_images_of_each_class_train_and_test_as_were_asked_for(assignment):
    assert assignment.split_counts == {"Cat": {"train": 40, "test": 20}, "Dog": {"train": 40, "test": 20}}
    (row,) = assignment.history("transfer")
    assert round(row["images_per_second"] * row["seconds"]) == 80
    assert [scores["images"] for scores in assignment.metrics["evaluation"]["perClass"]] == [20, 20]


def test_the_example_takes_exactly_1000_training_and_500_test_images_of_each_class(assignment, examples):
    data = assignment.fetch_dataset(examples.read("assignment-vgg16", ALLOW_MISSING_CLASSES, "spec.dataset.imageSize=[32, 32]"))
    assert np.bincount(data.train.labels).tolist() == [1000, 1000]
    assert np.bincount(data.test.labels).tolist() == [500, 500]
    assert data.validation is None
    assert set(data.train.names).isdisjoint(data.test.names)
    assert set(CORRUPT).isdisjoint([*data.train.names, *data.test.names])


def test_vgg16_without_its_dense_layers_stands_below_own_ones(assignment, examples):
    base = assignment.model("transfer").get_layer("base")
    kinds = [type(layer).__name__ for layer in base.layers]
    assert (kinds.count("Conv2D"), kinds.count("Dense")) == (13, 0)
    head = [layer for layer in assignment.model("transfer").layers if layer.name in {"hidden_1", "logits"}]
    assert [(layer.units, layer.activation.__name__) for layer in head] == [(256, "relu"), (1, "linear")]


def test_frozen_vgg16_is_the_one_that_was_mirrored(assignment, examples):
    found, wanted = layer_weights(assignment.model("transfer").get_layer("base")), layer_weights(examples.backbones["VGG16"])
    assert len(wanted) == 13
    assert all(are_identical(found[name], wanted[name]) for name in wanted)


def test_loss_and_optimizer_are_those_that_were_chosen(assignment):
    transfer = assignment.job.spec.transfer
    assert (transfer.loss, transfer.optimizer.name) == ("binaryCrossentropy", "rmsprop")
    assert assignment.history("transfer")[0]["learning_rate"] == pytest.approx(2e-5)


def test_the_model_is_evaluated_on_the_test_part(assignment):
    evaluation = assignment.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 40)
    test = assignment.dataset.test
    answers = assignment.published_model.predict(test.load_images(np.arange(40)), verbose=0)
    assert evaluation["accuracy"] == pytest.approx(np.mean(answers.argmax(axis=1) == test.labels))
