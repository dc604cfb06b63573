"""Certificates, of the server, of the user, of a pod: over TLS, with an authority made on the spot."""

import base64
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from api_server import TOKEN, ApiServer

from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.errors import SettingError, UnavailableError

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates: apt-get install openssl")
EC = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
# What some clusters have (kubernetes-client/python#2394): an authority without key identifiers.
PLAIN_AUTHORITY = "[req]\ndistinguished_name=dn\nx509_extensions=ca\n[dn]\n[ca]\nbasicConstraints=critical,CA:TRUE\n"


def openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=folder)


def certificate(folder: Path, name: str, extension: str) -> None:
    (folder / "extension").write_text(extension)
    openssl(folder, f"req {EC} -keyout {name}.key -out {name}.csr -subj /CN={name}")
    signed = f"-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extension -out {name}.crt"
    openssl(folder, f"x509 -req -in {name}.csr {signed}")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ca.crt, server.crt (for 127.0.0.1) and alice.crt, and their keys."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "ca.conf").write_text(PLAIN_AUTHORITY)
    openssl(folder, f"req -x509 {EC} -config ca.conf -days 2 -subj /CN=kubernetes -keyout ca.key -out ca.crt")
    certificate(folder, "server", "subjectAltName=IP:127.0.0.1,DNS:cluster.example\n")
    certificate(folder, "alice", "extendedKeyUsage=clientAuth\n")
    return folder


def server_context(certificates: Path, *, asks: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    if asks:
        context.verify_mode = ssl.CERT_REQUIRED
        # In TLS 1.3 a client may have sent its request, and find the connection closed, before it reads the alert.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(certificates / "ca.crt")
    return context


@pytest.fixture
def tls_server(certificates: Path) -> Iterator[ApiServer]:
    with ApiServer(tls=server_context(certificates)) as server:
        yield server


@pytest.fixture
def asking_server(certificates: Path) -> Iterator[ApiServer]:
    """A server that knows its users by their certificates."""
    with ApiServer(token=None, tls=server_context(certificates, asks=True)) as server:
        yield server


def data(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def opened(path: Path, cluster: dict[str, Any], user: dict[str, Any] | None = None) -> Cluster:
    content = {
        "current-context": "a",
        "clusters": [{"name": "a", "cluster": cluster}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "alice"}}],
        "users": [{"name": "alice", "user": user or {"token": TOKEN}}],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    settings = ClusterSettings(kubeconfig=str(path), attempts=2, timeout_seconds=5, pause_seconds=0.01)
    return connect(settings)


def test_the_authority_of_the_kubeconfig_is_trusted(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    """Also one without key identifiers, which Python 3.13 alone would refuse."""
    trusting = {"server": tls_server.url, "certificate-authority-data": data(certificates / "ca.crt")}
    assert opened(tmp_path / "config", trusting).list("Job") == []


def test_a_server_of_another_authority_is_not_trusted(tls_server: ApiServer, tmp_path: Path):
    with pytest.raises(SettingError) as caught:
        opened(tmp_path / "config", {"server": tls_server.url}).list("Job")
    told = str(caught.value)
    assert told.startswith(f"The certificate of {tls_server.url} is not trusted ([SSL: CERTIFICATE_VERIFY_FAILED] ")
    assert told.endswith(
        "). The kubeconfig names its authority in certificate-authority or certificate-authority-data: "
        "fetch the kubeconfig anew."
    )


def test_a_server_with_another_name_is_not_trusted(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    trusting = {"server": tls_server.url.replace("127.0.0.1", "localhost")}
    trusting["certificate-authority"] = str(certificates / "ca.crt")
    with pytest.raises(SettingError, match=r"is not trusted .*Hostname mismatch"):
        opened(tmp_path / "config", trusting).list("Job")


def test_the_name_in_the_certificate_can_be_stated(tls_server: ApiServer, certificates: Path, tmp_path: Path):
    trusting = {"server": tls_server.url.replace("127.0.0.1", "localhost"), "tls-server-name": "cluster.example"}
    trusting["certificate-authority"] = str(certificates / "ca.crt")
    assert opened(tmp_path / "config", trusting).list("Job") == []


def test_a_check_that_is_switched_off_is_off_and_does_not_warn(tls_server: ApiServer, tmp_path: Path):
    assert opened(tmp_path / "config", {"server": tls_server.url, "insecure-skip-tls-verify": True}).list("Job") == []


@pytest.mark.parametrize("form", ["files", "data"])
def test_a_user_is_known_by_a_certificate(asking_server: ApiServer, certificates: Path, tmp_path: Path, form: str):
    trusting = {"server": asking_server.url, "certificate-authority-data": data(certificates / "ca.crt")}
    user: dict[str, Any] = {"client-certificate": "pki/alice.crt", "client-key": "pki/alice.key"}
    shutil.copytree(certificates, tmp_path / "kube" / "pki")
    if form == "data":
        files = {"client-certificate-data": "alice.crt", "client-key-data": "alice.key"}
        user = {key: data(certificates / file) for key, file in files.items()}
    assert opened(tmp_path / "kube" / "config", trusting, user).list("Job") == []


def test_a_plugin_may_give_a_certificate(asking_server: ApiServer, certificates: Path, tmp_path: Path):
    trusting = {"server": asking_server.url, "certificate-authority-data": data(certificates / "ca.crt")}
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {
            "clientCertificateData": (certificates / "alice.crt").read_text(),
            "clientKeyData": (certificates / "alice.key").read_text(),
        },
    }
    answer = tmp_path / "answer"
    answer.write_text(json.dumps(credential))
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "cat", "args": [str(answer)]}
    assert opened(tmp_path / "config", trusting, {"exec": plugin}).list("Job") == []


def test_a_user_without_the_certificate_that_is_asked_for_is_told(
    asking_server: ApiServer, certificates: Path, tmp_path: Path
):
    trusting = {"server": asking_server.url, "certificate-authority-data": data(certificates / "ca.crt")}
    with pytest.raises(SettingError) as caught:
        opened(tmp_path / "config", trusting).list("Job")
    told = str(caught.value)
    assert told.startswith(f"{asking_server.url} does not accept the certificate of the context a (")
    assert told.endswith("). Log in again as you do for kubectl.")


def test_a_server_that_breaks_off_the_handshake_is_tried_again(certificates: Path, tmp_path: Path):
    listener = socket.create_server(("127.0.0.1", 0))
    seen = []

    def hang_up() -> None:
        for _ in range(2):
            connection, _address = listener.accept()
            seen.append(connection.recv(10))
            connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    with listener, pytest.raises(UnavailableError) as caught:
        opened(tmp_path / "config", {"server": url}).list("Job")
    assert str(caught.value).startswith(f"{url} can't be reached to list jobs in default (")
    assert len(seen) == 2


def test_a_server_without_tls_is_told(api_server: ApiServer, tmp_path: Path):
    url = api_server.url.replace("http:", "https:")
    with pytest.raises(SettingError) as caught:
        opened(tmp_path / "config", {"server": url}).list("Job")
    assert str(caught.value).startswith(f"{url} does not speak TLS (")
    assert str(caught.value).endswith("). Look at server in the kubeconfig.")


# ── In a pod ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def account(tls_server: ApiServer, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pod's service account, and the variables that every pod has."""
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    shutil.copy(certificates / "ca.crt", folder / "ca.crt")
    (folder / "token").write_text(TOKEN)
    (folder / "namespace").write_text("team-a")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", str(urlsplit(tls_server.url).hostname))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(urlsplit(tls_server.url).port))
    return folder


def in_pod(account: Path, **settings: Any) -> Cluster:
    return connect(ClusterSettings(service_account=str(account), attempts=1, timeout_seconds=5, **settings))


def test_a_pod_uses_its_service_account(tls_server: ApiServer, account: Path):
    cluster = in_pod(account)
    assert cluster.list("Job") == []
    assert (cluster.namespace, cluster.server) == ("team-a", tls_server.url)


def test_a_namespace_that_is_stated_comes_before_that_of_the_pod(account: Path):
    assert in_pod(account, namespace="default").namespace == "default"


def test_a_kubeconfig_comes_before_the_service_account(api_server: ApiServer, account: Path, tmp_path: Path):
    file = api_server.kubeconfig(tmp_path / "config")
    assert in_pod(account, kubeconfig=str(file)).server == api_server.url


def test_a_token_that_was_exchanged_is_read_again(tls_server: ApiServer, account: Path):
    cluster = in_pod(account)
    tls_server.settings.token = "rotated"
    (account / "token").write_text("rotated")
    assert cluster.list("Job") == []
    assert [each.code for each in tls_server.requests] == [401, 200]


def test_a_pod_without_a_token_is_told(account: Path):
    (account / "token").unlink()
    with pytest.raises(SettingError) as caught:
        in_pod(account)
    assert str(caught.value) == (
        f"This pod has no token for the API server (Service token file does not exist. {account}). Give it a service "
        "account with automountServiceAccountToken: true, or name a kubeconfig with --kubeconfig."
    )


def test_a_token_of_a_pod_that_is_refused_is_told(tls_server: ApiServer, account: Path):
    (account / "token").write_text("wrong")
    with pytest.raises(SettingError) as caught:
        in_pod(account).list("Job")
    assert str(caught.value) == (
        f"{tls_server.url} does not accept the pod's service account (401: Unauthorized). "
        "Log in again as you do for kubectl, or choose another context with --context."
    )
