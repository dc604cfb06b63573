"""The mirror of prepared TFDS datasets: copies, versions, and datasets that TFDS does not provide."""

import pytest
from tests.tfds_datasets import prepare_dataset

from topwork.data.sources import open_source
from topwork.data.tfds_mirror import TfdsName
from topwork.data.tfds_mirror_writer import mirror_tfds
from topwork.errors import DataError, SettingError
from topwork.spec.dataset import DatasetSource


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data_dir with a dataset that TFDS provides, and two versions of one that it does not."""
    directory = tmp_path_factory.mktemp("tfds")
    prepare_dataset(directory, "tf_flowers", "3.0.1", ("dandelion", "daisy", "tulips"), {"train": 9})
    prepare_dataset(directory, "own_images", "1.2.0", ("a", "b"), {"train": 4, "test": 2}, config="small")
    prepare_dataset(directory, "own_images", "1.10.0", ("a", "b"), {"train": 6}, config="small")
    return directory


def open_mirrored(workspace, name):
    return open_source(DatasetSource(tfds=name), workspace)


def test_mirrored_dataset_is_copied_once_and_read_from_storage(workspace, data_dir):
    assert mirror_tfds("tf_flowers", workspace, data_dir) == ("tf_flowers/3.0.1", False)
    keys = [stored.key for stored in workspace.storage.list("mirror/")]
    assert mirror_tfds("tf_flowers", workspace, data_dir) == ("tf_flowers/3.0.1", True)
    # Without data_dir, the mirrored dataset is used and nothing is downloaded.
    assert mirror_tfds("tf_flowers", workspace) == ("tf_flowers/3.0.1", True)
    assert [stored.key for stored in workspace.storage.list("mirror/")] == keys
    source = open_mirrored(workspace, "tf_flowers")
    assert (source.name, source.digest()) == ("tf_flowers", "tf_flowers/3.0.1")
    assert source.class_names() == ("dandelion", "daisy", "tulips")
    assert source.splits() == {"train": 9}
    images = list(source.images("train"))
    assert sorted(image.label for image in images) == ["daisy"] * 3 + ["dandelion"] * 3 + ["tulips"] * 3
    assert all(image.read().startswith(b"\xff\xd8") for image in images)


def test_dataset_that_tfds_does_not_provide_is_read_from_the_mirror(workspace, data_dir):
    assert mirror_tfds("own_images/small:1.2.0", workspace, data_dir) == ("own_images/small/1.2.0", False)
    source = open_mirrored(workspace, "own_images")
    assert source.description() == {"tfds": "own_images/small/1.2.0"}
    assert source.splits() == {"train": 4, "test": 2}
    mirror_tfds("own_images", workspace, data_dir)
    # 1.10.0 is newer than 1.2.0.
    assert open_mirrored(workspace, "own_images").description() == {"tfds": "own_images/small/1.10.0"}
    assert open_mirrored(workspace, "own_images/small:1.2.*").description() == {"tfds": "own_images/small/1.2.0"}
    with pytest.raises(
        DataError, match=r"own_images:3\.\*\.\*, which .* The mirror contains own_images/small/1\.10\.0"
    ):
        open_mirrored(workspace, "own_images:3.*.*")


def test_mirrored_dataset_without_a_manifest_is_ignored(workspace, data_dir):
    mirror_tfds("own_images", workspace, data_dir)
    workspace.storage.delete(["mirror/tfds/own_images/small/1.10.0/manifest.json"])
    with pytest.raises(DataError, match=r"does not provide"):
        open_mirrored(workspace, "own_images")
    # Copying it again completes it.
    assert mirror_tfds("own_images", workspace, data_dir) == ("own_images/small/1.10.0", False)
    assert open_mirrored(workspace, "own_images").splits() == {"train": 6}


def test_dataset_missing_from_data_dir_is_rejected_with_the_available_ones(workspace, data_dir):
    with pytest.raises(SettingError) as error:
        mirror_tfds("tf_flowers:2.0.0", workspace, data_dir)
    assert "does not contain a prepared tf_flowers:2.0.0" in str(error.value)
    assert "It contains tf_flowers/3.0.1: specify the version to use." in str(error.value)
    with pytest.raises(
        SettingError, match=r"does not contain a prepared cats_vs_dogs/4\.0\.1\. Expected the files that tfds\.load\("
    ):
        mirror_tfds("cats_vs_dogs", workspace, data_dir)


def test_incomplete_dataset_is_rejected_and_nothing_is_stored(workspace, tmp_path):
    directory = prepare_dataset(tmp_path, "own_images", "1.0.0", ("a", "b"), {"train": 4, "test": 2})
    next(directory.glob("*test*")).unlink()
    with pytest.raises(DataError, match=r"1 of 2 files are missing, such as own_images-test\.tfrecord-00000-of-00001"):
        mirror_tfds("own_images", workspace, tmp_path)
    (directory / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"is not a prepared TFDS dataset"):
        mirror_tfds("own_images", workspace, tmp_path)
    assert list(workspace.storage.list("mirror/")) == []


@pytest.mark.parametrize(
    ("name", "provided", "expected"),
    [
        ("x", None, "x/1.10.0"),
        ("x:1.2.*", None, "x/1.2.0"),
        ("x:1.2.0", None, "x/1.2.0"),
        ("x:9.0.0", None, None),
        ("x", "x/1.2.0", "x/1.2.0"),
        # Another version than TFDS provides is only used if the name contains it.
        ("x", "x/1.3.0", None),
        ("y/b", None, "y/b/1.0.0"),
        ("z", None, None),
    ],
)
def test_select_returns_the_matching_version(name, provided, expected):
    available = ["x/1.2.0", "x/1.10.0", "y/a/1.0.0", "y/b/1.0.0"]
    assert TfdsName.parse(name).select(available, provided) == expected


def test_select_rejects_an_ambiguous_configuration():
    with pytest.raises(
        DataError, match=r"^y is available as y/a/1\.0\.0, y/b/1\.0\.0\. Specify the configuration: y/…\.$"
    ):
        TfdsName.parse("y").select(["y/a/1.0.0", "y/b/1.0.0"], None)
