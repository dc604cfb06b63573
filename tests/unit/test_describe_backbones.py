"""`topwork describe` for every model of keras.applications."""

import json

import keras
import pytest

from topwork.cli.commands.describe import describe
from topwork.spec.applications import APPLICATIONS
from topwork.spec.yaml_output import dump_job


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_application_is_described_without_downloading_weights(name, monkeypatch, make_job, tmp_path, capsys):
    def fail_download(*_, **__):
        raise AssertionError("describe must not download anything")

    monkeypatch.setattr(keras.src.utils.file_utils, "get_file", fail_download)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TOPWORK_STATE", str(tmp_path / "state"))
    # The smallest size: every feature map keeps at least one cell.
    side = APPLICATIONS[name].min_side
    fine = {"epochs": 1, "unfreeze": {"layers": 2}, "optimizer": {"learningRate": 1e-5}}
    job = make_job(
        model={"base": {"application": "VGG16", "weights": "none"}}, transfer={"train": "head"}, fineTune=fine
    )
    (tmp_path / "job.yaml").write_text(dump_job(job))
    sets = [f"spec.model.base={{application: {name}}}", f"spec.dataset.imageSize=[{side}, {side}]"]
    describe([tmp_path / "job.yaml"], sets, as_json=True)
    (description,) = json.loads(capsys.readouterr().out)
    parameters = APPLICATIONS[name].parameters_without_top
    assert description["base"]["parameters"] == parameters
    assert description["base"]["weights"] == "ImageNet"
    (transfer_phase,), (fine_tune_phase,) = (stage["phases"] for stage in description["stages"])
    head = transfer_phase["trainable"]
    assert transfer_phase["frozen"] == parameters
    assert sum(group["frozen"] for group in transfer_phase["layers"]) == parameters
    assert fine_tune_phase["trainable"] + fine_tune_phase["frozen"] == parameters + head
