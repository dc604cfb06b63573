"""The audit of a dataset: planted duplicates, what the spec makes of them, older datasets, image quality, labels."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from topwork.artifacts import write_artifact
from topwork.data.signatures import SIGNATURES_FILE
from topwork.errors import DataError
from topwork.registry.versions import Version, update_latest
from topwork.stages.audit import audit
from topwork.stages.pull import pull

PER_CLASS = 10


@pytest.fixture
def photographs(tmp_path):
    """`<tmp>/photographs/<split>/<class>/*.png`: parts of two photographs; three training images are also in test."""
    root = tmp_path / "photographs"
    for label in ("china", "flower"):
        image = Image.open(str(resources.files("sklearn.datasets") / "images" / f"{label}.jpg"))
        width, height = image.width // 5, image.height // 4
        for number in range(20):
            x, y = number % 5 * width, number // 5 * height
            split = ("train", "val", "test")[0 if number < PER_CLASS else 1 if number < 15 else 2]
            directory = root / split / label
            directory.mkdir(parents=True, exist_ok=True)
            image.crop((x, y, x + width, y + height)).save(directory / f"{number:02}.png")
    return root


@pytest.fixture
def make_photo_job(make_job, photographs):
    def make(**settings):
        source = {"folder": {"uri": str(photographs)}}
        return make_job(dataset={"source": source, "splits": "auto", "imageSize": [32, 32], "audit": settings})

    return make


def plant_copies(photographs):
    train = photographs / "train" / "china"
    with Image.open(train / "07.png") as image:
        ImageOps.mirror(image).save(photographs / "test" / "china" / "mirrored.png")
        image.save(photographs / "test" / "china" / "exact.bmp")
    with Image.open(train / "02.png") as image:
        image.crop((6, 5, image.width - 6, image.height - 5)).save(
            photographs / "test" / "china" / "cropped.jpg", quality=85
        )


def test_copies_in_train_and_test_are_reported(make_photo_job, photographs, workspace):
    plant_copies(photographs)
    job = make_photo_job()
    dataset = pull(job, workspace)
    findings = audit(job, dataset, workspace)
    assert (findings.leak.images, findings.leak.exact, findings.leak.near) == (13, 1, 2)
    copies = {pair.first.name.split("/")[-1]: pair.second.name.split("/")[-1] for pair in findings.pairs}
    assert copies == {"mirrored.png": "07.png", "exact.bmp": "07.png", "cropped.jpg": "02.png"}
    assert findings.warnings() == (
        "3 of 13 test images have a near duplicate in train (1 with equal pixels). The metrics may be optimistic.",
    )
    stored = json.loads(workspace.storage.read(f"runs/{job.run}/audit.json"))
    assert stored["overlaps"][0] == {
        "split": "test", "otherSplit": "train", "images": 13, "searched": 13, "exact": 1, "near": 2,
    }  # fmt: skip
    rows = workspace.storage.read(f"runs/{job.run}/suspects.csv").decode().splitlines()
    assert len([row for row in rows if "duplicate" in row]) == 3
    assert workspace.metrics.registry.get_sample_value("topwork_leaked_images") == 3


def test_a_process_logs_equal_findings_once_and_sets_their_metrics_for_each_run(
    make_photo_job, photographs, workspace, caplog
):
    plant_copies(photographs)
    job = make_photo_job()
    dataset = pull(job, workspace)
    for run in ("first", "second"):
        workspace.metrics.start_job(job="photos", run=run, stage="run", version="1")
        audit(job, dataset, workspace)
        assert workspace.metrics.registry.get_sample_value("topwork_leaked_images") == 3
    assert str([record.msg for record in caplog.records]).count("duplicates across splits") == 1


def test_different_photographs_are_not_reported(make_photo_job, workspace):
    job = make_photo_job(nearDuplicates="fail")
    findings = audit(job, pull(job, workspace), workspace)
    assert [(overlap.split, overlap.other_split, overlap.duplicates) for overlap in findings.overlaps] == [
        ("test", "train", 0),
        ("test", "validation", 0),
        ("validation", "train", 0),
    ]


def test_leaks_stop_a_job_that_does_not_accept_them(make_photo_job, photographs, workspace):
    plant_copies(photographs)
    job = make_photo_job(nearDuplicates="fail", maxLeakRatio=0.2)
    dataset = pull(job, workspace)
    for _ in range(2):  # also with the stored findings
        with pytest.raises(
            DataError, match=r"3 of 13 test images .* 23.08%, more than spec.dataset.audit.maxLeakRatio"
        ):
            audit(job, dataset, workspace)


def test_accepted_leaks_do_not_stop_a_job(make_photo_job, photographs, workspace):
    plant_copies(photographs)
    job = make_photo_job(nearDuplicates="fail", maxLeakRatio=0.3)
    assert audit(job, pull(job, workspace), workspace).leak.duplicates == 3


def test_sample_of_a_large_split_is_searched_unless_leaks_are_not_accepted(
    make_photo_job, photographs, workspace, monkeypatch
):
    plant_copies(photographs)
    monkeypatch.setattr("topwork.stages.audit.MAX_COMPARISONS", 12 * 20)  # 20 training images
    monkeypatch.setattr("topwork.stages.audit.MIN_SEARCHED", 1)
    job = make_photo_job()
    leak = audit(job, pull(job, workspace), workspace).leak
    assert (leak.images, leak.searched, leak.exact) == (13, 12, 1)
    assert leak.near in {1, 2}  # one of the images may not be in the sample
    assert leak.ratio == pytest.approx(1 / 13 + leak.near / 12)
    assert leak.describe() == (
        f"1 of 13 test images have equal pixels in train, and {leak.near} of a sample of 12 a near duplicate."
    )
    job = make_photo_job(nearDuplicates="fail", maxLeakRatio=0.5)
    leak = audit(job, pull(job, workspace), workspace).leak
    assert (leak.searched, leak.exact, leak.near) == (13, 1, 2)


def test_audit_that_is_off_reads_no_images(make_photo_job, workspace):
    job = make_photo_job(nearDuplicates="off")
    dataset = pull(job, workspace)
    assert audit(job, dataset, workspace) is None
    assert not (workspace.scratch / dataset.prefix).exists()


def test_datasets_of_older_versions_are_searched(make_photo_job, photographs, workspace, monkeypatch):
    plant_copies(photographs)
    monkeypatch.setattr("topwork.data.tfds_writer._write_signature", lambda file, image: None)
    monkeypatch.setattr("topwork.data.tfds_writer.SIGNATURES_FILE", "unused.bin")
    job = make_photo_job()
    dataset = pull(job, workspace)
    assert workspace.storage.size(f"{dataset.prefix}/{SIGNATURES_FILE}") is None
    assert audit(job, dataset, workspace).leak.duplicates == 3


def test_useless_images_are_reported(make_photo_job, photographs, workspace):
    train = photographs / "train" / "flower"
    Image.new("RGB", (120, 100), "green").save(train / "blank.png")
    with Image.open(photographs / "train" / "china" / "02.png") as image:
        image.resize((12, 10)).save(train / "tiny.png")
    job = make_photo_job()
    findings = audit(job, pull(job, workspace), workspace)
    found = {issue.image.name.split("/")[-1]: issue.problem for issue in findings.quality_examples}
    assert found["blank.png"] == "blank"
    assert found["tiny.png"] == "tiny"
    assert findings.quality["tiny"] == 1


def test_wrong_labels_of_digits_are_found(make_job, tmp_path, workspace):
    """One of twenty labels is wrong. The base is not pretrained, so pixels are compared."""
    digits, random = load_digits(), np.random.default_rng(0)
    pixels, labels = digits.images[:600], digits.target[:600].copy()
    wrong = random.permutation(len(labels))[:30]
    labels[wrong] = (labels[wrong] + random.integers(1, 10, 30)) % 10
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        directory = tmp_path / "digits" / str(label)
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(directory / f"{number:04}.png")
    dataset = {
        "source": {"folder": {"uri": str(tmp_path / "digits")}},
        "splits": {"train": 0.8, "test": 0.2},
        "imageSize": [32, 32],
        "audit": {"nearDuplicates": "off", "labelIssues": "report"},
    }
    job = make_job(dataset=dataset)
    findings = audit(job, pull(job, workspace), workspace)
    suspects = {int(issue.image.name.split("/")[-1][:4]) for issue in findings.label_examples}
    assert findings.label_features == "pixels"
    assert findings.label_issues == len(suspects)
    assert len(suspects & set(wrong.tolist())) >= 0.8 * len(wrong)
    assert len(suspects & set(wrong.tolist())) >= 0.7 * len(suspects)


def test_images_and_classes_are_compared_with_those_of_the_last_version(
    make_photo_job, photographs, workspace, tmp_path
):
    job, storage = make_photo_job(nearDuplicates="off", labelIssues="report"), workspace.storage
    dataset = pull(job, workspace)
    assert audit(job, dataset, workspace).drift is None
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "audit.json").write_bytes(storage.read(f"runs/{job.run}/audit.json"))
    version = Version(
        name="tiny", version=1, uri="", run=job.run, weights="", published="", main_metric="accuracy", metrics={},
        split="test", images=10, dataset=dataset.prefix,
    )  # fmt: skip
    write_artifact(storage, "models/tiny/1", tmp_path / "version", version.model_dump(mode="json"))
    update_latest(storage, "tiny")
    same = audit(job.as_run("same"), dataset, workspace).drift
    assert (same.version, same.distance, same.features) == (1, 0.0, 0.0)
    for path in photographs.rglob("*.png"):
        with Image.open(path) as image:
            image.point(lambda value: value // 3).save(path)
    (photographs / "train" / "flower" / "09.png").unlink()
    darker = audit(job, pull(job, replace(workspace, scratch=tmp_path / "new")), workspace).drift
    assert darker.features > 0.5
    assert darker.distance == pytest.approx(0.5 - 19 / 39, abs=1e-5)
    assert f"the features of images by {darker.features:.2f} deviations" in darker.describe()
