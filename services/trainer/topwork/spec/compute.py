"""`spec.compute` and `spec.metrics`: the machine and the monitoring, which change no result."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from topwork.spec.affinity import wrong_affinity
from topwork.spec.messages import hint, shown
from topwork.spec.section import Meaning, Number, Part, Refusal, Whole, YesNo, named_once, rule
from topwork.spec.uris import HttpUrl

ByteQuantity = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,14}(\.[0-9]{1,9})?|0\.[0-9]{1,9})(k|M|G|T|Ki|Mi|Gi|Ti)$"),
    Meaning("a Kubernetes quantity with its unit, such as 16Gi or 500M"),
]
CpuText = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,5}m?|[1-9][0-9]{0,5}\.[0-9]{1,3}|0\.[0-9]{0,2}[1-9])$"),
]
# RFC 1123 subdomain, as Kubernetes checks it: no part between two dots is empty, or begins or ends with a dash.
SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
DnsName = Annotated[
    str,
    StringConstraints(pattern=f"^{SUBDOMAIN}$", max_length=63),
    Meaning("a Kubernetes name: a-z, 0-9, dash and dot, at most 63 characters"),
]
ObjectName = Annotated[
    str,
    StringConstraints(pattern=f"^{SUBDOMAIN}$", max_length=253),
    Meaning("the name of a Kubernetes object: a-z, 0-9, dash and dot, at most 253 characters"),
]
QUALIFIED_NAME = StringConstraints(
    pattern=rf"^({SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?$", max_length=253 + 1 + 63
)
PARTS_OF_A_NAME = "[prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot"
LabelKey = Annotated[str, QUALIFIED_NAME, Meaning(f"a Kubernetes label key: {PARTS_OF_A_NAME}")]
LabelValue = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"),
    Meaning(
        "a Kubernetes label value: at most 63 letters, digits, dash, underscore and dot, in quotes if it is a number"
    ),
]
AnnotationKey = Annotated[str, QUALIFIED_NAME, Meaning(f"a Kubernetes annotation key: {PARTS_OF_A_NAME}")]
AnnotationValue = Annotated[str, Meaning("text, in quotes if it is a number or true or false")]
ConfigMapKey = Annotated[
    str,
    StringConstraints(pattern=r"^\.?[-_A-Za-z0-9][-._A-Za-z0-9]*$", max_length=253),
    Meaning("a key of a ConfigMap: letters, digits, dash, underscore and dot, at most 253 characters"),
]
# Kubernetes takes 256 KiB of annotations, and `kubectl apply` keeps the whole Job, with these, in one of them.
MOST_ANNOTATION_BYTES = 64 * 1024
FACTORS = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
TOLERATION_KEYS = ("key", "operator", "value", "effect", "tolerationSeconds")
TOLERATION_WORDS = {
    "operator": ("Equal", "Exists"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}


def _cpu_kind(value: object) -> str:
    if isinstance(value, str):
        return "<text>"
    return "<share>" if isinstance(value, float) else "<cores>"


class ExtraCa(Part):
    """Authorities that the job trusts beside those of the image, from a ConfigMap in the Job's namespace."""

    config_map: ObjectName = Field(description="Name of the ConfigMap.")
    key: ConfigMapKey = Field(default="ca.crt", description="Its key that holds the certificates, as PEM.")


class Compute(Part):
    """What the Kubernetes Job asks for."""

    gpus: Whole = Field(default=1, ge=0, le=16, description="GPUs of the pod; 0 trains on the processor.")
    cpu: Annotated[
        Annotated[CpuText, Tag("<text>")]
        | Annotated[Whole, Field(ge=1, le=1024), Tag("<cores>")]
        | Annotated[Number, Field(gt=0.0, le=1024.0), Tag("<share>")],
        Discriminator(_cpu_kind),
        Meaning("cores as a number above 0, at most 1024, or a Kubernetes quantity such as 500m"),
    ] = Field(default=4, description="CPU cores.")
    memory: ByteQuantity = Field(default="16Gi", description="Memory of the pod.")
    shared_memory: ByteQuantity = Field(default="2Gi", description="Size of /dev/shm; counts as memory of the pod.")
    scratch: ByteQuantity = Field(default="50Gi", description="Size of the scratch volume.")
    precision: Literal["auto", "float32", "mixed_float16", "mixed_bfloat16"] = Field(
        default="auto", description="Number format of the computation; auto is mixed_bfloat16 on GPUs that have it."
    )
    queue: DnsName | None = Field(default=None, description="Kueue local queue.")
    deadline_seconds: Whole = Field(
        default=86400, ge=60, le=2**31 - 1, description="Seconds after which the Job is ended."
    )
    retries: Whole = Field(default=3, ge=0, le=100, description="Retries of the Job.")
    ttl_seconds_after_finished: Whole = Field(
        default=86400, ge=0, le=2**31 - 1, description="Seconds that a finished Job is kept."
    )
    node_selector: dict[LabelKey, LabelValue] = Field(default={}, description="Labels that the node must have.")
    tolerations: tuple[dict[str, Any], ...] = Field(
        default=(),
        max_length=64,
        description="Taints of nodes that are borne, with key, operator, value, effect and tolerationSeconds.",
    )
    affinity: dict[str, Any] = Field(
        default={},
        description="Affinity of the pod as Kubernetes has it: nodeAffinity, podAffinity and podAntiAffinity.",
    )
    priority_class_name: DnsName | None = Field(default=None, description="PriorityClass of the pod.")
    service_account_name: ObjectName | None = Field(
        default=None,
        description="ServiceAccount of the pod, for access to the storage by workload identity; without it default.",
    )
    image_pull_secrets: tuple[ObjectName, ...] = Field(
        default=(), max_length=16, description="Secrets with the logins of private registries."
    )
    annotations: dict[AnnotationKey, AnnotationValue] = Field(default={}, description="Annotations of the pod.")
    extra_ca: ExtraCa | None = Field(
        default=None, alias="extraCA", description="Authorities that are trusted beside those of the image."
    )
    prefetch: YesNo = Field(
        default=False,
        description="Whether a Job of its own, without GPUs, pulls the dataset ahead, so that no GPU waits for it.",
    )
    termination_grace_period_seconds: Whole = Field(
        default=300,
        ge=30,
        le=3600,
        description="Seconds from SIGTERM to SIGKILL: for the step under way, its checkpoint and the upload of that.",
    )
    checkpoint_minutes: Number = Field(
        default=10.0,
        gt=0.0,
        le=1440.0,
        description="Minutes after which a checkpoint is stored in the middle of an epoch, too; each epoch has one at "
        "its end.",
    )


class Metrics(Part):
    """How the metrics leave the job."""

    pushgateway: HttpUrl | None = Field(default=None, description="Address of a Pushgateway for the final outcome.")
    linger_seconds: Whole = Field(
        default=0,
        ge=0,
        le=600,
        description="Seconds that the port stays open at the end, also after a failure, so that it is scraped again.",
    )


def in_bytes(quantity: str) -> float:
    """Turn a Kubernetes quantity with its unit, such as 16Gi, into bytes."""
    number = quantity.rstrip("kKMGTi")
    return float(number) * FACTORS[quantity[len(number) :]]


def in_millicores(cpu: str | int | float) -> int:
    """Turn cores, a number or a Kubernetes quantity such as 500m, into thousandths, of which there is at least one."""
    if isinstance(cpu, str) and cpu.endswith("m"):
        return int(cpu[:-1])
    return math.ceil(round(float(cpu) * 1000, 6))


@rule(Compute)
def shared_memory_fits_into_memory(compute: Compute) -> Iterator[Refusal]:
    """The volume at /dev/shm is memory: what fills it is memory of the pod, which is ended when it has none."""
    if in_bytes(compute.shared_memory) >= in_bytes(compute.memory):
        yield Refusal(
            "sharedMemory",
            f"{compute.shared_memory} is not below spec.compute.memory {compute.memory}, of which it is a part. "
            "Raise memory or lower sharedMemory.",
        )


@rule(Compute)
def tolerations_are_those_of_kubernetes(compute: Compute) -> Iterator[Refusal]:
    """The API server would refuse the whole Job for one wrong toleration."""
    for index, toleration in enumerate(compute.tolerations):
        path = f"tolerations.{index}"
        for key, value in toleration.items():
            if key not in TOLERATION_KEYS:
                known = ", ".join(TOLERATION_KEYS)
                yield Refusal(f"{path}.{key}", f"no such key.{hint(key, TOLERATION_KEYS)} Known: {known}.")
            elif key == "tolerationSeconds":
                if type(value) is not int:
                    yield Refusal(f"{path}.{key}", f"{shown(value)} is not allowed. Allowed: a whole number.")
            elif not isinstance(value, str):
                yield Refusal(f"{path}.{key}", f"{shown(value)} is not allowed. Allowed: text, in quotes.")
            elif key in TOLERATION_WORDS and value not in TOLERATION_WORDS[key]:
                words = TOLERATION_WORDS[key]
                yield Refusal(
                    f"{path}.{key}", f"{shown(value)} is not allowed.{hint(value, words)} Allowed: {', '.join(words)}."
                )


@rule(Compute)
def tolerations_make_sense(compute: Compute) -> Iterator[Refusal]:
    """Kubernetes takes a value with Equal only, seconds with NoExecute only, and no key only with Exists."""
    for index, toleration in enumerate(compute.tolerations):
        path = f"tolerations.{index}"
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield Refusal(f"{path}.value", "operator Exists takes no value. Leave one of the two out.")
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield Refusal(
                f"{path}.tolerationSeconds", "goes with effect NoExecute only. Take it out, or change effect."
            )
        if not toleration.get("key") and toleration.get("operator") != "Exists":
            yield Refusal(path, "no key. Name the taint's key, or bear all taints with {operator: Exists}.")


@rule(Compute)
def affinity_is_that_of_kubernetes(compute: Compute) -> Iterator[Refusal]:
    """As with the tolerations: one wrong key, and the API server refuses the whole Job."""
    yield from wrong_affinity(compute.affinity, "affinity")


@rule(Compute)
def pull_secrets_are_named_once(compute: Compute) -> Iterator[Refusal]:
    """The API server merges the list by name, and takes no name twice."""
    yield from named_once("imagePullSecrets", compute.image_pull_secrets)


@rule(Compute)
def annotations_are_not_too_large(compute: Compute) -> Iterator[Refusal]:
    """Kubernetes takes 256 KiB of annotations, and `kubectl apply` keeps the whole Job in one of them."""
    size = sum(len(f"{key}{value}".encode()) for key, value in compute.annotations.items())
    if size > MOST_ANNOTATION_BYTES:
        yield Refusal(
            "annotations", f"{size} bytes in all are more than {MOST_ANNOTATION_BYTES}. Keep large texts elsewhere."
        )
