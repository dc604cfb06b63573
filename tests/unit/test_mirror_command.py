"""`topwork mirror`: what it refuses before it opens any storage, and what a job needs of it."""

from pathlib import Path

import pytest

from topwork.cli.commands.mirror import job, tfds, weights
from topwork.errors import SettingError


def test_a_model_that_keras_does_not_have_is_refused_with_the_nearest():
    with pytest.raises(SettingError) as error:
        weights("s3://photos/topwork", ["VGG16", "ResNet51"])
    assert str(error.value) == ("ResNet51 is no classification model of keras.applications. Did you mean ResNet50?")


def test_one_file_holds_the_weights_of_one_model(tmp_path):
    with pytest.raises(SettingError, match=r"^--file holds the weights of one model, and 2 are named\. Name one\.$"):
        weights("s3://photos/topwork", ["VGG16", "VGG19"], tmp_path / "x.weights.h5")


def test_a_file_or_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"^--file /nowhere/x\.h5 is no file here\.$"):
        weights("s3://photos/topwork", ["VGG16"], Path("/nowhere/x.h5"))
    with pytest.raises(SettingError, match=r"^--data-dir /nowhere is no folder here\.$"):
        tfds("s3://photos/topwork", "cats_vs_dogs", Path("/nowhere"))


def test_a_job_that_downloads_nothing_needs_no_mirror(make_job, tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(make_job().model_dump_json(by_alias=True, exclude_unset=True))
    job([path])
    assert capsys.readouterr().out == "tiny downloads nothing that is mirrored.\n"
