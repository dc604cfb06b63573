"""`spec.compute` and `spec.metrics`: resources, scheduling and monitoring of the Job; neither affects the result."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictFloat, StrictInt, Tag

from topwork.spec.kubernetes_types import (
    AnnotationKey,
    AnnotationValue,
    ByteQuantity,
    ConfigMapKey,
    CpuQuantity,
    DnsName,
    ImageReference,
    LabelKey,
    LabelValue,
    ObjectName,
    check_affinity,
    check_toleration,
    quantity_to_bytes,
)
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, check_unique, rule
from topwork.spec.uris import HttpUrl

# Kubernetes allows 256 KiB of annotations per object, and `kubectl apply` stores the whole Job in one of them.
MAX_ANNOTATION_BYTES = 64 * 1024


def _cpu_tag(value: object) -> str:
    if isinstance(value, str):
        return "<quantity>"
    return "<fraction>" if isinstance(value, float) else "<cores>"


class ExtraCa(SpecModel):
    """Additional certificate authorities that the job trusts, from a ConfigMap in the namespace of the Job."""

    config_map: ObjectName = Field(description="Name of the ConfigMap.")
    key: ConfigMapKey = Field(default="ca.crt", description="Key of the ConfigMap with the certificates in PEM format.")


class Topology(SpecModel):
    """Placement of the pods of a run on several nodes, relative to each other. The scheduler follows it if possible."""

    pack: LabelKey | None = Field(
        default=None,
        description="Label of machines: pods are placed on machines with the same value, such as "
        "topology.kubernetes.io/zone for a fast network between them. Unset: no preference.",
    )
    spread: LabelKey | None = Field(
        default=None,
        description="Label of machines: pods are distributed evenly over its values, such as kubernetes.io/hostname "
        "for a machine each. Unset: no preference.",
    )


class Compute(SpecModel):
    """Resources and scheduling of the Kubernetes Job. Changing these values does not change the result of a run."""

    image: ImageReference | None = Field(
        default=None,
        description="Image of all containers. Unset: the image of the namespace's defaults, or else "
        "topwork:<version>-gpu, or -cpu without GPUs.",
    )
    nodes: StrictInt = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of nodes: pods that train the run together. Resources and placement apply to each of them.",
    )
    gpus: StrictInt = Field(default=1, ge=0, le=16, description="Number of GPUs of each pod. 0 trains on the CPU.")
    cpu: Annotated[
        Annotated[CpuQuantity, Tag("<quantity>")]
        | Annotated[StrictInt, Field(ge=1, le=1024), Tag("<cores>")]
        | Annotated[StrictFloat, Field(gt=0.0, le=1024.0), Tag("<fraction>")],
        Discriminator(_cpu_tag),
        ValueDescription("a number of cores above 0 and at most 1024, or a Kubernetes quantity such as 500m"),
    ] = Field(default=4, description="CPU cores of each pod.")
    memory: ByteQuantity = Field(default="16Gi", description="Memory of each pod.")
    shared_memory: ByteQuantity = Field(
        default="2Gi", description="Size of the memory-backed volume at /dev/shm. Counts toward the memory of the pod."
    )
    scratch: ByteQuantity = Field(
        default="50Gi",
        description="Size of the scratch volume of each pod, for the local copy of the dataset and caches.",
    )
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = Field(
        default="auto",
        description="Keras dtype policy. auto selects mixed_bfloat16 on GPUs that support it, and on CPUs that support "
        "it if the model is large enough to benefit; otherwise float32.",
    )
    queue: DnsName | None = Field(default=None, description="Kueue LocalQueue that admits the Job. Unset: no queue.")
    deadline_seconds: StrictInt = Field(
        default=86400, ge=60, le=2**31 - 1, description="Seconds after which Kubernetes terminates the Job."
    )
    retries: StrictInt = Field(
        default=3,
        ge=0,
        le=100,
        description="Number of retries before the Job fails (backoffLimit, times nodes). Disruptions such as "
        "preemption do not count.",
    )
    ttl_seconds_after_finished: StrictInt = Field(
        default=86400, ge=0, le=2**31 - 1, description="Seconds after which Kubernetes deletes a finished Job."
    )
    node_selector: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels that a node must have to run the pod."
    )
    tolerations: tuple[dict[str, Any], ...] = Field(
        default=(),
        max_length=64,
        description="Node taints that the pod tolerates, each with key, operator, value, effect and "
        "tolerationSeconds as in a pod spec.",
    )
    affinity: dict[str, Any] = Field(
        default={},
        description="Affinity of the pod as in a pod spec: nodeAffinity, podAffinity and podAntiAffinity.",
    )
    topology: Topology | None = Field(
        default=None, description="Placement of the pods relative to each other. Requires several nodes."
    )
    priority_class_name: DnsName | None = Field(default=None, description="PriorityClass of the pod.")
    service_account_name: ObjectName | None = Field(
        default=None,
        description="ServiceAccount of the pod, used for workload identity access to the object storage. Unset: the "
        "default account of the namespace.",
    )
    image_pull_secrets: tuple[ObjectName, ...] = Field(
        default=(), max_length=16, description="Names of Secrets with credentials for private image registries."
    )
    annotations: dict[AnnotationKey, AnnotationValue] = Field(default={}, description="Annotations of the pod.")
    extra_ca: ExtraCa | None = Field(
        default=None,
        alias="extraCA",
        description="Certificate authorities to trust in addition to those in the image.",
    )
    prefetch: StrictBool = Field(
        default=False,
        description="Whether a separate Job without GPUs pulls the dataset first, so that no GPU is idle during the "
        "download.",
    )
    termination_grace_period_seconds: StrictInt = Field(
        default=300,
        ge=30,
        le=3600,
        description="Seconds between SIGTERM and SIGKILL. In this time the trainer finishes the current step and "
        "uploads a checkpoint.",
    )
    checkpoint_minutes: StrictFloat = Field(
        default=10.0,
        gt=0.0,
        le=1440.0,
        description="Minutes between checkpoints within an epoch. Another one is stored at the end of each epoch, but "
        "at most once a minute.",
    )
    keep_checkpoint: StrictBool = Field(
        default=False,
        description="Whether to keep the last checkpoint of each stage, so that the same job with more epochs "
        "continues from it instead of starting over. A stage with a cosine schedule, which depends on the number of "
        "epochs, or with unfreeze.steps starts over.",
    )

    @property
    def replicas(self) -> int:
        """Number of replicas of the model: the GPUs of all nodes, or one per node on the CPU."""
        return self.nodes * max(1, self.gpus)


class Metrics(SpecModel):
    """Export of Prometheus metrics. Changing these values does not change the result of a run."""

    pushgateway: HttpUrl | None = Field(
        default=None, description="URL of a Pushgateway that receives the final outcome. Unset: nothing is pushed."
    )
    linger_seconds: StrictInt = Field(
        default=0,
        ge=0,
        le=600,
        description="Seconds that the metrics port stays open after a stage ends or fails, to allow a last scrape.",
    )


@rule(Compute)
def shared_memory_is_below_memory(compute: Compute) -> Iterator[Violation]:
    """Files in /dev/shm count toward the memory of the pod, which is OOM-killed when it exceeds its limit."""
    if quantity_to_bytes(compute.shared_memory) >= quantity_to_bytes(compute.memory):
        yield Violation(
            "sharedMemory",
            f"{compute.shared_memory} is not below spec.compute.memory {compute.memory}, which includes it. "
            "Raise memory or lower sharedMemory.",
        )


@rule(Compute)
def tolerations_match_the_kubernetes_api(compute: Compute) -> Iterator[Violation]:
    """The API server rejects the whole Job if one toleration is invalid."""
    for index, toleration in enumerate(compute.tolerations):
        yield from check_toleration(toleration, f"tolerations.{index}")


@rule(Compute)
def toleration_fields_are_consistent(compute: Compute) -> Iterator[Violation]:
    """Kubernetes allows value only with Equal, tolerationSeconds only with NoExecute, and no key only with Exists."""
    for index, toleration in enumerate(compute.tolerations):
        path = f"tolerations.{index}"
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield Violation(f"{path}.value", "cannot be combined with operator Exists. Remove one of them.")
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield Violation(
                f"{path}.tolerationSeconds", "applies only to effect NoExecute. Remove it, or change the effect."
            )
        if not toleration.get("key") and toleration.get("operator") != "Exists":
            yield Violation(path, "has no key. Set the key of the taint, or tolerate all taints with operator: Exists.")


@rule(Compute)
def affinity_matches_the_kubernetes_api(compute: Compute) -> Iterator[Violation]:
    """The API server rejects the whole Job if one key of the affinity is invalid."""
    yield from check_affinity(compute.affinity, "affinity")


@rule(Compute)
def topology_requires_several_nodes(compute: Compute) -> Iterator[Violation]:
    """A single pod has no other pods to be placed next to."""
    if compute.topology and compute.nodes == 1:
        yield Violation("topology", "applies only to several nodes. Set spec.compute.nodes, or remove topology.")


@rule(Topology)
def topology_does_not_contradict_itself(topology: Topology) -> Iterator[Violation]:
    """Pods can't have the same value of a label and be distributed over its values."""
    if topology.pack and topology.pack == topology.spread:
        yield Violation("spread", f"{topology.spread} is also the label of pack. Remove one of them.")


@rule(Compute)
def image_pull_secrets_are_unique(compute: Compute) -> Iterator[Violation]:
    """Server-side apply merges this list by name and rejects duplicates."""
    yield from check_unique("imagePullSecrets", compute.image_pull_secrets)


@rule(Compute)
def annotations_are_small(compute: Compute) -> Iterator[Violation]:
    """Kubernetes allows 256 KiB of annotations, and `kubectl apply` stores the whole Job in one of them."""
    size = sum(len(f"{key}{value}".encode()) for key, value in compute.annotations.items())
    if size > MAX_ANNOTATION_BYTES:
        yield Violation(
            "annotations",
            f"the total size of {size} bytes exceeds {MAX_ANNOTATION_BYTES}. Store large values elsewhere.",
        )
