"""The HTML report, the model card, `metrics.json` and `history.csv`."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from ruamel.yaml import YAML

from topwork.data.dataset_manifest import ClassSelectionSummary, DatasetMetadata, RejectedImage
from topwork.report.calibration import Calibration
from topwork.report.documents import listed_classes, render_model_card, render_report, top_confusions
from topwork.report.evaluation import evaluate_predictions
from topwork.report.export_check import ExportCheck
from topwork.report.gates import LatestVersion
from topwork.report.plots import plot_history
from topwork.report.results import Misclassification, Results, history_csv, metrics_json, step_seconds
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
def results(job):
    return make_results(job, ("cat", "dog", HOSTILE))


def make_results(job, names):
    random = np.random.default_rng(0)
    labels = random.integers(0, len(names), 60)
    probabilities = random.dirichlet(np.ones(len(names)), 60).astype(np.float32)
    return Results(
        job=job,
        dataset=DatasetMetadata(
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
        evaluation=evaluate_predictions(probabilities, labels, names),
        gates=(),
        mistakes=(Misclassification(f"dog/{HOSTILE}.jpg", "dog", HOSTILE, 0.97, "data:image/jpeg;base64,AAAA"),),
        lineage={"Run": job.run, "Model": "s3://ml-artifacts/topwork/models/cats/3"},
        version=3,
        formats=("keras", "savedModel"),
        export_check=ExportCheck(
            tolerance=1e-4,
            logit_tolerance=2e-4,
            images=60,
            encoded_images=20,
            largest_difference={"keras": 0.0, "savedModel": 1.2e-7},
            largest_logit_difference={"keras": 0.0, "savedModel": 0.0},
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


def test_report_is_self_contained(results):
    page = Page(render_report(results))
    assert page.tags.count("svg") == 2
    assert {"link", "script", "iframe"}.isdisjoint(page.tags)
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert "@import" not in render_report(results)


def test_report_escapes_untrusted_text(results):
    text = render_report(results)
    assert HOSTILE not in text
    page = Page(text)
    assert "script" not in page.tags
    # as column, row, class, counts, confusion or rejected image, and misclassified image
    assert page.text.count(HOSTILE) >= 5


def test_report_shows_the_requested_metrics_first(results):
    tiles = re.findall(r'<div class="tile( main)?"><b>([^<]+)</b><span>(\w+)</span>', render_report(results))
    values = results.evaluation.metrics
    assert tiles == [
        (" main", f"{values['auc']:.4f}", "auc"),
        ("", f"{values['accuracy']:.4f}", "accuracy"),
        ("", f"{values['loss']:.4f}", "loss"),
    ]


def test_report_of_many_classes_plots_the_confusion_matrix_and_lists_the_top_confusions(job):
    results = make_results(job, tuple(f"class {index}" for index in range(30)))
    page = Page(render_report(results))
    assert page.tags.count("svg") == 3
    worst = top_confusions(results)
    assert len(worst) == 12
    assert [entry[2] for entry in worst] == sorted((entry[2] for entry in worst), reverse=True)


@pytest.fixture
def large_results(job):
    """Results of 1,000 classes, 500 of which occur among 60 images at most."""
    names = tuple(f"class {index}" for index in range(1000))
    return make_results(job, names)


def test_report_shows_mistakes_beside_their_heat_maps(results):
    mistake = dataclasses.replace(results.mistakes[0], heat_uri="data:image/jpeg;base64,BBBB")
    heated = dataclasses.replace(results, mistakes=(mistake,), heat_note="Right: what the model looked at.")
    page = Page(render_report(heated))
    assert [address for address in page.addresses if "jpeg" in address] == [mistake.thumbnail_uri, mistake.heat_uri]
    assert "Right: what the model looked at." in page.text
    assert "wide" not in "".join(re.findall(r'class="gallery[^"]*"', render_report(results)))


def test_documents_describe_the_calibration(results):
    fitted = Calibration(temperature=1.5, images=40).with_uncalibrated(results.evaluation)
    calibrated = dataclasses.replace(results, calibration=fitted)
    text = "the logits are divided by 1.5, a temperature that was fitted on 40 images of the validation split."
    page = Page(render_report(calibrated))
    assert text in page.text
    assert "before calibration" in page.text
    assert text in render_model_card(calibrated)
    content = json.loads(metrics_json(calibrated))["calibration"]
    assert (content["temperature"], content["images"], content["reason"]) == (1.5, 40, "")
    assert content["before"]["calibrationError"] == results.evaluation.calibration_error
    assert json.loads(metrics_json(results))["calibration"] is None
    assert "calibrated" not in render_model_card(results)


def test_documents_of_many_classes_are_bounded(large_results):
    html, card, content = render_report(large_results), render_model_card(large_results), metrics_json(large_results)
    assert len(html) < 250_000
    assert len(card) < 50_000
    assert len(content) < 500_000
    page = Page(html)
    assert page.tags.count("svg") == 2
    for text in (page.text, card):
        assert "200 classes with the lowest F1, of 1000" in text
        assert "all 1000 classes" in text
    evaluation = json.loads(content)["evaluation"]
    assert evaluation["confusion"] is None
    assert len(evaluation["perClass"]) == 1000
    assert evaluation["confusions"][0].keys() == {"trueClass", "predictedClass", "images", "share"}


def test_listed_classes_start_with_the_lowest_f1(large_results):
    values = [score.f1 for score in listed_classes(large_results)]
    occurring = [value for value in values if value is not None]
    assert occurring == sorted(occurring)
    assert values[: len(occurring)] == occurring


def test_documents_name_classes_without_images(job):
    results = make_results(job, ("cat", "dog", HOSTILE, "never"))
    labels = np.array([0, 1, 2])
    evaluation = evaluate_predictions(np.eye(4, dtype=np.float32)[labels], labels, ("cat", "dog", HOSTILE, "never"))
    results = dataclasses.replace(results, evaluation=evaluation, notes=evaluation.notes)
    note = "1 of 4 classes has no images in the test split and is excluded from precision, recall, F1 and AUC: never."
    assert note in Page(render_report(results)).text
    assert note in render_model_card(results)
    assert "| never | 0 | not defined | not defined | not defined |" in render_model_card(results)
    content = json.loads(metrics_json(results))["evaluation"]
    assert (content["excludedClasses"], content["excludedClassNames"]) == (1, ["never"])
    assert content["perClass"][3] == {
        "name": "never", "images": 0, "predicted": 0, "precision": None, "recall": None, "f1": None,
    }  # fmt: skip


def test_documents_say_which_classes_were_merged_and_left_out(results):
    selection = ClassSelectionSummary(setting={}, merged={"cat": ("lion", HOSTILE)}, left_out={"fox": 3, HOSTILE: 4})
    dataset = results.dataset.model_copy(update={"class_selection": selection})
    results = dataclasses.replace(results, dataset=dataset)
    text = Page(render_report(results)).text
    assert f"The class cat contains the classes lion, {HOSTILE} of the source." in text
    assert f"Left out: 2 classes of the source with 7 images, fox, {HOSTILE}." in text
    card = render_model_card(results)
    assert " The class cat contains the classes lion, " in card
    assert " Left out: 2 classes of the source with 7 images, fox, " in card
    assert HOSTILE not in card.replace("spec.yaml", "")


def test_documents_show_the_latest_version_on_the_same_images(results):
    latest = LatestVersion(version="cats/2", metrics={"accuracy": 0.125, "loss": 2.0})
    results = dataclasses.replace(results, latest=latest)
    assert "cats/2, evaluated on the same images" in Page(render_report(results)).text
    assert "| accuracy | 0.1250 |" in render_model_card(results)
    assert json.loads(metrics_json(results))["latest"]["metrics"] == {"accuracy": 0.125, "loss": 2.0}


def test_report_is_reproducible(results):
    assert render_report(results) == render_report(results)


def test_plots_change_no_global_state_and_use_the_text_color_of_the_page():
    before = dict(matplotlib.rcParams)
    svg = plot_history(HISTORY)
    assert dict(matplotlib.rcParams) == before
    assert "currentColor" in svg
    assert "#010203" not in svg
    texts = "".join(ElementTree.fromstring(svg).itertext())
    assert all(word in texts for word in ("loss", "accuracy", "training", "validation", "transfer", "fine-tune"))


def test_history_without_epochs_is_not_plotted():
    assert plot_history([]) == ""


def test_model_card_is_well_formed_for_any_class_names(results):
    card = render_model_card(results)
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
    # A pipe inside a cell is escaped: every row has as many cells as the header.
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {4, 5, 6}
    assert "topwork predict s3://ml-artifacts/topwork/models/cats/3 image.jpg" in body
    assert "keras 0.0e+00, savedModel 1.2e-07." in body
    assert 'keras.models.load_model("model.keras")' in body


def test_model_card_shows_only_exported_formats(results):
    card = render_model_card(dataclasses.replace(results, formats=("onnx",)))
    assert "load_model" not in card
    assert "saved_model.load" not in card
    assert "`model.onnx` takes float32 (n, 32, 32, 3)" in card


def test_metrics_json_contains_all_metrics(results):
    content = json.loads(metrics_json(results))
    assert content["mainMetric"] == "auc"
    assert set(content["metrics"]) == {
        "loss", "accuracy", "precision", "recall", "f1", "auc", "calibrationError",
    }  # fmt: skip
    assert content["evaluation"]["classNames"][2] == HOSTILE
    assert content["recheck"]["largestDifference"] == {"keras": 0.0, "savedModel": 1.2e-7}


def epochs(stage, *rates):
    return [{"stage": stage, "epoch": number, "images_per_second": rate} for number, rate in enumerate(rates, 1)]


def test_step_seconds_is_the_low_median_of_the_epochs(job):
    spec = job.spec.model_copy(update={"fine_tune": FineTune(epochs=2, batch_size=16)})
    job = job.model_copy(update={"spec": spec})
    # The first epoch of a stage includes graph tracing: of two epochs, the faster one counts.
    history = epochs("transfer", 20.0, 160.0, 128.0) + epochs("fine-tune", 2.0, 8.0)
    assert step_seconds(job, history) == {"transfer": 64 / 128, "fine-tune": 16 / 8}
    assert step_seconds(job, HISTORY) == {}


def test_metrics_json_and_model_card_contain_step_seconds(results):
    measured = dataclasses.replace(results, history=epochs("transfer", 128.0))
    assert json.loads(metrics_json(measured))["stepSeconds"] == {"transfer": 0.5}
    assert "Seconds per training step (median over the epochs): transfer 0.5.\n" in render_model_card(measured)
    assert "Seconds per training step" not in render_model_card(results)


def test_history_csv_leaves_missing_values_empty():
    assert history_csv(HISTORY).decode().splitlines() == [
        "stage,epoch,loss,accuracy,validation_loss,seconds",
        "transfer,1,0.7,0.5,0.69,2.0",
        "transfer,2,0.6,0.6,0.65,1.0",
        "fine-tune,1,0.5,0.75,,3.0",
    ]


def test_dumped_spec_reads_back_as_the_same_job(job):
    reloaded = TransferJob.model_validate(YAML(typ="safe").load(dump_job(job)))
    assert reloaded == job
    assert reloaded.run == job.run


def with_dataset(job, **settings):
    """Return the job with other settings of `spec.dataset`."""
    dataset = job.spec.dataset.model_copy(update=settings)
    return job.model_copy(update={"spec": job.spec.model_copy(update={"dataset": dataset})})


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (31, 47), (1, 500), (7, 3)])
@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_code_in_the_card_resizes_images_as_in_training(job, fit, shape):
    from topwork.data.images.resizing import resize

    results = make_results(with_dataset(job, image_fit=fit, image_size=(32, 48)), ("cat", "dog"))
    code = re.search(r"```python\n([^`]*def resize[^`]*)```", render_model_card(results))[1]
    functions = {}
    exec(code, functions)  # the code of the card
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = resize(pixels, (32, 48), fit).numpy()
    assert np.array_equal(functions["resize"](pixels).numpy(), expected)


@pytest.mark.parametrize(
    ("fit", "sentence", "limit"),
    [
        ("stretch", "resized to 32x48 pixels (height x width) without preserving", "objects look different"),
        ("crop", "cropped to the central part with the aspect ratio of the input, then resized", "Objects outside"),
        ("pad", "scaled to fit into 32x48 pixels (height x width) with their aspect ratio", "Objects are small"),
    ],
)
def test_card_and_report_state_how_images_are_resized(job, fit, sentence, limit):
    results = make_results(with_dataset(job, image_fit=fit, image_size=(32, 48)), ("cat", "dog"))
    card = render_model_card(results).replace("\\", "")
    for text in (card, Page(render_report(results)).text):
        assert f"{sentence}" in text
        assert f"(imageFit: {fit}). The interpolation is bilinear with antialiasing" in text
    assert limit in card.partition("## Limits")[2]
    assert card.count("def resize") == 1
    served = render_model_card(dataclasses.replace(results, formats=("savedModel",)))
    assert "def resize" not in served
