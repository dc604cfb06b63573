"""Values of the Helm chart: the source of values.yaml, its JSON Schema and the table in the README."""

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StringConstraints

from topwork.cluster.names import STORAGE_SECRET
from topwork.spec.compute import Compute, Metrics
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
# Part of a Kubernetes object that the chart copies unchanged.
KubernetesFields = dict[str, Any]


class Section(SpecModel):
    """A section of values.yaml with a comment above each key."""


class DefaultSpec(SpecModel):
    """Defaults for fields of job specs in the namespace."""

    storage: StorageUri | None = Field(default=None, description="Same as spec.storage.")
    compute: Compute = Field(default=Compute(), description="Same as spec.compute.")
    metrics: Metrics = Field(default=Metrics(), description="Same as spec.metrics.")


class Defaults(Section):
    """Defaults for TransferJobs in the namespace, and for Jobs that `topwork submit` creates there."""

    image: Image = Field(
        default="",
        description="Image of all job containers. If empty, the image that `make image` builds: topwork:<version>-gpu "
        "or topwork:<version>-cpu.",
    )
    spec: DefaultSpec = Field(
        default=DefaultSpec(),
        description="Default values of spec.storage, spec.compute and spec.metrics. Keys set in a job spec take "
        "precedence. Example: {storage: s3://ml-artifacts/topwork, compute: {queue: team-a, memory: 32Gi}}.",
    )


class ServiceAccount(Section):
    """The service account topwork-job. Pods of jobs never mount a Kubernetes API token."""

    create: StrictBool = Field(default=True, description="Whether to create the service account.")
    annotations: dict[AnnotationKey, str] = Field(
        default={},
        description="Annotations for the workload identity of your cloud provider, such as "
        "{eks.amazonaws.com/role-arn: arn:…}.",
    )


class Submitters(Section):
    """The role topwork-submitter, which grants the permissions that the topwork commands need, and its subjects."""

    create: StrictBool = Field(default=True, description="Whether to create the role and its binding.")
    groups: tuple[str, ...] = Field(default=("topwork-submitters",), description="Groups bound to the role.")
    users: tuple[str, ...] = Field(default=(), description="Users bound to the role.")
    service_accounts: tuple[ObjectName, ...] = Field(
        default=(), description="Service accounts in the namespace bound to the role."
    )


class S3(Section):
    """Access to object storage."""

    credentials: Literal["existing", "create", "workloadIdentity"] = Field(
        default="existing",
        description=f"existing: you create the Secret {STORAGE_SECRET}, whose keys are AWS environment variables. "
        "create: the chart creates the Secret from the values below, which Helm also stores in its release Secret. "
        "workloadIdentity: jobs run as the service account, without access keys.",
    )
    endpoint: HttpUrl | Literal[""] = Field(default="", description="URL of the S3 server. Leave empty for Amazon S3.")
    region: str = Field(default="", description="Region, if the server requires one.")
    access_key_id: str = Field(
        default="", description="Access key ID for credentials: create, or for the embedded S3 server."
    )
    secret_access_key: str = Field(
        default="", description="Secret access key for credentials: create, or for the embedded S3 server."
    )


class PodMonitor(Section):
    """PodMonitors, which make the Prometheus Operator scrape the metrics ports of jobs and of the controller."""

    enabled: StrictBool = Field(
        default=False, description="Whether to create the PodMonitors. Requires monitoring.coreos.com/v1."
    )
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels that your Prometheus selects, such as {release: kube-prometheus-stack}."
    )
    interval: Duration = Field(default="15s", description="Scrape interval.")
    pod_target_labels: tuple[LabelKey, ...] = Field(
        default=("team",), description="Pod labels, from metadata.labels of job specs, to add to the scraped series."
    )


class PrometheusRule(Section):
    """A PrometheusRule with the alerts and recording rules."""

    enabled: StrictBool = Field(
        default=False, description="Whether to create the PrometheusRule. Requires monitoring.coreos.com/v1."
    )
    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Labels that your Prometheus selects.")


class Dashboards(Section):
    """A ConfigMap with the dashboards, for the Grafana sidecar to import."""

    enabled: StrictBool = Field(default=False, description="Whether to create the ConfigMap.")
    labels: dict[LabelKey, LabelValue] = Field(
        default={"grafana_dashboard": "1"}, description="Labels that the sidecar selects."
    )
    annotations: dict[AnnotationKey, str] = Field(
        default={}, description="Annotations of the ConfigMap, such as {grafana_folder: Machine learning}."
    )
    namespace: DnsName | Literal[""] = Field(
        default="", description="Namespace that the sidecar watches. Defaults to the release namespace."
    )


class Monitoring(Section):
    """Prometheus and Grafana."""

    pod_monitor: PodMonitor = Field(default=PodMonitor(), description=PodMonitor.__doc__)
    prometheus_rule: PrometheusRule = Field(default=PrometheusRule(), description=PrometheusRule.__doc__)
    dashboards: Dashboards = Field(default=Dashboards(), description=Dashboards.__doc__)
    pushgateway: HttpUrl | Literal[""] = Field(
        default="", description="URL of a Pushgateway to which jobs push their outcome. Job specs can override it."
    )


class NetworkPolicies(Section):
    """NetworkPolicies for job pods, the controller and the embedded S3 server."""

    enabled: StrictBool = Field(default=False, description="Whether to create the NetworkPolicies.")
    scrapers: tuple[KubernetesFields, ...] = Field(
        default=({"namespaceSelector": {}},),
        description="NetworkPolicy peers allowed to scrape the metrics ports. All other ingress to job pods is denied, "
        "except from the controller of this release. Add the controller of another release here. The metrics of runs "
        "on several nodes are open to all: such a run has a policy of its own.",
    )
    egress: tuple[KubernetesFields, ...] = Field(
        default=(),
        description="NetworkPolicy egress rules of job pods. DNS, the embedded S3 server and the other pods of a run "
        "are always allowed. If empty, all egress is allowed, because storage and dataset sources are often outside "
        "the cluster.",
    )


class Seaweedfs(Section):
    """An embedded S3 server for evaluation, with one pod, one volume and no replication. Not for production."""

    enabled: StrictBool = Field(
        default=False,
        description="Whether to run the server. Jobs use it, and its bucket is the default of spec.storage.",
    )
    image: Image = Field(default="chrislusf/seaweedfs:4.48", description="Image of SeaweedFS.")
    bucket: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")] = Field(
        default="topwork", description="Bucket to create."
    )
    size: ByteQuantity = Field(default="20Gi", description="Size of the volume.")
    storage_class: DnsName | Literal[""] = Field(
        default="", description="StorageClass of the volume. Defaults to that of the cluster."
    )
    resources: KubernetesFields = Field(
        default={"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        description="Resource requests and limits of the container.",
    )


class Tests(Section):
    """Settings of `helm test`, which writes, reads and deletes an object, and submits a TransferJob as a dry run."""

    storage: StorageUri | Literal[""] = Field(
        default="", description="Storage to test. Defaults to defaults.spec.storage."
    )
    image: Image = Field(
        default="",
        description="Image of the pod that tests the storage. Defaults to defaults.image, or the CPU image if that is "
        "empty.",
    )


class ChartJob(SpecModel):
    """A TransferJob. Its key in `jobs` is the name."""

    labels: dict[LabelKey, LabelValue] = Field(default={}, description="Same as metadata.labels of a job spec.")
    annotations: dict[AnnotationKey, str] = Field(default={}, description="Same as metadata.annotations of a job spec.")
    # The CustomResourceDefinition and the controller validate it.
    spec: KubernetesFields = Field(description="Same as spec of a job spec. docs/spec.md describes all keys.")


class ControllerCrds(Section):
    """The CustomResourceDefinition of TransferJobs."""

    upgrade: StrictBool = Field(
        default=True,
        description="Whether helm upgrade applies the definition of the new version, in a pre-upgrade hook. Helm "
        "itself only installs it with the first release.",
    )


class ControllerWebhook(Section):
    """A webhook that reports all errors of a spec at `kubectl apply`, like `topwork validate`."""

    enabled: StrictBool = Field(
        default=False,
        description="Whether to create the webhook. If it does not respond, specs are accepted, and the controller "
        "reports the errors in the status.",
    )
    certificate: Literal["certManager", "selfSigned"] = Field(
        default="selfSigned",
        description="selfSigned: the controller generates the certificate and adds its CA to the webhook "
        "configuration. certManager: cert-manager does, which requires cert-manager.io/v1.",
    )


class Controller(Section):
    """The controller, which runs TransferJobs as Kubernetes Jobs and writes their status."""

    enabled: StrictBool = Field(default=True, description="Whether to run the controller. `jobs` requires it.")
    image: Image = Field(
        default="",
        description="Image of the controller. If empty, the image that `make image ACCELERATOR=controller` builds: "
        "topwork:<version>-controller.",
    )
    image_pull_secrets: tuple[ObjectName, ...] = Field(
        default=(), description="Secrets of the registry of this image, in the release namespace."
    )
    namespaces: tuple[DnsName, ...] = Field(
        default=(),
        description="Namespaces whose TransferJobs the controller runs, in addition to the release namespace. They "
        "must exist.",
    )
    cluster_wide: StrictBool = Field(
        default=False,
        description="Whether the controller runs the TransferJobs of all namespaces. Also lets users with the "
        "ClusterRoles view, edit and admin of Kubernetes read or manage TransferJobs.",
    )
    replicas: Annotated[int, Field(ge=0, le=10)] = Field(
        default=1, description="Number of pods. One is active; each other takes over within seconds if it fails."
    )
    workers: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Number of TransferJobs that the controller processes at the same time."
    )
    resources: KubernetesFields = Field(
        default={"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        description="Resource requests and limits of the container.",
    )
    priority_class_name: DnsName | Literal[""] = Field(default="", description="PriorityClass of the pods.")
    node_selector: dict[LabelKey, LabelValue] = Field(default={}, description="Node labels that the pods require.")
    tolerations: tuple[KubernetesFields, ...] = Field(default=(), description="Taints that the pods tolerate.")
    webhook: ControllerWebhook = Field(default=ControllerWebhook(), description=ControllerWebhook.__doc__)
    crds: ControllerCrds = Field(default=ControllerCrds(), description=ControllerCrds.__doc__)


class Values(Section):
    """All values of the chart."""

    defaults: Defaults = Field(default=Defaults(), description=Defaults.__doc__)
    jobs: dict[DnsLabel, ChartJob] = Field(
        default={},
        description="TransferJobs to create, as NAME: {labels: {…}, annotations: {…}, spec: {…}}. Requires the "
        "controller.",
    )
    controller: Controller = Field(default=Controller(), description=Controller.__doc__)
    s3: S3 = Field(default=S3(), description=S3.__doc__)
    service_account: ServiceAccount = Field(default=ServiceAccount(), description=ServiceAccount.__doc__)
    submitters: Submitters = Field(default=Submitters(), description=Submitters.__doc__)
    monitoring: Monitoring = Field(default=Monitoring(), description=Monitoring.__doc__)
    network_policies: NetworkPolicies = Field(default=NetworkPolicies(), description=NetworkPolicies.__doc__)
    seaweedfs: Seaweedfs = Field(default=Seaweedfs(), description=Seaweedfs.__doc__)
    tests: Tests = Field(default=Tests(), description=Tests.__doc__)
