"""examples/audited.yaml: copies in train and test stop a job before training, or are reported with the model."""

import csv
import io
import json
from importlib import resources

import numpy as np
import pytest
from PIL import Image, ImageOps
from tests.end_to_end.example_systems import EXAMPLES

SMALL = (
    "spec.model.base={cnn: {filters: [4, 8]}}",
    "spec.dataset.imageSize=[32, 32]",
    "spec.transfer={train: all, epochs: 1, batchSize: 12}",
    "spec.publish={formats: [keras]}",
)
FILES = {"temple": "china.jpg", "petals": "flower.jpg"}
WARN = "spec.dataset.audit={nearDuplicates: warn, labelIssues: report}"


@pytest.fixture(scope="module")
def photographs(examples):
    """Detailed parts of two photographs, each of them once more as a mirrored, compressed copy."""
    root, random = examples.directory / "photographs", np.random.default_rng(0)
    for label, left, top in (("temple", 0, 160), ("petals", 240, 80)):
        image = Image.open(str(resources.files("sklearn.datasets") / "images" / FILES[label]))
        (root / label).mkdir(parents=True)
        for number in range(16):
            x, y = left + number % 4 * 60, top + number // 4 * 60
            part = image.crop((x, y, x + 60, y + 60))
            part.save(root / label / f"{number:02}.png")
            ImageOps.mirror(part).save(root / label / f"{number:02}-copy.jpg", quality=int(random.integers(70, 95)))
    return f"spec.dataset.source={{folder: {{uri: {root}}}}}"


def test_copies_stop_the_job_before_training(examples, photographs, tmp_path):
    options = [word for override in (*SMALL, photographs) for word in ("--set", override)]
    completed = examples.topwork("audit", EXAMPLES / "audited.yaml", *options, "--output", tmp_path)
    assert completed.returncode == 2
    assert "more than spec.dataset.audit.maxLeakRatio 0.01 allows" in completed.stderr
    findings = json.loads((tmp_path / "audit.json").read_text())
    overlap = findings["overlaps"][0]
    assert (overlap["split"], overlap["otherSplit"]) == ("test", "train")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "suspects.csv").read_text())))
    found = [row for row in rows if (row["split"], row["other_split"]) == ("test", "train")]
    assert len({row["image"] for row in found}) == overlap["near"] > 0
    for row in found:
        assert row["problem"] == "near duplicate"
        assert row["image"][:9] == row["other_image"][:9]  # <class>/<number>


@pytest.fixture(scope="module")
def run(examples, photographs):
    return examples.run_one("audited", *SMALL, photographs, WARN)


def test_copies_are_reported_with_the_model(run):
    leak = json.loads(run.storage.read(f"{run.version_key}/audit.json"))["overlaps"][0]
    images = f"{leak['near']} of {leak['images']}"
    assert f"  leaks   {images} images of the test split have a near duplicate in train" in run.summary
    for document in ("card.md", "report.html"):
        assert (
            f"{images} test images have a near duplicate in train"
            in run.storage.read(f"{run.version_key}/{document}").decode()
        )
    assert run.storage.read(f"{run.version_key}/suspects.csv") == run.storage.read(f"runs/{run.job.run}/suspects.csv")


def test_report_shows_both_images_of_a_pair(run):
    report = run.storage.read(f"{run.version_key}/report.html").decode()
    assert report.count('<figure class="twins">') >= 1
    assert "probably have a wrong class, judged by their pixels" in report
