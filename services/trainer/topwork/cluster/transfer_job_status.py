"""The status of a TransferJob in a cluster: its `status` subresource, which the controller writes and commands read."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

State = Literal["Pending", "Running", "Suspended", "Complete", "Failed", "Cancelled"]
FINAL_STATES: frozenset[State] = frozenset({"Complete", "Failed", "Cancelled"})
"""States that end a run; only a change of the spec starts another one."""
ConditionType = Literal["Accepted", "Suspended", "Complete", "Failed", "Cancelled"]
MAX_ATTEMPTS = 20
"""Maximum number of pods in the status, or two per node if that is more; older ones are dropped."""


class StatusModel(BaseModel):
    """Part of the status: immutable, camelCase in YAML and snake_case in Python; ignores keys of newer versions."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=to_camel, validate_by_name=True, validate_by_alias=True
    )


class Condition(StatusModel):
    """A condition, as in metav1.Condition."""

    type: ConditionType = Field(description="Type of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    reason: str = Field(description="Reason for its last transition, in CamelCase.")
    message: str = Field(default="", description="Details of the transition.")
    last_transition_time: datetime = Field(description="When its status changed last.")
    observed_generation: int = Field(default=0, description="Generation of the spec that the condition describes.")


class ConditionedStatus(StatusModel):
    """What the statuses of all kinds have."""

    observed_generation: int = Field(default=0, description="Generation of the spec that this status describes.")
    state: State = Field(default="Pending", description="State of the run.")
    conditions: tuple[Condition, ...] = Field(
        default=(), description="Conditions: Accepted, Suspended, Complete, Failed and Cancelled."
    )

    @property
    def is_final(self) -> bool:
        """Whether it is finished."""
        return self.state in FINAL_STATES

    def condition(self, kind: ConditionType) -> Condition | None:
        """Return a condition by its type; None if it is not set."""
        return next((condition for condition in self.conditions if condition.type == kind), None)


class AttemptRecord(StatusModel):
    """A pod of the run."""

    pod: str = Field(description="Name of the pod.")
    uid: str = Field(description="UID of the pod.")
    node: str | None = Field(default=None, description="Node of the pod.")
    created: datetime | None = Field(default=None, description="When the pod was created.")
    stage: str | None = Field(default=None, description="Stage that it ran last.")
    started: datetime | None = Field(default=None, description="When its first container started.")
    ended: datetime | None = Field(default=None, description="When its last container ended.")
    exit_code: int | None = Field(default=None, description="Exit code of the container that failed or was stopped.")
    error: str | None = Field(default=None, description="Why it ended.")
    gpu_seconds: float = Field(default=0.0, description="Number of its GPUs times the seconds for which it held them.")
    index: int | None = Field(default=None, description="Index of its node. Unset for a run on one node.")
    attempt: int | None = Field(
        default=None, description="Number of the attempt, in which every node has a pod. Unset for a run on one node."
    )


class TransferJobStatus(ConditionedStatus):
    """Observed state of the TransferJob. Written by the controller."""

    run: str | None = Field(
        default=None,
        description="Name of the run, which is also that of its Job: NAME-DIGEST, where the digest "
        "covers all fields of the spec that can affect the result.",
    )
    stage: str | None = Field(default=None, description="Stage that runs, or that ran last.")
    progress: str | None = Field(default=None, description="Progress of the stage, such as 3/10 epochs.")
    eta: str | None = Field(default=None, description="Estimated time until the last planned epoch of the stage.")
    metric: str | None = Field(default=None, description="Best metric so far, such as validation_accuracy 0.9312.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Metrics on the validation split, with the loss, of a run that publishes nothing."
    )
    dataset: str | None = Field(
        default=None,
        description="Key prefix of the stored dataset of a run that publishes nothing; with lists of the splits or a "
        "pinned test set, also # and a digest of them.",
    )
    model: str | None = Field(default=None, description="URI of the published model.")
    model_version: int | None = Field(default=None, description="Version of the published model.")
    waiting_for: str | None = Field(default=None, description="Why the run is pending or stopping.")
    error: str | None = Field(default=None, description="Why the run failed.")
    exit_code: int | None = Field(default=None, description="Exit code of the run; unset until it is finished.")
    gpus: int | None = Field(default=None, description="Number of GPUs that the run requests.")
    gpu_seconds: float | None = Field(default=None, description="GPU-seconds of all attempts of all runs so far.")
    failures: int | None = Field(default=None, description="Failed attempts that count against spec.compute.retries.")
    attempts: int | None = Field(
        default=None, description="Number of attempts of the run so far: its pods, on several nodes those of one node."
    )
    attempt_history: tuple[AttemptRecord, ...] = Field(default=(), description="The latest pods of the run.")
    job_uid: str | None = Field(default=None, description="UID of the Job that trains.")
    image: str | None = Field(
        default=None,
        description="Image that the run started with. The run keeps it, unless the spec sets spec.compute.image.",
    )
    start_time: datetime | None = Field(default=None, description="When the run was created.")
    completion_time: datetime | None = Field(default=None, description="When the run finished.")
