"""Storage with network faults and wrong settings: retries and error messages."""

import contextlib
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings
from topwork.errors import SettingError, UnavailableError
from topwork.redaction import redact, register_secrets

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
UNLIMITED = 1 << 40
AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)


class FaultyProxy:
    """A TCP proxy in front of the real server that breaks the first connections.

    `plan` has an entry per connection: the number of response bytes to pass on, or the bytes of a response to send.
    """

    def __init__(self, server: str, plan: list[int | bytes], tls: ssl.SSLContext | None = None) -> None:
        self._server = (urlsplit(server).hostname, urlsplit(server).port)
        self._plan, self._tls = plan, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                step = self._plan.pop(0) if self._plan else UNLIMITED
                threading.Thread(target=self._serve, args=(client, step), daemon=True).start()

    def _serve(self, client: socket.socket, step: int | bytes) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as resources:
            if self._tls:
                client = self._tls.wrap_socket(client, server_side=True)
            resources.callback(client.close)
            if isinstance(step, bytes):
                client.recv(1 << 16)
                client.sendall(step)
                return
            server = resources.enter_context(socket.create_connection(self._server))
            threading.Thread(target=self._forward, args=(client, server, UNLIMITED), daemon=True).start()
            self._forward(server, client, step)
            client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket, limit: int) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := source.recv(min(limit, 1 << 16))):
                target.sendall(data)
                limit -= len(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def faulty_proxy(s3_settings: StorageSettings) -> Iterator[Callable[..., FaultyProxy]]:
    with contextlib.ExitStack() as resources:

        def make(plan: list[int | bytes], tls: ssl.SSLContext | None = None) -> FaultyProxy:
            proxy = FaultyProxy(str(s3_settings.endpoint_url), plan, tls)
            resources.callback(proxy.close)
            return proxy

        yield make


@pytest.fixture
def no_aws_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove all AWS variables and files; returns the path where a config file can be written."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path / "aws-config"


def retries(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("topwork_storage_retries_total")


def test_requests_to_a_busy_server_are_retried_and_counted(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    metrics = Metrics()
    settings = replace(s3_settings, endpoint_url=faulty_proxy([BUSY, BUSY]).endpoint)
    assert Storage(storage.uri, settings, metrics).write("key", b"value") is True
    assert storage.read("key") == b"value"
    assert retries(metrics) == 2


def test_server_that_stays_busy_is_reported_as_unavailable(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    endpoint = faulty_proxy([BUSY] * 4).endpoint
    settings = replace(s3_settings, endpoint_url=endpoint, attempts=2)
    with pytest.raises(UnavailableError) as caught:
        Storage(storage.uri, settings).write("key", b"value")
    assert str(caught.value).startswith(f"{endpoint} failed for {storage.uri}/key after all retries (503: ")


def test_read_retries_a_truncated_response(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    data = bytes(range(256)) * 1000
    storage.write("key", data)
    metrics = Metrics()
    settings = replace(s3_settings, endpoint_url=faulty_proxy([2000, 100_000]).endpoint)
    assert Storage(storage.uri, settings, metrics).read("key") == data
    assert retries(metrics) == 2


@pytest.mark.parametrize("length", [b"37", b"many"])
def test_read_retries_a_truncated_not_found_response(
    length: bytes, storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    body = b"<Error><Code>NoSuchKey</Code></Error>"[:20]
    truncated = b"HTTP/1.1 404 Not Found\r\nContent-Length: %b\r\nConnection: close\r\n\r\n%b" % (length, body)
    storage.write("existing", b"value")
    proxied = Storage(storage.uri, replace(s3_settings, endpoint_url=faulty_proxy([truncated, truncated]).endpoint))
    assert proxied.read("existing") == b"value"
    proxied = Storage(storage.uri, replace(s3_settings, endpoint_url=faulty_proxy([truncated]).endpoint))
    assert proxied.read("missing") is None


def test_read_fails_if_every_response_is_truncated(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    storage.write("key", bytes(10_000))
    settings = replace(s3_settings, endpoint_url=faulty_proxy([2000] * 3).endpoint, attempts=2)
    with pytest.raises(UnavailableError, match=r"after all retries \(truncated response: "):
        Storage(storage.uri, settings).read("key")


def test_download_resumes_after_a_truncated_response(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy], tmp_path: Path
) -> None:
    data = bytes(range(256)) * 4000
    storage.write("key", data)
    # The first connection ends after its HEAD request, the next ones within the body.
    settings = replace(s3_settings, endpoint_url=faulty_proxy([UNLIMITED, 300_000, 300_000]).endpoint)
    expected = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert Storage(storage.uri, settings).download("key", tmp_path / "file", expected) == expected


def test_conditional_write_recognizes_its_own_object_after_a_lost_response(
    storage: Storage, s3_settings: StorageSettings, faulty_proxy: Callable[..., FaultyProxy]
) -> None:
    # The server handles the first request, but its response is lost; the second request finds an existing object.
    settings = replace(s3_settings, endpoint_url=faulty_proxy([1]).endpoint)
    assert Storage(storage.uri, settings).write("claim", b"mine", only_if_absent=True) is True
    assert storage.read("claim") == b"mine"


def test_missing_bucket_is_reported_with_its_endpoint(s3_settings: StorageSettings, tmp_path: Path) -> None:
    missing = Storage("s3://no-such-bucket/prefix", s3_settings)
    endpoint = s3_settings.endpoint_url
    message = (
        f"The bucket no-such-bucket does not exist at {endpoint}. Create it "
        f"(aws s3 mb s3://no-such-bucket --endpoint-url {endpoint}) "
        "or correct the storage URI, AWS_ENDPOINT_URL or AWS_REGION."
    )
    (tmp_path / "file").write_bytes(b"x")
    for operation in (
        missing.check,
        lambda: missing.read("key"),
        lambda: missing.write("key", b"x"),
        lambda: list(missing.list()),
        lambda: missing.upload(tmp_path / "file", "key"),
    ):
        with pytest.raises(SettingError) as caught:
            operation()
        assert str(caught.value) == message


def test_check_accepts_an_existing_bucket(storage: Storage) -> None:
    storage.check()


def test_wrong_secret_key_is_reported_with_its_variable(storage: Storage, s3_settings: StorageSettings) -> None:
    wrong = Storage(storage.uri, replace(s3_settings, secret_key="wrong-secret"))
    with pytest.raises(AccessError) as caught:
        wrong.check()
    assert str(caught.value) == (
        f"{s3_settings.endpoint_url} rejected the request signature. Check AWS_SECRET_ACCESS_KEY and AWS_REGION."
    )


def test_unknown_access_key_is_reported_with_its_variable(storage: Storage, s3_settings: StorageSettings) -> None:
    wrong = Storage(storage.uri, replace(s3_settings, access_key="NOBODY"))
    with pytest.raises(AccessError) as caught:
        wrong.check()
    assert str(caught.value) == (
        f"{s3_settings.endpoint_url} does not know the access key. Check AWS_ACCESS_KEY_ID and AWS_PROFILE."
    )


def test_missing_credentials_are_reported_with_the_variables(
    s3_settings: StorageSettings, no_aws_configuration: Path
) -> None:
    bare = Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url))
    with pytest.raises(SettingError) as caught:
        bare.check()
    assert str(caught.value) == (
        "No credentials for s3://topwork-test: expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a "
        f"service account with web identity, but found none of these. Set the credentials for "
        f"{s3_settings.endpoint_url}."
    )


def test_incomplete_credentials_are_reported_with_the_missing_variable(
    s3_settings: StorageSettings, no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "only")
    with pytest.raises(SettingError, match="but found credentials without AWS_SECRET_ACCESS_KEY"):
        Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url))


def test_missing_profile_is_reported(no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    with pytest.raises(SettingError, match=r"^AWS_PROFILE names a profile that does not exist: .*\(nowhere\)"):
        Storage("s3://topwork-test")


def test_unreachable_credential_service_is_reported_as_unavailable(
    no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/role")
    with pytest.raises(
        UnavailableError, match=r"^The credentials for storage could not be retrieved: .* container-role"
    ):
        Storage("s3://topwork-test")


def test_web_identity_without_a_role_is_reported(no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", __file__)
    with pytest.raises(SettingError, match=r"^The AWS variables or files for storage are invalid: .*AWS_ROLE_ARN"):
        Storage("s3://topwork-test")


def test_endpoint_that_is_not_a_url_is_reported(no_aws_configuration: Path) -> None:
    with pytest.raises(SettingError, match=r"^The storage endpoint is not a URL: .*minio.*AWS_ENDPOINT_URL\.$"):
        Storage("s3://topwork-test", StorageSettings(endpoint_url="minio:9000"))


def test_closed_port_is_reported_as_unavailable(s3_settings: StorageSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    metrics = Metrics()
    unreachable = Storage("s3://topwork-test", replace(s3_settings, endpoint_url=endpoint, attempts=2), metrics)
    with pytest.raises(
        UnavailableError, match=rf"^{endpoint} can't be reached for s3://topwork-test after all retries"
    ):
        unreachable.check()
    assert retries(metrics) == 1


def test_server_that_never_responds_is_reported_as_unavailable(s3_settings: StorageSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = replace(s3_settings, endpoint_url=endpoint, attempts=1, read_timeout_seconds=0.3)
        with pytest.raises(UnavailableError, match="can't be reached"):
            Storage("s3://topwork-test", settings).check()
        assert count_connections(silent) == 1
        # Only a truncated body causes requests beyond the configured attempts.
        with pytest.raises(UnavailableError):
            Storage("s3://topwork-test", replace(settings, attempts=2)).read("key")
        assert count_connections(silent) == 2


def count_connections(server: socket.socket) -> int:
    """Count the connections since the last call."""
    server.setblocking(False)
    for number in count():
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return number
    raise AssertionError


def test_endpoint_and_credentials_are_read_from_aws_variables(
    storage: Storage, s3_settings: StorageSettings, no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3_settings.endpoint_url))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_settings.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_settings.secret_key))
    storage.write("key", b"value")
    assert Storage(storage.uri).read("key") == b"value"


def test_endpoint_and_credentials_are_read_from_a_profile(
    storage: Storage, s3_settings: StorageSettings, no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_aws_configuration.write_text(
        f"[profile lab]\nendpoint_url = {s3_settings.endpoint_url}\naws_access_key_id = {s3_settings.access_key}\n"
        f"aws_secret_access_key = {s3_settings.secret_key}\nregion = eu-central-1\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write("key", b"value")
    assert Storage(storage.uri).read("key") == b"value"
    # Its secret key is redacted in logs.
    assert redact(f"the key is {s3_settings.secret_key}.") == "the key is ***."
    register_secrets((), "storage credentials")


@pytest.mark.parametrize(
    ("endpoint", "path_style", "url"),
    [
        ("https://minio.example.com", None, "https://minio.example.com/photos/"),
        ("https://oss.example.com", False, "https://photos.oss.example.com/"),
        (None, None, "https://photos.s3.amazonaws.com/"),
        (None, True, "https://s3.amazonaws.com/photos/"),
    ],
)
def test_path_style_is_used_except_for_amazon(
    no_aws_configuration: Path, endpoint: str | None, path_style: bool | None, url: str
) -> None:
    settings = StorageSettings(endpoint_url=endpoint, access_key="a", secret_key="b", path_style=path_style)
    client = Storage("s3://photos", settings)._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == f"{url}k"


def test_endpoint_from_a_variable_uses_path_style(no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
    client = Storage("s3://photos", StorageSettings(access_key="a", secret_key="b"))._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == "https://minio.example.com/photos/k"


def test_addressing_style_of_aws_files_has_priority(
    no_aws_configuration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_aws_configuration.write_text(
        "[default]\nendpoint_url = https://oss.example.com\ns3 =\n    addressing_style = virtual\n"
    )
    client = Storage("s3://photos", StorageSettings(access_key="a", secret_key="b"))._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == "https://photos.oss.example.com/k"


def test_checksums_can_be_disabled_with_a_variable(
    storage: Storage, s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    unchecked = Storage(storage.uri, s3_settings)
    sent: list[dict[str, str]] = []
    unchecked._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(dict(request.headers)))
    (tmp_path / "file").write_bytes(b"12345")
    unchecked.write("small", b"x")
    entry = unchecked.upload(tmp_path / "file", "file")
    assert [name for headers in sent for name in headers if "checksum" in name.lower()] == []
    assert unchecked.download("file", tmp_path / "copy", entry) == entry


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl: apt-get install openssl")
def test_private_certificate_authority_is_trusted_if_configured(
    storage: Storage,
    s3_settings: StorageSettings,
    faulty_proxy: Callable[..., FaultyProxy],
    no_aws_configuration: Path,
    tmp_path: Path,
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=s3"
    options = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *options], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    settings = replace(s3_settings, endpoint_url=faulty_proxy([], tls).endpoint, attempts=1)
    with pytest.raises(SettingError, match=r"certificate of https://127\.0\.0\.1:\d+ is not trusted.*AWS_CA_BUNDLE"):
        Storage(storage.uri, settings).check()
    trusted = Storage(storage.uri, replace(settings, ca_bundle=str(certificate)))
    assert trusted.write("key", b"value") is True
    assert trusted.read("key") == b"value"
    (tmp_path / "file").write_bytes(b"12345")
    assert trusted.upload(tmp_path / "file", "file").size == 5
    for variable in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, str(certificate))
            assert Storage(storage.uri, settings).read("key") == b"value"


def test_requests_use_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(connection: socket.socket) -> bytes:
        with connection:
            request = connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return request

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        received = pool.submit(lambda: accept(server.accept()[0]))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "")
        settings = StorageSettings(endpoint_url="http://minio.storage.svc", access_key="a", secret_key="b")
        assert Storage("s3://photos", settings).size("key") is None
        assert received.result().startswith(b"HEAD http://minio.storage.svc/photos/key HTTP/1.1\r\n")
