"""The state of a run as its process reports it; its fields are the keys of the JSON output of `topwork top`."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GpuUsage:
    """Usage of a GPU. A value that the GPU does not report is None.

    Attributes:
        index: Index of the GPU; in a run on several nodes, that of its node and its own, such as 1/0.
        utilization: Fraction of the last sample period in which it was busy, 0 to 1.
        memory_used_bytes: Memory in use, in bytes.
        memory_total_bytes: Total memory, in bytes.
        power_watts: Power draw in watts.
        temperature_celsius: Temperature in degrees Celsius.
    """

    index: str
    utilization: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class BestMetric:
    """The best value of a metric in a stage."""

    stage: str
    name: str
    split: str
    value: float


@dataclass(frozen=True)
class TrainingSpeed:
    """Training speed.

    Attributes:
        images_per_second: Images per second while steps are running.
        step_seconds: Duration of a step in seconds.
        input_wait: Fraction of the step time spent waiting for input, 0 to 1.
        lately: True for the recent speed; False for the mean since the process started, if no step ended recently.
    """

    images_per_second: float
    step_seconds: float
    input_wait: float | None
    lately: bool


@dataclass(frozen=True)
class StorageTraffic:
    """Transferred bytes, and bytes per second. The rate is None after a single reading."""

    bytes: float
    bytes_per_second: float | None


@dataclass(frozen=True)
class NodeSnapshot:
    """The state of a node of a run on several nodes, as its process reports it.

    Attributes:
        index: Index of the node, from 0.
        source: Where the state was read, such as a URL or a pod.
        pod: Name of the pod, if the run is in a cluster.
        state: As of the run.
        reason: Why its process does not answer.
        input_wait: Fraction of the step time that the node spends waiting for its own input, 0 to 1.
        evaluated_per_second: Images per second that the node evaluated without communication, since it started.
        gpus: Usage of its GPUs.
        read_seconds_ago: Age of the last reading, in seconds.
    """

    index: int
    source: str
    pod: str | None = None
    state: str = "starting"
    reason: str | None = None
    input_wait: float | None = None
    evaluated_per_second: float | None = None
    gpus: tuple[GpuUsage, ...] = ()
    read_seconds_ago: float = 0.0


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run as its process reports it, or as the cluster reports it if the process does not answer.

    Attributes:
        run: Name of the run.
        job: Name of the job.
        source: Where the state was read, such as a URL or a pod.
        namespace: Namespace, if the run is in a cluster.
        pod: Name of the pod, if the run is in a cluster.
        state: running, starting, between stages, gone, the outcome of a finished process, or the phase of the run.
        reason: Why the run is pending, or why its process does not answer.
        stage: The running stage, or the last one.
        stage_seconds: Time since the start of the running stage, or duration of the finished one, in seconds.
        seconds_by_stage: Durations of the finished stages, in seconds.
        epoch: Number of completed epochs of the stage.
        epochs: Maximum number of epochs of the stage.
        seconds_left: Estimated time to the last epoch, in seconds. Early stopping can end the stage earlier.
        loss: Loss of the last epoch, by split.
        metrics: Metrics of the last epoch, by split and name.
        best: Best metric of the stage.
        learning_rate: Learning rate of the last step.
        speed: Training speed.
        replicas: Number of model replicas.
        gpus: Usage of the GPUs.
        checkpoint_seconds_ago: Age of the last checkpoint, in seconds.
        progress_seconds_ago: Time since the last progress, in seconds.
        traffic: Traffic with storage by direction, download or upload.
        retries: Number of retried requests to storage.
        images: Number of images in the dataset.
        rejected: Number of rejected images.
        gates_failed: Number of gates that were not met.
        exit_code: Exit code of the process; None while it is running.
        version: Version of topwork.
        read_seconds_ago: Age of the last reading, in seconds.
        nodes: The nodes that were read, if several train the run; the run itself is as node 0 reports it.
        node_count: Number of nodes that train the run; None for one.
    """

    run: str
    job: str
    source: str
    namespace: str | None = None
    pod: str | None = None
    state: str = "starting"
    reason: str | None = None
    stage: str | None = None
    stage_seconds: float | None = None
    seconds_by_stage: Mapping[str, float] = field(default_factory=dict)
    epoch: int | None = None
    epochs: int | None = None
    seconds_left: float | None = None
    loss: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    best: BestMetric | None = None
    learning_rate: float | None = None
    speed: TrainingSpeed | None = None
    replicas: int | None = None
    gpus: tuple[GpuUsage, ...] = ()
    checkpoint_seconds_ago: float | None = None
    progress_seconds_ago: float | None = None
    traffic: Mapping[str, StorageTraffic] = field(default_factory=dict)
    retries: int | None = None
    images: int | None = None
    rejected: int | None = None
    gates_failed: int | None = None
    exit_code: int | None = None
    version: str | None = None
    read_seconds_ago: float = 0.0
    nodes: tuple[NodeSnapshot, ...] = ()
    node_count: int | None = None
