"""What an API server refuses, in the words of real servers, and the one line that a user gets."""

import time
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.requests import LONGEST_PAUSE_SECONDS
from topwork.errors import SettingError, UnavailableError

JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run"}, "spec": {}}
CONFLICT = api_statuses.field_conflict("kubectl", "batch/v1", ".spec.parallelism", ".spec.suspend")
LONG = "core.PodTemplateSpec{ObjectMeta:v1.ObjectMeta{" + 400 * "x" + "}}"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        pytest.param(
            api_statuses.rbac("patch", "jobs", "team-a", "run", "batch"),
            "alice may not patch jobs in the namespace team-a. Whoever runs the cluster can give you the role "
            "topwork-submitter of k8s/base; kubectl auth can-i patch jobs -n team-a says when it is there.",
            id="403 role",
        ),
        pytest.param(
            api_statuses.quota("jobs.batch", "run", "count/jobs.batch=1", "count/jobs.batch=4", "count/jobs.batch=4"),
            "The quota of the namespace team-a refused to apply Job run in team-a: exceeded quota: compute, requested: "
            "count/jobs.batch=1, used: count/jobs.batch=4, limited: count/jobs.batch=4. "
            "See what is taken with: kubectl describe quota -n team-a",
            id="403 quota",
        ),
        pytest.param(
            api_statuses.forbidden("pods", "run-x", "failed quota: compute: must specify limits.cpu for: pull"),
            "The quota of the namespace team-a refused to apply Job run in team-a: failed quota: compute: must specify "
            "limits.cpu for: pull. See what is taken with: kubectl describe quota -n team-a",
            id="403 quota that wants limits",
        ),
        pytest.param(
            api_statuses.pod_security("run-x", "runAsNonRoot != true (pod must set securityContext.runAsNonRoot=true)"),
            'The namespace team-a refused to apply Job run in team-a: violates PodSecurity "restricted:latest": '
            "runAsNonRoot != true (pod must set securityContext.runAsNonRoot=true). "
            "Its level is in its labels: kubectl get namespace team-a --show-labels",
            id="403 Pod Security",
        ),
        pytest.param(
            api_statuses.forbidden(
                "jobs.batch", "run", "unable to create new content in namespace team-a because it is being terminated"
            ),
            "The namespace team-a is being deleted. Wait until it is gone and make it again, "
            "or choose another with --namespace.",
            id="403 namespace that goes",
        ),
        pytest.param(
            api_statuses.forbidden("jobs.batch", "run", "maximum cpu usage per Container is 4, but limit is 8"),
            'The cluster refused to apply Job run in team-a: jobs.batch "run" is forbidden: maximum cpu usage per '
            "Container is 4, but limit is 8.",
            id="403 of another kind",
        ),
        pytest.param(
            api_statuses.webhook("validate.kyverno.svc-fail", "images must come from registry.example"),
            'A policy of the cluster refused to apply Job run in team-a: admission webhook "validate.kyverno.svc-fail" '
            "denied the request: images must come from registry.example. "
            "Change the spec to what it asks for, or talk to whoever runs the cluster.",
            id="400 webhook",
        ),
        pytest.param(
            api_statuses.webhook("gatekeeper.sh", "no label owner", 403),
            'A policy of the cluster refused to apply Job run in team-a: admission webhook "gatekeeper.sh" '
            "denied the request: no label owner. "
            "Change the spec to what it asks for, or talk to whoever runs the cluster.",
            id="403 webhook",
        ),
        pytest.param(
            api_statuses.webhook("gpu.example", "no GPUs today", 500),
            'A policy of the cluster refused to apply Job run in team-a: admission webhook "gpu.example" '
            "denied the request: no GPUs today. "
            "Change the spec to what it asks for, or talk to whoever runs the cluster.",
            id="500 webhook",
        ),
        pytest.param(
            api_statuses.status(
                422,
                "Invalid",
                "jobs.batch \"run\" is forbidden: ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: "
                "4 at most",
            ),
            'A policy of the cluster refused to apply Job run in team-a: jobs.batch "run" is forbidden: '
            "ValidatingAdmissionPolicy 'gpus' with binding 'all' denied request: 4 at most. "
            "Change the spec to what it asks for, or talk to whoever runs the cluster.",
            id="422 admission policy",
        ),
        pytest.param(
            api_statuses.no_namespace("team-a"),
            "There is no namespace team-a at {url}. Make it with: kubectl create namespace team-a "
            "- or choose another with --namespace.",
            id="404 namespace",
        ),
        pytest.param(
            api_statuses.no_such_api(),
            "{url} could not apply Job run in team-a (404: the server could not find the requested resource): it is no "
            "API server of Kubernetes, or an old one. topwork needs Kubernetes 1.31 or newer: kubectl version",
            id="404 API",
        ),
        pytest.param(
            CONFLICT,
            "The cluster refused to apply Job run in team-a: another program has set .spec.parallelism (kubectl), "
            ".spec.suspend (kubectl). Leave these fields to topwork, or cancel the job and submit it again.",
            id="409 fields",
        ),
        pytest.param(
            api_statuses.invalid("Job", "run", "spec.template", f"Invalid value: {LONG}: field is immutable", "batch"),
            "The cluster refused to apply Job run in team-a: spec.template: …field is immutable.",
            id="422 with the whole object",
        ),
        pytest.param(
            api_statuses.invalid(
                "Job", "run", "spec.backoffLimit", "Invalid value: -1: must be greater than or equal to 0", "batch"
            ),
            "The cluster refused to apply Job run in team-a: spec.backoffLimit: Invalid value: -1: must be greater "
            "than or equal to 0.",
            id="422",
        ),
        pytest.param(
            api_statuses.bad_request('strict decoding error: unknown field "spec.podFailurePolicies"'),
            "The cluster refused to apply Job run in team-a: strict decoding error: unknown field "
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
            "The cluster does not know a field of what it was asked to apply Job run in team-a: failed to create typed "
            "patch object (team-a/run; batch/v1, Kind=Job): .spec.podReplacementPolicy: field not declared in schema. "
            "topwork needs Kubernetes 1.31 or newer: kubectl version",
            id="500 of an old cluster",
        ),
    ],
)
def test_what_is_refused_is_told_at_once_in_one_line(
    api_server: ApiServer, cluster: Cluster, status: dict[str, Any], said: str
):
    api_server.plant(Fault(status))
    with pytest.raises(SettingError) as caught:
        cluster.apply(JOB)
    assert str(caught.value) == said.format(url=api_server.url)
    assert len(api_server.requests) == 1


def test_a_login_that_is_refused_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.settings.token = "another"
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        f"{api_server.url} does not accept the context tests (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
    assert len(api_server.requests) == 1


def test_a_role_that_is_missing_for_logs_names_them(api_server: ApiServer, cluster: Cluster):
    api_server.plant(Fault(api_statuses.rbac("get", "pods/log", "team-a", "p")))
    with pytest.raises(SettingError) as caught:
        list(cluster.logs("p", "pull"))
    assert str(caught.value) == (
        "alice may not get pods/log in the namespace team-a. Whoever runs the cluster can give you the role "
        "topwork-submitter of k8s/base; kubectl auth can-i get pods/log -n team-a says when it is there."
    )


def test_a_container_that_is_none_of_the_pod_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": []}})
    with pytest.raises(SettingError) as caught:
        list(cluster.logs("p", "pull"))
    assert str(caught.value) == (
        "The cluster refused to read the log of Pod p in team-a: container pull is not valid for pod p."
    )


def test_a_redirect_to_a_login_page_is_told(api_server: ApiServer, cluster: Cluster):
    answer = api_statuses.status(302, "", "moved")
    api_server.plant(Fault(answer, body=b"", headers={"Location": "https://login.example/"}))
    with pytest.raises(SettingError) as caught:
        cluster.list("Job")
    assert str(caught.value) == (
        f"{api_server.url} answers with a redirect to https://login.example/: it is no API server of Kubernetes."
    )


# ── What passes ─────────────────────────────────────────────────────────────────────────────────────────────────────

PASSING = [
    pytest.param(Fault(api_statuses.too_many()), id="429"),
    pytest.param(Fault({"code": 429}, body=b"Too many requests, please try again later.\n"), id="429 in plain text"),
    pytest.param(Fault(api_statuses.internal()), id="500"),
    pytest.param(Fault(api_statuses.status(502, "", ""), body=b"<html>Bad Gateway</html>"), id="502 of a proxy"),
    pytest.param(Fault(api_statuses.unavailable()), id="503"),
    pytest.param(Fault(reset=True), id="reset"),
    pytest.param(Fault(cut_after=20), id="broken off"),
    pytest.param(Fault(cut_after=0), id="without a body"),
    pytest.param(Fault(body=b"<html>Please log in</html>"), id="garbage"),
    pytest.param(Fault(body=b"[]"), id="JSON of something else"),
    pytest.param(
        Fault(
            api_statuses.status(
                409,
                "Conflict",
                'Operation cannot be fulfilled on jobs.batch "run": the object has been modified; please apply your '
                "changes to the latest version and try again",
            )
        ),
        id="409 of two at once",
    ),
]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(api_server: ApiServer, cluster: Cluster, fault: Fault):
    api_server.plant(fault, times=2)
    assert cluster.apply(JOB)["metadata"]["name"] == "run"
    assert len(api_server.requests) == 3


@pytest.mark.parametrize("fault", PASSING)
def test_what_does_not_pass_is_unavailable(api_server: ApiServer, make_cluster: Callable[..., Cluster], fault: Fault):
    api_server.plant(fault, times=5)
    with pytest.raises(UnavailableError) as caught:
        make_cluster(attempts=3).apply(JOB)
    assert api_server.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(api_server.requests) == 3


def unavailable(cluster: Cluster) -> str:
    with pytest.raises(UnavailableError) as caught:
        cluster.apply(JOB)
    return str(caught.value)


def test_a_server_that_stays_overloaded_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.plant(Fault(api_statuses.unavailable()), times=5)
    assert unavailable(cluster) == (
        f"{api_server.url} could not apply Job run in team-a (503: the server is currently unable to handle the "
        "request). Try again later."
    )


def test_a_server_that_is_not_there_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.__exit__()
    assert unavailable(cluster) == (
        f"{api_server.url} can't be reached to apply Job run in team-a (Connection refused). "
        "Look at the network, a VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_a_connection_that_is_reset_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.plant(Fault(reset=True), times=5)
    assert unavailable(cluster) == (
        f"{api_server.url} can't be reached to apply Job run in team-a (Connection reset by peer). "
        "Look at the network, a VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_a_server_that_is_too_slow_is_told(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.plant(Fault(delay=1.0), times=5)
    assert unavailable(make_cluster(timeout_seconds=0.2, attempts=2)) == (
        f"{api_server.url} can't be reached to apply Job run in team-a (timed out). "
        "Look at the network, a VPN and the proxy (kubectl cluster-info), or try again later."
    )


def test_an_answer_that_is_not_of_kubernetes_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.plant(Fault(body=b"<html>\nPlease log in</html>"), times=5)
    assert unavailable(cluster) == (
        f"{api_server.url} could not apply Job run in team-a: what it answered is not of Kubernetes "
        "(<html> Please log in</html>). Look at server in the kubeconfig and at the proxy."
    )


def test_the_wait_that_the_server_asks_for_is_kept(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    cluster = make_cluster(pause_seconds=30)
    api_server.plant(Fault(api_statuses.too_many(), headers={"Retry-After": "1"}))
    began = time.monotonic()
    cluster.list("Job")
    assert 1.0 <= time.monotonic() - began < 15.0


def test_pauses_grow_and_stay_bounded(make_cluster: Callable[..., Cluster]):
    api = make_cluster(pause_seconds=1.0)._api
    assert 0.75 <= api.pause(1, None) <= 1.25
    assert 6.0 <= api.pause(4, None) <= 10.0
    assert api.pause(40, None) == LONGEST_PAUSE_SECONDS
