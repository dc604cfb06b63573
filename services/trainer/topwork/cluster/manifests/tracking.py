"""Environment variables of the containers that report to MLflow."""

from typing import Any

from topwork.clients.mlflow import CREDENTIAL_VARIABLES
from topwork.cluster.names import StageName
from topwork.spec import TransferJob


def tracking_variables(job: TransferJob, stage: StageName) -> list[dict[str, Any]]:
    """List the variables with the credentials of MLflow; none for `pull`, which reports nothing.

    Args:
        job: The job.
        stage: The stage that the container runs.

    Returns:
        One variable per key that the Secret may have. A missing Secret does not keep the pod from starting: the
        process then reports that MLflow rejects it, and trains.
    """
    mlflow = job.spec.tracking.mlflow
    if stage == "pull" or mlflow is None or mlflow.secret_name is None:
        return []
    return [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": mlflow.secret_name, "key": key, "optional": True}}}
        for key in CREDENTIAL_VARIABLES
    ]
