"""Certificates of the webhook: files that are renewed, and self-signed ones of several replicas."""

import base64
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import api_statuses
import pytest
from api_statuses import Fault
from cryptography import x509

from topwork.cluster.controller.runtime.certificates import (
    MAX_AUTHORITIES,
    FileCertificates,
    SelfSignedCertificates,
    add_authority,
    issue_certificate,
)
from topwork.errors import SettingError

HOST = "topwork-controller.team-a.svc"
NAME = "topwork-controller"


@pytest.fixture
def context():
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


@pytest.fixture
def configuration(api_server):
    """ValidatingWebhookConfiguration with two webhooks, as the chart creates it: without a caBundle."""
    service = {"name": NAME, "namespace": "team-a", "path": "/validate", "port": 443}
    webhooks = [
        {
            "name": name,
            "clientConfig": {"service": service},
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Ignore",
            "timeoutSeconds": 5,
        }
        for name in ("one.topwork.dev", "two.topwork.dev")
    ]
    return api_server.put({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": NAME}, "webhooks": webhooks,
    })  # fmt: skip


def bundles(api_server):
    stored = api_server.get("ValidatingWebhookConfiguration", NAME)
    return [base64.b64decode(webhook["clientConfig"].get("caBundle", "")).decode() for webhook in stored["webhooks"]]


def write(directory, issued):
    directory.mkdir(exist_ok=True)
    (directory / "tls.crt").write_bytes(issued.certificate)
    (directory / "tls.key").write_bytes(issued.key)


def served_certificate(context, authority, host=HOST):
    """Connect over TLS as the API server does, and return the verified certificate of the server."""
    ours, theirs = socket.socketpair()
    client = ssl.create_default_context(cadata=authority)

    def serve():
        with context.wrap_socket(theirs, server_side=True, do_handshake_on_connect=False) as server:
            try:
                server.do_handshake()
            except (ssl.SSLError, OSError):
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=host) as connection:
            return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True))
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("host", [HOST, "10.0.0.7", "::1"])
def test_an_issued_certificate_passes_strict_verification(context, tmp_path, host):
    issued = issue_certificate(host)
    write(tmp_path, issued)
    FileCertificates(tmp_path).refresh(context)
    certificate = served_certificate(context, issued.authority, host)
    assert certificate.not_valid_after_utc == issued.expires.replace(microsecond=0)


def test_an_issued_certificate_is_valid_for_its_host_only(context, tmp_path):
    issued = issue_certificate(HOST)
    write(tmp_path, issued)
    FileCertificates(tmp_path).refresh(context)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        served_certificate(context, issued.authority, "other.team-a.svc")


def test_renewed_files_are_used_by_new_connections(context, tmp_path):
    old, new = issue_certificate(HOST), issue_certificate(HOST)
    source = FileCertificates(tmp_path)
    for issued in (old, new):
        write(tmp_path, issued)
        source.refresh(context)
        assert served_certificate(context, issued.authority)


@pytest.mark.parametrize("damage", ["mismatch", "truncated", "missing"])
def test_files_that_are_being_replaced_leave_the_old_certificate_in_use(context, tmp_path, damage):
    old, new = issue_certificate(HOST), issue_certificate(HOST)
    source = FileCertificates(tmp_path)
    write(tmp_path, old)
    source.refresh(context)
    if damage == "missing":
        (tmp_path / "tls.key").unlink()
    else:
        (tmp_path / "tls.crt").write_bytes(new.certificate[: 40 if damage == "truncated" else None])
    with pytest.raises(SettingError, match=r"certificate of the webhook can't be loaded from .*tls\.crt and tls\.key"):
        source.refresh(context)
    assert served_certificate(context, old.authority)
    write(tmp_path, new)
    source.refresh(context)
    assert served_certificate(context, new.authority)


def test_self_signed_authority_is_added_to_each_webhook(api_server, cluster, configuration, context):
    SelfSignedCertificates(cluster, NAME, HOST).refresh(context)
    first, second = bundles(api_server)
    assert first == second
    assert served_certificate(context, first)


def test_replicas_that_start_together_all_work(api_server, make_cluster, configuration):
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(MAX_AUTHORITIES)]
    with ThreadPoolExecutor() as pool:
        for future in [
            pool.submit(SelfSignedCertificates(make_cluster(), NAME, HOST).refresh, context) for context in contexts
        ]:
            future.result()
    assert all(served_certificate(context, bundles(api_server)[0]) for context in contexts)


def test_a_conflicting_update_is_repeated(api_server, cluster, configuration, context):
    stale = api_statuses.modified("validatingwebhookconfigurations.admissionregistration.k8s.io", NAME)
    api_server.inject(Fault(stale, method="PUT"), times=3)
    SelfSignedCertificates(cluster, NAME, HOST).refresh(context)
    assert served_certificate(context, bundles(api_server)[0])


def test_an_authority_that_others_displaced_is_added_again(api_server, cluster, configuration, context):
    source = SelfSignedCertificates(cluster, NAME, HOST)
    source.refresh(context)
    for _ in range(MAX_AUTHORITIES):  # a replica in a crash loop
        SelfSignedCertificates(cluster, NAME, HOST).refresh(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    with pytest.raises(ssl.SSLCertVerificationError):
        served_certificate(context, bundles(api_server)[0])
    source.refresh(context)
    assert served_certificate(context, bundles(api_server)[0])
    assert bundles(api_server)[0].count("BEGIN CERTIFICATE") == MAX_AUTHORITIES


def test_a_refresh_without_changes_writes_nothing(api_server, cluster, configuration, context):
    source = SelfSignedCertificates(cluster, NAME, HOST)
    source.refresh(context)
    before = len(api_server.requests)
    source.refresh(context)
    assert [request.method for request in api_server.requests[before:]] == ["GET"]


def test_a_certificate_is_renewed_before_it_expires(api_server, cluster, configuration, context):
    soon = timedelta(days=20)
    source = SelfSignedCertificates(cluster, NAME, HOST, lifetime=soon, renew_before=timedelta(days=30))
    source.refresh(context)
    first = served_certificate(context, bundles(api_server)[0])
    source.refresh(context)
    assert served_certificate(context, bundles(api_server)[0]).serial_number != first.serial_number


def test_expired_authorities_and_placeholders_are_dropped():
    expired = issue_certificate(HOST, timedelta(minutes=-1)).authority
    valid, new = issue_certificate(HOST).authority, issue_certificate(HOST).authority
    bundle = base64.b64encode(f"placeholder\n{expired}{valid}".encode()).decode()
    before = {"webhooks": [{"name": "a", "clientConfig": {"caBundle": bundle}}]}
    (webhook,) = add_authority(before, new)["webhooks"]
    assert base64.b64decode(webhook["clientConfig"]["caBundle"]).decode() == valid + new
    assert before["webhooks"][0]["clientConfig"]["caBundle"] == bundle


def test_a_failed_update_keeps_the_certificate_that_the_api_server_trusts(
    api_server, make_cluster, configuration, context
):
    source = SelfSignedCertificates(
        make_cluster(attempts=1), NAME, HOST, lifetime=timedelta(days=20), renew_before=timedelta(days=30)
    )
    source.refresh(context)
    trusted = bundles(api_server)[0]
    api_server.inject(Fault(api_statuses.internal_error(), method="PUT"))
    with pytest.raises(Exception, match="could not update ValidatingWebhookConfiguration"):
        source.refresh(context)
    assert served_certificate(context, trusted)


def test_a_missing_configuration_is_an_error_that_names_the_fix(cluster, context):
    with pytest.raises(SettingError, match=r"topwork-controller does not exist\. Install it with the chart"):
        SelfSignedCertificates(cluster, NAME, HOST).refresh(context)


def test_dates_of_an_issued_certificate_tolerate_clock_skew():
    issued = issue_certificate(HOST)
    for pem in (issued.certificate, issued.authority.encode()):
        assert x509.load_pem_x509_certificate(pem).not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=59)
