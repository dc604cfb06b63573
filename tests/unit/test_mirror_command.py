"""`topwork mirror`: arguments that are rejected before storage is opened, and jobs without downloads."""

from pathlib import Path

import pytest

from topwork.cli.commands.mirror import job, tfds, weights
from topwork.errors import SettingError


def test_unknown_model_is_rejected_with_the_nearest_name():
    with pytest.raises(SettingError) as error:
        weights("s3://photos/topwork", ["VGG16", "ResNet51"])
    assert str(error.value) == ("ResNet51 is not a classification model of keras.applications. Did you mean ResNet50?")


def test_file_of_weights_is_rejected_for_several_models(tmp_path):
    with pytest.raises(
        SettingError, match=r"^--file contains the weights of one model, but 2 models are named\. Name one\.$"
    ):
        weights("s3://photos/topwork", ["VGG16", "VGG19"], tmp_path / "x.weights.h5")


def test_missing_file_or_directory_is_rejected():
    with pytest.raises(SettingError, match=r"^--file /nowhere/x\.h5 does not exist or is not a file\.$"):
        weights("s3://photos/topwork", ["VGG16"], Path("/nowhere/x.h5"))
    with pytest.raises(SettingError, match=r"^--data-dir /nowhere does not exist or is not a directory\.$"):
        tfds("s3://photos/topwork", "cats_vs_dogs", Path("/nowhere"))


def test_job_without_downloads_needs_no_mirror(make_job, tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(make_job().model_dump_json(by_alias=True, exclude_unset=True))
    job([path])
    assert capsys.readouterr().out == "tiny downloads neither weights nor a TFDS dataset.\n"
