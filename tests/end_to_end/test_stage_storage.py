"""`topwork stage` and its storage: errors in the Secret, credentials from roles, and custom certificate authorities."""

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": None}
MISSING = (
    "No credentials for {uri}: the container lacks {names}. Add {names} to the Secret topwork-s3 in the pod's "
    "namespace (kubectl create secret generic topwork-s3 --from-literal=AWS_ACCESS_KEY_ID=…), or set "
    "spec.compute.serviceAccountName to a service account that has access to the bucket."
)
WRONG_SECRET = "{endpoint} rejected the request signature. Check AWS_SECRET_ACCESS_KEY and AWS_REGION."


@pytest.mark.parametrize(
    ("variables", "code", "expected"),
    [
        (NO_KEYS, 2, MISSING.replace("{names}", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
        ({"AWS_SECRET_ACCESS_KEY": None}, 2, MISSING.replace("{names}", "AWS_SECRET_ACCESS_KEY")),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, 75, "{endpoint} does not know the access key. Check AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, 75, WRONG_SECRET),
        ({"AWS_SECRET_ACCESS_KEY": "secret\n"}, 2, "AWS_SECRET_ACCESS_KEY begins or ends with a space or a line break"),
        (
            {"AWS_CA_BUNDLE": "/nowhere.pem"},
            2,
            "AWS_CA_BUNDLE names /nowhere.pem, which does not exist in the container",
        ),
        (
            NO_KEYS | {"AWS_WEB_IDENTITY_TOKEN_FILE": __file__},
            2,
            "The AWS variables or files for storage are invalid: ",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            75,
            "http://127.0.0.1:9 can't be reached for {uri} after all retr",
        ),
        (
            {"AWS_ENDPOINT_URL": "https://nowhere.invalid"},
            75,
            "https://nowhere.invalid can't be reached for {uri} after",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://s3.example.com"},
            2,
            "The storage endpoint (AWS_ENDPOINT_URL) is plain HTTP to",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://nowhere.invalid", "TOPWORK_ALLOW_HTTP": "a.example,nowhere.invalid"},
            75,
            "http://nowhere.invalid can't be reached for {uri} after",
        ),
    ],
    ids=["none", "half", "key", "secret", "line-break", "bundle", "no-role", "refused", "no-name", "plain", "allowed"],
)
def test_error_in_the_secret_is_reported(pod, write_job, storage, proxy, variables, code, expected):
    with proxy(silent=True) as port:
        # A metadata service that never responds, as behind a network policy that drops its traffic.
        metadata = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}/"}
        started = time.monotonic()
        exit_code, message, container = pod.run("pull", write_job(), **metadata, **variables)
        assert time.monotonic() - started < 30
    assert (exit_code, message.outcome, message.exit_code) == (code, "failed", code), container.output
    assert message.error.startswith(expected.format(uri=storage.uri, endpoint=pod.variables["AWS_ENDPOINT_URL"])), (
        message.error
    )
    assert container.lines[-1]["message"] == message.error
    assert pod.variables["AWS_SECRET_ACCESS_KEY"] not in container.output + message.error


def test_missing_bucket_is_reported(pod, write_job):
    code, message, _ = pod.run("pull", write_job(storage="s3://no-such-bucket/x"))
    assert code == 2
    assert message.error.startswith("The bucket no-such-bucket does not exist at http://127.0.0.1:")


def test_pod_without_aws_variables_lists_the_keys_for_the_secret(pod, write_job, storage):
    code, message, _ = pod.run(
        "pull", write_job(), **NO_KEYS | {"AWS_ENDPOINT_URL": None, "AWS_EC2_METADATA_DISABLED": "true"}
    )
    names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    fix = f"Add {names} and, for a server that isn't Amazon's, AWS_ENDPOINT_URL to the Secret topwork-s3 in the pod's"
    assert code == 2
    assert message.error.startswith(f"No credentials for {storage.uri}: the container lacks {names}. {fix}")


def test_credentials_from_the_container_role_are_used(pod, write_job, s3_settings):
    """Credentials can also come from another provider of boto3; here, from a container credentials endpoint."""
    keys = {"AccessKeyId": s3_settings.access_key, "SecretAccessKey": s3_settings.secret_key}
    response = json.dumps({**keys, "Token": "", "Expiration": "2099-01-01T00:00:00Z"}).encode()
    with json_server(response) as port:
        role = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{port}/role"}
        code, _, container = pod.run("pull", write_job(), **NO_KEYS, **role)
    assert code == 0, container.output


@contextmanager
def json_server(response: bytes) -> Iterator[int]:
    """Serve the same JSON for every request."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(response)))
            self.end_headers()
            self.wfile.write(response)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def tls(tmp_path) -> tuple[ssl.SSLContext, Path]:
    """TLS context of a server on localhost, and the certificate of its authority."""
    directory = tmp_path / "tls"
    directory.mkdir()
    (directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")
    return context, directory / "ca.crt"


def test_storage_with_a_custom_certificate_authority(pod, write_job, proxy, tls):
    context, authority = tls
    job = write_job()
    with proxy(tls=context) as port:
        endpoint = {"AWS_ENDPOINT_URL": f"https://localhost:{port}"}
        code, message, _ = pod.run("pull", job, **endpoint)
        assert (code, "is not trusted" in message.error) == (2, True)
        code, message, _ = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=f"{authority}.missing")
        assert (code, "spec.compute.extraCA names a ConfigMap" in message.error) == (2, True)
        code, _, container = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=str(authority))
        assert code == 0, container.output
