"""Validating webhook of the controller: its answers, and its HTTPS server."""

import copy
import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import contextmanager

import pytest
import sample_searches

from topwork.cluster.controller.runtime import webhook
from topwork.cluster.controller.runtime.certificates import FileCertificates, issue_certificate
from topwork.cluster.controller.runtime.webhook import WebhookServer, review
from topwork.errors import SettingError, SpecError, UnavailableError
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import read_search_data, read_text

OBJECT = {
    "apiVersion": "topwork.dev/v1alpha1",
    "kind": "TransferJob",
    "metadata": {"name": "cats", "namespace": "team-a"},
    "spec": {
        "storage": "s3://photos/topwork",
        "dataset": {
            "source": {"tfds": "cats_vs_dogs"},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "MobileNetV2"}},
    },
}


def no_defaults(_namespace):
    return None


def change(obj, **spec):
    return obj | {"spec": obj["spec"] | spec}


INVALID = change(OBJECT, transfer={"epochs": 0, "batchsize": 8}, model={"base": {"application": "MobileNetV9"}})


def request(obj=OBJECT, old=None, *, operation="CREATE", **fields):
    content = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "topwork.dev", "version": "v1alpha1", "kind": "TransferJob"},
        "resource": {"group": "topwork.dev", "version": "v1alpha1", "resource": "transferjobs"},
        "namespace": "team-a",
        "operation": operation,
        "userInfo": {"username": "alice"},
        "object": obj,
        "oldObject": old,
        "dryRun": False,
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": content | fields}


def answer(*arguments, read_defaults=no_defaults, **fields):
    return review(request(*arguments, **fields), read_defaults)["response"]


def test_a_valid_object_is_allowed():
    assert review(request(), no_defaults) == {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "response": {"uid": "705ab4f5-6393-11e8-b7cc-42010a800002", "allowed": True},
    }


def test_an_invalid_object_is_denied_with_all_problems_as_validate_prints_them():
    response = answer(INVALID)
    assert not response["allowed"]
    with pytest.raises(SpecError) as error:
        read_text(json.dumps(INVALID), "job.yaml")
    expected = {line.split(": ", 1)[1] for line in str(error.value).splitlines()}
    assert set(response["status"]["message"].splitlines()) == expected
    assert len(expected) == 3
    assert "spec.transfer.batchsize: unknown key. Did you mean batchSize?" in response["status"]["message"]


def test_a_search_is_validated_like_its_file():
    assert answer(sample_searches.search())["allowed"]
    invalid = sample_searches.search(space={"model.head.dropout": {"uniform": [0.0, 7.0]}}, trials=0)
    message = answer(invalid)["status"]["message"]
    with pytest.raises(SpecError) as error:
        read_search_data(invalid)
    assert message == str(error.value)
    assert "spec.trials" in message


def test_defaults_of_the_namespace_are_filled_in():
    obj = copy.deepcopy(OBJECT)
    del obj["spec"]["storage"]
    assert "spec.storage" in answer(obj)["status"]["message"]
    namespaces = []

    def read_defaults(namespace):
        namespaces.append(namespace)
        return SpecDefaults("configmap/topwork-defaults", {("spec", "storage"): "s3://artifacts"})

    assert answer(obj, read_defaults=read_defaults)["allowed"]
    assert namespaces == ["team-a"]


@pytest.mark.parametrize("error", [UnavailableError("no response"), SettingError("forbidden")])
def test_an_object_is_allowed_while_the_defaults_of_its_namespace_are_unknown(error):
    def read_defaults(_namespace):
        raise error

    assert answer(INVALID, read_defaults=read_defaults)["allowed"]


@pytest.mark.parametrize(
    "fields",
    [
        {"subResource": "status"},
        {"obj": None, "old": INVALID, "operation": "DELETE"},
        {"old": INVALID | {"metadata": INVALID["metadata"] | {"finalizers": ["example.com/hold"]}}},
        {"old": INVALID | {"metadata": INVALID["metadata"] | {"annotations": {"a": "b"}}}},
        {"obj": INVALID | {"metadata": INVALID["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}},
    ],
)
def test_changes_besides_the_spec_are_allowed_for_an_invalid_object(fields):
    arguments = {"obj": INVALID, "operation": "UPDATE"} | fields
    assert answer(arguments.pop("obj"), arguments.pop("old", OBJECT), **arguments)["allowed"]


def test_an_invalid_object_can_be_suspended():
    assert answer(change(INVALID, suspend=True), INVALID, operation="UPDATE")["allowed"]
    assert answer(INVALID, change(INVALID, suspend=True), operation="UPDATE")["allowed"]


def test_a_changed_spec_is_validated():
    assert not answer(INVALID, OBJECT, operation="UPDATE")["allowed"]


def test_metadata_of_the_server_and_status_are_ignored():
    metadata = {"uid": "1", "resourceVersion": "1", "generation": 1, "managedFields": [], "annotations": {"a/b": "c"}}
    obj = OBJECT | {"metadata": OBJECT["metadata"] | metadata, "status": {"state": "Running"}}
    assert answer(obj)["allowed"]


# ── Server ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HOST = "localhost"


@pytest.fixture
def certificates(tmp_path):
    return tmp_path / "certificates"


def write(directory, issued):
    directory.mkdir(exist_ok=True)
    (directory / "tls.crt").write_bytes(issued.certificate)
    (directory / "tls.key").write_bytes(issued.key)
    return issued.authority


@contextmanager
def serving(directory, read_defaults=no_defaults):
    server = WebhookServer(0, FileCertificates(directory), read_defaults, refresh_seconds=0.05)
    server.start()
    yield server


def post(server, authority, body, path="/validate"):
    context = ssl.create_default_context(cadata=authority)
    connection = http.client.HTTPSConnection(HOST, server.port, context=context, timeout=10)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or "null") if response.status == 200 else None
    finally:
        connection.close()


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_server_answers_at_its_path_only(certificates):
    authority = write(certificates, issue_certificate(HOST))
    with serving(certificates) as server:
        until(lambda: not server.error)
        status, content = post(server, authority, request(INVALID))
        assert (status, content["response"]["allowed"]) == (200, False)
        assert post(server, authority, request(), "/validate/other")[0] == 404


def test_server_is_not_ready_until_the_certificate_exists_and_uses_renewed_ones(certificates):
    with serving(certificates) as server:
        until(lambda: "can't be loaded" in server.error)
        for _ in range(2):
            authority = write(certificates, issue_certificate(HOST))

            def is_trusted(authority=authority):
                try:
                    return post(server, authority, request())[0] == 200
                except ssl.SSLError:
                    return False

            until(is_trusted)
        assert not server.error


def test_server_answers_within_its_timeout_and_allows_what_it_could_not_validate(certificates, monkeypatch):
    monkeypatch.setattr(webhook, "ANSWER_SECONDS", 0.2)
    authority = write(certificates, issue_certificate(HOST))
    release = threading.Event()
    with serving(certificates, lambda _namespace: release.wait(20)) as server:
        until(lambda: not server.error)
        started = time.monotonic()
        _, content = post(server, authority, request(INVALID))
        release.set()
    assert content["response"]["allowed"]
    assert "did not validate this object in time" in content["response"]["warnings"][0]
    assert time.monotonic() - started < 3


def test_server_allows_what_an_unexpected_error_kept_it_from_validating(certificates):
    authority = write(certificates, issue_certificate(HOST))
    with serving(certificates, lambda _namespace: 1 / 0) as server:
        until(lambda: not server.error)
        _, content = post(server, authority, request(INVALID))
    assert (content["response"]["allowed"], len(content["response"]["warnings"])) == (True, 1)


@pytest.mark.parametrize("body", [[], {}, "text", {"request": {}}])
def test_server_rejects_what_is_no_review(certificates, body):
    authority = write(certificates, issue_certificate(HOST))
    with serving(certificates) as server:
        until(lambda: not server.error)
        assert post(server, authority, body)[0] == 400


def test_clients_that_send_nothing_do_not_block_others(certificates):
    authority = write(certificates, issue_certificate(HOST))
    with serving(certificates) as server:
        until(lambda: not server.error)
        idle = [socket.create_connection((HOST, server.port)) for _ in range(50)]
        try:
            assert post(server, authority, request())[0] == 200
        finally:
            for connection in idle:
                connection.close()


def test_a_port_in_use_is_an_error_that_names_the_option(certificates):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=rf"Cannot listen on --webhook-port {port} \(.*\)\. Choose another"):
            WebhookServer(port, FileCertificates(certificates), no_defaults, 1.0).start()
