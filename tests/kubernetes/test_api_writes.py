"""Writes to the tests' API server: create, replace, patch, status subresource, generation and field ownership."""

from collections.abc import Iterator
from typing import Any

import pytest
import sample_crd
from api_server import NAMESPACE, ApiServer

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import ConflictError, NotFoundError, SettingError, UidConflictError

JOB = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}, "spec": {"a": 1}}
LEASE = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}, "spec": {}}


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer(crds=[sample_crd.definition()]) as server:
        yield server


def with_status(**status: Any) -> KubernetesObject:
    return {key: value for key, value in JOB.items() if key != "spec"} | {"status": status}


def condition(kind: str, status: str = "True") -> KubernetesObject:
    return {"type": kind, "status": status, "reason": "Tested"}


def test_kind_is_served_only_with_its_definition(api_server: ApiServer, cluster: Cluster):
    assert cluster.serves("TransferJob")
    assert cluster.serves("Lease")
    api_server.put(JOB)
    assert cluster.delete("CustomResourceDefinition", "transferjobs.topwork.dev")
    assert not cluster.serves("TransferJob")
    assert [obj for obj in api_server.objects.list_all() if obj["kind"] == "TransferJob"] == []


def test_generation_changes_with_the_spec_only(cluster: Cluster):
    assert cluster.apply(JOB)["metadata"]["generation"] == 1
    unchanged = cluster.apply(JOB)
    assert cluster.apply(JOB)["metadata"]["resourceVersion"] == unchanged["metadata"]["resourceVersion"]
    assert cluster.apply(JOB | {"metadata": {"name": "cats", "labels": {"a": "b"}}})["metadata"]["generation"] == 1
    cluster.apply(with_status(state="Running"), subresource="status")
    assert cluster.apply(JOB | {"spec": {"a": 2}})["metadata"]["generation"] == 2


def test_status_and_spec_change_separately(cluster: Cluster):
    assert "status" not in cluster.apply(JOB | {"status": {"state": "Complete"}})
    stored = cluster.apply(with_status(state="Running") | {"spec": {"a": 9}}, subresource="status", manager="m")
    assert (stored["spec"], stored["status"]) == ({"a": 1}, {"state": "Running"})
    assert cluster.apply(JOB | {"spec": {"a": 2}})["status"] == {"state": "Running"}
    owners = {entry["manager"]: entry.get("subresource") for entry in stored["metadata"]["managedFields"]}
    assert owners == {"topwork": None, "m": "status"}


def test_status_of_a_missing_object_is_not_created(cluster: Cluster):
    with pytest.raises(NotFoundError, match=r'transferjobs.topwork.dev "cats" not found'):
        cluster.apply(with_status(state="Running"), subresource="status")


def test_conditions_merge_by_type(cluster: Cluster):
    cluster.apply(JOB)
    cluster.apply(with_status(conditions=[condition("Accepted")]), subresource="status", manager="one")
    cluster.apply(with_status(conditions=[condition("Healthy")]), subresource="status", manager="two")
    changed = [condition("Complete"), condition("Failed", "False")]
    stored = cluster.apply(with_status(conditions=changed), subresource="status", manager="one")
    assert [item["type"] for item in stored["status"]["conditions"]] == ["Healthy", "Complete", "Failed"]
    with pytest.raises(SettingError, match=r"status.conditions\[type=\"Healthy\"\].status \(owned by two\)"):
        cluster.apply(with_status(conditions=[condition("Healthy", "False")]), subresource="status", manager="one")


def test_forced_apply_takes_fields(cluster: Cluster):
    cluster.apply(JOB, manager="one")
    with pytest.raises(SettingError, match=r"another field manager set .spec.a \(owned by one\)"):
        cluster.apply(JOB | {"spec": {"a": 2}}, manager="two")
    stored = cluster.apply(JOB | {"spec": {"a": 2}}, manager="two", force=True)
    assert [entry["manager"] for entry in stored["metadata"]["managedFields"]] == ["two"]


def test_field_that_an_apply_omits_is_removed(cluster: Cluster):
    cluster.apply(JOB | {"spec": {"a": 1, "b": {"c": 2}}})
    assert cluster.apply(JOB)["spec"] == {"a": 1}


def test_existing_object_is_not_created_again(cluster: Cluster):
    assert cluster.create(LEASE)["metadata"]["uid"]
    with pytest.raises(ConflictError, match=r'leases.coordination.k8s.io "l" already exists'):
        cluster.create(LEASE)


def test_replace_requires_the_current_resource_version(cluster: Cluster):
    first = cluster.create(LEASE)
    second = cluster.replace(first | {"spec": {"holderIdentity": "a"}})
    assert second["metadata"]["resourceVersion"] != first["metadata"]["resourceVersion"]
    with pytest.raises(ConflictError, match=r"the object has been modified; please apply your changes to the latest"):
        cluster.replace(first | {"spec": {"holderIdentity": "b"}})
    with pytest.raises(SettingError, match=r"metadata.resourceVersion: Invalid value: 0: must be specified"):
        cluster.replace(LEASE)


def test_apply_to_a_recreated_object_fails(api_server: ApiServer, cluster: Cluster):
    first = cluster.apply(JOB)
    cluster.delete("TransferJob", "cats")
    cluster.apply(JOB)
    body = JOB | {"metadata": {"name": "cats", "uid": first["metadata"]["uid"]}}
    with pytest.raises(UidConflictError, match=r"metadata.uid: Invalid value: \"[-0-9a-f]+\": field is immutable"):
        cluster.apply(body)
    # As in Kubernetes, only the resourceVersion protects the status of a custom resource.
    cluster.apply(with_status(phase="A") | {"metadata": body["metadata"]}, subresource="status")
    version = {"name": "cats", "resourceVersion": first["metadata"]["resourceVersion"]}
    with pytest.raises(ConflictError, match=r"could not update the status of TransferJob cats .* has been modified"):
        cluster.apply(with_status(phase="B") | {"metadata": version}, subresource="status")
    stored = api_server.get("TransferJob", "cats")
    assert stored and stored["status"] == {"phase": "A"}


def test_replace_of_a_recreated_object_fails(cluster: Cluster):
    first = cluster.create(LEASE)
    cluster.delete("Lease", "l")
    cluster.create(LEASE)
    with pytest.raises(ConflictError, match=r"Precondition failed: UID in precondition"):
        cluster.replace(first)


def test_dry_run_stores_nothing(api_server: ApiServer, cluster: Cluster):
    assert cluster.apply(JOB, dry_run=True)["metadata"]["generation"] == 1
    assert api_server.get("TransferJob", "cats") is None


def test_watch_covers_all_namespaces(api_server: ApiServer, cluster: Cluster):
    cluster.apply(JOB)
    cluster.in_namespace("default").apply(JOB)
    events = cluster.watch("TransferJob", all_namespaces=True, seconds=0.2)
    assert [(event.type, event.object["metadata"]["namespace"]) for event in events] == [
        ("ADDED", "default"),
        ("ADDED", NAMESPACE),
    ]
