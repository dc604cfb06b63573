"""`topwork predict` and `topwork models` with a model in storage."""

import csv
import io
import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

from topwork.artifacts import write_artifact
from topwork.cli.model_address import ModelAddress, parse_model_address
from topwork.data.images.decoding import Preprocessing
from topwork.errors import DataError, SettingError
from topwork.model.export import export_model
from topwork.registry import versions


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Directory of a version whose untrained model distinguishes red from blue by the channel means."""
    directory = tmp_path_factory.mktemp("version")
    image = keras.Input((32, 32, 3), name="image")
    means = keras.layers.GlobalAveragePooling2D()(image)
    dense = keras.layers.Dense(2)
    logits = dense(means)
    dense.set_weights([np.array([[-0.05, 0.05], [0, 0], [0.05, -0.05]]), np.zeros(2)])
    model = keras.Model(image, keras.layers.Softmax()(logits))
    export_model(model, ("blue", "red"), ("keras", "savedModel"), Preprocessing(), directory)
    (directory / "labels.txt").write_text("blue\nred\n")
    return directory


@pytest.fixture
def published(storage, exported):
    """Versions 1 and 2 of `colors`; version 2 is the latest, and version 3 is incomplete."""
    for number in (1, 2):
        metrics = {"auc": 0.9 + number / 100, "loss": 0.5}
        version = versions.Version(
            name="colors", version=number, uri=storage.uri_of(f"models/colors/{number}"), run="colors-0123abcd",
            weights="0a", split="test", images=8,
            published="2030-01-02T03:04:05Z", main_metric="auc", metrics=metrics,
        )  # fmt: skip
        write_artifact(storage, versions.version_prefix("colors", number), exported, version.model_dump(mode="json"))
    versions.update_latest(storage, "colors")
    assert versions.claim_version(storage, "colors", "another") == 3
    return storage


def test_models_list_shows_each_model_with_its_latest_version(command, published):
    lines = command("models", "list", published.uri).output.splitlines()
    assert [line.split() for line in lines] == [
        ["model", "latest", "versions", "metric", "published"],
        ["colors", "2", "2", "auc", "0.9200", "2030-01-02T03:04:05Z"],
    ]
    (model,) = json.loads(command("models", "list", published.uri, "--json").output)
    assert (model["name"], model["versions"], model["latest"]["version"]) == ("colors", [1, 2], 2)


def test_models_list_reports_an_empty_storage(command, storage):
    assert command("models", "list", storage.uri).output == f"No models are published in {storage.uri}.\n"


def test_models_show_accepts_storage_and_name_or_a_uri(command, published):
    output = command("models", "show", published.uri, "colors").output
    assert output.startswith(f"colors version 2\n  model      {published.uri}/models/colors/2\n")
    assert "auc        0.9200" in output
    assert command("models", "show", f"{published.uri}/models/colors/latest").output == output
    first = json.loads(command("models", "show", f"{published.uri}/models/colors/1", "--json").output)
    assert (first["version"], first["files"]["labels.txt"]) == (1, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["color"], "{uri} has no model color. Published models: colors."),
        (["colors", "--version", "3"], "{uri} has no version 3 of colors. Published: 1, 2."),
        ([], "{uri} is not the URI of a published model. Use the storage and the name, such as"),
    ],
)
def test_models_show_reports_the_existing_models_and_versions(command, published, arguments, message):
    with pytest.raises(SettingError) as raised:
        command("models", "show", published.uri, *arguments)
    assert str(raised.value).startswith(message.format(uri=published.uri))


def test_models_fetch_downloads_the_complete_version_or_nothing(command, published, exported, tmp_path):
    target = tmp_path / "fetched"
    command("models", "fetch", published.uri, "colors", target, "--version", "1")
    files = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    assert {path.relative_to(target) for path in target.rglob("*") if path.is_file()} == files
    with pytest.raises(SettingError, match="already exists"):
        command("models", "fetch", f"{published.uri}/models/colors", target)

    published.write("models/colors/2/labels.txt", b"red\nblue\n")
    with pytest.raises(Exception, match=r"labels\.txt does not match its manifest"):
        command("models", "fetch", f"{published.uri}/models/colors", tmp_path / "damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["fetched"]


def test_model_uri_may_contain_models_in_its_prefix():
    assert parse_model_address("s3://b/models/x/models/cats/3") == ModelAddress("s3://b/models/x", "cats", 3)
    assert parse_model_address("s3://b/models/cats/") == ModelAddress("s3://b", "cats")


def write_pictures(directory):
    """Write a red JPEG, a blue PNG, a damaged JPEG, and a text file, which is ignored."""
    directory.mkdir()
    Image.new("RGB", (50, 40), (220, 20, 30)).save(directory / "a-red.jpg")
    Image.new("RGB", (40, 60), (20, 20, 200)).save(directory / "b-blue.png")
    (directory / "c-broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (directory / "notes.txt").write_text("not asked about")
    return directory


def test_predict_predicts_readable_images_and_reports_the_rest(command, published, tmp_path):
    directory = write_pictures(tmp_path / "pictures")
    with pytest.raises(DataError, match=r"1 of 3 images could not be read\.") as raised:
        command("predict", f"{published.uri}/models/colors/latest", directory)
    assert raised.value.exit_code == 2


def test_predict_prints_classes_and_probabilities_as_text_json_and_csv(command, exported, tmp_path):
    directory = write_pictures(tmp_path / "pictures")
    (directory / "c-broken.jpg").unlink()
    lines = command("predict", exported, directory).output.splitlines()
    assert lines == [f"{directory}/a-red.jpg: red 100.0 %", f"{directory}/b-blue.png: blue 100.0 %"]
    red, blue = map(
        json.loads, command("predict", exported / "model.keras", directory, "--json", "--top", 2).output.splitlines()
    )
    assert [entry["class"] for entry in red["classes"]] == ["red", "blue"]
    assert sum(entry["probability"] for entry in blue["classes"]) == pytest.approx(1.0)
    rows = list(csv.DictReader(io.StringIO(command("predict", exported, directory / "a-red.jpg", "--csv").output)))
    assert [(row["rank"], row["class"]) for row in rows] == [("1", "red")]


def test_predict_uses_the_rules_of_pull_for_the_files_of_a_directory(command, exported, published, tmp_path):
    directory = write_pictures(tmp_path / "pictures")
    for name in (
        "download.jfif",
        "scan.jpe",
        "noext",
        "misnamed.dat",
        "._a.jpg",
        "__MACOSX/b.jpg",
        ".thumbnails/c.jpg",
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copy(directory / "a-red.jpg", directory / name)
    (directory / "._a.jpg").write_bytes(b"Mac OS X")
    with pytest.raises(DataError, match=r"1 of 7 images could not be read\."):
        command("predict", exported, directory, "--json")
    (directory / "c-broken.jpg").unlink()
    names = ["a-red.jpg", "b-blue.png", "download.jfif", "misnamed.dat", "noext", "scan.jpe"]
    lines = command("predict", exported, directory, "--json").output.splitlines()
    assert [json.loads(line)["image"] for line in lines] == [f"{directory}/{name}" for name in names]
    for path in directory.rglob("*"):
        if path.is_file():
            published.upload(path, f"mixed/{path.relative_to(directory)}")
    lines = command("predict", exported, published.uri_of("mixed/"), "--json").output.splitlines()
    assert [json.loads(line)["image"] for line in lines] == [published.uri_of(f"mixed/{name}") for name in names]


def test_predict_reads_images_from_storage(command, published, tmp_path):
    directory = write_pictures(tmp_path / "pictures")
    published.upload(directory / "a-red.jpg", "new/a-red.jpg")
    published.upload(directory / "b-blue.png", "new/deep/b-blue.png")
    model = f"{published.uri}/models/colors/1"
    assert command("predict", model, published.uri_of("new/a-red.jpg")).output == (
        f"{published.uri_of('new/a-red.jpg')}: red 100.0 %\n"
    )
    lines = command("predict", model, published.uri_of("new/"), "--json").output.splitlines()
    assert [json.loads(line)["classes"][0]["class"] for line in lines] == ["red", "blue"]


def test_predict_works_without_a_keras_file(command, exported, tmp_path):
    directory = write_pictures(tmp_path / "pictures")
    shutil.copytree(exported, tmp_path / "served")
    (tmp_path / "served" / "model.keras").unlink()
    lines = command(
        "predict", tmp_path / "served", directory / "b-blue.png", directory / "a-red.jpg"
    ).output.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["blue 100.0 %", "red 100.0 %"]


@pytest.fixture
def cropping_version(exported, tmp_path):
    """A version that was trained with `imageFit: crop`, and an image that is red in the center and blue elsewhere."""
    version = tmp_path / "cropping"
    version.mkdir()
    model = keras.models.load_model(exported / "model.keras", compile=False)
    export_model(model, ("blue", "red"), ("keras",), Preprocessing(image_fit="crop"), version)
    shutil.copy(exported / "labels.txt", version)
    pixels = np.full((40, 200, 3), (20, 20, 200), np.uint8)
    pixels[:, 80:120] = (220, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return version, tmp_path / "wide.png"


def test_predict_resizes_images_as_the_version_was_trained(command, cropping_version):
    version, image = cropping_version
    assert command("predict", version, image).output == f"{image}: red 100.0 %\n"
    settings = json.loads((version / "preprocessing.json").read_text())
    del settings["imageFit"]  # as published before this setting existed
    (version / "preprocessing.json").write_text(json.dumps(settings))
    assert command("predict", version, image).output == f"{image}: blue 100.0 %\n"


def test_predict_with_a_keras_file_uses_the_settings_next_to_it(command, cropping_version, storage):
    version, image = cropping_version
    for path in version.iterdir():
        storage.upload(path, f"files/{path.name}")
    for model in (version / "model.keras", storage.uri_of("files/model.keras")):
        assert command("predict", model, image).output == f"{image}: red 100.0 %\n"
    (version / "preprocessing.json").unlink()
    result = command("predict", version / "model.keras", image)
    assert result.stdout == f"{image}: blue 100.0 %\n"
    assert result.stderr == (
        f"preprocessing.json is not next to {version}/model.keras: images are resized without preserving their aspect "
        "ratio.\n"
    )


def test_predict_rejects_a_path_without_a_model(command, tmp_path):
    with pytest.raises(SettingError, match=r"nowhere does not exist\. Expected an s3:// URI, a \.keras file"):
        command("predict", tmp_path / "nowhere", "image.jpg")
    with pytest.raises(SettingError, match=r"contains no model\. Expected one of model\.keras, saved_model\.pb"):
        command("predict", tmp_path, "image.jpg")
    (tmp_path / "bad.keras").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"bad\.keras cannot be loaded as a Keras model for RGB images: "):
        command("predict", tmp_path / "bad.keras", "image.jpg")
