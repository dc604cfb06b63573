"""examples/assignment-vgg16.yaml: an archive with corrupt files, exact counts per class, VGG16 with a custom head."""

import functools
import http.server
import io
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.end_to_end.example_systems import ALLOW_MISSING_CLASSES, are_identical, layer_weights, random_image

CLASSES = {"Cat": (90, 60, 40), "Dog": (40, 70, 120)}
# Slightly more images per class than the 1,500 that the example needs.
VALID_IMAGES = 1502
# None is a truncated JPEG file.
CORRUPT = {
    "PetImages/Cat/666.jpg": b"",
    "PetImages/Cat/truncated.jpg": None,
    "PetImages/Dog/11702.jpg": b"",
    "PetImages/Dog/text.jpg": b"not an image",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """URL of an archive with the layout of the Kaggle archive, served over HTTP."""
    directory = tmp_path_factory.mktemp("archive")
    random = np.random.default_rng(0)
    with zipfile.ZipFile(directory / "pets.zip", "w") as file:
        file.writestr("readme[1].txt", "Dogs vs. cats")
        for name, color in CLASSES.items():
            for index in range(VALID_IMAGES):
                file.writestr(f"PetImages/{name}/{10000 + index}.jpg", encode_jpeg(random, color))
            file.writestr(f"PetImages/{name}/Thumbs.db", b"\xd0\xcf\x11\xe0 not an image")
        for name, data in CORRUPT.items():
            file.writestr(name, encode_jpeg(random, (90, 60, 40))[:300] if data is None else data)
    handler = functools.partial(QuietHandler, directory=directory)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/pets.zip"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def encode_jpeg(random, color):
    data = io.BytesIO()
    random_image(random, 24, color).save(data, "JPEG")
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


def test_example_uses_the_published_archive(examples):
    """The example downloads the archive that TFDS uses for cats_vs_dogs."""
    import tensorflow_datasets as tfds

    source = Path(tfds.__file__).parent / "image_classification" / "cats_vs_dogs.py"
    job = examples.read("assignment-vgg16")
    parent, _, name = job.spec.dataset.source.archive.uri.rpartition("/")
    assert f"{parent.rpartition('/')[2]}/{name}" in source.read_text()
    assert job.spec.dataset.source.archive.root == "PetImages"


def test_pull_reports_and_skips_corrupt_files(assignment):
    metadata = assignment.dataset_metadata
    rejected = {image.name: image.reason for image in metadata.rejected}
    assert {f"PetImages/{name}" if not name.startswith("PetImages") else name for name in rejected} >= set(CORRUPT)
    assert metadata.class_counts == {"Cat": VALID_IMAGES, "Dog": VALID_IMAGES}
    assert assignment.event("dataset")["rejected"] == len(rejected)
    assert "empty 2" in assignment.event("images rejected")["reasons"]


def test_splits_have_the_requested_images_per_class(assignment):
    assert assignment.split_counts == {"Cat": {"train": 40, "test": 20}, "Dog": {"train": 40, "test": 20}}
    (row,) = assignment.history("transfer")
    assert round(row["images_per_second"] * row["seconds"]) == 80
    assert [scores["images"] for scores in assignment.metrics["evaluation"]["perClass"]] == [20, 20]


def test_example_has_1000_training_and_500_test_images_per_class(assignment, examples):
    dataset = assignment.fetch_dataset(
        examples.read("assignment-vgg16", ALLOW_MISSING_CLASSES, "spec.dataset.imageSize=[32, 32]")
    )
    assert np.bincount(dataset.train.labels).tolist() == [1000, 1000]
    assert np.bincount(dataset.test.labels).tolist() == [500, 500]
    assert dataset.validation is None
    assert set(dataset.train.names).isdisjoint(dataset.test.names)
    assert set(CORRUPT).isdisjoint([*dataset.train.names, *dataset.test.names])


def test_head_replaces_the_dense_layers_of_vgg16(assignment, examples):
    base = assignment.model("transfer").get_layer("base")
    classes = [type(layer).__name__ for layer in base.layers]
    assert (classes.count("Conv2D"), classes.count("Dense")) == (13, 0)
    head = [layer for layer in assignment.model("transfer").layers if layer.name in {"hidden_1", "logits"}]
    assert [(layer.units, layer.activation.__name__) for layer in head] == [(256, "relu"), (1, "linear")]


def test_frozen_vgg16_keeps_the_mirrored_weights(assignment, examples):
    actual = layer_weights(assignment.model("transfer").get_layer("base"))
    expected = layer_weights(examples.backbones["VGG16"])
    assert len(expected) == 13
    assert all(are_identical(actual[name], expected[name]) for name in expected)


def test_transfer_uses_the_loss_and_optimizer_of_the_spec(assignment):
    transfer = assignment.job.spec.transfer
    assert (transfer.loss, transfer.optimizer.name) == ("binaryCrossentropy", "rmsprop")
    assert assignment.history("transfer")[0]["learning_rate"] == pytest.approx(2e-5)


def test_model_is_evaluated_on_the_test_split(assignment):
    evaluation = assignment.metrics["evaluation"]
    assert (evaluation["split"], evaluation["images"]) == ("test", 40)
    test = assignment.dataset.test
    probabilities = assignment.published_model.predict(test.load_images(np.arange(40)), verbose=0)
    assert evaluation["accuracy"] == pytest.approx(np.mean(probabilities.argmax(axis=1) == test.labels))
