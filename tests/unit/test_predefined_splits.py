"""Splits that the source defines: directories, columns of tables, splits of TFDS; and replacements of missing ones."""

import json
import re
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.clients.prometheus.metrics import Metrics
from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.sources import open_dataset_source, open_source
from topwork.data.splits.counts import check_splits, count_images
from topwork.data.splits.groups import Groups
from topwork.data.splits.predefined import describe_predefined, match_splits
from topwork.data.splits.selection import SourceSplit, select_splits
from topwork.errors import DataError
from topwork.registry.datasets import fingerprint_of
from topwork.spec.dataset import Dataset, DatasetSource
from topwork.spec.splits import Splits

TREE = (
    *(f"Training/{name}/{number}.png" for name in ("cat", "dog") for number in range(3)),
    *("VAL/cat/4.png", "VAL/dog/5.png", "test/cat/6.png"),
)
CLASSES = ("cat", "dog")


@pytest.fixture
def open_tree(tmp_path):
    workspace = SimpleNamespace(scratch=tmp_path / "scratch", storage=None, metrics=Metrics())

    def write(kind, names):
        root = tmp_path / "tree"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"x")
        if kind == "folder":
            return {"folder": {"uri": str(root)}}
        path = tmp_path / f"tree.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.write(root / name, f"pictures/{name}")
        else:
            with tarfile.open(path, "w:gz") as archive:
                archive.add(root, "pictures")
        return {"archive": {"uri": str(path), "root": "pictures"}}

    def open_source_of(kind, names=TREE, **options):
        source = DatasetSource.model_validate(write(kind, names))
        return open_source(source, workspace, **{"has_split_directories": True, **options})

    return open_source_of


KINDS = pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])


@KINDS
def test_directories_of_splits_are_recognized_in_any_spelling(open_tree, kind):
    source = open_tree(kind)
    assert source.class_names() == CLASSES
    assert source.splits() == {"train": 6, "validation": 2, "test": 1}
    names = {
        split: sorted(image.name.removeprefix("pictures/") for image in source.images(split))
        for split in source.splits()
    }
    assert names["validation"] == ["VAL/cat/4.png", "VAL/dog/5.png"]
    assert names["test"] == ["test/cat/6.png"]
    assert len(names["train"]) == 6
    assert {image.label for image in source.images("train")} == {"cat", "dog"}


@KINDS
def test_directories_of_splits_are_never_classes(open_tree, kind):
    with pytest.raises(DataError, match=r"directories of splits \(Training, VAL, test\).*splits: auto"):
        open_tree(kind, has_split_directories=False).class_names()


@KINDS
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat/1.png", "cat/a/1.png", "dog/b/2.png"), "contains cat, dog"),
        ((*TREE, "unlabeled/x/1.png"), "but {} contains unlabeled"),
        ((*TREE, "train/cat/9.png"), "Training and train, which both stand for the train split"),
        (("val/cat/1.png", "test/dog/1.png"), "has no train split, which the predefined splits of spec.dataset.splits"),
        (("pets/train/cat/1.png", "pets/test/dog/1.png"), "contains pets"),
        (("train/1.png", "test/2.png"), "contains no image in a class directory"),
    ],
)
def test_other_trees_are_rejected(open_tree, kind, names, message):
    source = open_tree(kind, names)
    (uri,) = [settings["uri"] for settings in source.description().values()]
    with pytest.raises(DataError, match=re.escape(message.format(uri))):
        source.class_names()


def test_archive_that_has_classes_on_both_levels_gives_two_datasets(open_tree):
    names = ("train/1.png", "train/cat/2.png", "train/dog/3.png", "test/4.png", "test/cat/5.png")
    given = open_tree("zip", names).description()
    found = {}
    for splits in ("auto", {"train": 0.8, "test": 0.2}):
        settings = Dataset.model_validate({"source": given, "splits": splits, "imageSize": [32, 32]})
        source = open_dataset_source(settings, SimpleNamespace(scratch=None, storage=None, metrics=Metrics()))
        found[source.class_names()] = fingerprint_of(source, settings)
    assert list(found) == [("cat", "dog"), ("test", "train")]
    assert len(set(found.values())) == 2


@pytest.fixture
def open_table(tmp_path):
    workspace = SimpleNamespace(scratch=tmp_path / "scratch", storage=None, metrics=Metrics())

    def write(rows):
        path = tmp_path / "images.jsonl"
        path.write_text("".join(json.dumps({"image": i, "label": c, "fold": s}) + "\n" for i, c, s in rows))
        source = {"table": {"uri": str(path), "split": "fold"}}
        return open_source(DatasetSource.model_validate(source), workspace)

    return write


ROWS = [("a.png", "cat", "TRAIN"), ("b.png", "dog", "train"), ("c.png", "cat", "dev"), ("d.png", "dog", "eval")]


def test_column_of_a_table_defines_the_splits(open_table):
    source = open_table(ROWS)
    assert source.splits() == {"train": 2, "validation": 1, "test": 1}
    assert [(image.name, image.label) for image in source.images("validation")] == [("c.png", "cat")]


def test_image_that_moves_to_another_split_changes_the_dataset(open_table):
    moved = [*ROWS[:3], ("d.png", "dog", "train")]
    before, after = open_table(ROWS).digest(), open_table(moved).digest()
    assert before != after


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ("e.png", "cat", "holdout")], "line 5: fold is 'holdout', which is not the name of a split"),
        ([*ROWS, ("e.png", "cat", "")], "line 5: fold is ''"),
        ([*ROWS, ("a.png", "cat", "test")], "line 5: a.png has the class 'cat' and the split 'test', but another"),
        (ROWS[2:], "has no train split"),
    ],
)
def test_invalid_columns_of_splits_are_rejected(open_table, rows, message):
    with pytest.raises(DataError, match=re.escape(message)):
        open_table(rows).class_names()


def dataset(splits="auto", on_missing_class="fail"):
    source = {"source": {"folder": {"uri": "photos"}}, "imageSize": [32, 32], "onMissingClass": on_missing_class}
    return Dataset.model_validate(source | {"splits": splits})


def sources(**labels):
    first, found = 0, {}
    for name, values in labels.items():
        found[name] = SourceSplit(first, np.array(values))
        first += len(values)
    return found


def metadata(**splits):
    counts = {name: dict(zip(CLASSES, values, strict=True)) for name, values in splits.items()}
    return DatasetMetadata(
        name="photos",
        fingerprint="0" * 16,
        source={"folder": {"uri": "photos"}},
        class_names=CLASSES,
        splits=counts,
        images=sum(map(sum, splits.values())),
        rejected=(),
        duplicates=0,
    )


def test_splits_of_the_source_are_used_as_they_are():
    selected = select_splits(dataset(), sources(test=[0, 1], train=[0, 1, 1], dev=[1, 0]), CLASSES, seed=1)
    assert {name: positions.tolist() for name, positions in selected.items()} == {
        "train": [2, 3, 4],
        "validation": [5, 6],
        "test": [0, 1],
    }


@pytest.mark.parametrize(("missing", "train"), [({"validation"}, 90), ({"test"}, 90), ({"validation", "test"}, 80)])
def test_missing_split_is_a_stratified_tenth_of_the_train_split(missing, train):
    given = {name: [0, 1] * 5 for name in {"validation", "test"} - missing}
    stored = sources(**given, train=[0] * 60 + [1] * 40)
    one, other = (select_splits(dataset(), stored, CLASSES, seed) for seed in (1, 2))
    labels = np.concatenate([source.labels for source in stored.values()])
    assert len(one["train"]) == train
    for name in missing:
        assert np.bincount(labels[one[name]]).tolist() == [6, 4]
        assert one[name].tolist() != other[name].tolist()
    assert sorted(np.concatenate(list(one.values()))) == list(range(len(labels)))
    expected = {name: len(positions) for name, positions in one.items()}
    sizes = {name: len(source.labels) for name, source in stored.items()}
    assert count_images(Splits(predefined=True), sizes, 2) == expected


def test_class_that_cannot_be_divided_is_rejected_before_training():
    message = "divides each class into 3 splits, but dog has fewer than 3 images"
    with pytest.raises(DataError, match=message):
        check_splits(dataset(), metadata(train=(9, 2)))
    with pytest.raises(DataError, match=message):
        select_splits(dataset(), sources(train=[0] * 9 + [1] * 2), CLASSES, seed=1)
    check_splits(dataset(), metadata(train=(9, 2), val=(1, 1), test=(1, 1)))


def test_replaced_and_unused_splits_are_described():
    splits = Splits(predefined=True)
    assert describe_predefined(splits, {"train": 9, "test": 3, "unlabeled": 5}, "photos") == (
        "The source has no validation split. 10% of each class of its train split replace it.",
        "The split unlabeled of the source is not used.",
    )
    assert describe_predefined(splits, {"train": 9, "val": 1, "eval": 3}, "photos") == ()
    grouped = Splits(predefined=True, stratify=False, group_by="folder")
    assert describe_predefined(grouped, {"train": 9, "val": 3}, "photos") == (
        "The source has no test split. About 10% of its train split, in whole groups, replace it.",
    )
    assert match_splits(["test", "train", "val"], "photos") == {"train": "train", "validation": "val", "test": "test"}


GROUPED = {"predefined": True, "groupBy": "folder"}
# The class and the group of each image.
IMAGES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=1, max_size=80)


def test_mapping_is_the_long_form_of_auto():
    stored = sources(test=[0, 1], train=[0, 1] * 20)
    short, long = (select_splits(dataset(splits), stored, CLASSES, 1) for splits in ("auto", {"predefined": True}))
    assert {name: positions.tolist() for name, positions in short.items()} == {
        name: positions.tolist() for name, positions in long.items()
    }
    assert dataset({"predefined": True}).has_validation
    assert dataset({"predefined": True}).has_split_directories


@settings(deadline=None)
@given(train=IMAGES, given_splits=st.sets(st.sampled_from(["validation", "test"])), seed=st.integers(0, 3))
def test_missing_splits_are_whole_groups_of_the_train_split(train, given_splits, seed):
    # The groups of the other splits are different ones.
    others = {name: [(0, f"{name} a"), (1, f"{name} b")] for name in sorted(given_splits)}
    images = {**others, "train": train}
    stored = sources(**{name: [label for label, _ in rows] for name, rows in images.items()})
    groups = Groups.of([str(group) for rows in images.values() for _, group in rows])
    settings = dataset(GROUPED, on_missing_class="allow")
    try:
        selected = select_splits(settings, stored, CLASSES, seed, groups)
    except DataError as error:
        assert re.search("split has no images|training split contains no image", str(error))
        return
    assert sorted(np.concatenate(list(selected.values()))) == list(range(len(groups.of_image)))
    used = {name: set(groups.of_image[positions]) for name, positions in selected.items()}
    assert sum(map(len, used.values())) == len(groups.names)
    for name in given_splits:
        first = stored[name].first
        assert selected[name].tolist() == [first, first + 1]
    again = select_splits(settings, stored, CLASSES, seed, groups)
    assert all((selected[name] == again[name]).all() for name in selected)


def test_missing_split_has_a_tenth_of_each_class_as_far_as_groups_allow():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), random.integers(1, 9, 200))
    labels = (random.random(len(groups)) < random.choice([0.1, 0.7], 200)[groups]).astype(np.int64)
    selected = select_splits(dataset(GROUPED), sources(train=labels), CLASSES, 1, Groups(range(200), groups))
    for name in ("validation", "test"):
        np.testing.assert_allclose(np.bincount(labels[selected[name]]) / np.bincount(labels), 0.1, atol=0.01)


def test_group_in_several_splits_of_the_source_is_rejected():
    stored = sources(test=[0, 1], train=[0, 1, 1, 0], unlabeled=[0])
    groups = Groups.of(["p1", "p2", "p1", "p1", "p2", "p3", "p3"])
    message = (
        "spec.dataset.splits.groupBy: images of the same group are in several splits of the source, for 2 of 3 groups: "
        "p1 (2 train, 1 test), p2 (1 train, 1 test). The published metrics would be too high. Move each "
        "group to one split, or use"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        select_splits(dataset(GROUPED), stored, CLASSES, 1, groups)


def test_only_some_of_many_divided_groups_are_named():
    stored = sources(test=[0, 1] * 10, train=[0, 1] * 10)
    groups = Groups.of([f"p{number:02}" for number in [*range(20), *range(20)]])
    with pytest.raises(DataError, match=r" for 20 of 20 groups: .*p04 \(1 train, 1 test\), and 15 more\. The"):
        select_splits(dataset(GROUPED), stored, CLASSES, 1, groups)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"predefined": True, "train": 0.8, "test": 0.2}, "predefined: cannot be combined with train and test"),
        ({"predefined": True, "perClass": {"train": 3, "test": 3}}, "predefined: cannot be combined with perClass"),
        ({"predefined": False, "groupBy": "folder"}, "train: is required"),
    ],
)
def test_predefined_splits_are_not_combined_with_others(splits, message):
    with pytest.raises(ValueError, match=message):
        dataset(splits)
