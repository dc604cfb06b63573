"""Selected and merged classes, from the source to the images of each split."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs
from tests.tfds_datasets import prepare_dataset

from topwork.data.local_dataset import fetch_dataset
from topwork.data.tfds_mirror_writer import mirror_tfds
from topwork.description.known_dataset import find_known_dataset
from topwork.errors import DataError
from topwork.registry.datasets import read_entries, select_dataset
from topwork.stages.pull import find_dataset, pull

VEHICLES = [{"vehicle": ["car", "truck"]}, "person"]
FRACTIONS = {"train": 0.5, "validation": 0.25, "test": 0.25}


@pytest.fixture
def street(tmp_path):
    """`<tmp>/street/{car,person,truck,unsure}/day{0,1,2,3}/{0,1}.png`."""
    random = np.random.default_rng(0)
    for name in ("car", "person", "truck", "unsure"):
        for day in range(4):
            directory = tmp_path / "street" / name / f"day{day}"
            directory.mkdir(parents=True)
            for index in range(2):
                pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{index}.png")
    return tmp_path / "street"


@pytest.fixture
def make_street_job(make_job, street):
    def make(classes=VEHICLES, source=None, **others):
        source = source or {"folder": {"uri": str(street)}}
        dataset = {"source": source, "splits": FRACTIONS, "imageSize": [32, 32], **others}
        return make_job(dataset=dataset if classes is None else {**dataset, "classes": classes})

    return make


def test_merged_and_excluded_classes_are_pulled_and_reported(make_street_job, workspace):
    job = make_street_job()
    with capture_logs() as logs:
        dataset = pull(job, workspace)
    metadata = dataset.metadata
    assert metadata.class_names == ("vehicle", "person")
    assert metadata.splits == {"train": {"person": 8, "vehicle": 16}}
    assert metadata.source_class_names == ("car", "truck", "person")
    notes = (
        "The class vehicle contains the classes car, truck of the source.",
        "Left out: 1 class of the source with 8 images, unsure.",
    )
    assert tuple(entry["note"] for entry in logs if entry["event"] == "selected classes") == notes
    assert find_known_dataset(job, workspace, None, None).notes == notes
    local = fetch_dataset(dataset, job, workspace)
    assert local.class_names == ("vehicle", "person")
    names = [name for split in (local.train, local.validation, local.test) for name in split.names]
    labels = [label for split in (local.train, local.validation, local.test) for label in split.labels.tolist()]
    found = Counter((name.split("/")[0], label) for name, label in zip(names, labels, strict=True))
    assert found == {("car", 0): 8, ("truck", 0): 8, ("person", 1): 8}
    assert {entry.label for entry in read_entries(dataset, workspace.storage)} == {"vehicle", "person"}


def test_same_image_in_merged_classes_is_a_duplicate_and_no_contradiction(make_street_job, workspace, street):
    shutil.copy(street / "car" / "day0" / "0.png", street / "truck" / "copy.png")
    shutil.copy(street / "person" / "day0" / "0.png", street / "unsure" / "copy.png")
    merged = pull(make_street_job(), workspace).metadata
    assert (merged.images, merged.duplicates, merged.contradictions) == (25, 1, None)
    separate = pull(make_street_job(None), workspace).metadata
    assert (separate.images, separate.contradictions.images) == (30, 4)


@pytest.mark.parametrize(
    "splits",
    [
        {**FRACTIONS, "groupBy": "folder"},
        {"perClass": {"train": 4, "validation": 2, "test": 2}},
        {"train": "train[:50%]", "validation": "train[50%:75%]", "test": "train[75%:]"},
    ],
)
def test_splits_divide_the_selected_classes(make_street_job, workspace, splits):
    job = make_street_job(splits=splits)
    local = fetch_dataset(pull(job, workspace), job, workspace)
    parts = (local.train, local.validation, local.test)
    if "perClass" in splits:
        assert [np.bincount(part.labels).tolist() for part in parts] == [[4, 4], [2, 2], [2, 2]]
    else:
        assert [part.size for part in parts] == [12, 6, 6]
    if "groupBy" in splits:
        days = [{name.split("/")[1] for name in part.names} for part in parts]
        assert [len(found) for found in days] == [2, 1, 1]


def test_directories_of_merged_classes_are_no_groups(make_street_job, workspace, street):
    for path in street.glob("*/*/*"):
        path.rename(path.parents[1] / f"{path.parent.name}-{path.name}")
    job = make_street_job(splits={**FRACTIONS, "groupBy": "folder"})
    with pytest.raises(DataError, match="directly in the directories of their classes"):
        fetch_dataset(pull(job, workspace), job, workspace)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ["car", "Person"],
            r'"Person" is not a class of .*/street\. Did you mean person\? Classes .*"truck", "unsure"',
        ),
        ({"exclude": ["car", "truck", "unsure"]}, 'leaves only "person"'),
    ],
)
def test_selection_that_does_not_fit_is_rejected_before_anything_is_stored(
    make_street_job, workspace, classes, message
):
    for find in (pull, select_dataset):
        with pytest.raises(DataError, match=message):
            find(make_street_job(classes), workspace)
    assert list(workspace.storage.list("datasets/")) == []


def test_image_of_a_class_that_is_left_out_changes_nothing(make_street_job, workspace, street):
    job = make_street_job()
    first = pull(job, workspace)
    shutil.copy(street / "car" / "day0" / "0.png", street / "unsure" / "new.png")
    selected = select_dataset(job, workspace)
    assert (selected.stored.prefix, selected.changes) == (first.prefix, "")
    shutil.copy(street / "unsure" / "day0" / "0.png", street / "car" / "new.png")
    assert select_dataset(job, workspace).changes == "1 image added since the last pull"


def test_dataset_of_other_classes_is_not_used(make_street_job, workspace):
    first = pull(make_street_job(), workspace)
    for classes in (None, ["car", "person"], [{"vehicle": ["car", "truck"]}, "unsure"]):
        job = make_street_job(classes)
        assert select_dataset(job, workspace).stored is None
        # Nor as the one before it, which --pinned would keep.
        assert select_dataset(job, workspace).changes == ""
        with pytest.raises(DataError, match="with the classes that"):
            select_dataset(job, workspace, pinned=True)
    listed = find_known_dataset(make_street_job(["car", "person", "unsure"]), workspace, 7, 100)
    assert (listed.classes, listed.dataset) == (3, None)
    assert listed.notes == ("--classes 7 is ignored: spec.dataset.classes has 3.",)
    same = make_street_job([{"vehicle": ["truck", "car"]}, {"person": ["person"]}])
    assert select_dataset(same, workspace, pinned=True).stored.prefix == first.prefix


def test_dataset_of_an_earlier_version_is_still_used(make_street_job, workspace):
    job = make_street_job(None)
    dataset = pull(job, workspace)
    key = f"{dataset.prefix}/manifest.json"
    manifest = json.loads(workspace.storage.read(key))
    del manifest["facts"]["class_selection"]
    workspace.storage.write(key, json.dumps(manifest).encode())
    found = select_dataset(job, workspace, pinned=True)
    assert found.stored.metadata.source_class_names == ("car", "person", "truck", "unsure")
    assert fetch_dataset(found.stored, job, workspace).train.size == 16


def test_archive_on_s3_is_pulled_with_selected_classes(make_street_job, workspace, street, tmp_path):
    (street / "unsure" / "broken.png").write_bytes(b"not an image")
    workspace.storage.upload(Path(shutil.make_archive(str(tmp_path / "street"), "gztar", street)), "street.tar.gz")
    job = make_street_job(source={"archive": {"uri": f"{workspace.storage.uri}/street.tar.gz"}})
    dataset = pull(job, workspace)
    assert dataset.metadata.splits == {"train": {"person": 8, "vehicle": 16}}
    assert (dataset.metadata.rejected, dataset.metadata.class_selection.left_out) == ((), {"unsure": 9})
    assert select_dataset(job, workspace).stored.prefix == dataset.prefix


def test_folder_on_s3_is_pulled_with_selected_classes(make_street_job, workspace, street):
    photos = workspace.storage.at(f"{workspace.storage.uri}-street")
    for path in street.glob("*/*/*"):
        photos.upload(path, path.relative_to(street).as_posix())
    photos.write("unsure/broken.png", b"not an image")
    dataset = pull(make_street_job(source={"folder": {"uri": photos.uri}}), workspace)
    assert dataset.metadata.splits == {"train": {"person": 8, "vehicle": 16}}
    assert (dataset.metadata.rejected, dataset.metadata.class_selection.left_out) == ((), {"unsure": 9})


def test_tfds_dataset_is_pulled_with_selected_classes(make_street_job, workspace, tmp_path):
    classes = ("truck", "car", "unsure", "person")
    prepare_dataset(tmp_path, "own_street", "1.0.0", classes, {"train": 24, "test": 8})
    mirror_tfds("own_street", workspace, tmp_path)
    for setting, names, counts in (
        ({"exclude": ["unsure"]}, ("truck", "car", "person"), {"truck": 6, "car": 6, "person": 6}),
        (["person", {"vehicle": ["car", "truck"]}], ("person", "vehicle"), {"person": 6, "vehicle": 12}),
    ):
        job = make_street_job(setting, {"tfds": "own_street"}, splits="auto")
        dataset = pull(job, workspace)
        assert dataset.metadata.class_names == names
        assert dataset.metadata.splits["train"] == counts
        assert dataset.metadata.class_selection.left_out == {"unsure": 8}
        assert find_dataset(job, workspace).prefix == dataset.prefix
        local = fetch_dataset(dataset, job, workspace)
        assert np.bincount(local.test.labels).tolist() == [counts[name] // 3 for name in names]
    with pytest.raises(DataError, match=r'"bus" is not a class of own_street/1\.0\.0\. .*"truck", "car", "unsure"'):
        pull(make_street_job(["bus", "car"], {"tfds": "own_street"}, splits="auto"), workspace)
