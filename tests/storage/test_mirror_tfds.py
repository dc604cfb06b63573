"""Prepared TFDS datasets in the mirror: brought there once, found by version, read without TFDS knowing them."""

import pytest
from tests.tfds_pictures import prepare

from topwork.data.sources import open_source
from topwork.data.tfds_mirror import AskedName
from topwork.data.tfds_mirror_writer import mirror_tfds
from topwork.errors import DataError, SettingError
from topwork.spec.dataset import DatasetSource


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data_dir with a dataset that TFDS knows, and two configurations of one that it does not."""
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder, "tf_flowers", "3.0.1", ("dandelion", "daisy", "tulips"), {"train": 9})
    prepare(folder, "own_pictures", "1.2.0", ("a", "b"), {"train": 4, "test": 2}, config="small")
    prepare(folder, "own_pictures", "1.10.0", ("a", "b"), {"train": 6}, config="small")
    return folder


def opened(workspace, name):
    return open_source(DatasetSource(tfds=name), workspace)


def test_a_prepared_dataset_is_mirrored_once_and_read_as_tfds_would(workspace, data_dir):
    assert mirror_tfds("tf_flowers", workspace, data_dir) == ("tf_flowers/3.0.1", False)
    keys = [stored.key for stored in workspace.storage.list("mirror/")]
    assert mirror_tfds("tf_flowers", workspace, data_dir) == ("tf_flowers/3.0.1", True)
    # Found without the folder too: nothing is downloaded.
    assert mirror_tfds("tf_flowers", workspace) == ("tf_flowers/3.0.1", True)
    assert [stored.key for stored in workspace.storage.list("mirror/")] == keys
    source = opened(workspace, "tf_flowers")
    assert (source.name, source.digest()) == ("tf_flowers", "tf_flowers/3.0.1")
    assert source.class_names() == ("dandelion", "daisy", "tulips")
    assert source.splits() == {"train": 9}
    items = list(source.items("train"))
    assert sorted(item.label for item in items) == ["daisy"] * 3 + ["dandelion"] * 3 + ["tulips"] * 3
    assert all(item.read().startswith(b"\xff\xd8") for item in items)


def test_a_dataset_that_tfds_does_not_know_is_read_from_the_mirror(workspace, data_dir):
    assert mirror_tfds("own_pictures/small:1.2.0", workspace, data_dir) == ("own_pictures/small/1.2.0", False)
    source = opened(workspace, "own_pictures")
    assert source.description() == {"tfds": "own_pictures/small/1.2.0"}
    assert source.splits() == {"train": 4, "test": 2}
    mirror_tfds("own_pictures", workspace, data_dir)
    # 1.10.0 is newer than 1.2.0.
    assert opened(workspace, "own_pictures").description() == {"tfds": "own_pictures/small/1.10.0"}
    assert opened(workspace, "own_pictures/small:1.2.*").description() == {"tfds": "own_pictures/small/1.2.0"}
    with pytest.raises(DataError, match=r"own_pictures:3\.\*\.\*, which .* Mirrored are own_pictures/small/1\.10\.0"):
        opened(workspace, "own_pictures:3.*.*")


def test_a_dataset_without_its_manifest_is_not_found(workspace, data_dir):
    mirror_tfds("own_pictures", workspace, data_dir)
    workspace.storage.delete(["mirror/tfds/own_pictures/small/1.10.0/manifest.json"])
    with pytest.raises(DataError, match=r"does not know"):
        opened(workspace, "own_pictures")
    # Bringing it again goes on from there.
    assert mirror_tfds("own_pictures", workspace, data_dir) == ("own_pictures/small/1.10.0", False)
    assert opened(workspace, "own_pictures").splits() == {"train": 6}


def test_what_is_not_in_the_folder_is_refused_with_what_is(workspace, data_dir):
    with pytest.raises(SettingError) as error:
        mirror_tfds("tf_flowers:2.0.0", workspace, data_dir)
    assert "holds no prepared tf_flowers:2.0.0" in str(error.value)
    assert "It holds tf_flowers/3.0.1: name the version that you want." in str(error.value)
    with pytest.raises(SettingError, match=r"holds no prepared cats_vs_dogs/4\.0\.1\. Expected what tfds\.load\("):
        mirror_tfds("cats_vs_dogs", workspace, data_dir)


def test_a_dataset_that_is_not_whole_is_refused_and_nothing_is_stored(workspace, tmp_path):
    folder = prepare(tmp_path, "own_pictures", "1.0.0", ("a", "b"), {"train": 4, "test": 2})
    next(folder.glob("*test*")).unlink()
    with pytest.raises(
        DataError, match=r"1 of its 2 files are missing, such as own_pictures-test\.tfrecord-00000-of-00001"
    ):
        mirror_tfds("own_pictures", workspace, tmp_path)
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"is no prepared TFDS dataset"):
        mirror_tfds("own_pictures", workspace, tmp_path)
    assert list(workspace.storage.list("mirror/")) == []


@pytest.mark.parametrize(
    ("asked", "made", "picked"),
    [
        ("x", None, "x/1.10.0"),
        ("x:1.2.*", None, "x/1.2.0"),
        ("x:1.2.0", None, "x/1.2.0"),
        ("x:9.0.0", None, None),
        ("x", "x/1.2.0", "x/1.2.0"),
        # Another version than this TFDS makes is no stand-in unless it is named.
        ("x", "x/1.3.0", None),
        ("y/b", None, "y/b/1.0.0"),
        ("z", None, None),
    ],
)
def test_the_version_that_is_meant_is_picked(asked, made, picked):
    there = ["x/1.2.0", "x/1.10.0", "y/a/1.0.0", "y/b/1.0.0"]
    assert AskedName.parse(asked).pick(there, made) == picked


def test_one_of_several_configurations_must_be_named():
    with pytest.raises(DataError, match=r"^y is there as y/a/1\.0\.0, y/b/1\.0\.0\. Name the configuration: y/…\.$"):
        AskedName.parse("y").pick(["y/a/1.0.0", "y/b/1.0.0"], None)
