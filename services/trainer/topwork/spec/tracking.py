"""`spec.tracking`: where the progress of a run is recorded besides Prometheus."""

from typing import Annotated

from pydantic import Field, StrictBool, StrictStr

from topwork.spec.kubernetes_types import ObjectName
from topwork.spec.spec_model import SpecModel, ValueDescription
from topwork.spec.uris import HttpUrl

ExperimentName = Annotated[
    StrictStr,
    Field(min_length=1, max_length=250, pattern=r"^[^\x00-\x1f]*$"),
    ValueDescription("the name of an MLflow experiment, such as cats-vs-dogs or /Shared/cats-vs-dogs"),
]


class Mlflow(SpecModel):
    """The MLflow server that a run reports to. An outage of the server never stops the run."""

    uri: HttpUrl = Field(description="URL of the MLflow tracking server, without credentials.")
    experiment: ExperimentName | None = Field(
        default=None, description="MLflow experiment of the run. Unset: the name of the model, or of the search."
    )
    secret_name: ObjectName | None = Field(
        default=None,
        description="Secret with MLFLOW_TRACKING_TOKEN, or with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. "
        "Outside a cluster, these are environment variables.",
    )


class Tracking(SpecModel):
    """Records of a run for TensorBoard and MLflow. Changing these values does not change the result of a run."""

    tensorboard: StrictBool = Field(
        default=False, description="Whether to store event files for TensorBoard under runs/<run>/events/."
    )
    mlflow: Mlflow | None = Field(default=None, description="MLflow server to report to. Unset: none.")
