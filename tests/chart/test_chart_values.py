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
    },
}
# Keys in the specs of custom resources, as defined in prometheus-operator, api/monitoring/v1.
CUSTOM_RESOURCE_KEYS = {
    "PodMonitor": {"selector", "podTargetLabels", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
}
ENDPOINT_KEYS = {"port", "interval", "relabelings"}
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
            assert all(endpoint.keys() == ENDPOINT_KEYS for endpoint in manifest["spec"].get("podMetricsEndpoints", []))
        elif manifest not in VALIDATED_OBJECTS:
            assert_valid_object(manifest, VERSIONS)
            VALIDATED_OBJECTS.append(manifest)
        for pod in pods(manifest):
            assert list(pod_security_violations(pod)) == []
            assert pod["automountServiceAccountToken"] is False
        assert manifest["metadata"]["namespace"] in {"ml", "grafana"}


@pytest.mark.parametrize("name", VALUE_SETS)
def test_helm_lint_passes(name: str) -> None:
    result = helm_python.lint(CHART, VALUE_SETS[name], strict=True)
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
        ({"jobs": {"cats": {"spec": spec(trasfer={})}}}, "at '/jobs/cats/spec': additional properties 'trasfer' not"),
        (
            {"jobs": {"cats": {"spec": spec(transfer={"epochs": "x"})}}},
            "at '/jobs/cats/spec/transfer/epochs': got string, want integer",
        ),
        (
            {"jobs": {"cats": {"spec": spec(compute={"gpus": 17})}}},
            "at '/jobs/cats/spec/compute/gpus': maximum: got 17, want 16",
        ),
        (
            {"jobs": {"cats": {"labels": {"team": True}, "spec": spec()}}},
            "at '/jobs/cats/labels/team': got boolean, want string",
        ),
        (
            {"jobs": {"cats": {"spec": spec(storage=None)}}},
            "jobs.cats.spec.storage is missing. Set it, for example to s3://bucket/prefix, or set defaults",
        ),
        (
            {"jobs": {"cats": {"spec": spec(model={"base": {"saved": {"uri": "old.keras"}}})}}},
            'jobs.cats.spec.model.base.saved.uri: "old.keras" is a local path, which pods cannot read.',
        ),
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


def test_unquoted_on_and_off_are_accepted(render_chart: Render) -> None:
    # Helm parses both as booleans.
    values = helm_python.values_from_yaml("transfer: {featureCache: off}\nfineTune: {epochs: 1, featureCache: off}")
    assert values["transfer"] == {"featureCache": False}
    objects = render_chart({"jobs": {"cats": {"spec": spec(**values)}}})
    (text,) = (item["data"]["job.yaml"] for item in objects.values() if "job.yaml" in item.get("data", {}))
    assert text.count('featureCache: "off"') == 2


def test_jobs_use_the_defaults_of_the_namespace(render_chart: Render) -> None:
    defaults = {"compute": {"queue": "team-a", "memory": "32Gi"}, "metrics": {"lingerSeconds": 5}}
    objects = render_chart(
        {"defaults": {"spec": defaults}, "jobs": {"cats": {"spec": spec(compute={"memory": "64Gi"})}}}
    )
    (job,) = (item for (kind, _), item in objects.items() if kind == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "64Gi"


def test_chart_version_equals_topwork_version(chart: helm_python.Chart) -> None:
    assert (chart.metadata["version"], chart.metadata["appVersion"]) == (__version__, __version__)


def test_notes_contain_missing_settings_and_the_next_command(chart: helm_python.Chart) -> None:
    def notes(values: dict[str, Any]) -> str:
        return chart.render(values, name="r", namespace="ml")["topwork/templates/NOTES.txt"]

    assert "each job must set spec.storage" in notes({})
    assert "kubectl create secret generic topwork-s3 -n ml" in notes({})
    assert "topwork submit job.yaml -n ml --follow" in notes({})
    job = {"seaweedfs": {"enabled": True}, "jobs": {"cats": {"spec": spec()}}}
    assert "Action required" not in notes(job)
    assert "topwork status cats -n ml --follow" in notes(job)
