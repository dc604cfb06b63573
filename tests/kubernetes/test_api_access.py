"""Authorization, webhooks and Tables of the tests' API server."""

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import sample_crd
from api_server import NAMESPACE, TOKEN, ApiServer
from api_tables import human_duration

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import ForbiddenError, SettingError

JOB = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}, "spec": {"a": 1}}
Object = dict[str, Any]


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer(crds=[sample_crd.definition()]) as server:
        yield server


# ── Authorization ─────────────────────────────────────────────────────────────────────────────────────────────────────


def rule(*verbs: str, resources: tuple[str, ...] = ("transferjobs",), **fields: Any) -> Object:
    return {"apiGroups": ["topwork.dev"], "resources": [*resources], "verbs": [*verbs]} | fields


def test_only_what_the_rules_allow_is_allowed(api_server: ApiServer, cluster: Cluster):
    api_server.put(JOB)
    api_server.allow([rule("get", "list"), rule("patch", resources=("transferjobs/status",))], namespace=NAMESPACE)
    assert cluster.get("TransferJob", "cats")
    cluster.apply(JOB | {"status": {"state": "Running"}}, subresource="status")
    for request in (
        lambda: cluster.apply(JOB),
        lambda: cluster.delete("TransferJob", "cats"),
        lambda: cluster.list("Pod"),
        lambda: cluster.in_namespace("default").list("TransferJob"),
        lambda: cluster.list("TransferJob", all_namespaces=True),
    ):
        with pytest.raises(ForbiddenError):
            request()


def test_apply_requires_create_for_a_new_object(api_server: ApiServer, cluster: Cluster):
    api_server.allow([rule("patch", "get")])
    with pytest.raises(ForbiddenError, match=r"is not allowed to create transferjobs"):
        cluster.apply(JOB)
    api_server.put(JOB)
    cluster.apply(JOB)


def test_resource_names_restrict_a_rule(api_server: ApiServer, cluster: Cluster):
    api_server.put(JOB)
    api_server.allow([rule("get", resourceNames=["dogs"])])
    with pytest.raises(ForbiddenError):
        cluster.get("TransferJob", "cats")
    assert cluster.get("TransferJob", "dogs") is None


def test_other_users_are_not_restricted(
    api_server: ApiServer, cluster: Cluster, make_cluster: Callable[..., Cluster], tmp_path: Path
):
    token = api_server.add_user("system:serviceaccount:team-a:topwork-controller")
    api_server.allow([rule("get")], user="system:serviceaccount:team-a:topwork-controller")
    controller = make_cluster(kubeconfig=str(api_server.kubeconfig(tmp_path / "other", user={"token": token})))
    cluster.apply(JOB)
    message = r"topwork-controller is not allowed to patch transferjobs .* role topwork-controller of k8s/controller"
    with pytest.raises(ForbiddenError, match=message):
        controller.apply(JOB)


# ── Webhooks ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def reviews() -> Iterator[tuple[str, list[Object]]]:
    """URL of a webhook that denies a spec with `a: 9`, and the requests that it received."""
    received: list[Object] = []

    class Webhook(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Write no access log."""

        def do_POST(self) -> None:
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append(review["request"])
            is_allowed = review["request"]["object"]["spec"]["a"] != 9
            response = {"uid": review["request"]["uid"], "allowed": is_allowed, "warnings": ["reviewed"]}
            if not is_allowed:
                response["status"] = {"message": "spec.a is 9", "code": 422}
            data = json.dumps(review | {"response": response}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/validate", received
    server.shutdown()
    server.server_close()


def webhook(url: str, failure_policy: str = "Fail") -> Object:
    rules = [{"apiGroups": ["topwork.dev"], "apiVersions": ["*"], "resources": ["transferjobs"]}]
    hook = {"name": "validate.topwork.dev", "clientConfig": {"url": url}, "failurePolicy": failure_policy}
    hook |= {"rules": [rules[0] | {"operations": ["CREATE", "UPDATE"]}], "timeoutSeconds": 5}
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    return kind | {"metadata": {"name": "topwork"}, "webhooks": [hook]}


def test_webhook_reviews_objects(api_server: ApiServer, cluster: Cluster, reviews: tuple[str, list[Object]]):
    url, requests = reviews
    api_server.put(webhook(url))
    cluster.apply(JOB)
    assert cluster.warnings == ["reviewed"]
    with pytest.raises(SettingError, match=r'webhook "validate.topwork.dev" denied the request: spec.a is 9'):
        cluster.apply(JOB | {"spec": {"a": 9}})
    cluster.apply(JOB | {"status": {"state": "Running"}}, subresource="status")
    assert [(request["operation"], request["object"]["spec"]["a"]) for request in requests] == [
        ("CREATE", 1),
        ("UPDATE", 9),
    ]
    assert requests[1]["oldObject"]["spec"] == {"a": 1}


def test_failure_policy_of_a_webhook(api_server: ApiServer, cluster: Cluster, make_cluster: Callable[..., Cluster]):
    api_server.put(webhook("http://127.0.0.1:1/", "Ignore"))
    cluster.apply(JOB)
    api_server.put(webhook("http://127.0.0.1:1/"))
    with pytest.raises(Exception, match=r'failed calling webhook "validate.topwork.dev"'):
        make_cluster(attempts=1).apply(JOB | {"spec": {"a": 2}})


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_table_has_the_columns_of_the_definition(api_server: ApiServer):
    api_server.put(JOB | {"status": {"state": "Running"}})
    api_server.put(JOB | {"metadata": {"name": "dogs"}, "status": {"run": "dogs-1"}})
    headers = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io", "Authorization": f"Bearer {TOKEN}"}
    url = f"{api_server.url}/apis/topwork.dev/v1alpha1/namespaces/{NAMESPACE}/transferjobs"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as response:
        table = json.load(response)
    assert [(column["name"], column["priority"]) for column in table["columnDefinitions"]] == [
        ("Name", 0),
        ("State", 0),
        ("Run", 1),
        ("Age", 0),
    ]
    assert [row["cells"][:3] for row in table["rows"]] == [["cats", "Running", None], ["dogs", None, "dogs-1"]]
    assert table["rows"][0]["object"]["kind"] == "PartialObjectMetadata"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5s"), (119, "119s"), (330, "5m30s"), (2700, "45m"), (25500, "7h5m"), (108000, "30h"), (273600, "3d4h")],
)
def test_ages_are_formatted_as_kubectl_does(seconds: int, text: str):
    assert human_duration(seconds) == text
