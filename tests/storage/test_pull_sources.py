"""Sources on S3, and TensorFlow Datasets with and without internet access."""

import dataclasses
import functools
import http.server
import io
import threading
import time
import zipfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import downloader

from topwork.artifacts import write_artifact
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.local_dataset import fetch_dataset
from topwork.data.sources import open_source
from topwork.data.sources.tfds import record_directory_growth
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import DatasetSource
from topwork.stages.pull import pull


def _open(workspace, **source):
    return open_source(DatasetSource.model_validate(source), workspace)


def _read(source, split="train"):
    return [(image.name, image.label, image.read()) for image in source.images(split)]


@pytest.fixture
def photos(storage):
    for key, data in {
        "cat/1.jpg": b"cat one",
        "cat/old/2.jpg": b"cat two",
        "dog/1.jpg": b"dog one",
        "dog/": b"",
    }.items():
        storage.write(f"photos/{key}", data)
    return f"{storage.uri}/photos"


def test_folder_on_s3_is_read(workspace, photos, storage):
    source = _open(workspace, folder={"uri": f"{photos}/"})
    assert source.name == "photos"
    assert source.class_names() == ("cat", "dog")
    assert _read(source) == [
        ("cat/1.jpg", "cat", b"cat one"),
        ("cat/old/2.jpg", "cat", b"cat two"),
        ("dog/1.jpg", "dog", b"dog one"),
    ]
    before = source.digest()
    storage.write("photos/dog/1.jpg", b"dog two")
    assert _open(workspace, folder={"uri": photos}).digest() != before


def test_table_on_s3_is_read(workspace, photos, storage):
    rows = ["image,label", "cat/1.jpg,cat", "./cat/../dog/1.jpg,dog", f"{photos}/cat/old/2.jpg,cat"]
    storage.write("photos/labels.csv", "\n".join(rows).encode())
    source = _open(workspace, table={"uri": f"{photos}/labels.csv"})
    assert [entry[1:] for entry in _read(source)] == [("cat", b"cat one"), ("dog", b"dog one"), ("cat", b"cat two")]


def test_archive_on_s3_is_read(workspace, storage):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pets/cat/1.jpg", b"cat one")
        archive.writestr("pets/dog/1.jpg", b"dog one")
    storage.write("pets.zip", file.getvalue())
    source = _open(workspace, archive={"uri": f"{storage.uri}/pets.zip", "root": "pets"})
    before = source.digest()
    assert _read(source) == [("pets/cat/1.jpg", "cat", b"cat one"), ("pets/dog/1.jpg", "dog", b"dog one")]
    storage.write("pets.zip", file.getvalue() + b"\0")
    assert source.digest() != before


@pytest.mark.parametrize(
    "source",
    [
        {"folder": {"uri": "s3://topwork-test/nothing-here"}},
        {"archive": {"uri": "s3://topwork-test/nothing/here.zip"}},
        {"table": {"uri": "s3://topwork-test/nothing/here.csv"}},
    ],
)
def test_missing_source_on_s3_is_rejected(workspace, source):
    with pytest.raises(DataError, match=r"does not exist|contains no image"):
        _open(workspace, **source).digest()


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Red and blue images, downloaded from the server of the test."""

    VERSION = tfds.core.Version("1.2.3")
    url = ""

    def _info(self):
        image, label = tfds.features.Image(), tfds.features.ClassLabel(names=["red", "blue"])
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({"image": image, "label": label, "id": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        path = dl_manager.download_and_extract(self.url)
        return {"train": self._generate_examples(path / "train"), "test": self._generate_examples(path / "test")}

    def _generate_examples(self, path):
        for image in sorted(path.glob("*.png")):
            yield image.name, {"image": image, "label": image.name.split("-")[0], "id": image.name}


class NoImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        yield from ()


@pytest.fixture
def server(tmp_path):
    """A web server with the archive of TinyImages."""
    (tmp_path / "www").mkdir()
    with zipfile.ZipFile(tmp_path / "www" / "images.zip", "w") as archive:
        for split, count in (("train", 8), ("test", 4)):
            for color in ("red", "blue"):
                for index in range(count):
                    encoded = io.BytesIO()
                    Image.new("RGB", (20 + index, 20), color).save(encoded, "PNG")
                    archive.writestr(f"{split}/{color}-{index}.png", encoded.getvalue())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        TinyImages.url = f"http://127.0.0.1:{http_server.server_port}/images.zip"
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield http_server
        http_server.shutdown()
        thread.join()


@pytest.fixture
def tiny_job(make_job):
    return make_job(
        dataset={
            "source": {"tfds": "tiny_images"},
            "splits": {"train": "train[:75%]", "validation": "train[75%:]", "test": "test"},
            "imageSize": [32, 32],
        }
    )


def _stop(server):
    server.shutdown()
    server.server_close()


def test_tfds_dataset_is_downloaded_and_then_read_from_the_mirror_without_internet(
    tiny_job, workspace, server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)
    online = dataclasses.replace(workspace, storage=workspace.storage.at(f"{workspace.storage.uri}/online"))
    stored = pull(tiny_job, online)
    assert stored.prefix == f"datasets/tiny_images/{stored.metadata.fingerprint}"
    assert stored.metadata.source == {"tfds": "tiny_images/1.2.3"}
    assert stored.metadata.class_names == ("red", "blue")
    assert stored.metadata.splits == {"test": {"blue": 4, "red": 4}, "train": {"blue": 8, "red": 8}}
    dataset = fetch_dataset(stored, tiny_job, online)
    assert (dataset.train.size, dataset.validation.size, dataset.test.size) == (12, 4, 8)
    assert (dataset.test.load_images(np.arange(8))[:, 5, 5, 2] == 255 * dataset.test.labels).all()
    assert capsys.readouterr().out == ""

    _stop(server)
    downloads = (workspace.scratch / "pull" / "tfds").rename(tmp_path / "downloaded") / "downloads"
    message = (
        r"tiny_images could not be downloaded, .*: .*127\.0\.0\.1.* run `topwork mirror tfds s3://\S+ tiny_images` "
        r"on a machine that has it, or copy the TFDS download directory of such a machine to s3://\S+/mirror/tfds/tiny"
    )
    with pytest.raises(UnavailableError, match=message):
        pull(tiny_job, workspace)

    write_artifact(workspace.storage, "mirror/tfds/tiny_images", downloads, {})
    again = pull(tiny_job, workspace)
    assert again.metadata == stored.metadata


def test_mirror_that_was_copied_manually_is_used(tiny_job, workspace, storage, tmp_path):
    (tmp_path / "downloads").mkdir()
    storage.write("mirror/tfds/tiny_images/some/file.zip", b"content")
    storage.write("mirror/tfds/tiny_images/9.9.9/prepared-file", b"of another version")
    source = _open(workspace, tfds="tiny_images")
    assert source._copy_mirrored_downloads()
    downloads = workspace.scratch / "pull/tfds/downloads"
    assert [path.relative_to(downloads).as_posix() for path in downloads.rglob("*.*")] == ["some/file.zip"]
    assert (downloads / "some/file.zip").read_bytes() == b"content"


def test_unknown_tfds_name_is_rejected(workspace):
    with pytest.raises(DataError, match=r"tfds is no_such_dataset, which TensorFlow Datasets .* does not provide"):
        _open(workspace, tfds="no_such_dataset")


def test_tfds_dataset_without_images_is_rejected(workspace):
    with pytest.raises(DataError, match=r"no_images is not an image classification dataset"):
        _open(workspace, tfds="no_images")


def test_record_directory_growth_records_progress(tmp_path):
    metrics, name = Metrics(), "topwork_last_progress_timestamp_seconds"
    with record_directory_growth(tmp_path, metrics, 0.05):
        time.sleep(0.3)
        assert metrics.registry.get_sample_value(name) is None
        (tmp_path / "extracted").mkdir()
        (tmp_path / "extracted" / "part").write_bytes(b"more")
        deadline = time.monotonic() + 30
        while metrics.registry.get_sample_value(name) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
