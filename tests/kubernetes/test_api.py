"""The edge to the API server: objects in and out."""

import threading
import time

from api_server import ApiServer

from topwork.edge.kubernetes import Cluster

CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"job.yaml": "a: 1"}}


def test_apply_creates_an_object_in_the_namespace_of_the_context(api_server: ApiServer, cluster: Cluster):
    made = cluster.apply(CONFIG)
    assert made["data"] == {"job.yaml": "a: 1"}
    assert made["metadata"]["namespace"] == "team-a"
    assert cluster.get("ConfigMap", "run") == made


def test_watch(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    threading.Timer(0.2, api_server.patch, ("ConfigMap", "run", {"data": {"x": "y"}})).start()
    threading.Timer(0.4, api_server.remove, ("ConfigMap", "run")).start()
    began = time.monotonic()
    changes = list(cluster.watch("ConfigMap", seconds=0.8))
    assert [each.type for each in changes] == ["ADDED", "MODIFIED", "DELETED"]
    assert time.monotonic() - began < 1.5


def test_logs(api_server: ApiServer, cluster: Cluster):
    api_server.put(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "pull"}]}}
    )
    assert list(cluster.logs("p", "pull")) == []
    api_server.log("p", "pull", "one", "two")
    assert list(cluster.logs("p", "pull")) == ["one", "two"]
    threading.Timer(0.2, api_server.log, ("p", "pull", "three")).start()
    threading.Timer(0.4, api_server.end_log, ("p", "pull")).start()
    threading.Timer(0.6, api_server.remove, ("Pod", "p")).start()
    assert list(cluster.logs("p", "pull", follow=True)) == ["one", "two", "three"]


def test_delete(api_server: ApiServer, cluster: Cluster):
    cluster.apply(CONFIG)
    assert cluster.delete("ConfigMap", "run") is True
    assert cluster.delete("ConfigMap", "run") is False
