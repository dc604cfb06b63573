"""TLS certificates of servers, users and pods, with a certificate authority created for the tests."""

import base64
import gc
import json
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from api_server import TOKEN, ApiServer
from sample_crd import definition
from simulated_cluster import wait_for

from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.cluster.controller.runtime.operator import TransferJobWatch
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl: apt-get install openssl")
EC = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
# An authority without key identifiers, which some clusters have (kubernetes-client/python#2394).
PLAIN_AUTHORITY = "[req]\ndistinguished_name=dn\nx509_extensions=ca\n[dn]\n[ca]\nbasicConstraints=critical,CA:TRUE\n"


def run_openssl(directory: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=directory)


def create_certificate(directory: Path, name: str, extension: str) -> None:
    (directory / "extension").write_text(extension)
    run_openssl(directory, f"req {EC} -keyout {name}.key -out {name}.csr -subj /CN={name}")
    options = f"-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extension -out {name}.crt"
    run_openssl(directory, f"x509 -req -in {name}.csr {options}")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ca.crt, server.crt (for 127.0.0.1), alice.crt and their keys."""
    directory = tmp_path_factory.mktemp("certificates")
    (directory / "ca.conf").write_text(PLAIN_AUTHORITY)
    run_openssl(directory, f"req -x509 {EC} -config ca.conf -days 2 -subj /CN=kubernetes -keyout ca.key -out ca.crt")
    create_certificate(directory, "server", "subjectAltName=IP:127.0.0.1,DNS:cluster.example\n")
    create_certificate(directory, "alice", "extendedKeyUsage=clientAuth\n")
    return directory


def server_context(certificates: Path, *, client_certificates: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    if client_certificates:
        context.verify_mode = ssl.CERT_REQUIRED
        # In TLS 1.3, a client may send its request and find the connection closed before it reads the alert.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(certificates / "ca.crt")
    return context


@pytest.fixture
def tls_server(certificates: Path) -> Iterator[ApiServer]:
    with ApiServer(tls=server_context(certificates)) as server:
        yield server


@pytest.fixture
def client_certificate_server(certificates: Path) -> Iterator[ApiServer]:
    """A server that authenticates users by their certificates."""
    with ApiServer(token=None, tls=server_context(certificates, client_certificates=True)) as server:
        yield server


def base64_of(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def open_cluster(path: Path, cluster: dict[str, Any], user: dict[str, Any] | None = None) -> Cluster:
    content = {
        "current-context": "a",
        "clusters": [{"name": "a", "cluster": cluster}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "alice"}}],
        "users": [{"name": "alice", "user": user or {"token": TOKEN}}],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    settings = ClusterSettings(kubeconfig=str(path), attempts=2, timeout_seconds=5, backoff_seconds=0.01)
    return connect(settings)


def test_authority_of_the_kubeconfig_is_trusted(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    """Some clusters have an authority without key identifiers, which Python 3.13 rejects by default."""
    cluster = {"server": tls_server.url, "certificate-authority-data": base64_of(certificates / "ca.crt")}
    assert open_cluster(tmp_path / "config", cluster).list("Job") == []


def test_certificate_of_another_authority_is_not_trusted(tls_server: ApiServer, tmp_path: Path):
    with pytest.raises(SettingError) as caught:
        open_cluster(tmp_path / "config", {"server": tls_server.url}).list("Job")
    message = str(caught.value)
    assert message.startswith(
        f"The TLS certificate of {tls_server.url} is not trusted ([SSL: CERTIFICATE_VERIFY_FAILED] "
    )
    assert message.endswith(
        "). The kubeconfig sets the trusted authority in certificate-authority or certificate-authority-data: "
        "download the kubeconfig again."
    )


def test_server_with_another_name_is_not_trusted(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    cluster = {"server": tls_server.url.replace("127.0.0.1", "localhost")}
    cluster["certificate-authority"] = str(certificates / "ca.crt")
    with pytest.raises(SettingError, match=r"is not trusted .*Hostname mismatch"):
        open_cluster(tmp_path / "config", cluster).list("Job")


def test_tls_server_name_of_the_kubeconfig_is_used(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    cluster = {"server": tls_server.url.replace("127.0.0.1", "localhost"), "tls-server-name": "cluster.example"}
    cluster["certificate-authority"] = str(certificates / "ca.crt")
    assert open_cluster(tmp_path / "config", cluster).list("Job") == []


def test_disabled_verification_accepts_any_certificate_without_warning(tls_server: ApiServer, tmp_path: Path):
    assert (
        open_cluster(tmp_path / "config", {"server": tls_server.url, "insecure-skip-tls-verify": True}).list("Job")
        == []
    )


@pytest.mark.parametrize("authentication", ["token", "certificate", "server name", "insecure"])
def test_the_watch_of_the_controller_uses_the_same_credentials(certificates: Path, tmp_path: Path, authentication: str):
    is_certificate = authentication == "certificate"
    tls = server_context(certificates, client_certificates=is_certificate)
    with ApiServer(token=None if is_certificate else TOKEN, tls=tls, crds=[definition()]) as server:
        cluster: dict[str, Any] = {"server": server.url, "certificate-authority": str(certificates / "ca.crt")}
        if authentication == "server name":
            cluster |= {"server": server.url.replace("127.0.0.1", "localhost"), "tls-server-name": "cluster.example"}
        if authentication == "insecure":
            cluster = {"server": server.url, "insecure-skip-tls-verify": True}
        files = {"client-certificate": "alice.crt", "client-key": "alice.key"}
        user = {key: str(certificates / file) for key, file in files.items()} if is_certificate else None
        names: queue.SimpleQueue[str] = queue.SimpleQueue()
        watch = TransferJobWatch(
            open_cluster(tmp_path / "config", cluster, user),
            "team-a",
            lambda _type, obj: names.put(obj["metadata"]["name"]),
            list,
        )
        watch.start()
        wait_for(lambda: any(request.query.get("watch") for request in server.requests), "watch")
        kind = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob"}
        server.put(kind | {"metadata": {"name": "cats", "namespace": "team-a"}, "spec": {}})
        assert names.get(timeout=10) == "cats"
        watch.stop()
        wait_for(watch.problem, "end of the watch")
    # A process that stops watching ends, so nothing closes the TLS connections of kopf's client.
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.mark.parametrize("form", ["files", "data"])
def test_client_certificate_authenticates_the_user(
    client_certificate_server: ApiServer, certificates: Path, tmp_path: Path, form: str
):
    cluster = {
        "server": client_certificate_server.url,
        "certificate-authority-data": base64_of(certificates / "ca.crt"),
    }
    user: dict[str, Any] = {"client-certificate": "pki/alice.crt", "client-key": "pki/alice.key"}
    shutil.copytree(certificates, tmp_path / "kube" / "pki")
    if form == "data":
        files = {"client-certificate-data": "alice.crt", "client-key-data": "alice.key"}
        user = {key: base64_of(certificates / file) for key, file in files.items()}
    assert open_cluster(tmp_path / "kube" / "config", cluster, user).list("Job") == []


def test_exec_plugin_may_return_a_certificate(client_certificate_server: ApiServer, certificates: Path, tmp_path: Path):
    cluster = {
        "server": client_certificate_server.url,
        "certificate-authority-data": base64_of(certificates / "ca.crt"),
    }
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {
            "clientCertificateData": (certificates / "alice.crt").read_text(),
            "clientKeyData": (certificates / "alice.key").read_text(),
        },
    }
    response = tmp_path / "response"
    response.write_text(json.dumps(credential))
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "cat", "args": [str(response)]}
    assert open_cluster(tmp_path / "config", cluster, {"exec": plugin}).list("Job") == []


def test_missing_client_certificate_raises_setting_error(
    client_certificate_server: ApiServer, certificates: Path, tmp_path: Path
):
    cluster = {
        "server": client_certificate_server.url,
        "certificate-authority-data": base64_of(certificates / "ca.crt"),
    }
    with pytest.raises(SettingError) as caught:
        open_cluster(tmp_path / "config", cluster).list("Job")
    message = str(caught.value)
    assert message.startswith(f"{client_certificate_server.url} rejected the client certificate of context a (")
    assert message.endswith("). Log in again as you do for kubectl.")


def test_interrupted_handshake_is_retried(certificates: Path, tmp_path: Path):
    listener = socket.create_server(("127.0.0.1", 0))
    received = []

    def close_connections() -> None:
        for _ in range(2):
            connection, _address = listener.accept()
            received.append(connection.recv(10))
            connection.close()

    threading.Thread(target=close_connections, daemon=True).start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(UnavailableError) as caught:
        open_cluster(tmp_path / "config", {"server": url}).list("Job")
    assert str(caught.value).startswith(f"{url} is unreachable: could not list jobs in default (")
    assert len(received) == 2


def test_server_without_tls_raises_setting_error(api_server: ApiServer, tmp_path: Path):
    url = api_server.url.replace("http:", "https:")
    with pytest.raises(SettingError) as caught:
        open_cluster(tmp_path / "config", {"server": url}).list("Job")
    assert str(caught.value).startswith(f"{url} does not use TLS (")
    assert str(caught.value).endswith("). Check server in the kubeconfig.")


# ── Service account of a pod ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def account(tls_server: ApiServer, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory of a pod's service account, with the environment variables of a pod."""
    directory = tmp_path / "serviceaccount"
    directory.mkdir()
    shutil.copy(certificates / "ca.crt", directory / "ca.crt")
    (directory / "token").write_text(TOKEN)
    (directory / "namespace").write_text("team-a")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(urlsplit(tls_server.url).hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(urlsplit(tls_server.url).port))
    return directory


def connect_in_pod(account: Path, **settings: Any) -> Cluster:
    return connect(
        ClusterSettings(in_pod=True, service_account_directory=str(account), attempts=1, timeout_seconds=5, **settings)
    )


def test_pod_uses_its_service_account(tls_server: ApiServer, account: Path):
    cluster = connect_in_pod(account)
    assert cluster.list("Job") == []
    assert (cluster.namespace, cluster.server) == ("team-a", tls_server.url)


def test_namespace_setting_overrides_the_pod(account: Path):
    assert connect_in_pod(account, namespace="default").namespace == "default"


def test_kubeconfig_overrides_the_service_account(api_server: ApiServer, account: Path, tmp_path: Path):
    file = api_server.kubeconfig(tmp_path / "config")
    assert connect_in_pod(account, kubeconfig=str(file)).server == api_server.url


def test_rotated_token_is_read_again(tls_server: ApiServer, account: Path):
    cluster = connect_in_pod(account)
    tls_server.settings.token = "rotated"
    (account / "token").write_text("rotated")
    assert cluster.list("Job") == []
    assert [request.code for request in tls_server.requests] == [401, 200]


def test_pod_without_a_token_raises_setting_error(account: Path):
    (account / "token").unlink()
    with pytest.raises(SettingError) as caught:
        connect_in_pod(account)
    assert str(caught.value) == (
        f"The pod has no usable service account in {account} (Service token file does not exist). Set "
        "automountServiceAccountToken: true and a service account in the pod, or set --kubeconfig."
    )


def test_rejected_token_of_a_pod_names_the_service_account(tls_server: ApiServer, account: Path):
    (account / "token").write_text("wrong")
    with pytest.raises(SettingError) as caught:
        connect_in_pod(account).list("Job")
    assert str(caught.value) == (
        f"{tls_server.url} rejected the credentials of the pod's service account (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
