"""Storage behind a bad network and with wrong settings: what is tried again, and what the user is told."""

import contextlib
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, StorageSettings
from topwork.errors import SettingError, UnavailableError
from topwork.redaction import hide, without_secrets

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
WHOLE = 1 << 40
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


class Front:
    """A TCP port before the real server that spoils the first connections: `plan` holds bytes passed on, or BUSY."""

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
                step = self._plan.pop(0) if self._plan else WHOLE
                threading.Thread(target=self._serve, args=(client, step), daemon=True).start()

    def _serve(self, client: socket.socket, step: int | bytes) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            if self._tls:
                client = self._tls.wrap_socket(client, server_side=True)
            opened.callback(client.close)
            if isinstance(step, bytes):
                client.recv(1 << 16)
                client.sendall(step)
                return
            server = opened.enter_context(socket.create_connection(self._server))
            threading.Thread(target=self._pass, args=(client, server, WHOLE), daemon=True).start()
            self._pass(server, client, step)
            client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, limit: int) -> None:
        with contextlib.suppress(OSError):
            while limit > 0 and (data := source.recv(min(limit, 1 << 16))):
                target.sendall(data)
                limit -= len(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def front(s3_settings: StorageSettings) -> Iterator[Callable[..., Front]]:
    with contextlib.ExitStack() as opened:

        def make(plan: list[int | bytes], tls: ssl.SSLContext | None = None) -> Front:
            made = Front(str(s3_settings.endpoint_url), plan, tls)
            opened.callback(made.close)
            return made

        yield make


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No AWS variable and no AWS file; returns the place of the config file."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path / "aws-config"


def retries(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("topwork_storage_retries_total")


def test_a_busy_server_is_asked_again_and_the_retries_are_counted(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    metrics = Metrics()
    settings = replace(s3_settings, endpoint_url=front([BUSY, BUSY]).endpoint)
    assert Storage(storage.uri, settings, metrics).write("key", b"value") is True
    assert storage.read("key") == b"value"
    assert retries(metrics) == 2


def test_a_server_that_stays_busy_is_unavailable(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    endpoint = front([BUSY] * 4).endpoint
    settings = replace(s3_settings, endpoint_url=endpoint, attempts=2)
    with pytest.raises(UnavailableError) as caught:
        Storage(storage.uri, settings).write("key", b"value")
    assert str(caught.value).startswith(f"{endpoint} failed for {storage.uri}/key after all retries (503: ")


def test_an_answer_that_breaks_off_is_read_again(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    data = bytes(range(256)) * 1000
    storage.write("key", data)
    metrics = Metrics()
    settings = replace(s3_settings, endpoint_url=front([2000, 100_000]).endpoint)
    assert Storage(storage.uri, settings, metrics).read("key") == data
    assert retries(metrics) == 2


@pytest.mark.parametrize("length", [b"37", b"many"])
def test_that_an_object_is_missing_is_believed_to_a_whole_answer_only(
    length: bytes, storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    body = b"<Error><Code>NoSuchKey</Code></Error>"[:20]
    half = b"HTTP/1.1 404 Not Found\r\nContent-Length: %b\r\nConnection: close\r\n\r\n%b" % (length, body)
    storage.write("there", b"value")
    through = Storage(storage.uri, replace(s3_settings, endpoint_url=front([half, half]).endpoint))
    assert through.read("there") == b"value"
    through = Storage(storage.uri, replace(s3_settings, endpoint_url=front([half]).endpoint))
    assert through.read("missing") is None


def test_an_answer_that_always_breaks_off_is_unavailable(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    storage.write("key", bytes(10_000))
    settings = replace(s3_settings, endpoint_url=front([2000] * 3).endpoint, attempts=2)
    with pytest.raises(UnavailableError, match=r"after all retries \(the answer broke off: "):
        Storage(storage.uri, settings).read("key")


def test_a_download_that_breaks_off_goes_on_and_is_whole(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front], tmp_path: Path
) -> None:
    data = bytes(range(256)) * 4000
    storage.write("key", data)
    # The first connection survives its HEAD only, the next ends within the body.
    settings = replace(s3_settings, endpoint_url=front([WHOLE, 300_000, 300_000]).endpoint)
    expected = FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert Storage(storage.uri, settings).download("key", tmp_path / "file", expected) == expected


def test_a_claim_whose_answer_was_lost_is_known_as_ones_own(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front]
) -> None:
    # The request goes through, its answer does not; the second request is told that the object is there already.
    settings = replace(s3_settings, endpoint_url=front([1]).endpoint)
    assert Storage(storage.uri, settings).write("claim", b"mine", only_if_absent=True) is True
    assert storage.read("claim") == b"mine"


def test_a_missing_bucket_is_named_with_its_endpoint(s3_settings: StorageSettings, tmp_path: Path) -> None:
    missing = Storage("s3://no-such-bucket/prefix", s3_settings)
    endpoint = s3_settings.endpoint_url
    sentence = (
        f"The bucket no-such-bucket does not exist at {endpoint}. Make it "
        f"(aws s3 mb s3://no-such-bucket --endpoint-url {endpoint}) "
        "or correct the storage URI, AWS_ENDPOINT_URL or AWS_REGION."
    )
    (tmp_path / "file").write_bytes(b"x")
    for use in (
        missing.check,
        lambda: missing.read("key"),
        lambda: missing.write("key", b"x"),
        lambda: list(missing.list()),
        lambda: missing.upload(tmp_path / "file", "key"),
    ):
        with pytest.raises(SettingError) as caught:
            use()
        assert str(caught.value) == sentence


def test_a_bucket_that_is_there_passes_the_check(storage: Storage) -> None:
    storage.check()


def test_a_wrong_secret_points_to_its_variable(storage: Storage, s3_settings: StorageSettings) -> None:
    wrong = Storage(storage.uri, replace(s3_settings, secret_key="wrong-secret"))
    with pytest.raises(SettingError) as caught:
        wrong.check()
    assert str(caught.value) == (
        f"{s3_settings.endpoint_url} refused the signature. Look at AWS_SECRET_ACCESS_KEY and AWS_REGION."
    )


def test_an_unknown_access_key_points_to_its_variable(storage: Storage, s3_settings: StorageSettings) -> None:
    wrong = Storage(storage.uri, replace(s3_settings, access_key="NOBODY"))
    with pytest.raises(SettingError) as caught:
        wrong.check()
    assert str(caught.value) == (
        f"{s3_settings.endpoint_url} does not know the access key. Look at AWS_ACCESS_KEY_ID and AWS_PROFILE."
    )


def test_no_credentials_at_all_name_the_variables(s3_settings: StorageSettings, no_aws: Path) -> None:
    bare = Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url))
    with pytest.raises(SettingError) as caught:
        bare.check()
    assert str(caught.value) == (
        "No credentials for s3://topwork-test: expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a "
        f"service account with web identity, and found none of these. Set them for {s3_settings.endpoint_url}."
    )


def test_half_of_the_credentials_is_named(
    s3_settings: StorageSettings, no_aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "only")
    with pytest.raises(SettingError, match="and found them without AWS_SECRET_ACCESS_KEY"):
        Storage("s3://topwork-test", StorageSettings(endpoint_url=s3_settings.endpoint_url))


def test_a_profile_that_is_not_there_is_named(no_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nowhere")
    with pytest.raises(SettingError, match=r"^AWS_PROFILE names a profile that is not there: .*\(nowhere\)"):
        Storage("s3://topwork-test")


def test_a_role_whose_agent_is_down_is_worth_another_try(no_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/role")
    with pytest.raises(UnavailableError, match=r"^The credentials for storage could not be fetched: .* container-role"):
        Storage("s3://topwork-test")


def test_a_web_identity_without_its_role_is_named(no_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", __file__)
    with pytest.raises(SettingError, match=r"^The AWS variables or files can't be used for storage: .*AWS_ROLE_ARN"):
        Storage("s3://topwork-test")


def test_an_endpoint_that_is_no_url_is_named(no_aws: Path) -> None:
    with pytest.raises(SettingError, match=r"^The endpoint of storage is not a URL: .*minio.*AWS_ENDPOINT_URL\.$"):
        Storage("s3://topwork-test", StorageSettings(endpoint_url="minio:9000"))


def test_a_closed_port_is_unavailable(s3_settings: StorageSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    metrics = Metrics()
    gone = Storage("s3://topwork-test", replace(s3_settings, endpoint_url=endpoint, attempts=2), metrics)
    with pytest.raises(
        UnavailableError, match=rf"^{endpoint} can't be reached for s3://topwork-test after all retries"
    ):
        gone.check()
    assert retries(metrics) == 1


def test_a_server_that_never_answers_is_unavailable(s3_settings: StorageSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = replace(s3_settings, endpoint_url=endpoint, attempts=1, read_timeout_seconds=0.3)
        with pytest.raises(UnavailableError, match="can't be reached"):
            Storage("s3://topwork-test", settings).check()
        assert connections(silent) == 1
        # Only a body that breaks off is asked for again beside the attempts of a request.
        with pytest.raises(UnavailableError):
            Storage("s3://topwork-test", replace(settings, attempts=2)).read("key")
        assert connections(silent) == 2


def connections(server: socket.socket) -> int:
    """How many have come since this was last asked."""
    server.setblocking(False)
    for number in count():
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return number
    raise AssertionError


def test_endpoint_and_credentials_come_from_the_aws_variables(
    storage: Storage, s3_settings: StorageSettings, no_aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3_settings.endpoint_url))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_settings.access_key))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", str(s3_settings.secret_key))
    storage.write("key", b"value")
    assert Storage(storage.uri).read("key") == b"value"


def test_endpoint_and_credentials_come_from_a_profile(
    storage: Storage, s3_settings: StorageSettings, no_aws: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_aws.write_text(
        f"[profile lab]\nendpoint_url = {s3_settings.endpoint_url}\naws_access_key_id = {s3_settings.access_key}\n"
        f"aws_secret_access_key = {s3_settings.secret_key}\nregion = eu-central-1\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write("key", b"value")
    assert Storage(storage.uri).read("key") == b"value"
    # Nobody reads it in a log, either.
    assert without_secrets(f"the key is {s3_settings.secret_key}.") == "the key is ***."
    hide((), "storage credentials")


@pytest.mark.parametrize(
    ("endpoint", "path_style", "url"),
    [
        ("https://minio.example.com", None, "https://minio.example.com/photos/"),
        ("https://oss.example.com", False, "https://photos.oss.example.com/"),
        (None, None, "https://photos.s3.amazonaws.com/"),
        (None, True, "https://s3.amazonaws.com/photos/"),
    ],
)
def test_the_bucket_stands_in_the_path_but_at_amazon(
    no_aws: Path, endpoint: str | None, path_style: bool | None, url: str
) -> None:
    settings = StorageSettings(endpoint_url=endpoint, access_key="a", secret_key="b", path_style=path_style)
    client = Storage("s3://photos", settings)._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == f"{url}k"


def test_a_variable_for_the_endpoint_means_path_style_too(no_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
    client = Storage("s3://photos", StorageSettings(access_key="a", secret_key="b"))._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == "https://minio.example.com/photos/k"


def test_the_style_of_the_aws_files_holds(no_aws: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_aws.write_text("[default]\nendpoint_url = https://oss.example.com\ns3 =\n    addressing_style = virtual\n")
    client = Storage("s3://photos", StorageSettings(access_key="a", secret_key="b"))._client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": "photos", "Key": "k"})
    assert signed.split("?")[0] == "https://photos.oss.example.com/k"


def test_a_server_without_checksums_is_served_without(
    storage: Storage, s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    plain = Storage(storage.uri, s3_settings)
    sent: list[dict[str, str]] = []
    plain._client.meta.events.register("before-send.s3", lambda request, **_: sent.append(dict(request.headers)))
    (tmp_path / "file").write_bytes(b"12345")
    plain.write("small", b"x")
    entry = plain.upload(tmp_path / "file", "file")
    assert [name for headers in sent for name in headers if "checksum" in name.lower()] == []
    assert plain.download("file", tmp_path / "copy", entry) == entry


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate: apt-get install openssl")
def test_an_own_certificate_authority_is_trusted_when_it_is_named(
    storage: Storage, s3_settings: StorageSettings, front: Callable[..., Front], no_aws: Path, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=s3"
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made.split(), *named], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    settings = replace(s3_settings, endpoint_url=front([], tls).endpoint, attempts=1)
    with pytest.raises(SettingError, match=r"certificate of https://127\.0\.0\.1:\d+ is not trusted.*AWS_CA_BUNDLE"):
        Storage(storage.uri, settings).check()
    trusting = Storage(storage.uri, replace(settings, ca_bundle=str(certificate)))
    assert trusting.write("key", b"value") is True
    assert trusting.read("key") == b"value"
    (tmp_path / "file").write_bytes(b"12345")
    assert trusting.upload(tmp_path / "file", "file").size == 5
