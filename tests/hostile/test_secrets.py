"""Secrets in every possible input: none appears in a log, an error, metrics or storage."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from topwork.cli import configure_process
from topwork.cli.runtime.environment import register_environment_secrets
from topwork.cli.runtime.logging import LogFormat, configure_logging
from topwork.clients.s3.storage import Storage, create_bucket
from topwork.data.images.image_validation import Rejection
from topwork.data.sources import open_source
from topwork.redaction import redact, register_secrets
from topwork.spec.dataset import DatasetSource
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.problems import InvalidSpecError

KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SIGNATURE = "fe5f80f77d5fa3beca038a248ff027d0445342fe2855ddc963176630326f1024"
ID = "AKIAIOSFODNN7EXAMPLE"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"

EXAMPLES = [
    (f"https://ada:{SIGNATURE}@proxy.example:3128/x", "https://***@proxy.example:3128/x"),
    (f"https://b.s3.amazonaws.com/a.zip?X-Amz-Signature={SIGNATURE}&x=1", None),
    (f"https://b.s3.amazonaws.com/a.zip?X-Amz-Credential={ID}%2F20260101&X-Amz-Security-Token=abc%2Fdef", None),
    (f"https://a.blob.core.windows.net/c/a.zip?sv=2024&sig={SIGNATURE}", None),
    (f"https://storage.googleapis.com/a?X-Goog-Signature={SIGNATURE}", None),
    (f"https://d.cloudfront.net/a.zip?Expires=1&Signature={SIGNATURE}&Key-Pair-Id=APKAEIBAERJR2EXAMPLE", None),
    (f"https://host/a?access_token={SIGNATURE}#id_token={SIGNATURE}", None),
    (f"AWS4-HMAC-SHA256 Credential={ID}/20260101/us-east-1/s3, Signature={SIGNATURE}", None),
    (f"{{'Authorization': 'Bearer {SIGNATURE}'}}", None),
    (f"The key {ID} is not known.", "The key *** is not known."),
    (f"refused {JWT}", "refused ***"),
    (f"hf_{'a' * 34} and ghp_{'b' * 36}", "*** and ***"),
    (f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}\n-----END RSA PRIVATE KEY-----", "***"),
]


@pytest.mark.parametrize(("text", "expected"), EXAMPLES, ids=[str(number) for number in range(len(EXAMPLES))])
def test_text_that_looks_like_a_secret_is_redacted(text, expected):
    redacted = redact(text)
    assert expected in (redacted, None)
    for secret in (KEY, SIGNATURE, ID, JWT, "APKAEIBAERJR2EXAMPLE", "abc%2Fdef"):
        assert secret not in redacted


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix/a.zip has 3 images",
        "https://host/a.zip?id=1&version=2",
        "transfer epoch 1/2  loss 0.3  accuracy 0.9",
        "Set AWS_SECRET_ACCESS_KEY or AWS_SESSION_TOKEN in the Secret topwork-s3.",
        "mail ada@example.com, s3://b/c@d",
        "cat/IMG_20240101_AKIA.jpg",
    ],
)
def test_text_without_secrets_is_unchanged(text):
    assert redact(text) == text


@pytest.fixture
def environment_secrets():
    """Register secret values of an environment while a test runs."""
    environment = {
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr",
        "WANDB_API_KEY": "0123456789abcdef",
        "https_proxy": "http://ada:s3cr3t-of-ada@proxy:3128",
        "AWS_ACCESS_KEY_ID": "topwork",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token",
        "SHORT_PASSWORD": "a",
    }
    register_environment_secrets(environment)
    yield environment
    register_secrets((), "environment")


def test_values_of_secret_variables_are_redacted_in_every_spelling(environment_secrets):
    text = f"{KEY} wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCYEXAMPLEKEY FwoGZXIvYXdzEJr 0123456789abcdef s3cr3t-of-ada"
    assert redact(text) == "*** *** *** *** ***"
    harmless = "topwork reads /var/run/secrets/token as a user"
    assert redact(harmless) == harmless


def test_log_lines_names_and_reasons_are_redacted(environment_secrets, tmp_path):
    log_output = io.StringIO()
    for log_format in LogFormat:
        configure_logging(log_format, log_output)
        structlog.get_logger("topwork").info(
            f"fetched with {KEY}", uri=f"https://a:{KEY}@b/c", path=Path(KEY), names=[KEY], token="x FwoGZXIvYXdzEJr"
        )
        structlog.get_logger("topwork").error("failed", exc_info=KeyError(KEY))
    assert log_output.getvalue().count("***") == 12
    assert not any(secret in log_output.getvalue() for secret in (KEY, "FwoGZXIvYXdzEJr"))
    assert str(Rejection("missing", f"{KEY} is not there")) == "('missing', '*** is not there')"
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / f"{SIGNATURE} sig={SIGNATURE}.jpg").write_bytes(b"one")
    source = open_source(
        DatasetSource.model_validate({"folder": {"uri": str(tmp_path)}}), SimpleNamespace(storage=None)
    )
    (item,) = source.images("train")
    assert (item.name, item.read()) == (f"cat/{SIGNATURE} sig=***", b"one")


def test_library_logs_are_redacted(capsys, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "a-secret-of-mine")
    try:
        configure_process()
        logging.getLogger("urllib3").warning("Retrying %s: %s", "/?X-Amz-Signature=" + SIGNATURE, "a-secret-of-mine")
    finally:
        register_secrets((), "environment")
    assert capsys.readouterr().err.endswith(" Retrying /?X-Amz-Signature=*** *** [urllib3]\n")


SCRIPT = """
import logging, threading, weakref
from topwork.cli import configure_process
configure_process()
{statement}

def fail(*_):
    raise KeyError("a-secret-of-mine")

thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
target = threading.Event()
ref = weakref.ref(target, fail)
del target
try:
    fail()
except KeyError:
    logging.getLogger("library").exception("It failed")
"""
MESSAGES = ("Exception in thread worker", "Exception ignored in: <function fail", "It failed")


def run_failing_script(statement: str = "") -> str:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement=statement)],
        env={**os.environ, "MY_SECRET": "a-secret-of-mine"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a-secret-of-mine" not in process.stdout + process.stderr
    return process.stderr


def test_tracebacks_of_threads_callbacks_and_libraries_are_redacted():
    output = run_failing_script()
    assert output.count("KeyError: '***'") == 3
    assert all(message in output for message in MESSAGES)


def test_tracebacks_are_json_in_a_container():
    output = run_failing_script(
        "from pathlib import Path; from topwork.cli.runtime.container import Container; Container('pull', Path('log'))"
    )
    lines = [json.loads(line) for line in output.splitlines()]
    assert all(line["message"].startswith(start) for line, start in zip(lines, MESSAGES, strict=True))
    assert all(line["traceback"].endswith("KeyError: '***'") for line in lines)


@pytest.mark.parametrize(
    "uri",
    [
        f"https://host/a.zip?X-Amz-Signature={SIGNATURE}",
        f"https://host/a.zip?sv=1&sig={SIGNATURE}",
        f"https://host/a.zip?Key-Pair-Id={SIGNATURE}",
        f"https://host/a.zip#access_token={SIGNATURE}",
        f"https://ada:{SIGNATURE}@host/a.zip",
        f"s3://key:{SIGNATURE}@bucket/a.zip",
    ],
)
def test_spec_with_a_secret_is_rejected_without_showing_it(uri):
    """The URI would be stored next to the model and would affect the name of the run."""
    text = f"apiVersion: topwork.dev/v1alpha1\nspec:\n  dataset:\n    source:\n      archive:\n        uri: {uri}\n"
    with pytest.raises(InvalidSpecError, match="but specs are stored and shared") as raised:
        read_text(text, "job.yaml")
    assert SIGNATURE not in str(raised.value)


class MetricsReader(threading.Thread):
    """Reads the metrics page of a process once its port is logged."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        super().__init__(daemon=True)
        self.page = ""
        self._process, self._log = process, log

    def run(self) -> None:
        while self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                if '"metrics"' in line and not self.page:
                    port = json.loads(line)["port"]
                    with suppress(OSError):
                        self.page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            time.sleep(0.1)


def test_pull_leaks_no_secret_into_logs_metrics_or_storage(s3_settings, make_job, two_class_folder, tmp_path):
    """Keys in the environment, a password in the endpoint, signatures in rows and names, tokens in errors."""
    bucket = f"secrets-{uuid.uuid4().hex[:8]}"
    create_bucket(s3_settings, bucket)
    storage = Storage(f"s3://{bucket}/top", s3_settings)
    rows = [f"{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(two_class_folder.rglob("*.*"))]
    rows += [f"https://b.s3.amazonaws.com/a.jpg?X-Amz-Signature={SIGNATURE},red", f"{ID}/{JWT}.jpg,red"]
    rows += [f"gone/{'p' * 8}wd-of-hub.jpg,blue", f"s3://nowhere/x?token={SIGNATURE},blue"]
    (two_class_folder / "labels.csv").write_text("image,label\n" + "\n".join(rows))
    job = make_job(storage=storage.uri, dataset={
        "source": {"table": {"uri": str(two_class_folder / "labels.csv")}},
        "splits": {"train": "train[:60%]", "test": "train[60%:]"},
        "imageSize": [32, 32],
    })  # fmt: skip
    (tmp_path / "job.yaml").write_text(job.model_dump_json(by_alias=True, exclude_unset=True))
    (tmp_path / "termination-log").touch()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    environment = inherited | {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "HUB_PASSWORD": "ppppppppwd-of-hub",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "topwork", "stage", "pull", "--job", str(tmp_path / "job.yaml")]
    command += ["--scratch", str(tmp_path / "scratch"), "--metrics-port", "0"]
    command += ["--termination-log", str(tmp_path / "termination-log")]

    def run(number: int, **variables: str) -> tuple[int, str]:
        log = tmp_path / f"{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment | variables, cwd=tmp_path, stdout=file, stderr=file)
        reader = MetricsReader(process, log)
        reader.start()
        code = process.wait(240)
        reader.join()
        return code, log.read_text() + (tmp_path / "termination-log").read_text() + reader.page

    code, output = run(1)
    assert code == 0, output
    endpoint = "http://ada:password-of-ada@127.0.0.1:1"
    failed_code, failed_output = run(2, AWS_ENDPOINT_URL=endpoint, AWS_MAX_ATTEMPTS="1")
    assert failed_code in (2, 75), failed_output
    stored = "".join(f"{item.key} {(storage.read(item.key) or b'').decode('latin-1')}\n" for item in storage.list())
    assert "X-Amz-Signature=***" in stored
    assert '"missing": 4' in stored or stored.count('"reason": "missing"') == 4
    planted = [SIGNATURE, ID, JWT, "ppppppppwd-of-hub", "password-of-ada", s3_settings.secret_key]
    assert [secret for secret in planted if secret in output + failed_output + stored] == []
