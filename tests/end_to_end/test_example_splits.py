"""examples/own-splits.yaml and patients.yaml: splits of the source, and patients that are in one split only."""

import csv
import io

import numpy as np
import pytest
from tests.end_to_end.example_systems import random_image

SMALL = ("spec.model.base={cnn: {filters: [4, 8]}}", "spec.dataset.imageSize=[32, 32]", "spec.transfer.epochs=1")
BEANS = ("angular_leaf_spot", "bean_rust", "healthy")


@pytest.fixture(scope="module")
def beans(examples):
    splits = {"train": 36, "validation": 12, "test": 15}
    examples.mirror_tfds("beans", version="0.1.0", classes=BEANS, splits=splits)
    return examples.run_one("own-splits", *SMALL, "spec.transfer.train=all", "spec.transfer.batchSize=12")


def test_published_splits_are_used_as_they_are(beans):
    dataset = beans.dataset
    assert (dataset.train.size, dataset.validation.size, dataset.test.size) == (36, 12, 15)
    assert {name.split("/")[0] for name in dataset.test.names} == {"test"}
    assert beans.metrics["evaluation"]["images"] == 15
    assert beans.metrics["evaluation"]["split"] == "test"


@pytest.fixture(scope="module")
def scans(examples):
    """Write the table of the example with 120 images of 20 patients, and run the example."""
    random, storage = np.random.default_rng(0), examples.storage.at("s3://ml-artifacts/clinic")
    rows = []
    for number in range(120):
        patient = number % 20
        finding = "ill" if patient < 8 else "healthy"
        file = io.BytesIO()
        random_image(random, 32, (150, 40, 40) if finding == "ill" else (40, 40, 150)).save(file, "PNG")
        storage.write(f"scans/{number:04}.png", file.getvalue())
        rows.append((f"scans/{number:04}.png", finding, f"p{patient}"))
    table = io.StringIO()
    csv.writer(table).writerows([("file", "finding", "patient"), *rows])
    storage.write("scans.csv", table.getvalue().encode())
    small = (*SMALL, "spec.transfer.train=all", "spec.transfer.batchSize=12", "spec.fineTune=null")
    run = examples.run_one("patients", *small, "spec.compute.gpus=0")
    return run, {file: patient for file, _, patient in rows}


def test_no_patient_is_in_two_splits(scans):
    run, patient_of = scans
    splits = (run.dataset.train, run.dataset.validation, run.dataset.test)
    patients = [{patient_of[name] for name in split.names} for split in splits]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20
    assert [split.size for split in splits] == [84, 18, 18]


def test_both_findings_are_in_every_split(scans):
    run, _ = scans
    for counts in run.split_counts.values():
        assert all(counts.values())
