"""Secrets planted wherever one can get in: none comes out in a log, an error, metrics or storage."""

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

from topwork.cli.runtime.environment import keep_secrets, prepare_process
from topwork.clients.s3.storage import Storage, make_bucket
from topwork.data.image_validation import Rejection
from topwork.data.sources import open_source
from topwork.progress import LineProgress
from topwork.redaction import hide, without_secrets
from topwork.spec.dataset import DatasetSource
from topwork.spec.loading.loader import read_text
from topwork.spec.loading.problems import WrongSpec

KEY = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SIGNATURE = "fe5f80f77d5fa3beca038a248ff027d0445342fe2855ddc963176630326f1024"
ID = "AKIAIOSFODNN7EXAMPLE"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"

PLACES = [
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


@pytest.mark.parametrize(("text", "shown"), PLACES, ids=[str(number) for number in range(len(PLACES))])
def test_what_looks_like_a_secret_is_taken_out(text, shown):
    found = without_secrets(text)
    assert shown in (found, None)
    for secret in (KEY, SIGNATURE, ID, JWT, "APKAEIBAERJR2EXAMPLE", "abc%2Fdef"):
        assert secret not in found


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
def test_what_is_no_secret_stays_as_it_is(text):
    assert without_secrets(text) == text


@pytest.fixture
def planted():
    """Values of the environment that are secret, as long as a test runs."""
    environment = {
        "AWS_SECRET_ACCESS_KEY": KEY,
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEJr",
        "WANDB_API_KEY": "0123456789abcdef",
        "https_proxy": "http://ada:s3cr3t-of-ada@proxy:3128",
        "AWS_ACCESS_KEY_ID": "topwork",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token",
        "SHORT_PASSWORD": "a",
    }
    keep_secrets(environment)
    yield environment
    hide((), "environment")


def test_values_of_secret_variables_are_taken_out_however_they_are_spelled(planted):
    text = f"{KEY} wJalrXUtnFEMI%2FK7MDENG%2BbPxRfiCYEXAMPLEKEY FwoGZXIvYXdzEJr 0123456789abcdef s3cr3t-of-ada"
    assert without_secrets(text) == "*** *** *** *** ***"
    kept = "topwork reads /var/run/secrets/token as a user"
    assert without_secrets(kept) == kept


def test_lines_names_and_reasons_hold_no_secret(planted, tmp_path):
    said = io.StringIO()
    for progress in (LineProgress(said), LineProgress(said, as_json=True)):
        progress.note(f"fetched with {KEY}", uri=f"https://a:{KEY}@b/c", token="x FwoGZXIvYXdzEJr")
        progress.text(f"Traceback\n{KEY}")
    assert not any(secret in said.getvalue() for secret in (KEY, "FwoGZXIvYXdzEJr"))
    assert str(Rejection("missing", f"{KEY} is not there")) == "('missing', '*** is not there')"
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / f"{SIGNATURE} sig={SIGNATURE}.jpg").write_bytes(b"one")
    source = open_source(
        DatasetSource.model_validate({"folder": {"uri": str(tmp_path)}}), SimpleNamespace(storage=None)
    )
    (item,) = source.items("train")
    assert (item.name, item.read()) == (f"cat/{SIGNATURE} sig=***", b"one")


def test_what_libraries_log_holds_no_secret(caplog):
    try:
        prepare_process({"MY_SECRET": "a-secret-of-mine"})
        logging.getLogger("urllib3").warning("Retrying %s: %s", "/?X-Amz-Signature=" + SIGNATURE, "a-secret-of-mine")
    finally:
        hide((), "environment")
    assert caplog.messages == ["Retrying /?X-Amz-Signature=*** ***"]


RAISED_WHERE = """
import logging, threading, weakref
from topwork.cli.runtime.environment import prepare_process
prepare_process()
{prepared}

def fail(*_):
    raise KeyError("a-secret-of-mine")

thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
gone = threading.Event()
seen = weakref.ref(gone, fail)
del gone
try:
    fail()
except KeyError:
    logging.getLogger("library").exception("It failed")
"""
RAISED_TO = ("Exception in thread worker", "Exception ignored in: <function fail", "It failed")


def raised(prepared: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", RAISED_WHERE.format(prepared=prepared)],
        env={**os.environ, "MY_SECRET": "a-secret-of-mine"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a-secret-of-mine" not in ended.stdout + ended.stderr
    return ended.stderr


def test_no_traceback_that_python_or_a_library_prints_holds_a_secret():
    said = raised("")
    assert said.count("KeyError: '***'") == 3
    assert all(line in said for line in RAISED_TO)


def test_in_a_container_such_a_traceback_is_json():
    said = raised(
        "from pathlib import Path; from topwork.cli.runtime.container import Container; Container('pull', Path('log'))"
    )
    lines = [json.loads(line) for line in said.splitlines()]
    assert all(line["message"].startswith(start) for line, start in zip(lines, RAISED_TO, strict=True))
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
def test_a_spec_with_a_secret_is_refused_and_the_secret_not_shown(uri):
    """It would be stored beside the model, and be part of the run's name."""
    text = f"apiVersion: topwork.dev/v1alpha1\nspec:\n  dataset:\n    source:\n      archive:\n        uri: {uri}\n"
    with pytest.raises(WrongSpec, match="and a spec is stored and shared") as refused:
        read_text(text, "job.yaml")
    assert SIGNATURE not in str(refused.value)


class Watching(threading.Thread):
    """Reads the metrics of a process as often as it can, until it ends."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        super().__init__(daemon=True)
        self.pages = ""
        self._process, self._log = process, log

    def run(self) -> None:
        while self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                if '"metrics"' in line and not self.pages:
                    port = json.loads(line)["port"]
                    with suppress(OSError):
                        self.pages = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            time.sleep(0.1)


def test_a_pull_full_of_secrets_leaves_none_anywhere(s3_settings, make_job, two_class_folder, tmp_path):
    """Keys in the environment, a password in the endpoint, signatures in rows and names, tokens in errors."""
    bucket = f"secrets-{uuid.uuid4().hex[:8]}"
    make_bucket(s3_settings, bucket)
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
    (tmp_path / "ending").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    environment = kept | {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "HUB_PASSWORD": "ppppppppwd-of-hub",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "topwork", "stage", "pull", "--job", str(tmp_path / "job.yaml")]
    command += ["--scratch", str(tmp_path / "scratch"), "--metrics-port", "0"]
    command += ["--termination-log", str(tmp_path / "ending")]

    def run(number: int, **variables: str) -> tuple[int, str]:
        log = tmp_path / f"{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment | variables, cwd=tmp_path, stdout=file, stderr=file)
        watching = Watching(process, log)
        watching.start()
        code = process.wait(240)
        watching.join()
        return code, log.read_text() + (tmp_path / "ending").read_text() + watching.pages

    code, said = run(1)
    assert code == 0, said
    endpoint = "http://ada:password-of-ada@127.0.0.1:1"
    failed, refused = run(2, AWS_ENDPOINT_URL=endpoint, AWS_MAX_ATTEMPTS="1")
    assert failed in (2, 75), refused
    stored = "".join(f"{found.key} {(storage.read(found.key) or b'').decode('latin-1')}\n" for found in storage.list())
    assert "X-Amz-Signature=***" in stored
    assert '"missing": 4' in stored or stored.count('"reason": "missing"') == 4
    planted = [SIGNATURE, ID, JWT, "ppppppppwd-of-hub", "password-of-ada", s3_settings.secret_key]
    assert [secret for secret in planted if secret in said + refused + stored] == []
