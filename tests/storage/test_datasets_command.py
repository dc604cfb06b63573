"""`topwork datasets` with datasets in storage."""

import json
import shutil
import time

import pytest

from topwork.artifacts import write_artifact
from topwork.errors import SettingError
from topwork.registry import versions
from topwork.stages.pull import pull


@pytest.fixture
def datasets_command(command):
    return lambda *arguments: command("datasets", *arguments).output


@pytest.fixture
def datasets(make_job, workspace, two_class_folder, tmp_path):
    """Two datasets of a folder that changes in between; a model was published from the second one."""
    first = pull(make_job(), workspace)
    shutil.copy(two_class_folder / "red" / "00.jpg", two_class_folder / "red" / "new.jpg")
    (two_class_folder / "red" / "02.jpg").rename(two_class_folder / "blue" / "moved.jpg")
    (two_class_folder / "blue" / "04.jpg").write_bytes((two_class_folder / "blue" / "06.jpg").read_bytes())
    time.sleep(1.1)  # S3 lists whole seconds
    second = pull(make_job(), workspace)
    version = versions.Version(
        name="colors", version=1, uri=workspace.storage.uri_of("models/colors/1"), run="colors-0123abcd", weights="0a",
        split="test", images=8, published="2030-01-02T03:04:05Z", main_metric="auc", metrics={"auc": 1.0},
        dataset=second.prefix,
    )  # fmt: skip
    (tmp_path / "files").mkdir()
    write_artifact(workspace.storage, versions.version_prefix("colors", 1), tmp_path / "files", version.model_dump())
    return first, second


def test_list_shows_each_dataset_with_its_models(datasets_command, datasets, workspace, two_class_folder):
    lines = [line.split() for line in datasets_command("list", workspace.storage.uri).splitlines()]
    first, second = (dataset.prefix.removeprefix("datasets/") for dataset in datasets)
    assert lines == [
        ["DATASET", "SOURCE", "MODELS", "CLASSES", "IMAGES"],
        [first, str(two_class_folder), "2", "40"],
        [second, str(two_class_folder), "colors/1", "2", "41"],
    ]
    content = json.loads(datasets_command("list", workspace.storage.uri, "--json"))
    assert [(entry["images"], entry["models"]) for entry in content] == [(40, []), (41, ["colors/1"])]
    assert datasets_command("list", f"{workspace.storage.uri}/elsewhere").startswith("No datasets are stored in ")


def test_show_counts_the_images_of_each_class(datasets_command, datasets, workspace, two_class_folder):
    output = datasets_command("show", workspace.storage.uri, "photos")
    assert f'source      {{"folder": {{"uri": "{two_class_folder}"}}}}' in output
    assert "models      colors/1" in output
    assert [line.split() for line in output.splitlines()[-3:]] == [["CLASS", "TRAIN"], ["blue", "21"], ["red", "20"]]
    first = datasets[0].prefix.removeprefix("datasets/")
    content = json.loads(datasets_command("show", workspace.storage.uri, first, "--json"))
    assert content["splits"] == {"train": {"blue": 20, "red": 20}}
    assert content["bytes"] > 0


def test_diff_lists_added_removed_and_changed_images(datasets_command, datasets, workspace):
    first, second = (dataset.prefix for dataset in datasets)
    assert datasets_command("diff", workspace.storage.uri, first, second).splitlines() == [
        "- red/02.jpg (red)",
        "+ blue/moved.jpg (blue)",
        "+ red/new.jpg (red)",
        "* blue/04.jpg (blue): content changed",
        "2 images added, 1 removed, 1 changed",
    ]
    content = json.loads(datasets_command("diff", workspace.storage.uri, first, second, "--json"))
    assert [entry["path"] for entry in content["added"]] == ["blue/moved.jpg", "red/new.jpg"]
    assert datasets_command("diff", workspace.storage.uri, first, first) == "The datasets have the same images.\n"


def test_relabeled_images_of_a_table_are_listed(datasets_command, make_job, workspace, two_class_folder):
    def pull_table(label, split):
        rows = [f"{path},{path.parent.name},train" for path in sorted(two_class_folder.glob("*/*.jpg"))]
        rows += [f"{two_class_folder}/red/01.png,{label},test", f"{two_class_folder}/red/03.png,red,{split}"]
        table = two_class_folder / "images.csv"
        table.write_text("\n".join(["image,label,split", *rows]))
        source = {"table": {"uri": str(table), "split": "split"}}
        dataset = {"source": source, "splits": "auto", "imageSize": [32, 32], "onMissingClass": "allow"}
        return pull(make_job(dataset=dataset), workspace).prefix

    before, after = pull_table("red", "test"), pull_table("blue", "train")
    assert datasets_command("diff", workspace.storage.uri, before, after).splitlines() == [
        f"! {two_class_folder}/red/01.png (red) -> blue",
        f"> {two_class_folder}/red/03.png (red): test -> train",
        "1 image relabeled, 1 moved to another split or group",
    ]


def test_selected_classes_are_shown_and_compared(datasets_command, make_job, workspace, two_class_folder):
    shutil.copytree(two_class_folder / "red", two_class_folder / "pink")
    source = {"source": {"folder": {"uri": str(two_class_folder)}}, "imageSize": [32, 32]}
    settings = [{"exclude": ["pink"]}, ["blue", {"warm": ["pink", "red"]}]]
    before, after = (
        pull(make_job(dataset={**source, "splits": {"train": 0.8, "test": 0.2}, "classes": classes}), workspace).prefix
        for classes in settings
    )
    shown = datasets_command("show", workspace.storage.uri, before)
    assert "classes     Left out: 1 class of the source with 20 images, pink.\n" in shown
    shown = datasets_command("show", workspace.storage.uri, after)
    assert "classes     The class warm contains the classes pink, red of the source.\n" in shown
    content = json.loads(datasets_command("show", workspace.storage.uri, after, "--json"))
    assert content["class_selection"] == {"setting": settings[1], "merged": {"warm": ["pink", "red"]}, "left_out": {}}
    lines = datasets_command("diff", workspace.storage.uri, before, after).splitlines()
    assert lines[-2:] == [
        'spec.dataset.classes: {"exclude": ["pink"]} -> ["blue", {"warm": ["pink", "red"]}]',
        "20 images added, 20 relabeled, 1 new class, 1 removed class",
    ]
    assert "+ pink/00.jpg (warm)" in lines
    assert "! red/00.jpg (red) -> warm" in lines
    content = json.loads(datasets_command("diff", workspace.storage.uri, before, after, "--json"))
    assert content["class_settings"] == settings


def test_missing_dataset_is_reported_with_those_that_exist(datasets_command, datasets, workspace):
    for address in ("pets", "photos/0123456789abcdef"):
        with pytest.raises(SettingError, match=rf"has no dataset {address}\. Stored datasets: photos/.*, photos/"):
            datasets_command("show", workspace.storage.uri, address)
