"""The report, the card and the files beside them."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from ruamel.yaml import YAML

from topwork.data.dataset_manifest import DatasetMetadata, RejectedImage
from topwork.report.documents import card_md, confusions, report_html
from topwork.report.evaluation import evaluation
from topwork.report.export_check import Recheck
from topwork.report.plots import curves
from topwork.report.results import Mistake, Outcome, history_csv, metrics_json, step_seconds
from topwork.spec import TransferJob
from topwork.spec.fine_tune import FineTune
from topwork.spec.yaml_output import dump_job

HOSTILE = '<script>alert("x")</script>|`$\\alpha$`'
HISTORY = [
    {"stage": "transfer", "epoch": 1, "loss": 0.7, "accuracy": 0.5, "validation_loss": 0.69, "seconds": 2.0},
    {"stage": "transfer", "epoch": 2, "loss": 0.6, "accuracy": 0.6, "validation_loss": 0.65, "seconds": 1.0},
    {"stage": "fine-tune", "epoch": 1, "loss": 0.5, "accuracy": 0.75, "seconds": 3.0},
]


@pytest.fixture
def job():
    return TransferJob.model_validate(
        {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferJob",
            "metadata": {"name": "cats"},
            "spec": {
                "storage": "s3://ml-artifacts/topwork",
                "dataset": {
                    "source": {"folder": {"uri": "s3://ml-artifacts/photos/"}},
                    "splits": {"train": "train[:80%]", "test": "train[80%:]"},
                    "imageSize": [32, 32],
                },
                "model": {"base": {"cnn": {"filters": [4]}}},
                "transfer": {"train": "all"},
                "evaluate": {"metrics": ["auc", "accuracy"]},
                "compute": {"gpus": 0},
            },
        }
    )


@pytest.fixture
def outcome(job):
    return make_outcome(job, ("cat", "dog", HOSTILE))


def make_outcome(job, names):
    random = np.random.default_rng(0)
    labels = random.integers(0, len(names), 60)
    probabilities = random.dirichlet(np.ones(len(names)), 60).astype(np.float32)
    return Outcome(
        job=job,
        facts=DatasetMetadata(
            name="photos",
            fingerprint="0123456789abcdef",
            source={"folder": "s3://ml-artifacts/photos/"},
            class_names=names,
            splits={"train": dict.fromkeys(names, 100)},
            images=100 * len(names),
            rejected=(RejectedImage(name=f"cat/{HOSTILE}.jpg", reason="truncated", detail="image file is truncated"),),
            duplicates=3,
        ),
        counts={"train": dict.fromkeys(names, 80), "test": dict.fromkeys(names, 20)},
        history=HISTORY,
        evaluation=evaluation(probabilities, labels, names),
        gates=(),
        mistakes=(Mistake(f"dog/{HOSTILE}.jpg", "dog", HOSTILE, 0.97, "data:image/jpeg;base64,AAAA"),),
        lineage={"Run": job.run, "Model": "s3://ml-artifacts/topwork/models/cats/3"},
        version=3,
        formats=("keras", "savedModel"),
        recheck=Recheck(
            tolerance=1e-4,
            images=60,
            encoded_images=20,
            largest_difference={"keras": 0.0, "savedModel": 1.2e-7},
            accuracy={"keras": 0.5, "savedModel": 0.5},
        ),
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_needs_nothing_beside_it(outcome):
    page = Page(report_html(outcome))
    assert page.tags.count("svg") == 2
    assert {"link", "script", "iframe"}.isdisjoint(page.tags)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert "@import" not in report_html(outcome)


def test_the_report_escapes_the_text_of_strangers(outcome):
    text = report_html(outcome)
    assert HOSTILE not in text
    page = Page(text)
    assert "script" not in page.tags
    # as column, row, class, counts, most confused or rejected image, and mistake
    assert page.text.count(HOSTILE) >= 5


def test_the_report_shows_what_the_job_asked_for_first(outcome):
    tiles = re.findall(r'<div class="tile( main)?"><b>([^<]+)</b><span>(\w+)</span>', report_html(outcome))
    values = outcome.evaluation.values
    assert tiles == [
        (" main", f"{values['auc']:.4f}", "auc"),
        ("", f"{values['accuracy']:.4f}", "accuracy"),
        ("", f"{values['loss']:.4f}", "loss"),
    ]


def test_the_report_of_many_classes_draws_the_confusion_and_lists_the_worst(job):
    outcome = make_outcome(job, tuple(f"class {index}" for index in range(30)))
    page = Page(report_html(outcome))
    assert page.tags.count("svg") == 3
    worst = confusions(outcome)
    assert len(worst) == 12
    assert [entry[2] for entry in worst] == sorted((entry[2] for entry in worst), reverse=True)


def test_the_report_is_the_same_each_time(outcome):
    assert report_html(outcome) == report_html(outcome)


def test_figures_leave_nothing_behind_and_take_their_ink_from_the_page():
    before = dict(matplotlib.rcParams)
    svg = curves(HISTORY)
    assert dict(matplotlib.rcParams) == before
    assert "currentColor" in svg
    assert "#010203" not in svg
    texts = "".join(ElementTree.fromstring(svg).itertext())
    assert all(word in texts for word in ("loss", "accuracy", "training", "validation", "transfer", "fine-tune"))


def test_curves_of_no_epoch_are_not_drawn():
    assert curves([]) == ""


def test_the_card_keeps_its_form_whatever_classes_are_called(outcome):
    card = card_md(outcome)
    head, body = card.split("---\n")[1:]
    assert YAML(typ="safe").load(head) == {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "transfer-learning", "topwork"],
        "metrics": ["auc", "accuracy", "loss"],
    }
    assert "<script>" not in body
    rows = [line for line in body.splitlines() if line.startswith("| ") and "script" in line]
    assert rows
    # A bar inside a cell is escaped: every row of a table has as many cells as its head.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {4, 5, 6}
    assert "topwork predict s3://ml-artifacts/topwork/models/cats/3 image.jpg" in body
    assert "keras 0.0e+00, savedModel 1.2e-07." in body
    assert 'keras.models.load_model("model.keras")' in body


def test_the_card_shows_only_the_formats_that_there_are(outcome):
    card = card_md(dataclasses.replace(outcome, formats=("onnx",)))
    assert "load_model" not in card
    assert "saved_model.load" not in card
    assert "`model.onnx` takes float32 (n, 32, 32, 3)" in card


def test_metrics_json_tells_every_number(outcome):
    told = json.loads(metrics_json(outcome))
    assert told["mainMetric"] == "auc"
    assert set(told["metrics"]) == {
        "loss", "accuracy", "top5", "precision", "recall", "f1", "auc", "calibrationError",
    }  # fmt: skip
    assert told["evaluation"]["classNames"][2] == HOSTILE
    assert told["recheck"]["largestDifference"] == {"keras": 0.0, "savedModel": 1.2e-7}


def epochs(stage, *rates):
    return [{"stage": stage, "epoch": number, "images_per_second": rate} for number, rate in enumerate(rates, 1)]


def test_a_step_of_a_stage_takes_the_median_of_its_epochs(job):
    whole = job.spec.model_copy(update={"fine_tune": FineTune(epochs=2, batch_size=16)})
    job = job.model_copy(update={"spec": whole})
    # The first epoch of a stage holds the tracing of its graph: of two, the faster one tells.
    history = epochs("transfer", 20.0, 160.0, 128.0) + epochs("fine-tune", 2.0, 8.0)
    assert step_seconds(job, history) == {"transfer": 64 / 128, "fine-tune": 16 / 8}
    assert step_seconds(job, HISTORY) == {}


def test_metrics_json_and_card_tell_what_a_step_took(outcome):
    measured = dataclasses.replace(outcome, history=epochs("transfer", 128.0))
    assert json.loads(metrics_json(measured))["stepSeconds"] == {"transfer": 0.5}
    assert "Seconds of a training step, the median of the epochs: transfer 0.5.\n" in card_md(measured)
    assert "Seconds of a training step" not in card_md(outcome)


def test_history_leaves_empty_what_an_epoch_does_not_have():
    assert history_csv(HISTORY).decode().splitlines() == [
        "stage,epoch,loss,accuracy,validation_loss,seconds",
        "transfer,1,0.7,0.5,0.69,2.0",
        "transfer,2,0.6,0.6,0.65,1.0",
        "fine-tune,1,0.5,0.75,,3.0",
    ]


def test_the_spec_reads_back_as_the_same_job(job):
    again = TransferJob.model_validate(YAML(typ="safe").load(dump_job(job)))
    assert again == job
    assert again.run == job.run
