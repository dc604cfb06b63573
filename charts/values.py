"""What can be set in the chart: keys, defaults and words. values.yaml, its schema and the README come from these."""

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StringConstraints

from topwork.cluster.names import STORAGE_SECRET
from topwork.spec.compute import Compute, Metrics
from topwork.spec.job import JobSpec
from topwork.spec.kubernetes_types import (
    AnnotationKey,
    ByteQuantity,
    DnsLabel,
    DnsName,
    LabelKey,
    LabelValue,
    ObjectName,
)
from topwork.spec.spec_model import SpecModel
from topwork.spec.uris import HttpUrl, StorageUri

Image = Annotated[str, StringConstraints(max_length=1024)]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(ms|s|m|h)$")]
# Objects of Kubernetes that the chart hands on as they stand.
Plain = dict[str, Any]


class Section(SpecModel):
    """A mapping of values.yaml whose keys are described one by one."""


class DefaultSpec(SpecModel):
    """Parts of a job spec that hold for all jobs of the namespace which don't say otherwise."""

    storage: StorageUri | None = Field(default=None, description="As spec.storage.")
    compute: Compute = Field(default=Compute(), description="As spec.compute.")
    metrics: Metrics = Field(default=Metrics(), description="As spec.metrics.")


class Defaults(Section):
    """What jobs of the namespace don't have to say: those of `jobs`, and what `topwork submit` reads."""

    image: Image = Field(
        default="",
        description="Image of all containers of jobs. Empty: what `make image` builds, topwork:<version>-gpu or -cpu.",
    )
    spec: DefaultSpec = Field(
        default=DefaultSpec(),
        description="storage, and keys of compute and metrics, as in a job spec. A key that the job names itself is "
        "the job's. Such as {storage: s3://ml-artifacts/topwork, compute: {queue: team-a, memory: 32Gi}}.",
    )


class ServiceAccount(Section):
    """The account of jobs, topwork-job. No pod of topwork gets a token of the Kubernetes API."""

    create: StrictBool = Field(default=True, description="Whether to make it.")
    annotations: dict[AnnotationKey, str] = Field(
        default={},
        description="What your cloud wants for workload identity, such as {eks.amazonaws.com/role-arn: arn:…}.",
    )


class Submitters(Section):
    """Who may submit: the role topwork-submitter, with what the commands of topwork ask of the API server."""

    create: StrictBool = Field(default=True, description="Whether to make the role.")
    groups: tuple[str, ...] = Field(default=("topwork-submitters",), description="Groups that get it.")
    users: tuple[str, ...] = Field(default=(), description="Users that get it.")
    service_accounts: tuple[ObjectName, ...] = Field(
        default=(), description="Service accounts of the namespace that get it."
    )


class S3(Section):
    """The object storage."""

    credentials: Literal["existing", "create", "workloadIdentity"] = Field(
        default="existing",
        description=f"existing: the Secret {STORAGE_SECRET} is made by you, its keys the AWS variables. create: "
        "the chart makes it from the values below, which Helm keeps in the cluster. workloadIdentity: jobs run as the "
        "service account, and there are no keys.",
    )
    endpoint: HttpUrl | Literal[""] = Field(default="", description="Address of the server; empty for Amazon S3.")
    region: str = Field(default="", description="Region, where the server asks for one.")
    access_key_id: str = Field(default="", description="With credentials: create, and for the embedded server.")
    secret_access_key: str = Field(default="", description="With credentials: create, and for the embedded server.")


class PodMonitor(Section):
    """A PodMonitor, by which the Prometheus operator finds the metrics ports of jobs."""

    enabled: StrictBool = Field(default=False, description="Whether to make it; it needs monitoring.coreos.com/v1.")
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels that your Prometheus selects by, such as {release: kube-prometheus-stack}."
    )
    interval: Duration = Field(default="15s", description="How often a port is read.")
    pod_target_labels: tuple[LabelKey, ...] = Field(
        default=("team",), description="Labels of pods that become labels of their series; metadata.labels of jobs."
    )


class PrometheusRule(Section):
    """Alerts and recording rules."""

    enabled: StrictBool = Field(default=False, description="Whether to make them; they need monitoring.coreos.com/v1.")
    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Labels that your Prometheus selects by.")


class Dashboards(Section):
    """A ConfigMap with the dashboards, which the sidecar of Grafana takes in."""

    enabled: StrictBool = Field(default=False, description="Whether to make it.")
    labels: dict[LabelKey, LabelValue] = Field(
        default={"grafana_dashboard": "1"}, description="Labels that the sidecar looks for."
    )
    annotations: dict[AnnotationKey, str] = Field(
        default={}, description="Annotations of it, such as {grafana_folder: Machine learning}."
    )
    namespace: DnsName | Literal[""] = Field(
        default="", description="Where the sidecar looks; empty is the namespace of the release."
    )


class Monitoring(Section):
    """Prometheus and Grafana."""

    pod_monitor: PodMonitor = Field(default=PodMonitor(), description=PodMonitor.__doc__)
    prometheus_rule: PrometheusRule = Field(default=PrometheusRule(), description=PrometheusRule.__doc__)
    dashboards: Dashboards = Field(default=Dashboards(), description=Dashboards.__doc__)
    pushgateway: HttpUrl | Literal[""] = Field(
        default="", description="Address of a Pushgateway to which jobs push their outcome, unless they name one."
    )


class NetworkPolicies(Section):
    """NetworkPolicies for the pods of jobs, and for the embedded server."""

    enabled: StrictBool = Field(default=False, description="Whether to make them.")
    scrapers: tuple[Plain, ...] = Field(
        default=({"namespaceSelector": {}},),
        description="Who may read the metrics ports, as peers of a NetworkPolicy. Nothing else reaches a pod of a job.",
    )
    egress: tuple[Plain, ...] = Field(
        default=(),
        description="Where jobs may go, as rules of a NetworkPolicy; DNS, and the embedded server, always. Empty is "
        "everywhere: storage and sources of datasets are often outside of the cluster.",
    )


class Seaweedfs(Section):
    """An S3 server for trying out: one pod, one volume, no replica. Nothing to keep models in."""

    enabled: StrictBool = Field(
        default=False, description="Whether to run it. Jobs use it, and its bucket is spec.storage where none is named."
    )
    image: Image = Field(default="chrislusf/seaweedfs:4.48", description="Image of SeaweedFS.")
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = Field(
        default="topwork", description="Bucket that is made."
    )
    size: ByteQuantity = Field(default="20Gi", description="Size of its volume.")
    storage_class: DnsName | Literal[""] = Field(default="", description="StorageClass; empty is the cluster's own.")
    resources: Plain = Field(
        default={"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        description="What its pod asks for.",
    )


class Tests(Section):
    """`helm test`: stores, reads and deletes an object where jobs store theirs, and checks the specs of `jobs`."""

    storage: StorageUri | Literal[""] = Field(
        default="", description="Where the object is stored; empty is defaults.spec.storage."
    )
    image: Image = Field(default="", description="Image of topwork; empty is that of jobs without GPUs.")


class ChartJobSpec(JobSpec):
    """A job spec whose storage may be that of the defaults."""

    storage: StorageUri | None = Field(default=None, description="As spec.storage; without it that of the defaults.")  # type: ignore[assignment]


class ChartJob(SpecModel):
    """A job: its name is the key."""

    labels: dict[LabelKey, LabelValue] = Field(default={}, description="As metadata.labels of a job spec.")
    spec: ChartJobSpec = Field(description="As spec of a job spec; docs/spec.md has all keys.")


class Values(Section):
    """All values."""

    defaults: Defaults = Field(default=Defaults(), description=Defaults.__doc__)
    jobs: dict[DnsLabel, ChartJob] = Field(
        default={},
        description="Jobs that run, each as NAME: {labels: {…}, spec: {…}}. A job is named by the digest of its spec: "
        "with another spec the old Job goes, and a new one comes. A Job that is there is never changed.",
    )
    s3: S3 = Field(default=S3(), description=S3.__doc__)
    service_account: ServiceAccount = Field(default=ServiceAccount(), description=ServiceAccount.__doc__)
    submitters: Submitters = Field(default=Submitters(), description=Submitters.__doc__)
    monitoring: Monitoring = Field(default=Monitoring(), description=Monitoring.__doc__)
    network_policies: NetworkPolicies = Field(default=NetworkPolicies(), description=NetworkPolicies.__doc__)
    seaweedfs: Seaweedfs = Field(default=Seaweedfs(), description=Seaweedfs.__doc__)
    tests: Tests = Field(default=Tests(), description=Tests.__doc__)
