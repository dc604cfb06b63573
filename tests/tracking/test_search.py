"""A search on this machine in MLflow: a parent with the result, and a nested run for each trial."""

import pytest
from ruamel.yaml import YAML

from topwork.errors import DataError
from topwork.search.search_id import search_id
from topwork.spec.search import TransferSearch

RATE = "transfer.optimizer.learningRate"


@pytest.fixture
def search_of(make_job, mlflow, tmp_path):
    """Write the specification of a search, `<tmp>/search.yaml`; return its content."""

    def write(name, space):
        transfer = {"train": "all", "epochs": 1, "batchSize": 8, "featureCache": "off"}
        job = make_job(transfer=transfer, tracking={"tensorboard": True, "mlflow": {"uri": mlflow.uri}})
        content = {
            "apiVersion": "topwork.dev/v1alpha1",
            "kind": "TransferSearch",
            "metadata": {"name": name},
            "spec": {
                "space": space,
                "sampler": "grid",
                "template": job.model_dump(mode="json", by_alias=True, exclude_unset=True)["spec"],
            },
        }
        with (tmp_path / "search.yaml").open("w") as file:
            YAML().dump(content, file)
        return content

    return write


def test_search_is_a_parent_with_nested_trials(search_of, command, mlflow, storage, tmp_path, export_check_in_process):
    content = search_of("rates", {RATE: {"choice": [0.001, 0.01]}})
    result = command("search", tmp_path / "search.yaml", "--state", tmp_path / "state")
    assert result.exit_code == 0, result.output

    runs = mlflow.runs("rates")
    name = search_id(TransferSearch.model_validate(content))
    (parent,) = (run for run in runs if "topwork.search" in run.data.tags)
    *trials, best = sorted(
        (run for run in runs if run is not parent), key=lambda run: run.data.tags.get("topwork.trial", "best")
    )
    assert (parent.info.run_name, parent.info.status) == (name, "FINISHED")
    assert {run.data.tags["mlflow.parentRunId"] for run in (*trials, best)} == {parent.info.run_id}
    assert {run.info.status for run in (*trials, best)} == {"FINISHED"}
    assert [run.data.tags["topwork.trial"] for run in trials] == ["0", "1"]
    assert {run.data.params[RATE] for run in trials} == {"0.001", "0.01"}
    for trial in trials:
        assert {name for name in trial.data.metrics if "/" in name and "transfer" not in name} >= {
            "validation/accuracy", "validation/loss",
        }  # fmt: skip
        assert not [name for name in trial.data.metrics if name.startswith("test/")]
    winner = max(trials, key=lambda run: run.data.metrics["validation/accuracy"])
    assert best.data.params == winner.data.params
    assert parent.data.metrics["test/accuracy"] == best.data.metrics["test/accuracy"]
    assert parent.data.tags["topwork.model"] == storage.uri_of("models/rates/1")
    prefixes = {stored.key.split("/")[1] for stored in storage.list("runs/") if "/events/" in stored.key}
    assert prefixes == {run.info.run_name for run in (*trials, best)}


def test_search_without_a_winner_is_a_failure(search_of, command, mlflow, storage, tmp_path):
    missing = {"saved": {"uri": f"{storage.uri}/missing.keras"}}
    search_of("lost", {"model.base": {"choice": [missing]}})
    with pytest.raises(DataError, match="No trial of the search"):
        command("search", tmp_path / "search.yaml", "--state", tmp_path / "state")
    (parent,) = (run for run in mlflow.runs("lost") if "topwork.search" in run.data.tags)
    assert parent.info.status == "FAILED"
    assert "storage has no such object" in parent.data.tags["topwork.error"]
    assert {run.info.status for run in mlflow.runs("lost")} == {"FAILED"}
