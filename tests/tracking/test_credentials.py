"""Credentials of MLflow: in a pod from a Secret, elsewhere from environment variables."""

import pytest

from topwork.cli.runtime.environment import configure_tracking
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.errors import SettingError
from topwork.spec import TransferJob
from topwork.spec.tracking import Tracking

CREDENTIALS = ["MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]


def make_remote_job(**mlflow) -> TransferJob:
    spec = {
        "storage": "s3://bucket/topwork",
        "dataset": {
            "source": {"tfds": "cats_vs_dogs"},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "Xception"}},
        "tracking": {"mlflow": {"uri": "http://mlflow.mlflow.svc:5000", **mlflow}},
    }
    return TransferJob.model_validate(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}, "spec": spec}
    )


def mlflow_variables(job: TransferJob) -> dict[str, list[dict]]:
    pod = render(job, RenderOptions()).training["spec"]["template"]["spec"]
    return {
        container["name"]: [variable for variable in container["env"] if variable["name"].startswith("MLFLOW")]
        for container in (*pod["initContainers"], *pod["containers"])
    }


def test_training_containers_get_the_credentials_of_the_secret():
    variables = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": "mlflow-token", "key": name, "optional": True}}}
        for name in CREDENTIALS
    ]
    expected = {"pull": [], "transfer": variables, "fine-tune": variables}
    assert mlflow_variables(make_remote_job(secretName="mlflow-token")) == expected


def test_containers_have_no_credentials_without_a_secret():
    assert mlflow_variables(make_remote_job()) == {"pull": [], "transfer": [], "fine-tune": []}


def test_limits_of_requests_are_set_unless_the_user_sets_them():
    environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_TRACKING_TOKEN": "secret"}
    configure_tracking(make_remote_job().spec.tracking, environment)
    assert environment == {
        "MLFLOW_TRACKING_TOKEN": "secret",
        "MLFLOW_CONFIGURE_LOGGING": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    configure_tracking(Tracking(), untouched := {})
    assert not untouched


@pytest.mark.parametrize("name", CREDENTIALS)
def test_credentials_with_whitespace_are_rejected_without_showing_them(name):
    with pytest.raises(SettingError, match=f"^{name} begins or ends with a space or a line break") as error:
        configure_tracking(make_remote_job().spec.tracking, {name: "secret-value\n"})
    assert "secret-value" not in str(error.value)
