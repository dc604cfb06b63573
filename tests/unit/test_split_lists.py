"""Lists of images: how their lines are matched, and which lists are rejected."""

import gzip
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.data.dataset_manifest import Contradictions, DatasetMetadata, LabeledImage, RejectedImage
from topwork.data.splits.counts import count_images
from topwork.data.splits.groups import Groups
from topwork.data.splits.inputs import SplitInputs, SplitList
from topwork.data.splits.lists import (
    SAME_PIXELS,
    ImageNames,
    count_lines,
    find_unavailable_images,
    match_lists,
    read_split_lists,
)
from topwork.data.splits.selection import SourceSplit, StoredImages, select_images
from topwork.errors import DataError
from topwork.spec.dataset import Dataset

CLASSES = ("cat", "dog")
NAMES = [f"{name}/{number}.jpg" for name in CLASSES for number in range(10)]


def lists(**texts):
    return {
        name: SplitList(f"{name}.txt", text if isinstance(text, bytes) else text.encode())
        for name, text in texts.items()
    }


def matched(stored=NAMES, unavailable=(), root="", **texts):
    return match_lists(lists(**texts), stored, dict(unavailable), root)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("cat/1.jpg", "cat/1.jpg"),
        ("cat/1", "cat/1.jpg"),  # Food-101
        ("cat/1.jpg 281", "cat/1.jpg"),  # ImageNet
        ("cat/1\ttabby cat\t4", "cat/1.jpg"),
        ("/cat/1.jpg 0", "cat/1.jpg"),  # Places365
        ("./cat/1.jpg", "cat/1.jpg"),
        ("cat\\1.jpg", "cat/1.jpg"),
        ("dog/my photo.jpg", "dog/my photo.jpg"),
        ("dog/my photo.jpg 7", "dog/my photo.jpg"),
        ("dog/my photo 7", "dog/my photo.jpg"),
        ("dog/archive.tar", "dog/archive.tar.png"),
        ("#1/photo.jpg", "#1/photo.jpg"),
        ("cafe\u0301/1.jpg", "caf\u00e9/1.jpg"),
        ("/data/absolute.png", "/data/absolute.png"),
        ("dog/bell\x07.png\t3", "dog/bell?.png"),
    ],
)
def test_lines_of_published_lists_are_matched(line, name):
    others = ["dog/my photo.jpg", "dog/archive.tar.png", "#1/photo.jpg", "caf\u00e9/1.jpg", "/data/absolute.png"]
    others += ["dog/bell?.png"]
    found = matched([*NAMES, *others], train=f"\ufeff# a comment\r\n\r\n{line}\r\n")
    assert found.split_of == {name: "train"}


def test_paths_may_be_relative_to_the_root_of_an_archive():
    stored = [f"food-101/images/{name}" for name in NAMES]
    found = matched(stored, root="food-101/images", train="cat/1\nfood-101/images/cat/2.jpg")
    assert found.split_of == {"food-101/images/cat/1.jpg": "train", "food-101/images/cat/2.jpg": "train"}


NAME = st.text(st.sampled_from("ab .#é"), min_size=1, max_size=6).filter(lambda text: text.strip() == text)


@settings(deadline=None)
@given(st.lists(st.tuples(NAME, NAME, st.sampled_from([".jpg", ".png", ""])), min_size=1, max_size=12), st.data())
def test_complete_path_always_is_its_own_image(parts, data):
    stored = sorted({f"{directory}/{stem}{suffix}" for directory, stem, suffix in parts})
    name = data.draw(st.sampled_from(stored))
    assert ImageNames(stored).find(name) == {name: ""}


@pytest.mark.parametrize(
    ("stored", "line", "message"),
    [
        (
            ["cat/1.jpg", "cat/1.png"],
            "cat/1",
            "train.list (train.txt) is ambiguous: cat/1 (line 1: cat/1.jpg or cat/1.png). Write the complete path",
        ),
        (["cat/1.jpg", "cat/1 2.png"], "cat/1 2", "cat/1 2 (line 1: cat/1 2.png or cat/1.jpg)"),
    ],
)
def test_ambiguous_lines_are_rejected(stored, line, message):
    with pytest.raises(DataError, match=re.escape(message)):
        matched(stored, train=line)


def test_images_that_the_dataset_does_not_have_are_rejected():
    missing = "\n".join(f"cow/{number}.jpg" for number in range(7))
    message = (
        "spec.dataset.splits.test.list (test.txt) has 7 lines without an image of the dataset: cow/0.jpg (line 2), "
        "cow/1.jpg (line 3), cow/2.jpg (line 4), cow/3.jpg (line 5), cow/4.jpg (line 6), and 2 more. Paths are those "
        "of the source, such as cat/0.jpg."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        matched(train="cat/1.jpg", test=f"cat/2.jpg\n{missing}")
    with pytest.raises(DataError, match=r"has 1 line without an image of the dataset: path,label \(line 1\)"):
        matched(train="path,label\ncat/1.jpg")


def test_image_in_two_lists_is_rejected():
    message = "2 images in two lists of spec.dataset.splits: cat/2.jpg (train, test), cat/3.jpg (train, test). The"
    with pytest.raises(DataError, match=re.escape(message)):
        matched(train="cat/1.jpg\ncat/2.jpg\ncat/3.jpg", test="cat/2.jpg dog\ncat/3")


def test_repeated_lines_labels_and_rejected_images_are_noted():
    found = matched(
        unavailable={"cat/x.jpg": "corrupt", "dog/y.png": SAME_PIXELS},
        train="cat/1.jpg 0\ncat/1\ncat/x.jpg",
        test="dog/1.jpg tabby\ndog/y",
    )
    assert found.split_of == {"cat/1.jpg": "train", "dog/1.jpg": "test"}
    assert found.notes == (
        "Not used: 2 listed images that the pull rejected: cat/x.jpg (train; corrupt), dog/y.png (test; same pixels as "
        "an image of another class).",
        "Ignored in the train list: 1 line with an image that is already listed.",
        "Ignored in the train list: text after the path in 1 line, such as 0. The class of an image is that of the "
        "source.",
        "Ignored in the test list: text after the path in 1 line, such as tabby. The class of an image is that of the "
        "source.",
    )


def metadata(**settings):
    defaults = {
        "name": "pets",
        "fingerprint": "0" * 16,
        "source": {"folder": {"uri": "pets"}},
        "class_names": CLASSES,
        "splits": {"train": {"cat": 10, "dog": 10}},
        "images": 20,
        "rejected": (),
        "duplicates": 0,
    }
    return DatasetMetadata(**defaults | settings)


def test_images_that_were_rejected_or_dropped_are_found(tmp_path):
    example = (LabeledImage(name="cat/a.jpg", class_name="cat"), LabeledImage(name="dog/a.jpg", class_name="dog"))
    dropped = Contradictions(groups=2, images=4, dropped=True, examples=(example,))
    rejected = (RejectedImage(name="cat/x.jpg", reason="corrupt"),)
    listing = tmp_path / "entries.csv.gz"
    kept = metadata(rejected=rejected, contradictions=dropped.model_copy(update={"dropped": False}))
    assert find_unavailable_images(NAMES, kept, listing) == {"cat/x.jpg": "corrupt"}
    archive = metadata(rejected=rejected, contradictions=dropped)
    expected = {"cat/x.jpg": "corrupt", "cat/a.jpg": SAME_PIXELS, "dog/a.jpg": SAME_PIXELS}
    assert find_unavailable_images(NAMES, archive, listing) == expected
    with gzip.open(listing, "wt") as file:
        file.writelines(f"{name},cat,1,v\n" for name in [*NAMES, *expected, "cat/b.jpg"])
    assert find_unavailable_images(NAMES, archive, listing) == expected | {"cat/b.jpg": SAME_PIXELS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which lists no images"),
        (b"\xef\xbb\xbf# nothing\r\n\r\n", "which lists no images"),
        (b"cat/1.jpg\ncat/\xe9.jpg", "which is not UTF-8 text: line 2 has the byte 0xe9"),
        ("cat/1.jpg".encode("utf-16"), "which is not UTF-8 text: line 1 has the byte 0xff"),
        (None, "which does not exist"),
    ],
)
def test_unreadable_lists_are_rejected(content, message, tmp_path):
    path = tmp_path / "train.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^spec.dataset.splits.train.list is {path}, {message}"):
        read_split_lists({"train": str(path)}, None)


def test_lists_are_read_from_storage_too(storage):
    storage.write("lists/train.txt", b"cat/1.jpg\n")
    uri = storage.uri_of("lists/train.txt")
    assert read_split_lists({"train": uri}, storage) == {"train": SplitList(uri, b"cat/1.jpg\n")}
    with pytest.raises(DataError, match=r"test\.list is s3://.*, which does not exist"):
        read_split_lists({"test": storage.uri_of("lists/test.txt")}, storage)


def dataset(names=("train", "validation", "test"), **settings):
    splits = {name: {"list": f"{name}.txt"} for name in names}
    source = settings.pop("source", {"folder": {"uri": "pets"}})
    group_by = {"groupBy": settings.pop("group_by")} if "group_by" in settings else {}
    return Dataset.model_validate({"source": source, "splits": splits | group_by, "imageSize": [32, 32], **settings})


def stored_images(names=NAMES, groups=None):
    labels = np.array([CLASSES.index(name.split("/")[0]) for name in names])
    digests = np.arange(len(names), dtype=np.uint64)
    return StoredImages(CLASSES, {"train": SourceSplit(0, labels)}, names, digests, groups)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["train", "validation", "test", None]), min_size=20, max_size=20), st.randoms())
def test_each_listed_image_is_in_its_split_and_no_other_image_is_used(assigned, random):
    texts = {}
    for split in ("train", "validation", "test"):
        lines = [name for name, part in zip(NAMES, assigned, strict=True) if part == split]
        random.shuffle(lines)
        texts[split] = "\n".join(lines)
    inputs = SplitInputs(lists(**texts))
    settings = dataset(onMissingClass="allow")
    if len({name.split("/")[0] for name in texts["train"].split("\n") if name}) < 2:
        with pytest.raises(DataError, match="training split contains no image"):
            select_images(settings, metadata(), stored_images(), inputs, seed=1)
        return
    found = select_images(settings, metadata(), stored_images(), inputs, seed=1)
    for split, positions in found.positions.items():
        assert [NAMES[position] for position in positions] == sorted(filter(None, texts[split].split("\n")))
    unused = assigned.count(None)
    assert found.notes == ((f"Not used: {unused} of 20 images, which are in no list.",) if unused else ())
    counts = count_images(settings.split_settings, {"train": 20}, 2, inputs=inputs)
    assert counts == {split: len(positions) for split, positions in found.positions.items()}


def test_group_in_two_lists_is_rejected():
    groups = Groups.of([f"p{number}" for number in [*range(10), *range(10)]])
    inputs = SplitInputs(lists(train="cat/1.jpg\ndog/1.jpg\ndog/2.jpg", test="cat/2.jpg\ndog/3.jpg"))
    message = (
        "spec.dataset.splits.groupBy: images of the same group are in several lists, for 1 of 10 groups: p2 (1 train, "
        "1 test). The published metrics would be too high. Move each group to one list, or remove groupBy."
    )
    settings = dataset(("train", "test"), group_by="folder")
    with pytest.raises(DataError, match=re.escape(message)):
        select_images(settings, metadata(), stored_images(groups=groups), inputs, seed=1)


def test_class_without_listed_images_is_rejected():
    inputs = SplitInputs(lists(train="cat/1.jpg\ndog/1.jpg", test="cat/2.jpg"))
    with pytest.raises(DataError, match=r"test split contains no image of dog\. Enlarge .*test, remove the class"):
        select_images(dataset(("train", "test")), metadata(), stored_images(), inputs, seed=1)


def test_comments_and_blank_lines_are_not_counted():
    (part,) = lists(train="# one\n\ncat/1\n  \ncat/2 0\r\n").values()
    assert count_lines(part, "train") == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": {"tfds": "pets"}}, r"splits\.train: names images by their paths, but the images of a TFDS dataset"),
        ({"names": ("train",)}, r"test: is required .* such as test: \{list: test\.txt\}"),
        ({"names": ("test",)}, "train: is required"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        dataset(**settings)
