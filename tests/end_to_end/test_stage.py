"""`topwork stage`, as the containers of a pod call it: processes of their own, storage by its AWS variables alone."""

import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from topwork.cluster.ending import Ending

FINE_TUNE = {"epochs": 25, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}
LONG = {"train": "all", "epochs": 25, "batchSize": 8, "featureCache": "off"}
STOPPED = "Stopped. Start the same job again to go on."
NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": None}


class Process:
    """A container's process."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path, ending: Path) -> None:
        self._log = folder / f"{time.monotonic_ns()}.log"
        self._ending = ending
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "topwork", "stage", *arguments]
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """All lines; one that is no JSON fails the test."""
        return [json.loads(line) for line in self.output.splitlines()]

    @property
    def messages(self) -> list[str]:
        return [line["message"] for line in self.lines]

    def fact(self, message: str, name: str) -> Any:
        return next(line[name] for line in self.lines if line["message"] == message)

    def wait_for(self, seen: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not seen():
            assert time.monotonic() < deadline, self.output
            assert self.process.poll() is None, self.output
            time.sleep(0.02)

    def wait_for_line(self, text: str) -> None:
        self.wait_for(lambda: text in self.output)

    def end(self, seconds: float = 240) -> tuple[int, Ending]:
        code = self.process.wait(timeout=seconds)
        return code, Ending.model_validate_json(self._ending.read_text())

    def stop(self, seconds: float) -> tuple[int, Ending]:
        self.process.send_signal(signal.SIGTERM)
        return self.end(seconds)


class Pod:
    """Volumes and variables that the containers of a pod share."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.scratch = folder / "scratch"
        self.variables = environment
        self.folder = folder / "empty"
        self.folder.mkdir()
        self._ending = folder / "termination-log"
        self.started: list[Process] = []

    def start(self, stage: str, job: Path, **variables: str | None) -> Process:
        self._ending.write_text("")
        changed = {**self.variables, **variables}
        environment = {name: value for name, value in changed.items() if value is not None}
        arguments = [stage, "--job", job, "--scratch", self.scratch, "--metrics-port", "0"]
        arguments += ["--termination-log", self._ending]
        self.started.append(Process([*map(str, arguments)], environment, self.folder, self._ending))
        return self.started[-1]

    def run(self, stage: str, job: Path, **variables: str | None) -> tuple[int, Ending, Process]:
        process = self.start(stage, job, **variables)
        return *process.end(), process


@pytest.fixture
def pod(environment, s3_settings, tmp_path) -> Iterator[Pod]:
    """A pod with the variables of the Secret topwork-s3."""
    secret = {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
    }
    pod = Pod(tmp_path, environment | secret | {"AWS_EC2_METADATA_DISABLED": "true"})
    yield pod
    for process in pod.started:
        process.process.kill()
        process.process.wait()


@pytest.fixture
def write(make_job, tmp_path) -> Callable[..., Path]:
    """Write a tiny job for the storage of the test; keyword arguments replace whole keys of `spec`."""

    def write_job(**overrides: object) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(make_job(**overrides).model_dump_json(by_alias=True, exclude_unset=True))
        return path

    return write_job


def run_of(path: Path) -> str:
    from topwork.spec.reading import read_jobs

    return read_jobs(path)[0].run


@pytest.fixture
def without_tensorflow(tmp_path) -> dict[str, str]:
    """Variables under which the import of TensorFlow fails."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "tensorflow.py").write_text("raise KeyError('tensorflow was imported')")
    return {"PYTHONPATH": str(folder)}


def scraped(process: Process) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{process.fact('metrics', 'port')}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_three_containers_publish_a_model_and_find_it_the_next_time(pod, write, storage, without_tensorflow, topwork):
    job = write(fineTune=FINE_TUNE | {"epochs": 2}, compute={"gpus": 2}, metrics={"lingerSeconds": 300})
    run = run_of(job)

    code, ending, pulled = pod.run("pull", job)
    assert (code, ending) == (0, Ending(stage="pull", outcome="done", exit_code=0, run=run))
    assert pulled.fact("done", "images") == 40

    code, ending, transferred = pod.run("transfer", job)
    best = {"metric": "validation_accuracy", "value": transferred.lines[-2]["validation_accuracy"]}
    assert (code, ending) == (0, Ending(stage="transfer", outcome="done", exit_code=0, run=run, epochs=2, **best))
    assert transferred.fact("already done", "stage") == "pull"
    # This TensorFlow knows no GPU: two were asked for, and the job is tried on as many replicas without.
    note = "no GPU can be used by this build of TensorFlow: replicas on the processor"
    assert transferred.fact(note, "replicas") == 2

    process = pod.start("fine-tune", job)
    process.wait_for_line('"message": "done"')
    metrics = scraped(process)
    # Who waits for a last scrape is done, and ends so.
    code, ending = process.stop(seconds=10)
    model = storage.uri_of("models/tiny/1")
    main = {"metric": "accuracy", "value": process.fact("done", "accuracy")}
    done = Ending(stage="fine-tune", outcome="done", exit_code=0, run=run, epochs=2, model=model, **main)
    assert (code, ending) == (0, done)
    assert 'topwork_epoch{stage="transfer"} 2.0' in metrics
    assert f'topwork_best_metric{{name="accuracy",split="validation",stage="transfer"}} {best["value"]}' in metrics
    assert f'topwork_metric{{name="accuracy",split="test"}} {main["value"]}' in metrics
    assert "topwork_replicas 2.0" in metrics

    for stage in ("pull", "transfer"):
        code, ending, found = pod.run(stage, job, **without_tensorflow)
        assert (code, ending.outcome, ending.model) == (0, "done", model), found.output
    code, ending, _ = pod.run("fine-tune", job, **without_tensorflow)
    assert (code, ending) == (0, done)
    assert list(pod.folder.glob("*")) == list(pod.folder.glob("*.log"))
    assert "already published" in topwork("run", job, **pod.variables).stderr


def test_pull_and_transfer_that_are_done_need_no_tensorflow(pod, write, without_tensorflow):
    job = write()
    for stage in ("pull", "transfer"):
        code, ending, first = pod.run(stage, job)
        assert code == 0, first.output
        code, again, found = pod.run(stage, job, **without_tensorflow)
        assert (code, again) == (0, ending), found.output


def test_a_job_without_fine_tuning_is_published_by_its_last_container_alone(pod, write, storage):
    code, ending, process = pod.run("fine-tune", write())
    assert code == 0, process.output
    assert (ending.outcome, ending.epochs, ending.model) == ("done", None, storage.uri_of("models/tiny/1"))


def test_a_gate_that_is_not_met_ends_with_3(pod, write):
    job = write(evaluate={"metrics": ["calibrationError"], "gates": [{"metric": "calibrationError", "atMost": 0.0}]})
    code, ending, process = pod.run("fine-tune", job)
    assert (code, ending.outcome, ending.exit_code, ending.model) == (3, "failed", 3, None), process.output
    assert "calibrationError" in ending.error
    assert process.lines[-1]["level"] == "error"


def test_every_stage_stops_at_any_moment_and_goes_on(pod, write, storage):
    """Import of TensorFlow, pull, training of both stages, evaluation and export, upload."""
    job = write(transfer=LONG, fineTune=FINE_TUNE)
    run = run_of(job)

    def stopped(stage: str, moment: str | Callable[[], bool], seconds: float = 20) -> tuple[Ending, Process]:
        process = pod.start(stage, job)
        process.wait_for(moment if callable(moment) else lambda: moment in process.output)
        code, ending = process.stop(seconds)
        assert (code, ending.outcome, ending.exit_code, ending.run) == (143, "stopped", 143, run), process.output
        # The last line says so, and no line is anything but JSON.
        assert (process.lines[-1]["message"], process.lines[-1]["exit_code"]) == (ending.error, 143)
        return ending, process

    begun = '"message": "run"'
    ending, _ = stopped("pull", begun)
    assert ending == Ending(stage="pull", outcome="stopped", exit_code=143, run=run, error=STOPPED)
    stopped("pull", (pod.scratch / run / "pull").exists)
    assert pod.run("pull", job)[0] == 0

    stopped("transfer", begun)
    ending, _ = stopped("transfer", '"epoch": 3, ', seconds=60)
    assert 3 <= ending.epochs < 25
    assert ending.error.endswith("the checkpoint is stored. Start the same job again to go on.")
    code, ending, resumed = pod.run("transfer", job)
    assert (code, ending.epochs) == (0, 25), resumed.output
    assert "resumed" in resumed.messages

    ending, _ = stopped("fine-tune", '"stage": "fine-tune", "epoch": 3, ', seconds=60)
    assert 3 <= ending.epochs < 25
    ending, process = stopped("fine-tune", '"message": "evaluation"')
    assert ("resumed" in process.messages, ending.epochs) == (True, 25)
    stopped("fine-tune", '"message": "recheck"')
    code, ending, process = pod.run("fine-tune", job)
    assert (code, ending.model) == (0, storage.uri_of("models/tiny/1")), process.output
    assert [stored.key for stored in storage.list("models/") if stored.key.endswith("/manifest.json")] == [
        "models/tiny/1/manifest.json"
    ]


@contextmanager
def tcp_proxy(target: str, *, context: ssl.SSLContext | None = None, silent: bool = False) -> Iterator[int]:
    """Forward a port to a server, over TLS if a context is given; a silent one takes requests and never answers."""
    host, port = target.removeprefix("http://").split(":")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()

    def serve(client: socket.socket) -> None:
        try:
            client = context.wrap_socket(client, server_side=True) if context else client
        except OSError:
            return
        if silent:
            kept.append(client)
            return
        server = socket.create_connection((host, int(port)))
        threading.Thread(target=copy, args=(client, server), daemon=True).start()
        copy(server, client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_stop_is_granted_while_storage_does_not_answer(pod, write, s3_settings):
    with tcp_proxy(s3_settings.endpoint_url, silent=True) as port:
        process = pod.start("pull", write(), AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
        process.wait_for_line('"message": "metrics"')
        time.sleep(2)
        code, ending = process.stop(seconds=4)
    assert (code, ending.outcome, ending.error) == (143, "stopped", STOPPED)


MISSING = (
    "No credentials for {uri}: {names} is not set. Put {names} into the Secret topwork-s3 of the pod's namespace "
    "(kubectl create secret generic topwork-s3 --from-literal=AWS_ACCESS_KEY_ID=…), or name a service account that has "
    "access to the bucket in spec.compute.serviceAccountName."
)
WRONG_SECRET = "{endpoint} refused the signature. Look at AWS_SECRET_ACCESS_KEY and AWS_REGION."


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        (NO_KEYS, 2, MISSING.replace("{names}", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")),
        ({"AWS_SECRET_ACCESS_KEY": None}, 2, MISSING.replace("{names}", "AWS_SECRET_ACCESS_KEY")),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, 2, "{endpoint} does not know the access key. Look at AWS_ACCESS_KEY_ID"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, 2, WRONG_SECRET),
        ({"AWS_SECRET_ACCESS_KEY": "secret\n"}, 2, "AWS_SECRET_ACCESS_KEY begins or ends with a blank or a line break"),
        ({"AWS_CA_BUNDLE": "/nowhere.pem"}, 2, "AWS_CA_BUNDLE names /nowhere.pem, and there is no such file"),
        ({"AWS_WEB_IDENTITY_TOKEN_FILE": __file__}, 2, "The AWS variables or files can't be used for storage: "),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            75,
            "http://127.0.0.1:9 can't be reached for {uri} after all retr",
        ),
        ({"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, 75, "http://nowhere.invalid can't be reached for {uri} after"),
    ],
    ids=["none", "half", "key", "secret", "line-break", "bundle", "no-role", "refused", "no-name"],
)
def test_what_is_wrong_with_the_secret_is_named(pod, write, storage, s3_settings, variables, code, said):
    with tcp_proxy(s3_settings.endpoint_url, silent=True) as port:
        # A metadata service that never answers, as where a network policy swallows the requests to it.
        metadata = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{port}/"}
        began = time.monotonic()
        ended, ending, process = pod.run("pull", write(), **metadata, **variables)
        assert time.monotonic() - began < 30
    assert (ended, ending.outcome, ending.exit_code) == (code, "failed", code), process.output
    assert ending.error.startswith(said.format(uri=storage.uri, endpoint=s3_settings.endpoint_url)), ending.error
    assert process.lines[-1]["message"] == ending.error
    assert s3_settings.secret_key not in process.output + ending.error


def test_a_missing_bucket_is_named(pod, write):
    code, ending, _ = pod.run("pull", write(storage="s3://no-such-bucket/x"))
    assert code == 2
    assert ending.error.startswith("The bucket no-such-bucket does not exist at http://127.0.0.1:")


def test_a_pod_without_any_variable_says_which_the_secret_takes(pod, write, storage):
    code, ending, _ = pod.run("pull", write(), **NO_KEYS, AWS_ENDPOINT_URL=None, AWS_EC2_METADATA_DISABLED="true")
    names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    more = (
        f"Put {names} and, for a server that isn't Amazon's, AWS_ENDPOINT_URL into the Secret topwork-s3 of the pod's"
    )
    assert code == 2
    assert ending.error.startswith(f"No credentials for {storage.uri}: {names} is not set. {more}")


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


def test_storage_with_a_certificate_of_an_authority_of_ones_own(pod, write, s3_settings, tls):
    context, authority = tls
    job = write()
    with tcp_proxy(s3_settings.endpoint_url, context=context) as port:
        endpoint = {"AWS_ENDPOINT_URL": f"https://localhost:{port}"}
        code, ending, _ = pod.run("pull", job, **endpoint)
        assert (code, "is not trusted" in ending.error) == (2, True)
        code, ending, _ = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=f"{authority}.missing")
        assert (code, "spec.compute.extraCA names a ConfigMap" in ending.error) == (2, True)
        code, _, process = pod.run("pull", job, **endpoint, TOPWORK_EXTRA_CA=str(authority))
        assert code == 0, process.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "{file} is not there. Check the path."),
        ("", "{file} holds no job. A spec begins with apiVersion: topwork.dev/v1alpha1."),
        ("kind: TransferJob", "{file}:1:1: apiVersion: "),
        ("{one}\n---\n{one}", "{file} holds 2 jobs (tiny, tiny), and a pod runs one. Give each a file of its own."),
    ],
    ids=["missing", "empty", "wrong", "two"],
)
def test_a_job_file_that_holds_no_or_several_jobs_is_refused(pod, write, content, said):
    file = write()
    one = file.read_text()
    file.unlink()
    if content is not None:
        file.write_text(content.replace("{one}", one))
    code, ending, process = pod.run("pull", file)
    assert (code, ending.exit_code) == (2, 2)
    assert ending.error.startswith(said.format(file=file))
    assert process.lines[-1]["message"] == ending.error


def test_a_bug_ends_with_1_and_its_traceback(pod, write, without_tensorflow):
    code, ending, process = pod.run("transfer", write(), **without_tensorflow)
    assert (code, ending.outcome, ending.error) == (1, "failed", "KeyError: 'tensorflow was imported'")
    told, traceback = process.output.split("Traceback (most recent call last):")
    assert json.loads(told.splitlines()[-1])["level"] == "error"
    assert traceback.rstrip().endswith("KeyError: 'tensorflow was imported'")


def test_scratch_that_can_not_be_written_is_named(pod, write):
    pod.scratch = Path("/proc/scratch")
    code, ending, _ = pod.run("pull", write())
    assert code == 2
    assert ending.error.startswith("The scratch folder /proc/scratch/tiny-")
