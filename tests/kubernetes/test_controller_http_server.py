"""HTTP server of the controller, its probes, and the requirements of its command."""

import socket
import threading
import time
import urllib.error
import urllib.request

import pytest

from topwork.cli.commands import controller
from topwork.cluster.controller.runtime.http_server import HttpServer
from topwork.cluster.controller.runtime.watches import thread_problem
from topwork.errors import SettingError


@pytest.fixture
def problems() -> dict[str, list[str]]:
    return {"health": [], "readiness": []}


@pytest.fixture
def server(problems):
    server = HttpServer(
        0,
        metrics=lambda: (b"topwork_controller_leader 1.0\n", "text/plain; version=0.0.4"),
        health=lambda: problems["health"],
        readiness=lambda: problems["readiness"],
    )
    yield server
    server.close()


def get(server, path, host="127.0.0.1"):
    try:
        with urllib.request.urlopen(f"http://{host}:{server.port}{path}", timeout=5) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_metrics_are_served_over_ipv4_and_ipv6(server, host):
    assert get(server, "/metrics?name=a", host) == (200, "text/plain; version=0.0.4", "topwork_controller_leader 1.0\n")


@pytest.mark.parametrize(("path", "probe"), [("/healthz", "health"), ("/readyz", "readiness")])
def test_a_probe_fails_with_its_problems(server, problems, path, probe):
    assert get(server, path) == (200, "text/plain", "ok\n")
    problems[probe] += ["thread worker-1 is dead", "Jobs are not listed yet"]
    assert get(server, path) == (503, "text/plain", "thread worker-1 is dead\nJobs are not listed yet\n")


def test_other_paths_are_not_found(server):
    assert get(server, "/debug")[0] == 404


def test_clients_that_send_nothing_do_not_block_others(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    try:
        assert get(server, "/healthz")[0] == 200
    finally:
        for connection in idle:
            connection.close()


def test_a_port_in_use_is_an_error_that_names_the_option(server):
    with pytest.raises(SettingError, match=rf"Cannot listen on --http-port {server.port} \(.*\)\. Choose another port"):
        HttpServer(server.port, metrics=lambda: (b"", ""), health=list, readiness=list)


def test_a_dead_or_stuck_thread_is_a_problem():
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="watch-Job-team-a")
    thread.start()
    now = time.monotonic()
    assert thread_problem(thread, now, 60.0) is None
    assert thread_problem(thread, now - 61, 60.0) == "thread watch-Job-team-a has been stuck for 61 s"
    release.set()
    thread.join()
    assert thread_problem(thread, now, 60.0) == "thread watch-Job-team-a is dead"


def test_a_missing_requirement_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(controller, "find_spec", lambda name: None if name == "kopf" else object())
    with pytest.raises(SettingError, match=r"kopf is not installed, .*: pip install 'topwork\[controller\]'"):
        controller.require_modules()
