"""`topwork stage` and its storage: what is wrong with the Secret is named, and roles and authorities are found."""

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
    ("variables", "code", "said"),
    [
        (NO_KEYS, 2, MISSING.replace("{names}", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
        ({"AWS_SECRET_ACCESS_KEY": None}, 2, MISSING.replace("{names}", "AWS_SECRET_ACCESS_KEY")),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, 2, "{endpoint} does not know the access key. Check AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, 2, WRONG_SECRET),
        ({"AWS_SECRET_ACCESS_KEY": "secret\n"}, 2, "AWS_SECRET_ACCESS_KEY begins or ends with a space or a line break"),
        ({"AWS_CA_BUNDLE": "/nowhere.pem"}, 2, "AWS_CA_BUNDLE names /nowhere.pem, which does not exist in the container"),
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
def test_what_is_wrong_with_the_secret_is_named(pod, write, storage, proxy, variables, code, said):
    with proxy(silent=True) as port:
        # A metadata service that never answers, as where a network policy swallows the requests to it.
        metadata = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}/"}
        began = time.monotonic()
        ended, ending, process = pod.run("pull", write(), **metadata, **variables)
        assert time.monotonic() - began < 30
    assert (ended, ending.outcome, ending.exit_code) == (code, "failed", code), process.output
    assert ending.error.startswith(said.format(uri=storage.uri, endpoint=pod.variables["AWS_ENDPOINT_URL"])), (
        ending.error
    )
    assert process.lines[-1]["message"] == ending.error
    assert pod.variables["AWS_SECRET_ACCESS_KEY"] not in process.output + ending.error


def test_a_missing_bucket_is_named(pod, write):
    code, ending, _ = pod.run("pull", write(storage="s3://no-such-bucket/x"))
    assert code == 2
    assert ending.error.startswith("The bucket no-such-bucket does not exist at http://127.0.0.1:")


def test_a_pod_without_any_variable_says_which_the_secret_takes(pod, write, storage):
    code, ending, _ = pod.run(
        "pull", write(), **NO_KEYS | {"AWS_ENDPOINT_URL": None, "AWS_EC2_METADATA_DISABLED": "true"}
    )
    names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    more = (
        f"Add {names} and, for a server that isn't Amazon's, AWS_ENDPOINT_URL to the Secret topwork-s3 in the pod's"
    )
    assert code == 2
    assert ending.error.startswith(f"No credentials for {storage.uri}: the container lacks {names}. {more}")


def test_credentials_of_the_node_are_found(pod, write, s3_settings):
    """What boto3 finds by itself, here the service that answers a pod's or a task's role, works as well."""
    keys = {"AccessKeyId": s3_settings.access_key, "SecretAccessKey": s3_settings.secret_key}
    answer = json.dumps({**keys, "Token": "", "Expiration": "2099-01-01T00:00:00Z"}).encode()
    with json_server(answer) as port:
        role = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"http://127.0.0.1:{port}/role"}
        code, _, process = pod.run("pull", write(), **NO_KEYS, **role)
    assert code == 0, process.output


@contextmanager
def json_server(answer: bytes) -> Iterator[int]:
    """Answer every request with the same JSON."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def tls(tmp_path) -> tuple[ssl.SSLContext, Path]:
    """A server's context for localhost, and the file of the authority that vouches for it."""
    folder = tmp_path / "tls"
    folder.mkdir()
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context, folder / "ca.crt"


def test_storage_with_a_certificate_of_an_authority_of_ones_own(pod, write, proxy, tls):
    context, authority = tls
    job = write()
    with proxy(tls=context) as port:
        endpoint = {"AWS_ENDPOINT_URL": f"https://localhost:{port}"}
        code, ending, _ = pod.run("pull", job, **endpoint)
        assert (code, "is not trusted" in ending.error) == (2, True)
        code, ending, _ = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=f"{authority}.missing")
        assert (code, "spec.compute.extraCA names a ConfigMap" in ending.error) == (2, True)
        code, _, process = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=str(authority))
        assert code == 0, process.output
