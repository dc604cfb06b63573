"""`topwork mirror`: arguments that are rejected before storage is opened, and jobs without downloads."""

from pathlib import Path

import pytest

from topwork.cli.commands.mirror import job, tfds, weights
from topwork.errors import SettingError


def test_unknown_model_is_rejected_with_the_nearest_name():
    with pytest.raises(SettingError) as error:
        weights("s3://photos/topwork", ["VGG16", "ResNet51"])
    assert str(error.value) == ("ResNet51 is not a classification model of keras.applications. Did you mean ResNet50?")


@pytest.mark.parametrize(
    ("names", "file", "application", "message"),
    [
        (["VGG16"], Path("x.h5"), None, "--from and --as belong together"),
        ([], None, "VGG16", "--from and --as belong together"),
        (["VGG16", "VGG19"], Path("x.h5"), "VGG16", "Name either models to download, or a file and its model"),
        ([], None, None, "Name either models to download, or a file and its model"),
        ([], Path("x.h5"), "VGG17", r"VGG17 is not a classification model .* Did you mean VGG19\?"),
        ([], Path("/nowhere/x.h5"), "VGG16", r"--from /nowhere/x\.h5 does not exist or is not a file\.$"),
    ],
)
def test_options_that_do_not_fit_together_are_rejected(names, file, application, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        weights("s3://photos/topwork", names, file, application)


def test_missing_directory_is_rejected():
    with pytest.raises(SettingError, match=r"^--data-dir /nowhere does not exist or is not a directory\.$"):
        tfds("s3://photos/topwork", "cats_vs_dogs", Path("/nowhere"))


def test_job_without_downloads_needs_no_mirror(make_job, tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(make_job().model_dump_json(by_alias=True, exclude_unset=True))
    job([path])
    assert capsys.readouterr().out == "tiny downloads neither weights nor a TFDS dataset.\n"
