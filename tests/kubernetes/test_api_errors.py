"""Errors of the API server: each response of a real server, and the one-line message for the user."""

import time
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.rest_client import MAX_BACKOFF_SECONDS
from topwork.errors import SettingError, UnavailableError

JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run"}, "spec": {}}
CONFLICT = api_statuses.field_conflict("kubectl", "batch/v1", ".spec.parallelism", ".spec.suspend")
LONG = "core.PodTemplateSpec{ObjectMeta:v1.ObjectMeta{" + 400 * "x" + "}}"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param(
            api_statuses.rbac_denied("patch", "jobs", "team-a", "run", "batch"),
            "alice is not allowed to patch jobs in namespace team-a. Ask a cluster administrator for the role "
            "topwork-submitter of k8s/base, then check with: kubectl auth can-i patch jobs -n team-a",
            id="403 RBAC",
        ),
        pytest.param(
            api_statuses.rbac_denied(
                "patch", "jobs", "team-a", "run", "batch", "system:serviceaccount:ml:topwork-controller"
            ),
            "system:serviceaccount:ml:topwork-controller is not allowed to patch jobs in namespace team-a. Ask a "
            "cluster administrator for the role topwork-controller of k8s/controller, then check with: kubectl auth "
            "can-i patch jobs -n team-a --as system:serviceaccount:ml:topwork-controller",
            id="403 RBAC of the controller",
        ),
        pytest.param(
            api_statuses.quota_exceeded(
                "jobs.batch", "run", "count/jobs.batch=1", "count/jobs.batch=4", "count/jobs.batch=4"
            ),
            "A resource quota of namespace team-a rejected the request to apply Job run in team-a: exceeded quota: "
            "compute, requested: count/jobs.batch=1, used: count/jobs.batch=4, limited: count/jobs.batch=4. "
            "See current usage with: kubectl describe quota -n team-a",
            id="403 quota",
        ),
        pytest.param(
            api_statuses.forbidden("pods", "run-x", "failed quota: compute: must specify limits.cpu for: pull"),
            "A resource quota of namespace team-a rejected the request to apply Job run in team-a: failed quota: "
            "compute: must specify limits.cpu for: pull. See current usage with: kubectl describe quota -n team-a",
            id="403 quota that requires limits",
        ),
        pytest.param(
            api_statuses.pod_security_violation(
                "run-x", "runAsNonRoot != true (pod must set securityContext.runAsNonRoot=true)"
            ),
            "Pod Security admission of namespace team-a rejected the request to apply Job run in team-a: violates "
            'PodSecurity "restricted:latest": runAsNonRoot != true '
            "(pod must set securityContext.runAsNonRoot=true). "
            "See the enforced level with: kubectl get namespace team-a --show-labels",
            id="403 Pod Security",
        ),
        pytest.param(
            api_statuses.forbidden(
                "jobs.batch", "run", "unable to create new content in namespace team-a because it is being terminated"
            ),
            "Namespace team-a is being deleted. Wait until it is gone and create it again, "
            "or choose another namespace with --namespace.",
            id="403 namespace that is being deleted",
        ),
        pytest.param(
            api_statuses.forbidden("jobs.batch", "run", "maximum cpu usage per Container is 4, but limit is 8"),
            'The cluster rejected the request to apply Job run in team-a: jobs.batch "run" is forbidden: '
            "maximum cpu usage per Container is 4, but limit is 8.",
            id="403 limit range",
        ),
        pytest.param(
            api_statuses.webhook_denied("validate.kyverno.svc-fail", "images must come from registry.example"),
            "An admission policy of the cluster rejected the request to apply Job run in team-a: "
            'admission webhook "validate.kyverno.svc-fail" '
            "denied the request: images must come from registry.example. "
            "Change the job spec to satisfy the policy, or ask a cluster administrator.",
            id="400 webhook",
        ),
        pytest.param(
            api_statuses.webhook_denied("gatekeeper.sh", "no label owner", 403),
            "An admission policy of the cluster rejected the request to apply Job run in team-a: "
            'admission webhook "gatekeeper.sh" '
            "denied the request: no label owner. "
            "Change the job spec to satisfy the policy, or ask a cluster administrator.",
            id="403 webhook",
        ),
        pytest.param(
            api_statuses.webhook_denied("gpu.example", "no GPUs today", 500),
            "An admission policy of the cluster rejected the request to apply Job run in team-a: "
            'admission webhook "gpu.example" '
            "denied the request: no GPUs today. "
            "Change the job spec to satisfy the policy, or ask a cluster administrator.",
            id="500 webhook",
        ),
        pytest.param(
            api_statuses.status(
                422,
                "Invalid",
                "jobs.batch \"run\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: "
                "4 at most",
            ),
            "An admission policy of the cluster rejected the request to apply Job run in team-a: "
            'jobs.batch "run" is forbidden: '
            "ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: 4 at most. "
            "Change the job spec to satisfy the policy, or ask a cluster administrator.",
            id="422 admission policy",
        ),
        pytest.param(
            api_statuses.namespace_not_found("team-a"),
            "Namespace team-a does not exist at {url}. Create it with: kubectl create namespace team-a "
            "- or choose another namespace with --namespace.",
            id="404 namespace",
        ),
        pytest.param(
            api_statuses.unknown_api(),
            "{url} could not apply Job run in team-a (404: the server could not find the requested resource): it is "
            "not a Kubernetes API server, or too old. topwork needs Kubernetes 1.31 or newer; check the version with: "
            "kubectl version",
            id="404 API",
        ),
        pytest.param(
            CONFLICT,
            "The cluster rejected the request to apply Job run in team-a, because another field manager set "
            ".spec.parallelism (owned by kubectl), .spec.suspend (owned by kubectl). Leave these fields to topwork, or "
            "cancel the job and submit it again.",
            id="409 fields",
        ),
        pytest.param(
            api_statuses.invalid("Job", "run", "spec.template", f"Invalid value: {LONG}: field is immutable", "batch"),
            "The cluster rejected the request to apply Job run in team-a: spec.template: …field is immutable.",
            id="422 that repeats the object",
        ),
        pytest.param(
            api_statuses.invalid(
                "Job", "run", "spec.backoffLimit", "Invalid value: -1: must be greater than or equal to 0", "batch"
            ),
            "The cluster rejected the request to apply Job run in team-a: spec.backoffLimit: Invalid value: -1: must "
            "be greater than or equal to 0.",
            id="422",
        ),
        pytest.param(
            api_statuses.bad_request('strict decoding error: unknown field "spec.podFailurePolicies"'),
            "The cluster rejected the request to apply Job run in team-a: strict decoding error: unknown field "
            '"spec.podFailurePolicies".',
            id="400",
        ),
        pytest.param(
            api_statuses.status(
                500,
                "",
                "failed to create typed patch object (team-a/run; batch/v1, Kind=Job): .spec.podReplacementPolicy: "
                "field not declared in schema",
            ),
            "The cluster could not apply Job run in team-a, because it does not know a field of the object: failed to "
            "create typed patch object (team-a/run; batch/v1, Kind=Job): .spec.podReplacementPolicy: field not "
            "declared in schema. topwork needs Kubernetes 1.31 or newer; check the version with: kubectl version",
            id="500 of an old cluster",
        ),
    ],
)
def test_rejected_request_raises_a_one_line_error_without_retry(
    api_server: ApiServer, cluster: Cluster, status: dict[str, Any], message: str
):
    api_server.inject(Fault(status))
    with pytest.raises(SettingError) as caught:
        cluster.apply(JOB)
    assert str(caught.value) == message.format(url=api_server.url)
    assert len(api_server.requests) == 1


def test_rejected_token_names_the_context(api_server: ApiServer, cluster: Cluster):
    api_server.settings.token = "another"
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        f"{api_server.url} rejected the credentials of context tests (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
    assert len(api_server.requests) == 1


def test_missing_role_for_logs_names_the_subresource(api_server: ApiServer, cluster: Cluster):
    api_server.inject(Fault(api_statuses.rbac_denied("get", "pods/log", "team-a", "p")))
    with pytest.raises(SettingError) as caught:
        list(cluster.logs("p", "pull"))
    assert str(caught.value) == (
        "alice is not allowed to get pods/log in namespace team-a. Ask a cluster administrator for the role "
        "topwork-submitter of k8s/base, then check with: kubectl auth can-i get pods/log -n team-a"
    )


def test_logs_of_an_unknown_container_raise_an_error(api_server: ApiServer, cluster: Cluster):
    api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": []}})
    with pytest.raises(SettingError) as caught:
        list(cluster.logs("p", "pull"))
    assert str(caught.value) == (
        "The cluster rejected the request to read the log of Pod p in team-a: container pull is not valid for pod p."
    )


def test_redirect_to_a_login_page_raises_an_error(api_server: ApiServer, cluster: Cluster):
    status = api_statuses.status(302, "", "moved")
    api_server.inject(Fault(status, body=b"", headers={"Location": "https://login.example/"}))
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        f"{api_server.url} redirects to https://login.example/, so it is not a Kubernetes API server. "
        "Check server in the kubeconfig."
    )


# ── Transient errors ──────────────────────────────────────────────────────────────────────────────────────────────────

TRANSIENT = [
    pytest.param(Fault(api_statuses.too_many_requests()), id="429"),
    pytest.param(Fault({"code": 429}, body=b"Too many requests, please try again later.\n"), id="429 in plain text"),
    pytest.param(Fault(api_statuses.internal_error()), id="500"),
    pytest.param(Fault(api_statuses.status(502, "", ""), body=b"<html>Bad Gateway</html>"), id="502 of a proxy"),
    pytest.param(Fault(api_statuses.service_unavailable()), id="503"),
    pytest.param(Fault(reset=True), id="reset"),
    pytest.param(Fault(cut_after_bytes=20), id="cut off"),
    pytest.param(Fault(cut_after_bytes=0), id="without a body"),
    pytest.param(Fault(body=b"<html>Please log in</html>"), id="not JSON"),
    pytest.param(Fault(body=b"[]"), id="other JSON"),
    pytest.param(
        Fault(
            api_statuses.status(
                409,
                "Conflict",
                'Operation cannot be fulfilled on jobs.batch "run": the object has been modified; please apply your '
                "changes to the latest version and try again",
            )
        ),
        id="409 of a concurrent write",
    ),
]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_error_is_retried(api_server: ApiServer, cluster: Cluster, fault: Fault):
    api_server.inject(fault, times=2)
    assert cluster.apply(JOB)["metadata"]["name"] == "run"
    assert len(api_server.requests) == 3


@pytest.mark.parametrize("fault", TRANSIENT)
def test_persistent_transient_error_raises_unavailable_error(
    api_server: ApiServer, make_cluster: Callable[..., Cluster], fault: Fault
):
    api_server.inject(fault, times=5)
    with pytest.raises(UnavailableError) as caught:
        make_cluster(attempts=3).apply(JOB)
    assert api_server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(api_server.requests) == 3


def apply_error(cluster: Cluster) -> str:
    with pytest.raises(UnavailableError) as caught:
        cluster.apply(JOB)
    return str(caught.value)


def test_overloaded_server_message(api_server: ApiServer, cluster: Cluster):
    api_server.inject(Fault(api_statuses.service_unavailable()), times=5)
    assert apply_error(cluster) == (
        f"{api_server.url} could not apply Job run in team-a (503: the server is currently unable to handle the "
        "request). Try again later."
    )


def test_unreachable_server_message(api_server: ApiServer, cluster: Cluster):
    api_server.__exit__()
    assert apply_error(cluster) == (
        f"{api_server.url} is unreachable: could not apply Job run in team-a (Connection refused). "
        "Check the network, the VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_reset_connection_message(api_server: ApiServer, cluster: Cluster):
    api_server.inject(Fault(reset=True), times=5)
    assert apply_error(cluster) == (
        f"{api_server.url} is unreachable: could not apply Job run in team-a (Connection reset by peer). "
        "Check the network, the VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_response_timeout_message(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.inject(Fault(delay_seconds=1.0), times=5)
    assert apply_error(make_cluster(timeout_seconds=0.2, attempts=2)) == (
        f"{api_server.url} is unreachable: could not apply Job run in team-a (timed out). "
        "Check the network, the VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_response_that_is_not_from_kubernetes_message(api_server: ApiServer, cluster: Cluster):
    api_server.inject(Fault(body=b"<html>\nPlease log in</html>"), times=5)
    assert apply_error(cluster) == (
        f"{api_server.url} could not apply Job run in team-a: the response is not from a Kubernetes API server "
        "(<html> Please log in</html>). Check server in the kubeconfig and the proxy."
    )


def test_retry_waits_for_retry_after(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(backoff_seconds=30)
    api_server.inject(Fault(api_statuses.too_many_requests(), headers={"Retry-After": "1"}))
    start = time.monotonic()
    cluster.list("Job")
    assert 1.0 <= time.monotonic() - start < 15.0


def test_backoff_grows_up_to_the_maximum(make_cluster: Callable[..., Cluster]):
    client = make_cluster(backoff_seconds=1.0)._client
    assert 0.75 <= client.backoff_seconds(1, None) <= 1.25
    assert 6.0 <= client.backoff_seconds(4, None) <= 10.0
    assert client.backoff_seconds(40, None) == MAX_BACKOFF_SECONDS
