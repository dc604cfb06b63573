"""The chart with different values: lint, validity in every Kubernetes version, Pod Security and error messages."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
from object_validation import VERSIONS, assert_valid_object, pod_security_violations

from topwork import __version__

CHART = Path(__file__).parents[2] / "charts" / "topwork"
EXAMPLES = Path(__file__).parents[2] / "examples"
Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]


def spec(example: str = "cats-vs-dogs", **changes: Any) -> dict[str, Any]:
    example_spec = helm_python.values_from_yaml((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"))["spec"]
    return {key: value for key, value in (example_spec | changes).items() if value is not None}


GATEWAY = "http://pushgateway.monitoring:9091"
MONITORING = {"podMonitor": {"enabled": True, "labels": {"release": "kps"}}, "prometheusRule": {"enabled": True}}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "storage and queue": {"defaults": {"spec": {"storage": "s3://a-b/c", "compute": {"queue": "team-a", "cpu": 2.5}}}},
    "default image": {"defaults": {"image": "registry.example.com:5000/topwork:1.0-gpu"}},
    "access keys": {"s3": {"credentials": "create", "accessKeyId": "id", "secretAccessKey": "key"}},
    "access keys and endpoint": {
        "s3": {"credentials": "create", "endpoint": "https://s3", "accessKeyId": "i", "secretAccessKey": "k"}
    },
    "workload identity": {
        "s3": {"credentials": "workloadIdentity", "region": "eu-central-1"},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/topwork"}},
        "jobs": {"cats": {"spec": spec()}},
    },
    "no service account or role": {"serviceAccount": {"create": False}, "submitters": {"create": False}},
    "other submitters": {"submitters": {"groups": [], "users": ["ann"], "serviceAccounts": ["ci"]}},
    "no submitters": {"submitters": {"groups": []}},
    "monitoring": {"monitoring": MONITORING | {"dashboards": {"enabled": True}, "pushgateway": GATEWAY}},
    "dashboards in another namespace": {
        "monitoring": {
            "podMonitor": {"enabled": True, "podTargetLabels": [], "interval": "1m"},
            "dashboards": {
                "enabled": True,
                "namespace": "grafana",
                "annotations": {"grafana_folder": "Machine learning"},
            },
        }
    },
    "embedded server": {"seaweedfs": {"enabled": True}, "jobs": {"cats": {"spec": spec(storage=None)}}},
    "embedded server and network policies": {
        "seaweedfs": {"enabled": True, "storageClass": "fast", "bucket": "a.b-c", "size": "1Gi"},
        "networkPolicies": {"enabled": True, "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]},
    },
    "network policy": {
        "networkPolicies": {"enabled": True, "scrapers": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]}
    },
    "no scrapers": {"networkPolicies": {"enabled": True, "scrapers": []}},
    "several jobs": {
        "jobs": {
            "cats": {"labels": {"team": "vision"}, "spec": spec()},
            "gradual": {"spec": spec("lab-4-vgg16-gradual", compute={"gpus": 0, "cpu": "500m", "prefetch": True})},
            "solar": {"spec": spec("solar-scratch", compute={"extraCA": {"configMap": "ca"}, "gpus": 8})},
        },
        "monitoring": MONITORING,
    },
    "private registry": {
        "defaults": {
            "spec": {"storage": "s3://bucket", "compute": {"imagePullSecrets": ["login"], "serviceAccountName": "own"}}
        },
        "jobs": {"cats": {"spec": spec(storage=None, compute={"tolerations": [{"operator": "Exists"}]})}},
        "controller": {
            "image": "registry.example.com:5000/topwork:1.0-controller",
            "imagePullSecrets": ["login"],
            "priorityClassName": "system-cluster-critical",
            "nodeSelector": {"pool": "system"},
            "tolerations": [{"operator": "Exists"}],
        },
    },
    "no controller": {"controller": {"enabled": False}, "networkPolicies": {"enabled": True}},
    "cluster-wide controller and self-signed webhook": {
        "controller": {"clusterWide": True, "replicas": 2, "webhook": {"enabled": True}},
        "networkPolicies": {"enabled": True},
        "monitoring": MONITORING,
    },
    "several namespaces and cert-manager": {
        "controller": {
            "namespaces": ["team-a", "team-b"],
            "webhook": {"enabled": True, "certificate": "certManager"},
            "crds": {"upgrade": False},
        },
    },
}
# Keys in the specs of custom resources, as defined in prometheus-operator, api/monitoring/v1, and cert-manager,
# pkg/apis/certmanager/v1.
CUSTOM_RESOURCE_KEYS = {
    "PodMonitor": {"selector", "podTargetLabels", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
    "Certificate": {"secretName", "dnsNames", "issuerRef"},
    "Issuer": {"selfSigned"},
}
ENDPOINT_KEYS = {"port", "interval", "relabelings", "honorLabels"}
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration"}
# Objects in several sets are validated only once, because strict validation against seven schemas is slow.
VALIDATED_OBJECTS: list[dict[str, Any]] = []


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if manifest["kind"] == "Pod":
        yield manifest["spec"]
    elif "template" in manifest.get("spec", {}):
        yield manifest["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", VALUE_SETS)
def test_objects_are_valid_in_every_kubernetes_version(name: str, render_chart: Render) -> None:
    objects = render_chart(VALUE_SETS[name])
    for manifest in objects.values():
        if manifest["kind"] in CUSTOM_RESOURCE_KEYS:
            assert manifest["spec"].keys() <= CUSTOM_RESOURCE_KEYS[manifest["kind"]]
            assert all(endpoint.keys() <= ENDPOINT_KEYS for endpoint in manifest["spec"].get("podMetricsEndpoints", []))
        elif manifest["kind"] != "TransferJob" and manifest not in VALIDATED_OBJECTS:
            assert_valid_object(manifest, VERSIONS)
            VALIDATED_OBJECTS.append(manifest)
        for pod in pods(manifest):
            assert list(pod_security_violations(pod)) == []
            uses_api = pod["containers"][0]["image"].endswith("-controller")
            assert pod["automountServiceAccountToken"] is uses_api
        assert ("namespace" in manifest["metadata"]) is (manifest["kind"] not in CLUSTER_SCOPED)


@pytest.mark.parametrize("name", VALUE_SETS)
def test_helm_lint_passes(name: str) -> None:
    result = helm_python.lint(CHART, VALUE_SETS[name], strict=True, namespace="ml")
    assert [message for message in result["messages"] if message["severity"] > 1] == []
    assert result["errors"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"job": {}}, "at '': additional properties 'job' not allowed"),
        ({"seaweedfs": {"enabled": "yes"}}, "at '/seaweedfs/enabled': got string, want boolean"),
        ({"seaweedfs": {"bucket": "A"}}, "at '/seaweedfs/bucket': 'A' does not match pattern"),
        ({"s3": {"credentials": "secret"}}, "at '/s3/credentials': value must be one of 'existing', 'create', 'work"),
        (
            {"monitoring": {"podMonitor": {"interval": 15}}},
            "at '/monitoring/podMonitor/interval': got number, want str",
        ),
        ({"defaults": {"spec": {"seed": 1}}}, "at '/defaults/spec': additional properties 'seed' not allowed"),
        ({"defaults": {"spec": {"compute": {"gpu": 1}}}}, "at '/defaults/spec/compute': additional properties 'gpu'"),
        ({"jobs": {"Cats": {"spec": spec()}}}, "at '/jobs': additional properties 'Cats' not allowed"),
        ({"jobs": {"cats": spec()}}, "at '/jobs/cats': missing property 'spec'"),
        ({"jobs": {"cats": {"spec": []}}}, "at '/jobs/cats/spec': got array, want object"),
        (
            {"jobs": {"cats": {"labels": {"team": True}, "spec": spec()}}},
            "at '/jobs/cats/labels/team': got boolean, want string",
        ),
        ({"controller": {"replicas": 11}}, "at '/controller/replicas': maximum: got 11, want 10"),
        ({"controller": {"webhook": {"certificate": "own"}}}, "at '/controller/webhook/certificate': value must be"),
        ({"controller": {"namespaces": ["Team"]}}, "at '/controller/namespaces/0': 'Team' does not match pattern"),
        ({"s3": {"credentials": "create"}}, "s3.credentials is create: also set s3.accessKeyId and s3.secretAccessKey"),
        (
            {"seaweedfs": {"enabled": True}, "s3": {"credentials": "workloadIdentity"}},
            "s3.credentials is workloadIdentity, but seaweedfs.enabled is true, and the embedded server has its own",
        ),
    ],
    ids=str,
)
def test_invalid_values_are_rejected_with_their_path(
    values: dict[str, Any], message: str, render_chart: Render
) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        render_chart(values)
    assert message in str(error.value)


def test_chart_version_equals_topwork_version(chart: helm_python.Chart) -> None:
    assert (chart.metadata["version"], chart.metadata["appVersion"]) == (__version__, __version__)


def test_notes_contain_missing_settings_and_the_next_command(chart: helm_python.Chart) -> None:
    def notes(values: dict[str, Any]) -> str:
        return chart.render(values, name="r", namespace="ml")["topwork/templates/NOTES.txt"]

    assert "each job must set spec.storage" in notes({})
    assert "kubectl create secret generic topwork-s3 -n ml" in notes({})
    assert "kubectl apply -f job.yaml -n ml" in notes({})
    assert "The controller runs the TransferJobs of ml, team-a." in notes({"controller": {"namespaces": ["team-a"]}})
    assert "The controller runs the TransferJobs of all namespaces." in notes({"controller": {"clusterWide": True}})
    job = {"seaweedfs": {"enabled": True}, "jobs": {"cats": {"spec": spec()}}}
    assert "Action required" not in notes(job)
    assert "kubectl apply" not in notes(job)
    assert "kubectl get transferjobs -n ml" in notes(job)
    assert "kubectl wait transferjob/cats -n ml --for=condition=Complete --timeout=24h" in notes(job)
    assert "topwork status cats -n ml --follow" in notes(job)
    assert "topwork submit job.yaml -n ml --as job --follow" in notes({"controller": {"enabled": False}})


def test_all_yaml_files_of_the_chart_are_tidy() -> None:
    for path in [*CHART.rglob("*.yaml"), *CHART.rglob("*.tpl")]:
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n"), path
        lines = text.splitlines()
        assert [number for number, line in enumerate(lines, 1) if line != line.rstrip() or "\t" in line] == [], path


def test_every_value_is_used_by_a_template(chart: helm_python.Chart) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (CHART / "templates").rglob("*") if path.is_file())

    def unused(values: dict[str, Any]) -> Iterator[str]:
        for key, value in values.items():
            if f".{key}" not in text:
                yield key
            if isinstance(value, dict) and key != "resources":
                yield from unused(value)

    assert [key for key in unused(chart.values) if key != "grafana_dashboard"] == []
