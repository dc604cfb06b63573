"""Figures of a run as a person and a program read them in `topwork top`."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Gpu:
    """A GPU of the process; what it does not tell is None.

    Attributes:
        index: Its index.
        utilization: Share of the last moments in which it worked, 0..1.
        memory_used_bytes: Bytes.
        memory_total_bytes: Bytes.
        power_watts: Watts.
        temperature_celsius: Degrees Celsius.
    """

    index: str
    utilization: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True)
class Best:
    """The best metric of a stage."""

    stage: str
    name: str
    split: str
    value: float


@dataclass(frozen=True)
class Speed:
    """How fast training goes.

    Attributes:
        images_per_second: Images a second, while steps run.
        step_seconds: Seconds a step.
        input_wait: Share of the time of steps that waits for input, 0..1.
        lately: Of the last moments; else a mean since the process was started, as no step ended lately.
    """

    images_per_second: float
    step_seconds: float
    input_wait: float | None
    lately: bool


@dataclass(frozen=True)
class Traffic:
    """Traffic with object storage, in bytes and bytes a second; the rate is None after a single reading."""

    bytes: float
    bytes_per_second: float | None


@dataclass(frozen=True)
class Figures:
    """A run as its process tells it, or as the cluster does where no process tells.

    Attributes:
        run: Name of the run.
        job: Name of its job.
        source: Where this is read, such as a URL or a pod.
        namespace: Its namespace, where there is one.
        pod: Its pod, where there is one.
        state: running, starting, between stages, how it ended, or the phase of its Job.
        reason: Why it waits, or does not tell.
        stage: The stage at work, or the last one.
        stage_seconds: How long that runs already, or took.
        seconds_by_stage: What the stages took that are over.
        epoch: Complete epochs of the stage.
        epochs: Its epochs at most.
        seconds_left: Until its last epoch; early stopping may end it sooner.
        loss: Loss of the last epoch by split.
        metrics: Metrics by split and name.
        best: Best metric of the stage.
        learning_rate: Of the last step.
        speed: How fast it trains.
        replicas: How many train in step.
        gpus: Its GPUs.
        checkpoint_seconds_ago: Age of the last checkpoint.
        progress_seconds_ago: Since when nothing went on.
        traffic: Traffic with storage by direction, download or upload.
        retries: Requests to storage that were tried again.
        images: Images of the dataset.
        rejected: Images that were left out.
        gates_failed: Gates that were not met.
        exit_code: Exit code, once it ended.
        version: Version of topwork.
        read_seconds_ago: How old the newest reading is.
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
    best: Best | None = None
    learning_rate: float | None = None
    speed: Speed | None = None
    replicas: int | None = None
    gpus: tuple[Gpu, ...] = ()
    checkpoint_seconds_ago: float | None = None
    progress_seconds_ago: float | None = None
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    retries: int | None = None
    images: int | None = None
    rejected: int | None = None
    gates_failed: int | None = None
    exit_code: int | None = None
    version: str | None = None
    read_seconds_ago: float = 0.0
