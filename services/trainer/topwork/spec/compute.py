"""`spec.compute` and `spec.metrics`: the machine and the monitoring, which change no result."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from topwork.spec.address import HttpUrl
from topwork.spec.part import Meaning, Number, Part, Refusal, Whole, rule
from topwork.spec.words import hint, shown

ByteQuantity = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,14}(\.[0-9]{1,9})?|0\.[0-9]{1,9})(k|M|G|T|Ki|Mi|Gi|Ti)$"),
    Meaning("a Kubernetes quantity with its unit, such as 16Gi or 500M"),
]
CpuText = Annotated[
    str,
    StringConstraints(pattern=r"^([1-9][0-9]{0,5}m?|[1-9][0-9]{0,5}\.[0-9]{1,3}|0\.[0-9]{0,2}[1-9])$"),
]
DnsName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63),
    Meaning("a Kubernetes name: a-z, 0-9, dash and dot, at most 63 characters"),
]
LabelKey = Annotated[
    str,
    StringConstraints(
        pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
    ),
    Meaning("a Kubernetes label key: [prefix/]name, the name of at most 63 letters, digits, dash, underscore and dot"),
]
LabelValue = Annotated[
    str,
    StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"),
    Meaning(
        "a Kubernetes label value: at most 63 letters, digits, dash, underscore and dot, in quotes if it is a number"
    ),
]
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
    priority_class_name: DnsName | None = Field(default=None, description="PriorityClass of the pod.")


class Metrics(Part):
    """How the metrics leave the job."""

    pushgateway: HttpUrl | None = Field(default=None, description="Address of a Pushgateway for the final outcome.")
    linger_seconds: Whole = Field(
        default=0, ge=0, le=600, description="Seconds that the port stays open at the end, so that it is scraped again."
    )


def in_bytes(quantity: str) -> float:
    """Turn a Kubernetes quantity with its unit, such as 16Gi, into bytes."""
    number = quantity.rstrip("kKMGTi")
    return float(number) * FACTORS[quantity[len(number) :]]


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
        if toleration.get("operator") == "Exists" and toleration.get("value"):
            yield Refusal(f"{path}.value", "operator Exists takes no value. Leave one of the two out.")
        if not toleration.get("key") and toleration.get("operator") != "Exists":
            yield Refusal(path, "no key. Name the taint's key, or bear all taints with {operator: Exists}.")
