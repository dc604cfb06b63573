"""Apply, get, list and delete of `Cluster`, over HTTP."""

import json
import subprocess
import sys
from collections.abc import Callable

import api_statuses
import pytest
from api_server import ApiServer, owner_references
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster, KubernetesObject
from topwork.errors import SettingError

CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"job.yaml": "a: 1"}}
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "run", "labels": {"topwork.dev/job": "cats"}},
    "spec": {"template": {"spec": {"containers": [{"name": "fine-tune", "image": "topwork"}]}}},
}


def pod(name: str, **metadata: object) -> KubernetesObject:
    containers = [{"name": "fine-tune"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **metadata},
        "spec": {"containers": containers},
    }


# ── Apply ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_apply_sends_a_strict_server_side_apply(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    request = api_server.requests[-1]
    assert (request.method, request.path) == ("PATCH", "/api/v1/namespaces/team-a/configmaps/run")
    assert request.query == {"fieldManager": "topwork", "fieldValidation": "Strict"}
    assert request.headers["Content-Type"] == "application/apply-patch+yaml"
    assert request.headers["User-Agent"].startswith("topwork/")
    assert request.body == CONFIG | {"metadata": {"name": "run", "namespace": "team-a"}}


def test_apply_returns_the_stored_object(api_server: ApiServer, cluster: Cluster):
    stored = cluster.apply(JOB)
    assert stored == api_server.get("Job", "run")
    assert stored["metadata"]["namespace"] == "team-a"
    assert stored["spec"]["completionMode"] == "NonIndexed"


def test_repeated_apply_keeps_the_resource_version(cluster: Cluster):
    assert cluster.apply(JOB) == cluster.apply(JOB)


def test_apply_removes_fields_that_are_no_longer_set(cluster: Cluster):
    cluster.apply(CONFIG | {"data": {"job.yaml": "a: 1", "more": "b"}})
    assert cluster.apply(CONFIG)["data"] == {"job.yaml": "a: 1"}


def test_apply_keeps_fields_of_other_managers(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    api_server.patch("ConfigMap", "run", {"metadata": {"annotations": {"team": "vision"}}})
    assert cluster.apply(CONFIG | {"data": {}})["metadata"]["annotations"] == {"team": "vision"}


def test_apply_adds_owner_references(api_server: ApiServer, cluster: Cluster):
    owners = owner_references(cluster.apply(JOB))
    cluster.apply(CONFIG)
    owned = CONFIG | {"metadata": {"name": "run", "ownerReferences": owners}}
    assert cluster.apply(owned)["metadata"]["ownerReferences"] == owners


def test_dry_run_stores_nothing(api_server: ApiServer, cluster: Cluster):
    assert cluster.apply(CONFIG, dry_run=True)["data"] == {"job.yaml": "a: 1"}
    assert api_server.requests[-1].query["dryRun"] == "All"
    assert api_server.get("ConfigMap", "run") is None


def test_namespace_of_the_object_overrides_the_default(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG | {"metadata": {"name": "run", "namespace": "default"}})
    assert api_server.get("ConfigMap", "run", namespace="default") is not None


def test_cluster_scoped_object_is_applied(api_server: ApiServer, cluster: Cluster):
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}})
    assert cluster.get("Namespace", "team-b") == api_server.get("Namespace", "team-b")


def test_server_warnings_are_recorded_once(api_server: ApiServer, cluster: Cluster):
    api_server.send_warnings('would violate PodSecurity \\"restricted:latest\\": runAsNonRoot != true')
    cluster.apply(JOB)
    cluster.apply(JOB)
    assert cluster.warnings == ['would violate PodSecurity "restricted:latest": runAsNonRoot != true']


# ── Read ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_get_returns_none_for_a_missing_object(cluster: Cluster):
    assert cluster.get("Job", "run") is None


def test_names_are_quoted_in_urls(api_server: ApiServer, cluster: Cluster):
    assert cluster.get("Job", "../configmaps/run?x=1") is None
    assert api_server.requests[-1].path == "/apis/batch/v1/namespaces/team-a/jobs/..%2Fconfigmaps%2Frun%3Fx%3D1"


def test_list_selects_by_labels_and_fields(api_server: ApiServer, cluster: Cluster):
    for name, job in (("a", "cats"), ("b", "cats"), ("c", "dogs")):
        api_server.put(pod(name, labels={"topwork.dev/job": job}))
    api_server.patch("Pod", "b", {"status": {"phase": "Failed"}})
    pods = cluster.list("Pod", labels="topwork.dev/job in (cats, birds),topwork.dev/job", fields="status.phase=Failed")
    assert pods == [api_server.get("Pod", "b")]
    assert {"kind": "Pod", "apiVersion": "v1"}.items() <= pods[0].items()


def test_list_selects_events_by_involved_object(api_server: ApiServer, cluster: Cluster):
    for name, uid in (("a", "1"), ("b", "2")):
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": name}, "involvedObject": {"uid": uid}}
        api_server.put(event)
    assert [obj["metadata"]["name"] for obj in cluster.list("Event", fields="involvedObject.uid=2")] == ["b"]


def test_list_reads_all_pages(api_server: ApiServer, cluster: Cluster):
    for number in range(7):
        api_server.put(pod(f"p{number}"))
    api_server.settings.page_size = 3
    assert [obj["metadata"]["name"] for obj in cluster.list("Pod")] == [f"p{number}" for number in range(7)]
    assert [bool(request.query.get("continue")) for request in api_server.requests] == [False, True, True]


def test_list_restarts_when_its_version_expires(api_server: ApiServer, cluster: Cluster):
    for number in range(4):
        api_server.put(pod(f"p{number}"))
    api_server.settings.page_size = 3
    api_server.inject(Fault(), Fault(api_statuses.expired()))
    assert len(cluster.list("Pod")) == 4
    assert [request.code for request in api_server.requests] == [200, 410, 200, 200]


def test_list_covers_one_namespace_or_all(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("here"))
    api_server.put(pod("there", namespace="default"))
    assert [obj["metadata"]["name"] for obj in cluster.list("Pod")] == ["here"]
    assert [obj["metadata"]["name"] for obj in cluster.list("Pod", all_namespaces=True)] == ["there", "here"]
    assert api_server.requests[-1].path == "/api/v1/pods"


# ── Delete ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_delete_returns_whether_the_object_existed(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    assert cluster.delete("ConfigMap", "run") is True
    assert cluster.delete("ConfigMap", "run") is False
    assert api_server.get("ConfigMap", "run") is None


def test_delete_sends_delete_options(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("p"))
    cluster.delete("Pod", "p", uid="u", propagation="Foreground", grace_seconds=0)
    assert api_server.requests[-1].body == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": "u"},
        "gracePeriodSeconds": 0,
    }


def test_delete_with_uid_keeps_a_recreated_object(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    assert cluster.delete("ConfigMap", "run", uid="another") is False
    assert api_server.get("ConfigMap", "run") is not None


def test_deleting_a_job_deletes_its_pods_and_config_map(api_server: ApiServer, cluster: Cluster):
    owners = owner_references(cluster.apply(JOB))
    api_server.put(pod("p", ownerReferences=owners))
    cluster.apply(CONFIG | {"metadata": {"name": "run", "ownerReferences": owners}})
    assert cluster.delete("Job", "run") is True
    assert [api_server.list(kind) for kind in ("Job", "Pod", "ConfigMap")] == [[], [], []]


def test_foreground_deletion_keeps_the_job_until_its_pods_are_deleted(api_server: ApiServer, cluster: Cluster):
    api_server.hold_deletions = True
    api_server.put(pod("p", ownerReferences=owner_references(cluster.apply(JOB))))
    assert cluster.delete("Job", "run", propagation="Foreground") is True
    deleting = cluster.get("Job", "run")
    assert deleting is not None
    assert deleting["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert "deletionTimestamp" in cluster.list("Pod")[0]["metadata"]
    api_server.finish_deletions()
    assert [api_server.list(kind) for kind in ("Job", "Pod")] == [[], []]


def test_delete_returns_true_when_its_response_was_lost(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    api_server.inject(Fault(cut_after_bytes=10, method="DELETE"))
    assert cluster.delete("ConfigMap", "run") is True
    assert [(request.method, request.code) for request in api_server.requests[1:]] == [("DELETE", 200), ("DELETE", 404)]


# ── Rejected requests ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": {"spec": {"containers": [{"name": "fine-tune", "image": "b"}]}}}, "spec.template: "),
        ({"template": JOB["spec"]["template"], "completions": 2}, "spec.completions: "),
    ],
)
def test_immutable_job_field_is_rejected(cluster: Cluster, change: KubernetesObject, message: str):
    cluster.apply(JOB)
    with pytest.raises(SettingError) as caught:
        cluster.apply(JOB | {"spec": change})
    assert str(caught.value).startswith(f"The cluster rejected the request to apply Job run in team-a: {message}")
    assert str(caught.value).endswith("field is immutable.")


def test_fields_of_another_manager_are_not_overwritten(api_server: ApiServer, cluster: Cluster):
    api_server.put(CONFIG, manager="kubectl-client-side-apply")
    with pytest.raises(SettingError) as caught:
        cluster.apply(CONFIG | {"data": {"job.yaml": "a: 2"}})
    assert str(caught.value) == (
        "The cluster rejected the request to apply ConfigMap run in team-a, because another field manager set "
        ".data.job.yaml (owned by kubectl-client-side-apply). Leave these fields to topwork, or cancel the job and "
        "submit it again."
    )


def test_invalid_name_is_rejected(cluster: Cluster):
    with pytest.raises(SettingError) as caught:
        cluster.apply(CONFIG | {"metadata": {"name": "Run"}})
    assert str(caught.value) == (
        'The cluster rejected the request to apply ConfigMap Run in team-a: metadata.name: Invalid value: "Run": '
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'."
    )


def test_objects_are_json_serializable(make_cluster: Callable[..., Cluster]):
    stored = make_cluster().apply(JOB)
    assert json.loads(json.dumps(stored)) == stored


def test_errors_are_imported_without_the_official_client():
    script = "import sys, topwork.clients.kubernetes.errors; print('kubernetes' in sys.modules)"
    completed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert completed.stdout == "False\n"
