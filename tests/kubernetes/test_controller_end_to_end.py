"""The controller as a process, over the tests' API server with simulated controllers and a simulated kubelet."""

import base64
import http.client
import json
import socket
import ssl
import threading
import time

import api_statuses
import pytest
from api_http import Handler
from api_server import ApiServer, _HttpServer
from api_statuses import Fault
from controller_process import Controller, until
from sample_objects import CPU_SPEC
from simulated_controllers import SimulatedControllers

from topwork.cluster.controller.runtime.certificates import issue_certificate
from topwork.cluster.definition.custom_resource import definition


@pytest.fixture
def api_server():
    with ApiServer(crds=[definition()]) as server:
        yield server


@pytest.fixture
def controllers(api_server):
    with SimulatedControllers(api_server, stage_seconds=0.2) as controllers:
        yield controllers
    assert controllers.overlapping_pods() == []


@pytest.fixture
def start(kubeconfig):
    """Function that starts a controller; all are killed at the end."""
    started = []

    def start(*arguments):
        started.append(Controller(kubeconfig, *arguments))
        return started[-1]

    yield start
    for controller in started:
        if controller.process.poll() is None:
            controller.kill()


def transfer_job(name="cats", **spec):
    metadata = {"name": name, "namespace": "team-a"}
    return {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": metadata,
        "spec": CPU_SPEC | spec,
    }


def state(server, name="cats"):
    return ((server.get("TransferJob", name) or {}).get("status") or {}).get("state")


def wait_for_state(server, expected, name="cats"):
    until(lambda: state(server, name) == expected, f"state {expected} of {name}")


def test_a_transfer_job_runs_to_completion_and_sigterm_ends_the_controller(api_server, controllers, cluster, start):
    controller = start().wait_until_leading()
    cluster.apply(transfer_job(), manager="kubectl")
    wait_for_state(api_server, "Complete")
    (job,) = api_server.list("Job")
    assert job["metadata"]["ownerReferences"][0]["kind"] == "TransferJob"
    stored = api_server.get("TransferJob", "cats")
    assert not stored["metadata"].get("finalizers")
    assert not stored["metadata"].get("annotations")
    assert controller.get("/healthz") == controller.get("/readyz") == (200, "ok\n")
    page = controller.get("/metrics")[1]
    assert 'topwork_transferjob_state{namespace="team-a",state="Complete",transferjob="cats"} 1.0' in page
    assert "topwork_controller_leader 1.0" in page
    assert controller.get("/other")[0] == 404
    started = time.monotonic()
    assert controller.stop() == 0
    assert time.monotonic() - started < 10
    assert api_server.get("Lease", "topwork-controller")["spec"]["holderIdentity"] == ""
    assert controller.errors == []
    assert all({"time", "level", "message"} <= set(line) for line in controller.messages)


def test_only_the_permissions_of_its_role_are_used(api_server, controllers, cluster, start):
    controller = start().wait_until_leading()
    cluster.apply(transfer_job(), manager="kubectl")
    wait_for_state(api_server, "Complete")
    api_server.requests.clear()
    cluster.apply(transfer_job("dogs"), manager="kubectl")
    wait_for_state(api_server, "Complete", "dogs")
    assert controller.stop() == 0
    allowed = {
        ("GET", "transferjobs"), ("PATCH", "transferjobs/status"), ("GET", "transferjobs/status"),
        ("GET", "jobs"), ("POST", "jobs"), ("PATCH", "jobs"), ("DELETE", "jobs"),
        ("GET", "configmaps"), ("POST", "configmaps"), ("PATCH", "configmaps"), ("DELETE", "configmaps"),
        ("GET", "pods"), ("GET", "events"), ("POST", "events"), ("PATCH", "events"),
        ("GET", "leases"), ("POST", "leases"), ("PUT", "leases"),
    }  # fmt: skip
    used = set()
    for request in api_server.requests:
        _, separator, rest = request.path.partition("/namespaces/team-a/")
        if separator and not request.headers.get("User-Agent", "").startswith("kubectl"):
            plural, *parts = rest.split("/")
            used.add((request.method, "/".join([plural, *parts[1:]])))
    used.discard(("PATCH", "transferjobs"))  # the test's own
    assert used <= allowed, used - allowed


FAULTS = {
    "410 on watches": Fault(api_statuses.expired(), method="GET"),
    "429": Fault(api_statuses.too_many_requests(0), headers={"Retry-After": "0"}),
    "500": Fault(api_statuses.internal_error()),
    "cut": Fault(cut_after_bytes=60),
    "reset": Fault(reset=True),
}


def test_a_run_completes_despite_faults_of_the_api_server(api_server, controllers, cluster, start):
    controller = start().wait_until_leading()
    for number, fault in enumerate(FAULTS.values()):
        cluster.apply(transfer_job(f"cats-{number}"), manager="kubectl")
        for path in ("/transferjobs", "/jobs", "/pods", "/events", "/configmaps"):
            api_server.inject(Fault(**(vars(fault) | {"path": path})), times=3)
        api_server.compact()
    for number in range(len(FAULTS)):
        wait_for_state(api_server, "Complete", f"cats-{number}")
    runs = [record.run for record in controllers.pods]
    assert len(runs) == len(set(runs)) == len(FAULTS)
    assert controller.get("/healthz")[0] == 200
    assert controller.stop() == 0


def test_the_controller_waits_for_the_definition(api_server, controllers, cluster, start):
    api_server.remove("CustomResourceDefinition", "transferjobs.topwork.dev")
    controller = start()
    controller.wait_for_message("install the CustomResourceDefinition with: topwork crd --apply")
    code, text = controller.get("/readyz")
    # On a busy machine, other kinds may not be listed yet.
    assert (code, text.splitlines()[0]) == (
        503,
        "the cluster does not serve TransferJobs: install the CustomResourceDefinition with: topwork crd --apply",
    )
    assert controller.get("/healthz")[0] == 200
    api_server.install_crd(definition())
    cluster.apply(transfer_job(), manager="kubectl")
    wait_for_state(api_server, "Complete")
    assert controller.get("/readyz")[0] == 200
    assert controller.stop() == 0


def test_sigterm_ends_a_controller_that_waits(api_server, start):
    api_server.remove("CustomResourceDefinition", "transferjobs.topwork.dev")
    controller = start()
    controller.wait_for_message("install the CustomResourceDefinition")
    assert controller.stop() == 0


def test_a_standby_takes_over_when_the_leader_stops(api_server, controllers, cluster, start):
    leader = start().wait_until_leading()
    standby = start()
    standby.wait_for_message("watches synced")
    cluster.apply(transfer_job("first"), manager="kubectl")
    wait_for_state(api_server, "Complete", "first")
    assert "topwork_controller_leader 0.0" in standby.get("/metrics")[1]
    assert standby.get("/readyz")[0] == standby.get("/healthz")[0] == 200
    assert leader.stop() == 0
    cluster.apply(transfer_job("second"), manager="kubectl")
    standby.wait_until_leading()
    wait_for_state(api_server, "Complete", "second")
    assert "topwork_controller_leader 1.0" in standby.get("/metrics")[1]
    assert len(controllers.pods) == 2
    assert standby.stop() == 0


def test_losing_the_lease_ends_the_process_with_exit_code_1(api_server, start):
    controller = start().wait_until_leading()
    lease = {"holderIdentity": "other", "leaseDurationSeconds": 60}
    api_server.patch("Lease", "topwork-controller", {"spec": lease})
    assert controller.wait() == 1
    assert controller.messages[-1]["message"] == "Lease lost: the process ends, and another one continues"
    assert api_server.get("Lease", "topwork-controller")["spec"]["holderIdentity"] == "other"


def test_options_that_contradict_each_other_are_errors(kubeconfig):
    for arguments, message in (
        (("--namespace=a", "--all-namespaces"), "--namespace and --all-namespaces exclude each other"),
        (("--namespace=team-*",), "--namespace team-* is not the name of a namespace"),
        (("--webhook-self-signed=hook",), "--webhook-self-signed needs --webhook-host"),
        (
            ("--webhook-self-signed=hook", "--webhook-certificates=/c"),
            "--webhook-certificates and --webhook-self-signed exclude each other",
        ),
    ):
        controller = Controller(kubeconfig, *arguments)
        assert controller.wait() == 2
        assert message in json.dumps(controller.messages)


def test_a_run_completes_across_a_restart_of_the_api_server(api_server, controllers, cluster, start):
    controller = start().wait_until_leading()
    cluster.apply(transfer_job(), manager="kubectl")
    until(lambda: controllers.pods, "pod")
    restart(api_server, down_seconds=3.0)
    wait_for_state(api_server, "Complete")
    cluster.apply(transfer_job("dogs"), manager="kubectl")
    wait_for_state(api_server, "Complete", "dogs")
    assert len(controllers.pods) == 2
    assert controller.get("/healthz")[0] == 200
    until(lambda: controller.get("/readyz")[0] == 200, "readiness")
    assert controller.stop() == 0


def restart(server, down_seconds):
    """Close the port and all connections, and listen again with the same objects after some time."""
    port = server._http.server_port
    with server.objects.changed:
        server.is_closing = True
        server.objects.changed.notify_all()
    server._http.shutdown()
    server._http.server_close()
    time.sleep(down_seconds)
    server.is_closing = False
    server._http = _HttpServer(("127.0.0.1", port), Handler)
    server._http.api = server
    threading.Thread(target=server._http.serve_forever, args=(0.02,), daemon=True).start()


# ── Webhook ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(port, authority, obj):
    """Send an AdmissionReview as the API server does, and return the response."""
    review = {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {"uid": "1", "operation": "CREATE", "namespace": "team-a", "object": obj},
    }
    context = ssl.create_default_context(cadata=authority)
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=10)
    try:
        connection.request("POST", "/validate", json.dumps(review), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())["response"]
    finally:
        connection.close()


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def test_webhook_with_certificate_files(api_server, start, port, tmp_path):
    def write(issued):
        (tmp_path / "tls.crt").write_bytes(issued.certificate)
        (tmp_path / "tls.key").write_bytes(issued.key)
        return issued.authority

    config_map = {"data": {"defaults.yaml": "spec: {storage: s3://team-a}"}}
    api_server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "topwork-defaults"}} | config_map)
    controller = start(f"--webhook-port={port}", f"--webhook-certificates={tmp_path}")
    controller.wait_for_message("can't be loaded")
    assert "tls.crt" in controller.get("/readyz")[1]
    authority = write(issue_certificate("localhost"))
    until(lambda: controller.get("/readyz")[0] == 200, "readiness")
    obj = transfer_job(storage=None)
    del obj["spec"]["storage"]
    assert ask(port, authority, obj)["allowed"]
    answer = ask(port, authority, transfer_job(transfer={"epoch": 3, "batchSize": 0}))
    assert not answer["allowed"]
    first, second = answer["status"]["message"].splitlines()
    assert first == "spec.transfer.batchSize: 0 is not allowed. Allowed: an integer from 1 to 65536."
    assert second.startswith("spec.transfer.epoch: unknown key. Did you mean epochs?")
    assert controller.stop() == 0


def test_webhook_with_a_self_signed_certificate_on_two_replicas(api_server, start, tmp_path):
    webhook = {"name": "validate.topwork.dev", "clientConfig": {"service": {"name": "c", "namespace": "team-a"}}}
    api_server.put({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "hook"}, "webhooks": [webhook],
    })  # fmt: skip
    ports = []
    for _ in range(2):
        with socket.create_server(("", 0)) as server:
            ports.append(server.getsockname()[1])
    options = ("--webhook-self-signed=hook", "--webhook-host=localhost")
    replicas = [start(f"--webhook-port={port}", *options) for port in ports]
    for replica in replicas:
        replica.wait_for_message("certificate authority added")
    stored = api_server.get("ValidatingWebhookConfiguration", "hook")["webhooks"][0]["clientConfig"]["caBundle"]
    for port in ports:
        assert ask(port, base64.b64decode(stored).decode(), transfer_job())["allowed"]
