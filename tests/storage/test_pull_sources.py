"""Sources that need storage, and TensorFlow Datasets."""

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

from topwork.artifacts import write_whole
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.local_dataset import fetch
from topwork.data.sources import open_source
from topwork.data.sources.tfds import growth_told
from topwork.errors import DataError, UnavailableError
from topwork.spec.dataset import DatasetSource
from topwork.stages.pull import pull


def _open(workspace, **source):
    return open_source(DatasetSource.model_validate(source), workspace)


def _read(source, split="train"):
    return [(item.name, item.label, item.read()) for item in source.items(split)]


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


def test_a_folder_on_s3_is_read(workspace, photos, storage):
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


def test_a_table_on_s3_is_read(workspace, photos, storage):
    rows = ["image,label", "cat/1.jpg,cat", "./cat/../dog/1.jpg,dog", f"{photos}/cat/old/2.jpg,cat"]
    storage.write("photos/labels.csv", "\n".join(rows).encode())
    source = _open(workspace, table={"uri": f"{photos}/labels.csv"})
    assert [entry[1:] for entry in _read(source)] == [("cat", b"cat one"), ("dog", b"dog one"), ("cat", b"cat two")]


def test_an_archive_on_s3_is_read(workspace, storage):
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
def test_what_is_not_on_s3_is_refused(workspace, source):
    with pytest.raises(DataError, match=r"does not exist|holds no image"):
        _open(workspace, **source).digest()


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Red and blue pictures from a server that is up only now and then."""

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


class NoPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {}

    def _generate_examples(self):
        yield from ()


@pytest.fixture
def server(tmp_path):
    """A web server with the archive of TinyPictures."""
    (tmp_path / "www").mkdir()
    with zipfile.ZipFile(tmp_path / "www" / "pictures.zip", "w") as archive:
        for split, count in (("train", 8), ("test", 4)):
            for colour in ("red", "blue"):
                for index in range(count):
                    picture = io.BytesIO()
                    Image.new("RGB", (20 + index, 20), colour).save(picture, "PNG")
                    archive.writestr(f"{split}/{colour}-{index}.png", picture.getvalue())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        TinyPictures.url = f"http://127.0.0.1:{running.server_port}/pictures.zip"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def tiny_job(make_job):
    return make_job(
        dataset={
            "source": {"tfds": "tiny_pictures"},
            "splits": {"train": "train[:75%]", "validation": "train[75%:]", "test": "test"},
            "imageSize": [32, 32],
        }
    )


def _stop(server):
    server.shutdown()
    server.server_close()


def test_tfds_is_downloaded_then_from_a_mirror_without_internet(
    tiny_job, workspace, server, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(downloader, "MAX_RETRIES", 1)
    online = dataclasses.replace(workspace, storage=workspace.storage.at(f"{workspace.storage.uri}/online"))
    stored = pull(tiny_job, online)
    assert stored.prefix == f"datasets/tiny_pictures/{stored.facts.fingerprint}"
    assert stored.facts.source == {"tfds": "tiny_pictures/1.2.3"}
    assert stored.facts.class_names == ("red", "blue")
    assert stored.facts.splits == {"test": {"blue": 4, "red": 4}, "train": {"blue": 8, "red": 8}}
    dataset = fetch(stored, tiny_job, online)
    assert (dataset.train.size, dataset.validation.size, dataset.test.size) == (12, 4, 8)
    assert (dataset.test.images(np.arange(8))[:, 5, 5, 2] == 255 * dataset.test.labels).all()
    assert capsys.readouterr().out == ""

    _stop(server)
    downloads = (workspace.scratch / "pull" / "tfds").rename(tmp_path / "downloaded") / "downloads"
    message = (
        r"tiny_pictures could not be downloaded, .*: .*127\.0\.0\.1.* run `topwork mirror tfds s3://\S+ tiny_pictures` "
        r"on a machine that has it, or copy the TFDS download folder of such a machine to s3://\S+/mirror/tfds/tiny"
    )
    with pytest.raises(UnavailableError, match=message):
        pull(tiny_job, workspace)

    write_whole(workspace.storage, "mirror/tfds/tiny_pictures", downloads, {})
    again = pull(tiny_job, workspace)
    assert again.facts == stored.facts


def test_a_mirror_that_was_copied_by_hand_is_used(tiny_job, workspace, storage, tmp_path):
    (tmp_path / "downloads").mkdir()
    storage.write("mirror/tfds/tiny_pictures/some/file.zip", b"content")
    storage.write("mirror/tfds/tiny_pictures/9.9.9/a-prepared-one", b"of another version")
    source = _open(workspace, tfds="tiny_pictures")
    assert source._fetch_downloads()
    downloads = workspace.scratch / "pull/tfds/downloads"
    assert [path.relative_to(downloads).as_posix() for path in downloads.rglob("*.*")] == ["some/file.zip"]
    assert (downloads / "some/file.zip").read_bytes() == b"content"


def test_an_unknown_tfds_name_is_refused(workspace):
    with pytest.raises(DataError, match=r"tfds is no_such_dataset, which TensorFlow Datasets .* does not know"):
        _open(workspace, tfds="no_such_dataset")


def test_a_tfds_dataset_without_images_is_refused(workspace):
    with pytest.raises(DataError, match=r"no_pictures is no dataset for image classification"):
        _open(workspace, tfds="no_pictures")


def test_metrics_hear_of_a_download_that_tfds_says_nothing_of(tmp_path):
    metrics, name = Metrics(), "topwork_last_progress_timestamp_seconds"
    with growth_told(tmp_path, metrics, 0.05):
        time.sleep(0.3)
        assert metrics.registry.get_sample_value(name) is None
        (tmp_path / "extracted").mkdir()
        (tmp_path / "extracted" / "part").write_bytes(b"more")
        deadline = time.monotonic() + 30
        while metrics.registry.get_sample_value(name) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
