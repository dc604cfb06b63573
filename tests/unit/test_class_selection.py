"""`spec.dataset.classes`: every selected image has the right class, and the images of other classes are not read."""

import io
import json
import re
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.clients.prometheus.metrics import Metrics
from topwork.data.dataset_manifest import ClassSelectionSummary
from topwork.data.images.rejection import Rejection
from topwork.data.sources import open_dataset_source
from topwork.data.sources.class_selection import ClassSelection, SelectedClasses
from topwork.data.sources.source import SourceImage, SpaceEstimate
from topwork.data.sources.tfds import read_label_names
from topwork.errors import DataError
from topwork.registry.datasets import fingerprint_of
from topwork.spec.dataset import Dataset

# Two images of each class.
CLASSES = ("bird", "car", "cat", "person", "truck")
MERGED = [{"vehicle": ["truck", "car"]}, "person"]
KINDS = ("folder", "zip", "tar.gz", "table")


def make_settings(source, classes, **others):
    splits = {"train": 0.8, "test": 0.2}
    content = {"source": source, "imageSize": [32, 32], "splits": splits, **others}
    return Dataset.model_validate(content | ({"classes": classes} if classes is not None else {}))


def open_with(root, source, classes, **others):
    workspace = SimpleNamespace(scratch=root / "scratch", storage=None, metrics=Metrics())
    return open_dataset_source(make_settings(source, classes, **others), workspace)


def write_source(root, kind, paths):
    """Write files that contain their own path, whose class is the directory above them, and return the source."""
    if kind in {"zip", "tar.gz"}:
        archive = root / f"photos.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(archive, "w") as file:
                for path in paths:
                    file.writestr(path, path)
        else:
            with tarfile.open(archive, "w:gz") as file:
                for path in paths:
                    info = tarfile.TarInfo(path)
                    info.size = len(path.encode())
                    file.addfile(info, io.BytesIO(path.encode()))
        return {"archive": {"uri": str(archive)}}
    for path in paths:
        (root / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / path).write_text(path)
    if kind == "folder":
        return {"folder": {"uri": str(root / "photos")}}
    rows = [{"image": f"photos/{path}", "label": path.split("/")[-2]} for path in paths]
    (root / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"table": {"uri": str(root / "photos.jsonl")}}


def paths_of(classes, images=2):
    return [f"{name}/{index}.png" for name in classes for index in range(images)]


def read(source, split="train"):
    """Return the class of each image, after a check that it is the file with its name."""
    labels = {}
    for image in source.images(split):
        path = image.name.removeprefix("photos/")
        assert image.read().decode() == path
        assert path not in labels
        labels[path] = image.label
    return labels


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_merged_classes_are_one_class(tmp_path, kind):
    source = open_with(tmp_path, write_source(tmp_path, kind, paths_of(CLASSES)), MERGED)
    assert source.class_names() == ("vehicle", "person")
    assert source.splits() == {"train": 6}
    labels = read(source)
    assert Counter(labels.values()) == {"vehicle": 4, "person": 2}
    assert {path.split("/")[0] for path, label in labels.items() if label == "vehicle"} == {"car", "truck"}
    assert source.summary() == ClassSelectionSummary(
        setting=[{"vehicle": ["car", "truck"]}, "person"],
        merged={"vehicle": ("car", "truck")},
        left_out={"bird": 2, "cat": 2},
    )


def test_listed_classes_have_the_order_of_the_list(tmp_path, kind):
    source = open_with(tmp_path, write_source(tmp_path, kind, paths_of(CLASSES)), ["person", "bird"])
    assert source.class_names() == ("person", "bird")
    assert Counter(read(source).values()) == {"person": 2, "bird": 2}


def test_excluded_classes_are_left_out_and_others_keep_their_order(tmp_path, kind):
    source = open_with(tmp_path, write_source(tmp_path, kind, paths_of(CLASSES)), {"exclude": ["person", "car"]})
    assert source.class_names() == ("bird", "cat", "truck")
    assert Counter(read(source).values()) == {"bird": 2, "cat": 2, "truck": 2}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_selection_applies_to_every_split_of_the_source(tmp_path, kind):
    paths = [f"{split}/{path}" for split in ("train", "val", "test") for path in paths_of(CLASSES)]
    source = open_with(tmp_path, write_source(tmp_path, kind, paths), MERGED, splits="auto")
    assert source.splits() == {"train": 6, "validation": 6, "test": 6}
    for split in source.splits():
        assert Counter(read(source, split).values()) == {"vehicle": 4, "person": 2}
    assert source.summary().left_out == {"bird": 6, "cat": 6}


def test_split_without_selected_images_is_rejected(tmp_path):
    paths = [*(f"train/{path}" for path in paths_of(CLASSES)), "test/cat/1.png"]
    source = open_with(tmp_path, write_source(tmp_path, "folder", paths), MERGED, splits="auto")
    message = 'split test of .*/photos has no image of the classes .* selects: "vehicle", "person"'
    with pytest.raises(DataError, match=message):
        source.splits()
    with pytest.raises(DataError, match=message):
        list(source.images("test"))


# Errors


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cta", "bird"], '"cta" is not a class of {}. Did you mean cat? Classes of the source: "bird", "car", "cat",'),
        ([{"pet": ["cat", "Dog"]}, "bird"], '"Dog" is not a class of {}. Classes of the source: '),
        ({"exclude": ["trucks"]}, '"trucks" is not a class of {}. Did you mean truck?'),
        ({"exclude": ["bird", "car", "cat", "truck"]}, 'leaves only "person" of {}, but a classifier needs at least'),
        ({"exclude": [*CLASSES]}, "leaves only no class of {}"),
        ([{"car": ["truck"]}, "cat"], 'names "truck" "car", but {} has a class of this name, which is left out.'),
    ],
)
def test_selection_that_does_not_fit_the_source_is_rejected(tmp_path, kind, classes, message):
    given = write_source(tmp_path, kind, paths_of(CLASSES))
    source = open_with(tmp_path, given, classes)
    (uri,) = [settings["uri"] for settings in given.values()]
    with pytest.raises(DataError, match=re.escape(message.format(uri))):
        source.class_names()
    if kind in {"folder", "table"}:
        with pytest.raises(DataError, match=re.escape(message.format(uri))):
            source.digest()


def test_message_lists_a_limited_number_of_classes():
    names = tuple(f"class {number:03}" for number in range(500))
    with pytest.raises(DataError) as caught:
        ClassSelection(tuple(f"other {number}" for number in range(500))).select(names, "photos")
    assert "And 480 more. Classes of the source:" in str(caught.value)
    assert str(caught.value).endswith('"class 019" and 480 more.')
    assert len(str(caught.value)) < 3000


def test_names_that_are_the_same_without_secrets_are_rejected():
    secret = "https://user:{}@host/"  # the user and the password are removed from class names
    with pytest.raises(DataError, match=r"several names that are all .* Rename or remove all but one"):
        ClassSelection((secret.format("one"), secret.format("two")))


def test_names_are_compared_in_one_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    source = open_with(tmp_path, write_source(tmp_path, "folder", paths_of([composed, "tea"])), [decomposed, "tea"])
    assert source.class_names() == (composed, "tea")
    assert set(read(source).values()) == {composed, "tea"}


# What is read


def test_archive_unpacks_only_selected_images(tmp_path, monkeypatch):
    given = write_source(tmp_path, "zip", paths_of(CLASSES))
    source = open_with(tmp_path, given, MERGED)
    source.class_names()
    unpacked = []
    open_member = zipfile.ZipFile.open

    def record(archive, member, *arguments):
        unpacked.append(member.filename)
        return open_member(archive, member, *arguments)

    monkeypatch.setattr(zipfile.ZipFile, "open", record)
    read(source)
    assert unpacked == [path for path in paths_of(CLASSES) if not path.startswith(("bird", "cat"))]


@pytest.mark.parametrize(("kind", "listed"), [("folder", True), ("zip", False), ("tar.gz", False)])
def test_space_is_that_of_the_selected_images(tmp_path, kind, listed):
    source = open_with(tmp_path, write_source(tmp_path, kind, paths_of(CLASSES)), MERGED)
    expected = sum(len(path) for path in paths_of(["car", "person", "truck"]))
    assert source.estimate_space().image_bytes == (expected if listed else 0)
    source.class_names()
    assert source.estimate_space().image_bytes == expected


def write_table(tmp_path, rows):
    (tmp_path / "photos.jsonl").write_text("".join(json.dumps({"image": i, "label": c}) + "\n" for i, c in rows))
    for image, _ in rows:
        (tmp_path / image).write_text(image)
    return {"table": {"uri": str(tmp_path / "photos.jsonl")}}


def test_rows_of_one_image_may_contradict_each_other_only_outside_of_the_selection(tmp_path):
    rows = [("1.png", "car"), ("1.png", "truck"), ("2.png", "person"), ("2.png", "cat"), ("3.png", "")]
    given = write_table(tmp_path, rows)
    with pytest.raises(DataError, match=r"line 2: 1\.png has the class 'truck', but another class in an earlier row"):
        open_with(tmp_path, given, None).class_names()
    source = open_with(tmp_path, given, MERGED)
    assert source.class_names() == ("vehicle", "person")
    # A row without a label is rejected later, as without a selection.
    labels = [("1.png", "vehicle"), ("1.png", "vehicle"), ("2.png", "person"), ("3.png", None)]
    assert [(image.name, image.label) for image in source.images("train")] == labels
    assert [(entry.path, entry.label) for entry in source.entries()] == labels
    assert source.splits() == {"train": 4}
    with pytest.raises(DataError, match=r"line 4: 2\.png has the class 'animal', but another class in an earlier row"):
        open_with(tmp_path, given, [*MERGED, {"animal": ["cat"]}]).class_names()


def test_unsafe_member_of_an_archive_is_still_rejected(tmp_path):
    given = write_source(tmp_path, "zip", [*paths_of(CLASSES), "../car/1.png"])
    (image,) = [image for image in open_with(tmp_path, given, MERGED).images("train") if not image.label]
    with pytest.raises(Rejection):
        image.read()


# Fingerprint


def fingerprint(root, given, classes):
    return fingerprint_of(open_with(root, given, classes), make_settings(given, classes))


def test_fingerprint_without_a_selection_is_that_of_earlier_versions(tmp_path):
    given = {"archive": {"uri": "photos.zip", "sha256": "0" * 64}}
    assert fingerprint(tmp_path, given, None) == "c1afe76820fcbc34"


@pytest.mark.parametrize(
    "classes",
    [
        ["person", {"vehicle": ["car", "truck"]}],
        [{"van": ["car", "truck"]}, "person"],
        [{"vehicle": ["car"]}, "person"],
        {"exclude": ["bird", "cat"]},
        None,
    ],
)
def test_fingerprint_depends_on_the_selection(tmp_path, classes):
    given = write_source(tmp_path, "folder", paths_of(CLASSES))
    assert fingerprint(tmp_path, given, classes) != fingerprint(tmp_path, given, MERGED)


def test_fingerprint_does_not_depend_on_the_spelling_of_the_selection(tmp_path):
    given = write_source(tmp_path, "folder", paths_of(CLASSES))
    same = [{"vehicle": ["car", "truck"]}, {"person": ["person"]}]
    assert fingerprint(tmp_path, given, same) == fingerprint(tmp_path, given, MERGED)


def test_fingerprint_of_a_listed_source_depends_only_on_selected_images(tmp_path):
    given = write_source(tmp_path, "folder", paths_of(CLASSES))
    before = fingerprint(tmp_path, given, MERGED)
    (tmp_path / "photos" / "cat" / "new.png").write_text("new")
    assert fingerprint(tmp_path, given, MERGED) == before
    (tmp_path / "photos" / "car" / "new.png").write_text("new")
    assert fingerprint(tmp_path, given, MERGED) != before


def test_fingerprint_of_a_table_depends_only_on_selected_rows(tmp_path):
    given = write_source(tmp_path, "table", paths_of(CLASSES))
    before = fingerprint(tmp_path, given, MERGED)
    for label, is_same in (("cat", True), ("car", False)):
        with (tmp_path / "photos.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"image": f"{label}.png", "label": label}))
        assert (fingerprint(tmp_path, given, MERGED) == before) is is_same


def test_digest_of_an_archive_is_that_of_the_file_even_if_it_can_be_listed(tmp_path):
    given = write_source(tmp_path, "zip", paths_of(CLASSES))
    # A remote archive can be listed only after the download, and must have the same digest before.
    assert open_with(tmp_path, given, MERGED).digest() == open_with(tmp_path, given, None).digest()


# Any selection


NAMES = st.text("abcé0.- ", min_size=1, max_size=4).map(str.strip).filter(lambda name: name and name[0] != ".")


@st.composite
def selections(draw):
    """Classes of a source, and a selection of them with new and old names."""
    names = draw(st.lists(NAMES, min_size=3, max_size=8, unique=True))
    if draw(st.booleans()):
        return names, {"exclude": draw(st.lists(st.sampled_from(names), min_size=1, unique=True))}
    order = draw(st.permutations(names))
    parts, classes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=len(names))), []
    for index, size in enumerate(parts):
        part, order = order[:size], order[size:]
        if len(part) == 1 and draw(st.booleans()):
            classes.append(part[0])
        elif part:
            classes.append({draw(st.sampled_from([f"merged {index}", *part])): part})
    return names, classes


@settings(max_examples=60, deadline=None)
@given(selections(), st.sampled_from(KINDS), st.integers(1, 3))
def test_every_image_of_a_selected_class_is_read_once_with_its_class(selection, kind, images):
    names, classes = selection
    if isinstance(classes, dict):
        expected = {name: name for name in names if name not in classes["exclude"]}
        order = sorted(expected)
    else:
        listed = [next(iter(item.items())) if isinstance(item, dict) else (item, [item]) for item in classes]
        expected = {source: name for name, sources in listed for source in sources}
        order = [name for name, _ in listed]
    if len(order) < 2:
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        paths = paths_of(names, images)
        source = open_with(root, write_source(root, kind, paths), classes)
        assert source.class_names() == tuple(order)
        labels = read(source)
        assert labels == {path: expected[name] for path in paths if (name := path.split("/")[0]) in expected}
        assert source.splits() == {"train": len(labels)}
        if (entries := source.entries()) is not None:
            found = {entry.path.removeprefix("photos/"): entry.label for entry in entries}
            assert found == labels
        summary = source.summary()
        assert summary.left_out == {name: images for name in sorted(names) if name not in expected}
        stored = [source for name in order for source in summary.merged.get(name, (name,))]
        assert sorted(stored) == sorted(expected)


# Sources that are not listed


class Unlisted:
    """A source whose labels are known only from its images, like TFDS, with an order of its own."""

    name, is_listed, is_versioned = "unlisted", False, True

    def __init__(self, labels):
        self._labels = labels

    def description(self):
        return {"tfds": "unlisted/1.0.0"}

    def digest(self):
        return "unlisted/1.0.0"

    def entries(self):
        return None

    def class_sizes(self):
        return None

    def class_names(self):
        return ("truck", "car", "0", "person")

    def splits(self):
        return {"train": len(self._labels)}

    def images(self, split):
        return (SourceImage(str(number), label, str(number).encode) for number, label in enumerate(self._labels))

    def estimate_space(self):
        return SpaceEstimate(download_bytes=50, image_bytes=1000)


def select_unlisted(classes, labels):
    return SelectedClasses(Unlisted(labels), ClassSelection(make_settings({"tfds": "unlisted"}, classes).classes))


def test_source_that_is_not_listed_is_selected_while_it_is_read():
    source = select_unlisted({"exclude": ["0", "car"]}, ["person", "0", None, "truck", "0"])
    assert source.class_names() == ("truck", "person")
    assert (source.digest(), source.entries(), source.class_sizes()) == ("unlisted/1.0.0", None, None)
    assert source.splits() == {"train": None}
    for _ in range(2):
        images = [(image.name, image.label) for image in source.images("train")]
        assert images == [("0", "person"), ("2", None), ("3", "truck")]
        assert source.summary().left_out == {"car": 0, "0": 2}
    # Half of the classes.
    assert source.estimate_space() == SpaceEstimate(download_bytes=50, image_bytes=500)


def test_split_that_turns_out_to_have_no_selected_images_is_rejected():
    source = select_unlisted(["person", "car"], ["0", "truck", "0"])
    with pytest.raises(DataError, match=r"split train of unlisted/1\.0\.0 has no image of the classes"):
        list(source.images("train"))


def test_labels_without_names_are_numbers_in_quotes():
    features = {"label": tfds.features.ClassLabel(num_classes=3), "other": tfds.features.ClassLabel()}
    builder = SimpleNamespace(info=SimpleNamespace(full_name="digits/1.0.0", features=features))
    names = tuple(read_label_names(builder, "label"))
    assert ClassSelection(("2", "0")).select(names, "digits/1.0.0") == ("2", "0")
    with pytest.raises(DataError, match=r"The feature other of digits/1\.0\.0 defines no classes"):
        read_label_names(builder, "other")


# Description


def test_selection_is_described_in_sentences():
    left_out = {f"class {number}": 10 for number in range(12)}
    summary = ClassSelectionSummary(
        setting=[], merged={"vehicle": ("car", "truck"), "tench": ("n01440764",)}, left_out=left_out
    )
    assert summary.describe(limit=2) == (
        "The class vehicle contains the classes car, truck of the source.",
        "The class tench contains the class n01440764 of the source.",
        "Left out: 12 classes of the source with 120 images, class 0, class 1 and 10 more.",
    )
    assert summary.describe(limit=1)[1:2] == ("Merged or renamed classes that are not listed: 1.",)
    assert ClassSelectionSummary(setting=["b", "a"], merged={}, left_out={}).describe() == ()
