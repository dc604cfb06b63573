"""The chart with many sets of values: linted, taken by every version of Kubernetes, restricted; wrong ones refused."""

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
    found = helm_python.values_from_yaml((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"))["spec"]
    return {key: value for key, value in (found | changes).items() if value is not None}


GATEWAY = "http://pushgateway.monitoring:9091"
MONITORING = {"podMonitor": {"enabled": True, "labels": {"release": "kps"}}, "prometheusRule": {"enabled": True}}
SETS: dict[str, dict[str, Any]] = {
    "nothing set": {},
    "storage and queue": {"defaults": {"spec": {"storage": "s3://a-b/c", "compute": {"queue": "team-a", "cpu": 2.5}}}},
    "an image": {"defaults": {"image": "registry.example.com:5000/topwork:1.0-gpu"}},
    "keys": {"s3": {"credentials": "create", "accessKeyId": "id", "secretAccessKey": "key"}},
    "keys and a server": {
        "s3": {"credentials": "create", "endpoint": "https://s3", "accessKeyId": "i", "secretAccessKey": "k"}
    },
    "workload identity": {
        "s3": {"credentials": "workloadIdentity", "region": "eu-central-1"},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/topwork"}},
        "jobs": {"cats": {"spec": spec()}},
    },
    "no accounts": {"serviceAccount": {"create": False}, "submitters": {"create": False}},
    "other submitters": {"submitters": {"groups": [], "users": ["ann"], "serviceAccounts": ["ci"]}},
    "nobody submits": {"submitters": {"groups": []}},
    "monitoring": {"monitoring": MONITORING | {"dashboards": {"enabled": True}, "pushgateway": GATEWAY}},
    "dashboards elsewhere": {
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
    "embedded server, closed network": {
        "seaweedfs": {"enabled": True, "storageClass": "fast", "bucket": "a.b-c", "size": "1Gi"},
        "networkPolicies": {"enabled": True, "egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]},
    },
    "network policy": {
        "networkPolicies": {"enabled": True, "scrapers": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]}
    },
    "nobody scrapes": {"networkPolicies": {"enabled": True, "scrapers": []}},
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
# Custom resources, by the keys that their definitions have (prometheus-operator, api/monitoring/v1).
CUSTOM = {
    "PodMonitor": {"selector", "podTargetLabels", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
}
ENDPOINT = {"port", "interval", "relabelings"}
# What several sets have alike is validated once: strict schemas of seven versions take their time.
VALIDATED: list[dict[str, Any]] = []


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if manifest["kind"] == "Pod":
        yield manifest["spec"]
    elif "template" in manifest.get("spec", {}):
        yield manifest["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", SETS)
def test_every_version_of_kubernetes_takes_what_is_rendered(name: str, rendered: Render) -> None:
    objects = rendered(SETS[name])
    for manifest in objects.values():
        if manifest["kind"] in CUSTOM:
            assert manifest["spec"].keys() <= CUSTOM[manifest["kind"]]
            assert all(endpoint.keys() == ENDPOINT for endpoint in manifest["spec"].get("podMetricsEndpoints", []))
        elif manifest not in VALIDATED:
            assert_valid_object(manifest, VERSIONS)
            VALIDATED.append(manifest)
        for pod in pods(manifest):
            assert list(pod_security_violations(pod)) == []
            assert pod["automountServiceAccountToken"] is False
        assert manifest["metadata"]["namespace"] in {"ml", "grafana"}


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_no_fault(name: str) -> None:
    found = helm_python.lint(CHART, SETS[name], strict=True)
    assert [message for message in found["messages"] if message["severity"] > 1] == []
    assert found["errors"] == []


@pytest.mark.parametrize(
    ("values", "told"),
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
        ({"jobs": {"cats": {"spec": spec(storage=None)}}}, "jobs.cats.spec.storage is missing. Name it there, such as"),
        (
            {"jobs": {"cats": {"spec": spec(model={"base": {"saved": {"uri": "old.keras"}}})}}},
            'jobs.cats.spec.model.base.saved.uri: "old.keras" is a path on this machine: a pod can\'t read it.',
        ),
        ({"s3": {"credentials": "create"}}, "s3.credentials is create: set s3.accessKeyId and s3.secretAccessKey too"),
        (
            {"seaweedfs": {"enabled": True}, "s3": {"credentials": "workloadIdentity"}},
            "s3.credentials is workloadIdentity, and seaweedfs.enabled is true, which brings credentials of its own",
        ),
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_their_path(values: dict[str, Any], told: str, rendered: Render) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        rendered(values)
    assert told in str(refused.value)


def test_on_and_off_are_words_of_a_spec(rendered: Render) -> None:
    # Helm hands both over as true and false.
    values = helm_python.values_from_yaml("transfer: {featureCache: off}\nfineTune: {epochs: 1, featureCache: off}")
    assert values["transfer"] == {"featureCache": False}
    objects = rendered({"jobs": {"cats": {"spec": spec(**values)}}})
    (text,) = (found["data"]["job.yaml"] for found in objects.values() if "job.yaml" in found.get("data", {}))
    assert text.count('featureCache: "off"') == 2


def test_jobs_take_the_defaults_of_the_namespace(rendered: Render) -> None:
    defaults = {"compute": {"queue": "team-a", "memory": "32Gi"}, "metrics": {"lingerSeconds": 5}}
    objects = rendered({"defaults": {"spec": defaults}, "jobs": {"cats": {"spec": spec(compute={"memory": "64Gi"})}}})
    (job,) = (found for (kind, _), found in objects.items() if kind == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "64Gi"


def test_the_version_of_the_chart_is_that_of_topwork(chart: helm_python.Chart) -> None:
    assert (chart.metadata["version"], chart.metadata["appVersion"]) == (__version__, __version__)


def test_notes_name_what_is_missing_and_the_next_command(chart: helm_python.Chart) -> None:
    def notes(values: dict[str, Any]) -> str:
        return chart.render(values, name="r", namespace="ml")["topwork/templates/NOTES.txt"]

    assert "each job must set spec.storage" in notes({})
    assert "kubectl create secret generic topwork-s3 -n ml" in notes({})
    assert "topwork submit job.yaml -n ml --follow" in notes({})
    job = {"seaweedfs": {"enabled": True}, "jobs": {"cats": {"spec": spec()}}}
    assert "Action required" not in notes(job)
    assert "topwork status cats -n ml --follow" in notes(job)
