"""Splits that the source defines, from the source to the images of each split."""

import csv
import shutil

import pytest
from structlog.testing import capture_logs

from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError
from topwork.stages.pull import pull


@pytest.fixture
def split_tree(two_class_folder, tmp_path):
    """`<tmp>/tree/{Train,Test}/{blue,red}/*`: 16 and 4 images per class."""
    for name in ("blue", "red"):
        for path in sorted((two_class_folder / name).iterdir()):
            target = tmp_path / "tree" / ("Test" if int(path.stem) < 4 else "Train") / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "tree"


@pytest.fixture
def make_split_job(make_job, split_tree):
    def make(source, splits="auto"):
        return make_job(dataset={"source": source, "splits": splits, "imageSize": [32, 32]})

    return make


def test_images_stay_in_the_split_of_their_directory(make_split_job, workspace, split_tree):
    job = make_split_job({"folder": {"uri": str(split_tree)}})
    dataset = pull(job, workspace)
    assert dataset.metadata.class_names == ("blue", "red")
    assert dataset.metadata.splits == {"test": {"blue": 4, "red": 4}, "train": {"blue": 16, "red": 16}}
    with capture_logs() as logs:
        local = fetch_dataset(dataset, job, workspace)
    assert {name.split("/")[0] for name in local.test.names} == {"Test"}
    assert {name.split("/")[0] for name in (*local.train.names, *local.validation.names)} == {"Train"}
    assert (local.train.size, local.validation.size, local.test.size) == (29, 3, 8)
    (note,) = [entry["note"] for entry in logs if entry["event"] == "splits" and "note" in entry]
    assert note == "The source has no validation split. 10% of each class of its train split replace it."


def test_tree_of_splits_is_not_trained_on_as_classes(make_split_job, workspace, split_tree):
    source = {"folder": {"uri": str(split_tree)}}
    pull(make_split_job(source), workspace)
    with pytest.raises(DataError, match=r"directories of splits \(Test, Train\).* Set spec\.dataset\.splits: auto"):
        pull(make_split_job(source, {"train": 0.8, "test": 0.2}), workspace)


def test_images_stay_in_the_split_of_their_row(make_split_job, workspace, split_tree, tmp_path):
    rows = []
    for path in sorted(split_tree.glob("*/*/*")):
        split, label, _ = path.relative_to(split_tree).parts
        rows.append((str(path), label, "val" if path.stem in {"04", "05"} else split.lower()))
    with (tmp_path / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "fold"), *rows])
    job = make_split_job({"table": {"uri": str(tmp_path / "images.csv"), "split": "fold"}})
    local = fetch_dataset(pull(job, workspace), job, workspace)
    expected = {"train": local.train, "validation": local.validation, "test": local.test}
    for name, split in expected.items():
        names = {"validation": "val"}.get(name, name)
        assert sorted(split.names) == sorted(image for image, _, fold in rows if fold == names)


def test_groups_stay_whole_in_the_splits_of_the_source(make_split_job, workspace, split_tree):
    for path in sorted(split_tree.glob("*/*/*")):
        patient = path.parent / f"{path.parts[-3]}-{int(path.stem) // 2}"
        patient.mkdir(exist_ok=True)
        path.rename(patient / path.name)
    job = make_split_job({"folder": {"uri": str(split_tree)}}, {"predefined": True, "groupBy": "folder"})
    local = fetch_dataset(pull(job, workspace), job, workspace)
    patients = [{name.split("/")[-2] for name in part.names} for part in (local.train, local.validation, local.test)]
    assert patients[2] == {"Test-0", "Test-1"}
    assert patients[0] | patients[1] == {f"Train-{number}" for number in range(2, 10)}
    assert not patients[0] & patients[1]
    assert (local.train.size, local.validation.size, local.test.size) == (28, 4, 8)
    for path in sorted(split_tree.glob("Test/*/Test-1")):
        path.rename(path.with_name("Train-2"))
    with pytest.raises(DataError, match=r"splits of the source, for 1 of 9 groups: Train-2 \(4 train, 4 test\)"):
        fetch_dataset(pull(job, workspace), job, workspace)


def test_groups_of_a_table_are_stored_with_the_images(make_split_job, workspace, split_tree, tmp_path):
    rows = [(str(path), path.parent.name, f"patient {path.stem}") for path in sorted(split_tree.glob("*/*/*"))]
    with (tmp_path / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "patient"), *rows])
    splits = {"train": 0.6, "validation": 0.2, "test": 0.2}
    source = {"table": {"uri": str(tmp_path / "images.csv")}}
    job = make_split_job(source, splits | {"groupBy": {"column": "patient"}})
    dataset = pull(job, workspace)
    assert dataset.prefix != pull(make_split_job(source, splits), workspace).prefix
    local = fetch_dataset(dataset, job, workspace)
    patients = [{name.split("/")[-1].split(".")[0] for name in part.names} for part in (local.train, local.test)]
    assert [len(found) for found in patients] == [12, 4]
    assert not patients[0] & patients[1]
    assert (local.train.size, local.validation.size, local.test.size) == (24, 8, 8)
