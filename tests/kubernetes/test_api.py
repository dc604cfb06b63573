"""The edge to the API server: objects in and out, over HTTP."""

import json
from collections.abc import Callable

import api_statuses
import pytest
from api_server import ApiServer, owned_by
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


# ── Apply ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_apply_is_server_side_with_our_field_manager_and_strict(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    asked = api_server.requests[-1]
    assert (asked.method, asked.path) == ("PATCH", "/api/v1/namespaces/team-a/configmaps/run")
    assert asked.query == {"fieldManager": "topwork", "fieldValidation": "Strict"}
    assert asked.headers["Content-Type"] == "application/apply-patch+yaml"
    assert asked.headers["User-Agent"].startswith("topwork/")
    assert asked.body == CONFIG | {"metadata": {"name": "run", "namespace": "team-a"}}


def test_apply_returns_the_object_as_the_server_has_it(api_server: ApiServer, cluster: Cluster):
    made = cluster.apply(JOB)
    assert made == api_server.get("Job", "run")
    assert made["metadata"]["namespace"] == "team-a"
    assert made["spec"]["completionMode"] == "NonIndexed"


def test_apply_again_changes_nothing_and_the_version_stays(cluster: Cluster):
    assert cluster.apply(JOB) == cluster.apply(JOB)


def test_apply_removes_what_the_manifest_no_longer_states(cluster: Cluster):
    cluster.apply(CONFIG | {"data": {"job.yaml": "a: 1", "more": "b"}})
    assert cluster.apply(CONFIG)["data"] == {"job.yaml": "a: 1"}


def test_apply_keeps_what_others_have_set(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    api_server.patch("ConfigMap", "run", {"metadata": {"annotations": {"team": "vision"}}})
    assert cluster.apply(CONFIG | {"data": {}})["metadata"]["annotations"] == {"team": "vision"}


def test_apply_adds_owners(api_server: ApiServer, cluster: Cluster):
    owners = owned_by(cluster.apply(JOB))
    cluster.apply(CONFIG)
    owned = CONFIG | {"metadata": {"name": "run", "ownerReferences": owners}}
    assert cluster.apply(owned)["metadata"]["ownerReferences"] == owners


def test_a_dry_run_keeps_nothing(api_server: ApiServer, cluster: Cluster):
    assert cluster.apply(CONFIG, dry_run=True)["data"] == {"job.yaml": "a: 1"}
    assert api_server.requests[-1].query["dryRun"] == "All"
    assert api_server.get("ConfigMap", "run") is None


def test_a_namespace_in_the_manifest_comes_before_ours(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG | {"metadata": {"name": "run", "namespace": "default"}})
    assert api_server.get("ConfigMap", "run", namespace="default") is not None


def test_an_object_without_namespaces_is_applied(api_server: ApiServer, cluster: Cluster):
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}})
    assert cluster.get("Namespace", "team-b") == api_server.get("Namespace", "team-b")


def test_warnings_of_the_server_are_kept_once(api_server: ApiServer, cluster: Cluster):
    api_server.warn('would violate PodSecurity \\"restricted:latest\\": runAsNonRoot != true')
    cluster.apply(JOB)
    cluster.apply(JOB)
    assert cluster.warnings == ['would violate PodSecurity "restricted:latest": runAsNonRoot != true']


# ── Read ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_get_returns_none_for_what_is_not_there(cluster: Cluster):
    assert cluster.get("Job", "run") is None


def test_a_name_is_quoted_in_the_address(api_server: ApiServer, cluster: Cluster):
    assert cluster.get("Job", "../configmaps/run?x=1") is None
    assert api_server.requests[-1].path == "/apis/batch/v1/namespaces/team-a/jobs/..%2Fconfigmaps%2Frun%3Fx%3D1"


def test_list_selects_by_labels_and_fields(api_server: ApiServer, cluster: Cluster):
    for name, job in (("a", "cats"), ("b", "cats"), ("c", "dogs")):
        api_server.put(pod(name, labels={"topwork.dev/job": job}))
    api_server.patch("Pod", "b", {"status": {"phase": "Failed"}})
    found = cluster.list("Pod", labels="topwork.dev/job in (cats, birds),topwork.dev/job", fields="status.phase=Failed")
    assert found == [api_server.get("Pod", "b")]
    assert {"kind": "Pod", "apiVersion": "v1"}.items() <= found[0].items()


def test_list_selects_events_of_an_object(api_server: ApiServer, cluster: Cluster):
    for name, uid in (("a", "1"), ("b", "2")):
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": name}, "involvedObject": {"uid": uid}}
        api_server.put(event)
    assert [each["metadata"]["name"] for each in cluster.list("Event", fields="involvedObject.uid=2")] == ["b"]


def test_list_reads_all_pages(api_server: ApiServer, cluster: Cluster):
    for number in range(7):
        api_server.put(pod(f"p{number}"))
    api_server.settings.page = 3
    assert [each["metadata"]["name"] for each in cluster.list("Pod")] == [f"p{number}" for number in range(7)]
    assert [bool(each.query.get("continue")) for each in api_server.requests] == [False, True, True]


def test_list_begins_again_when_its_version_is_forgotten(api_server: ApiServer, cluster: Cluster):
    for number in range(4):
        api_server.put(pod(f"p{number}"))
    api_server.settings.page = 3
    api_server.plant(Fault(), Fault(api_statuses.expired()))
    assert len(cluster.list("Pod")) == 4
    assert [each.code for each in api_server.requests] == [200, 410, 200, 200]


def test_list_keeps_to_its_namespace_unless_all_are_asked_for(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("here"))
    api_server.put(pod("there", namespace="default"))
    assert [each["metadata"]["name"] for each in cluster.list("Pod")] == ["here"]
    assert [each["metadata"]["name"] for each in cluster.list("Pod", all_namespaces=True)] == ["there", "here"]
    assert api_server.requests[-1].path == "/api/v1/pods"


# ── Delete ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_delete_tells_whether_it_was_there(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    assert cluster.delete("ConfigMap", "run") is True
    assert cluster.delete("ConfigMap", "run") is False
    assert api_server.get("ConfigMap", "run") is None


def test_delete_says_how(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("p"))
    cluster.delete("Pod", "p", uid="u", propagation="Foreground", grace_seconds=0)
    assert api_server.requests[-1].body == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Foreground",
        "preconditions": {"uid": "u"},
        "gracePeriodSeconds": 0,
    }


def test_delete_leaves_an_object_that_was_made_anew(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    assert cluster.delete("ConfigMap", "run", uid="another") is False
    assert api_server.get("ConfigMap", "run") is not None


def test_a_job_takes_its_pods_and_config_map_with_it(api_server: ApiServer, cluster: Cluster):
    owners = owned_by(cluster.apply(JOB))
    api_server.put(pod("p", ownerReferences=owners))
    cluster.apply(CONFIG | {"metadata": {"name": "run", "ownerReferences": owners}})
    assert cluster.delete("Job", "run") is True
    assert [api_server.all(kind) for kind in ("Job", "Pod", "ConfigMap")] == [[], [], []]


def test_a_job_deleted_in_the_foreground_stays_until_its_pods_are_gone(api_server: ApiServer, cluster: Cluster):
    api_server.hold_deletions = True
    api_server.put(pod("p", ownerReferences=owned_by(cluster.apply(JOB))))
    assert cluster.delete("Job", "run", propagation="Foreground") is True
    waiting = cluster.get("Job", "run")
    assert waiting is not None
    assert waiting["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert "deletionTimestamp" in cluster.list("Pod")[0]["metadata"]
    api_server.finish_deletions()
    assert [api_server.all(kind) for kind in ("Job", "Pod")] == [[], []]


def test_a_deletion_whose_answer_got_lost_was_one(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    api_server.plant(Fault(cut_after=10, method="DELETE"))
    assert cluster.delete("ConfigMap", "run") is True
    assert [(each.method, each.code) for each in api_server.requests[1:]] == [("DELETE", 200), ("DELETE", 404)]


# ── What the server of these tests refuses, as a real one does ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"template": {"spec": {"containers": [{"name": "fine-tune", "image": "b"}]}}}, "spec.template: "),
        ({"template": JOB["spec"]["template"], "completions": 2}, "spec.completions: "),
    ],
)
def test_what_can_not_change_in_a_job_is_refused(cluster: Cluster, change: KubernetesObject, said: str):
    cluster.apply(JOB)
    with pytest.raises(SettingError) as caught:
        cluster.apply(JOB | {"spec": change})
    assert str(caught.value).startswith(f"The cluster refused to apply Job run in team-a: {said}")
    assert str(caught.value).endswith("field is immutable.")


def test_fields_of_another_manager_are_not_taken(api_server: ApiServer, cluster: Cluster):
    api_server.put(CONFIG, manager="kubectl-client-side-apply")
    with pytest.raises(SettingError) as caught:
        cluster.apply(CONFIG | {"data": {"job.yaml": "a: 2"}})
    assert str(caught.value) == (
        "The cluster refused to apply ConfigMap run in team-a: another program has set .data.job.yaml "
        "(kubectl-client-side-apply). Leave these fields to topwork, or cancel the job and submit it again."
    )


def test_a_name_that_is_none_is_refused(cluster: Cluster):
    with pytest.raises(SettingError) as caught:
        cluster.apply(CONFIG | {"metadata": {"name": "Run"}})
    assert str(caught.value) == (
        'The cluster refused to apply ConfigMap Run in team-a: metadata.name: Invalid value: "Run": a lowercase '
        "RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'."
    )


def test_objects_are_plain_and_json(make_cluster: Callable[..., Cluster]):
    made = make_cluster().apply(JOB)
    assert json.loads(json.dumps(made)) == made
