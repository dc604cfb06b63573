"""`spec.compute` and `spec.metrics`: the machine and the monitoring, which change no result."""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from topwork.spec.part import Part

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


class Compute(Part):
    """What the Kubernetes Job asks for."""

    gpus: int = Field(default=1, ge=0, le=16, description="GPUs of the pod; 0 trains on the processor.")
    cpu: Quantity | int | float = Field(default=4, description="CPU cores, as a Kubernetes quantity.")
    memory: Quantity = Field(default="16Gi", description="Memory, as a Kubernetes quantity.")
    shared_memory: Quantity = Field(default="2Gi", description="Size of /dev/shm; counts as memory of the pod.")
    scratch: Quantity = Field(default="50Gi", description="Size of the scratch volume.")
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = Field(
        default="auto", description="Number format of the computation; auto is mixed_bfloat16 on GPUs that have it."
    )
    queue: str | None = Field(default=None, description="Kueue local queue.")
    deadline_seconds: int = Field(default=86400, ge=60, description="Seconds after which the Job is ended.")
    retries: int = Field(default=3, ge=0, le=100, description="Retries of the Job.")
    ttl_seconds_after_finished: int = Field(default=86400, ge=0, description="Seconds that a finished Job is kept.")
    node_selector: dict[str, str] = Field(default={}, description="Labels that the node must have.")
    tolerations: tuple[dict[str, Any], ...] = Field(default=(), description="Taints of nodes that are borne.")
    priority_class_name: str | None = Field(default=None, description="PriorityClass of the pod.")


class Metrics(Part):
    """How the metrics leave the job."""

    pushgateway: str | None = Field(default=None, description="Address of a Pushgateway for the final outcome.")
    linger_seconds: int = Field(default=0, ge=0, le=600, description="Seconds that the port stays open at the end.")
