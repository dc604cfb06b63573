"""Tests of the helpers in this directory, which require no cluster and run with all other tests."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
from tests.cluster.controller import (
    DEFINITION,
    DEFINITIONS,
    PERMISSIONS,
    chart_objects,
    definition_object,
    expand_rules,
    kustomize_objects,
    parse_metrics,
)
from tests.cluster.environment import (
    compute_settings,
    controller_image,
    executable,
    has_cluster,
    image,
    in_cluster_config,
    kubeconfig_with_token,
    reachable_address,
)
from tests.cluster.kubectl import Kubectl, parse_documents
from tests.cluster.manifests import (
    BASE,
    CLOSED_ENDPOINT,
    RULE_ERRORS,
    base_objects,
    break_rules,
    inspection,
    probe,
    storage_secret,
    tiny_spec,
    unreachable_storage,
)
from tests.cluster.storage import serve_storage
from tests.cluster.transfer_jobs import LONG_TRAINING, TransferJobRun

from topwork import __version__
from topwork.clients.prometheus.controller import ControllerMetrics, TransferJobSample
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.manifests.transfer_job import parse_transfer_job
from topwork.spec import TransferJob
from topwork.spec.loading.problems import InvalidSpecError

KUBERNETES = "1.36"
HERE = Path(__file__).parent


def test_storage_is_served_at_another_address_with_credentials(tmp_path):
    # Stands for a network address, because the server itself listens only on 127.0.0.1.
    with serve_storage(tmp_path, "127.0.0.2") as storage:
        stored = storage.at("topwork/images")
        stored.write("red/1.png", b"x" * 3_000_000)
        assert stored.read("red/1.png") == b"x" * 3_000_000
        assert storage.address == ("127.0.0.2", int(storage.variables["AWS_ENDPOINT_URL"].rpartition(":")[2]))
        assert {name for name, value in storage.variables.items() if value} == {
            "AWS_ENDPOINT_URL",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_REGION",
        }
        wrong_keys = StorageSettings(storage.settings.endpoint_url, "wrong-id", "wrong-key", "us-east-1", attempts=1)
        with pytest.raises(AccessError):
            Storage(stored.uri, wrong_keys).read("red/1.png")


def test_reachable_address_is_configured_or_not_loopback():
    assert reachable_address("https://127.0.0.1:6443", {"TOPWORK_TEST_HOST": "10.0.0.7"}) == "10.0.0.7"
    try:
        address = reachable_address("https://127.0.0.1:6443", {})
    except OSError as error:
        assert str(error) == "This machine has no address that pods can reach. Set TOPWORK_TEST_HOST to one."
    else:
        assert not address.startswith("127.")


def test_no_cluster_is_used_implicitly():
    assert not has_cluster({})
    assert not has_cluster({"HOME": "/root", "KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert has_cluster({"KUBECONFIG": "/etc/kubeconfig"})


def test_images_and_compute_settings_come_from_the_environment():
    assert image({}) == f"topwork:{__version__}-cpu"
    assert image({"TOPWORK_IMAGE": "registry/topwork:1"}) == "registry/topwork:1"
    assert controller_image({}) == f"topwork:{__version__}-controller"
    assert controller_image({"TOPWORK_CONTROLLER_IMAGE": "registry/topwork:2"}) == "registry/topwork:2"
    assert (compute_settings({})["cpu"], compute_settings({})["memory"]) == ("1", "3Gi")
    assert compute_settings({"TOPWORK_TEST_CPU": "2"})["cpu"] == "2"


def test_tiny_spec_is_valid():
    job = TransferJob.model_validate(tiny_spec("tiny", "s3://bucket/topwork", "s3://bucket/photos"))
    assert job.spec.compute.gpus == 0


@pytest.mark.parametrize("obj", [probe("192.0.2.7", 8333), storage_secret({"AWS_REGION": "here"})])
def test_applied_objects_are_valid(obj):
    kubernetes_validate.validate(obj, KUBERNETES, strict=True)


@pytest.mark.skipif(not BASE.is_dir(), reason="make generate writes k8s/base")
def test_base_objects_can_use_another_namespace():
    objects = base_objects("elsewhere")
    for obj in objects:
        kubernetes_validate.validate(obj, KUBERNETES, strict=True)
    namespaces = [obj for obj in objects if obj["kind"] == "Namespace"]
    assert [obj["metadata"]["name"] for obj in namespaces] == ["elsewhere"]
    assert namespaces[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {obj["metadata"]["namespace"] for obj in objects if obj["kind"] != "Namespace"} == {"elsewhere"}
    assert "topwork-submitter" in {obj["metadata"]["name"] for obj in objects if obj["kind"] == "Role"}


def test_kubeconfig_with_a_token_is_valid(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.cluster.environment.SERVICE_ACCOUNT_DIRECTORY", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    (tmp_path / "ca.crt").write_text("certificates")
    path = tmp_path / "account.json"
    path.write_text(kubeconfig_with_token(in_cluster_config(), "the-token"))
    monkeypatch.setenv("KUBECONFIG", str(path))
    config = Kubectl().config()
    assert config["users"] == [{"name": "account", "user": {"token": "the-token"}}]
    assert config["clusters"][0]["cluster"]["server"] == "https://[fd00::1]:443"
    assert config["current-context"] == "account"


def test_executables_exist():
    for name in ("kubectl", "topwork"):
        subprocess.run([executable(name), "--help"], check=True, capture_output=True, timeout=60)


def collected(expression: str) -> list[str]:
    """Return the tests in this directory that a marker expression selects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-m", expression, str(HERE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=HERE.parents[1])
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_smoke_subset_covers_submission_failure_resumption_kubectl_prefetch_nodes_and_transfer_jobs():
    smoke = collected("cluster and smoke")
    assert 16 <= len(smoke) <= 22
    files = {line.partition("::")[0].rpartition("/")[2] for line in smoke}
    assert files == {
        "test_submit.py",
        "test_failures.py",
        "test_stops.py",
        "test_kubectl.py",
        "test_prefetch.py",
        "test_transfer_jobs.py",
        "test_controller.py",
        "test_nodes.py",
    }


def test_no_test_needs_to_run_a_command_in_a_container():
    # Some container runtimes support neither exec nor attach nor port forwarding.
    forbidden = {"exec", "attach", "cp", "port-forward", "debug"}
    for path in HERE.glob("*.py"):
        if path.name == "test_helpers.py":
            continue
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert forbidden.isdisjoint(value for value in strings if isinstance(value, str)), path.name


def test_documents_of_a_watch_are_parsed_up_to_the_last_complete_one():
    text = '{"type": "ADDED", "object": {"a": "{"}}\n{\n  "type": "DELETED",\n  "object": {}\n}\n{"type": "MOD'
    assert [document["type"] for document in parse_documents(text)] == ["ADDED", "DELETED"]
    assert parse_documents("") == []


def test_inspection_pod_runs_a_script_with_the_restricted_template_of_the_job():
    job = render(TransferJob.model_validate(tiny_spec("tiny", "s3://bucket/topwork", "s3://photos/a")), RenderOptions())
    pod = inspection(job.training, "print(1)")
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [container["command"] for container in pod["spec"]["containers"]] == [["python", "-c", "print(1)"]]
    assert pod["spec"]["initContainers"] == []
    assert "topwork.dev/run" not in pod["metadata"]["labels"]
    assert job.training["spec"]["template"]["spec"]["containers"][0]["args"][0] == "stage"


def test_secret_is_replaced_while_storage_is_unreachable_and_restored_after_a_failure():
    replaced = []

    def kubectl(*arguments, stdin):
        assert arguments == ("replace", "--filename", "-")
        replaced.append(json.loads(stdin)["stringData"])

    variables = {"AWS_ENDPOINT_URL": "http://10.0.0.7:8333", "AWS_REGION": "here"}
    with pytest.raises(ValueError, match="broken"), unreachable_storage(kubectl, variables):
        raise ValueError("broken")
    closed = {"AWS_ENDPOINT_URL": CLOSED_ENDPOINT, "AWS_ENDPOINT_URL_S3": CLOSED_ENDPOINT, "AWS_REGION": "here"}
    assert replaced == [closed, variables]


@pytest.mark.parametrize("make_objects", [kustomize_objects, chart_objects])
def test_objects_of_the_controller_are_valid_in_another_namespace(make_objects, monkeypatch):
    monkeypatch.setenv("TOPWORK_CONTROLLER_IMAGE", "registry/topwork:2")
    objects = make_objects("elsewhere")
    for obj in objects:
        kubernetes_validate.validate(obj, KUBERNETES, strict=True)
    assert {obj["metadata"]["namespace"] for obj in objects} == {"elsewhere"}
    (deployment,) = [obj for obj in objects if obj["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/topwork:2"
    assert {"--namespace=elsewhere", "--lease-namespace=elsewhere"} <= set(container["args"])
    rules = [rule for obj in objects if obj["kind"] == "Role" for rule in obj["rules"]]
    assert expand_rules(rules) == expand_rules(PERMISSIONS)
    subjects = [subject for obj in objects for subject in obj.get("subjects", [])]
    assert {subject["namespace"] for subject in subjects} == {"elsewhere"}


def test_controller_of_the_chart_can_have_other_namespaces_and_a_webhook():
    objects = chart_objects("home", namespaces=["other"], webhook={"enabled": True})
    assert {obj["metadata"]["namespace"] for obj in objects if obj["kind"] == "Role"} == {"home", "other"}
    cluster_wide = {obj["kind"] for obj in objects if "namespace" not in obj["metadata"]}
    assert cluster_wide == {"ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration"}


def test_definitions_are_read_from_k8s():
    assert [definition_object(name)["metadata"]["name"] for name in DEFINITIONS] == list(DEFINITIONS)
    definition = definition_object(DEFINITION)
    (version,) = definition["spec"]["versions"]
    assert version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["seed"]["description"]


def test_rules_of_a_role_are_expanded():
    rule = {"apiGroups": ["", "batch"], "resources": ["jobs"], "resourceNames": ["a", "b"], "verbs": ["get"]}
    assert expand_rules([rule, {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "get"]}]) == {
        ("", "jobs", "a", "get"),
        ("", "jobs", "b", "get"),
        ("batch", "jobs", "a", "get"),
        ("batch", "jobs", "b", "get"),
        ("", "pods", "", "list"),
        ("", "pods", "", "get"),
    }


def test_series_of_the_controller_are_found_by_their_labels():
    sample = TransferJobSample("ml", "cats", "cats-1", "Running", "pull", "", "", 0, 1.0, 1.0, None, gpu_seconds=0.0)
    metrics = ControllerMetrics(lambda: [sample], "0.2.0")
    metrics.set_leader(True)
    series = parse_metrics(metrics.page()[0].decode())
    assert series["topwork_controller_leader"] == 1
    assert series['topwork_transferjob_state{namespace="ml",state="Running",transferjob="cats"}'] == 1
    assert series['topwork_transferjob_created_timestamp_seconds{namespace="ml",transferjob="cats"}'] == 1


def test_broken_rules_are_the_only_errors_of_the_spec():
    content = tiny_spec("tiny", "s3://bucket/topwork", "s3://bucket/photos")
    parse_transfer_job(content)
    break_rules(content["spec"])
    with pytest.raises(InvalidSpecError) as error:
        parse_transfer_job(content)
    lines = str(error.value).splitlines()
    assert len(lines) == len(RULE_ERRORS)
    assert all(line.startswith(expected) for line, expected in zip(lines, RULE_ERRORS, strict=True))


def test_spec_of_a_transfer_job_can_be_changed(tmp_path):
    content = tiny_spec("tiny", "s3://bucket/topwork", "s3://bucket/photos")
    content["spec"]["compute"]["image"] = "registry/topwork:1"
    (tmp_path / "job.yaml").write_text(json.dumps(content))
    first = TransferJobRun(Kubectl("elsewhere"), TransferJob.model_validate(content), tmp_path / "job.yaml")
    second = first.with_spec(transfer=LONG_TRAINING)
    assert second.name == first.name
    assert second.object_name != first.object_name
    changed = second.edit(lambda spec: spec["compute"].update(retries=0))
    assert changed["spec"]["transfer"] == LONG_TRAINING
    assert TransferJob.model_validate(changed).run == second.object_name
