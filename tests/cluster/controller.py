"""The controller and the definition of TransferJobs, from the chart or k8s/, as an administrator installs them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import helm_python
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML
from tests.cluster.environment import EVENT_SECONDS, START_SECONDS, controller_image
from tests.cluster.kubectl import Kubectl, KubectlError, wait_for
from tests.cluster.manifests import ROOT, with_namespace

from topwork.clients.kubernetes import KubernetesObject

CHART = ROOT / "charts" / "topwork"
KUSTOMIZATION = ROOT / "k8s" / "controller"
DEFINITION_FILE = KUSTOMIZATION / "crd.yaml"
DEFINITION = "transferjobs.topwork.dev"
DEFINITIONS = (DEFINITION, "transfersearches.topwork.dev")
NAME = "topwork-controller"
SELECTOR = f"app.kubernetes.io/name={NAME}"
PORT = 8080
PERMISSIONS = [
    {"apiGroups": ["topwork.dev"], "resources": ["transfersearches"], "verbs": ["get", "list", "watch"]},
    {
        "apiGroups": ["topwork.dev"],
        "resources": ["transferjobs"],
        "verbs": ["get", "list", "watch", "create", "update", "delete"],
    },
    {
        "apiGroups": ["topwork.dev"],
        "resources": ["transferjobs/status", "transfersearches/status"],
        "verbs": ["get", "patch"],
    },
    {
        "apiGroups": ["topwork.dev"],
        "resources": ["transferjobs/finalizers", "transfersearches/finalizers"],
        "verbs": ["update"],
    },
    {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "verbs": ["get", "list", "watch", "create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "create", "update", "patch", "delete"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "create", "patch", "delete"]},
    {
        "apiGroups": ["networking.k8s.io"],
        "resources": ["networkpolicies"],
        "verbs": ["get", "create", "patch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list", "create", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["topwork-controller"],
        "verbs": ["get", "update"],
    },
]
"""All permissions of the controller in the namespace of its TransferJobs and its Lease."""


@dataclass(frozen=True)
class Controller:
    """A controller in the namespace of a release."""

    kubectl: Kubectl

    @property
    def account(self) -> str:
        """User name of its service account."""
        return f"system:serviceaccount:{self.kubectl.namespace}:{NAME}"

    def install(self, objects: list[KubernetesObject]) -> None:
        """Apply its objects, and wait until a pod is ready and leads."""
        for obj in objects:
            Kubectl(obj["metadata"].get("namespace", self.kubectl.namespace)).apply(obj)
        timeout = f"--timeout={START_SECONDS:.0f}s"
        self.kubectl("rollout", "status", f"deployment/{NAME}", timeout, seconds=START_SECONDS + 30)
        self.wait_for_leader()

    def pods(self) -> list[KubernetesObject]:
        """Return its pods that are not being deleted, oldest first."""
        return [pod for pod in self.kubectl.items("pod", SELECTOR) if "deletionTimestamp" not in pod["metadata"]]

    def kill(self) -> None:
        """Kill all of its pods, without a chance to release the Lease."""
        self.kubectl("delete", "pod", "--selector", SELECTOR, "--grace-period=0", "--force", "--wait=false")

    def wait_for_leader(self) -> str:
        """Wait until a pod leads, and return its name."""

        def find() -> str | None:
            names = [pod["metadata"]["name"] for pod in self.pods()]
            return next((name for name in names if self.metrics(name).get("topwork_controller_leader") == 1), None)

        return wait_for(find, f"a controller that leads in {self.kubectl.namespace}", seconds=EVENT_SECONDS)

    def metrics(self, pod: str) -> dict[str, float]:
        """Return the series of a pod, by name and sorted labels; empty if it does not answer."""
        try:
            page = self.kubectl.metrics(pod, PORT)
        except KubectlError:
            return {}
        return parse_metrics(page)


def parse_metrics(page: str) -> dict[str, float]:
    """Return the series of a metrics page, such as `up` or `up{a="1",b="2"}`."""
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {_series(sample.name, sample.labels): sample.value for sample in samples}


def _series(name: str, labels: Mapping[str, str]) -> str:
    text = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{text}}}" if text else name


def definition_object(name: str = DEFINITION) -> KubernetesObject:
    """Return a CustomResourceDefinition."""
    contents: list[KubernetesObject] = json.loads(json.dumps(list(YAML(typ="safe").load_all(DEFINITION_FILE))))
    return next(content for content in contents if content["metadata"]["name"] == name)


def kustomize_objects(namespace: str) -> list[KubernetesObject]:
    """Return the objects of k8s/controller except the definitions, in another namespace."""
    text = Kubectl()("kustomize", str(KUSTOMIZATION))
    objects = [obj for obj in with_namespace(text, namespace) if obj["kind"] != "CustomResourceDefinition"]
    for obj in objects:
        if obj["kind"] == "Deployment":
            (container,) = obj["spec"]["template"]["spec"]["containers"]
            options = [argument.partition("=") for argument in container["args"]]
            container["args"] = [
                f"{option}={namespace}" if option.endswith("namespace") else option + separator + value
                for option, separator, value in options
            ]
            container["image"] = controller_image()
    return objects


def chart_objects(namespace: str, **controller: Any) -> list[KubernetesObject]:
    """Return the controller's objects from the chart, for a release in a namespace.

    Args:
        namespace: Namespace of the release.
        controller: Values of `controller`.
    """
    values = {"controller": {"image": controller_image(), **controller}}
    with helm_python.Chart.load(CHART) as chart:
        templates = chart.render(values, name="topwork", namespace=namespace)
    documents = [
        helm_python.values_from_yaml(document)
        for path, text in templates.items()
        if not path.endswith("NOTES.txt")
        for document in f"\n{text}".split("\n---\n")
    ]
    return [obj for obj in documents if obj and obj["metadata"]["labels"].get("app.kubernetes.io/name") == NAME]


def access_rules(kubectl: Kubectl, user: str) -> set[tuple[str, str, str, str]]:
    """Return what a user may do in a namespace, as `kubectl auth can-i --list` does.

    Returns:
        Group, resource, resource name (empty for all) and verb of each permission.
    """
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": kubectl.namespace},
    }
    # To validate it, kubectl would list the CustomResourceDefinitions, which this user may not do.
    options = ("--filename", "-", "--output", "json", "--validate=false", "--as", user)
    answer = kubectl("create", *options, stdin=json.dumps(review))
    return expand_rules(json.loads(answer)["status"]["resourceRules"])


def expand_rules(rules: list[dict[str, list[str]]]) -> set[tuple[str, str, str, str]]:
    """Return each combination of group, resource, resource name and verb of RBAC rules."""
    return {
        (group, resource, name, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames") or [""]
        for verb in rule["verbs"]
    }
