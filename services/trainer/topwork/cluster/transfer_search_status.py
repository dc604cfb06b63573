"""The status of a TransferSearch in a cluster: its `status` subresource, which the controller writes."""

from datetime import datetime

from pydantic import Field

from topwork.cluster.transfer_job_status import ConditionedStatus, State, StatusModel


class TrialCounts(StatusModel):
    """Number of trials by state."""

    running: int = Field(default=0, description="Trials with a TransferJob that is not finished.")
    paused: int = Field(default=0, description="Trials that trained some epochs and may be continued.")
    complete: int = Field(default=0, description="Trials that trained all epochs.")
    pruned: int = Field(default=0, description="Trials that were stopped early.")
    failed: int = Field(default=0, description="Trials that failed.")


class BestTrial(StatusModel):
    """The best complete trial."""

    trial: int = Field(description="Number of the trial, from 0.")
    value: float = Field(description="Value of spec.metric on the validation split.")
    params: dict[str, str] = Field(default={}, description="Value of each parameter as JSON, by its path in the spec.")


class TransferSearchStatus(ConditionedStatus):
    """Observed state of the TransferSearch. Written by the controller."""

    state: State = Field(default="Pending", description="State of the search.")
    search: str | None = Field(
        default=None,
        description="ID of the search: NAME-DIGEST, where the digest covers everything that can affect the choice of "
        "its trials. A ConfigMap with this name and the suffix -journal contains its decisions and results.",
    )
    progress: str | None = Field(default=None, description="Finished and planned trials, such as 7/16.")
    trials: TrialCounts = Field(default=TrialCounts(), description="Number of trials by state.")
    best: BestTrial | None = Field(default=None, description="The best complete trial.")
    metric: str | None = Field(
        default=None, description="Metric of the best trial, such as validation_accuracy 0.9312."
    )
    model: str | None = Field(default=None, description="URI of the published model.")
    model_version: int | None = Field(default=None, description="Version of the published model.")
    waiting_for: str | None = Field(default=None, description="Why no trial runs, or is started.")
    end_reason: str | None = Field(default=None, description="Why no further trial starts.")
    error: str | None = Field(default=None, description="Why the search failed, or why its last trial failed.")
    gpu_seconds: float | None = Field(default=None, description="GPU-seconds of the trials with results.")
    start_time: datetime | None = Field(default=None, description="When the search started.")
    completion_time: datetime | None = Field(default=None, description="When the search finished.")
