"""A server that behaves like the API server of a Kubernetes cluster, over HTTP and in memory.

It keeps Jobs, ConfigMaps, Pods, Events, ResourceQuotas, Secrets and Namespaces, and serves server-side apply, GET, LIST
(selectors, `continue`), WATCH, DELETE (propagation, grace period, preconditions), logs and GET through pods/proxy (to
`ports`), with the errors of a real server in its words. No controller runs: a test plays the cluster itself.

    from api_server import ApiServer

    def test_something(api_server, cluster):          # fixtures of conftest.py; `cluster` is a Cluster of the edge
        api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {...}})   # ADDED
        api_server.patch("Pod", "p", {"status": {"phase": "Running"}})     # JSON merge patch, status too: MODIFIED
        api_server.log("p", "pull", "first line", "second line")          # following readers get them at once
        api_server.end_log("p", "pull")
        api_server.remove("Pod", "p")                                      # DELETED, at once

        api_server.plant(Fault(api_statuses.too_many(), headers={"Retry-After": "0"}))     # the next request gets it
        api_server.plant(Fault(cut_after=100, path="/log"), times=2)       # … that meets it
        assert [f"{each.method} {each.path}" for each in api_server.requests] == [...]

    Without the fixture: `with ApiServer() as server: server.kubeconfig(tmp_path / "config")`; the path is for
    KUBECONFIG or --kubeconfig. Namespaces `default` and `team-a` are there; requests need the server's token.

How deletions go: `deletion_seconds` is what a pod takes to stop after SIGTERM and what foreground deletion takes
besides (0.0: at once); `hold_deletions = True` leaves all that is being deleted (deletionTimestamp) until
`finish_deletions()`. Dependents (ownerReferences) go with their owner unless it is orphaned. Pods that a Job owns need
an ownerReference, as real ones have: `owned_by(job)` writes it.
"""

import json
import ssl
import sys
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import api_logs
from api_deletion import Deletion
from api_http import Handler
from api_objects import KINDS, Key, Object, Objects
from api_statuses import Fault

TOKEN = "token-of-the-tests"
NAMESPACE = "team-a"


@dataclass
class Request:
    """A request as it arrived, and the code of its answer (0: none was sent)."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any = None
    code: int = 0


@dataclass
class Planted:
    fault: Fault
    times: int


@dataclass
class Settings:
    """How the server behaves, apart from its objects."""

    token: str | None = TOKEN
    user: str = "alice"
    page: int = 500
    warnings: list[str] = field(default_factory=list)


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *arguments: Any) -> None:
        """Say nothing of a client that left or whose certificate was refused."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*arguments)


class ApiServer:
    """The server, and the hand that plays the cluster; see the module.

    Args:
        token: Token that requests need; None takes any request.
        tls: Context of the server for https.
    """

    def __init__(self, *, token: str | None = TOKEN, tls: ssl.SSLContext | None = None) -> None:
        self.settings = Settings(token)
        self.objects = Objects()
        self.logs = api_logs.Logs(self.objects.changed)
        self.deletion = Deletion(self.objects)
        self.requests: list[Request] = []
        # Ports of this machine that stand for ports of pods, by the pod's name and its port: what pods/proxy reaches.
        self.ports: dict[tuple[str, int], int] = {}
        self.closing = False
        self.bookmarks = 0
        self._planted: list[Planted] = []
        for name in ("default", NAMESPACE):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        self._http = _Http(("127.0.0.1", 0), Handler)
        self._http.api = self  # type: ignore[attr-defined]
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.objects.changed:
            self.closing = True
            self.objects.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    # ── What a cluster does ─────────────────────────────────────────────────────────────────────────────────────────

    def put(self, manifest: Object, *, manager: str = "") -> Object:
        """Create an object or replace it wholly, status too. `manager` owns its fields from now on."""
        key = self.key(manifest["kind"], manifest["metadata"]["name"], manifest["metadata"].get("namespace"))
        with self.objects.changed:
            stored = self.objects.store(key, manifest)
            if manager:
                self.objects.own(key, manager, manifest)
            return stored

    def patch(self, kind: str, name: str, change: Object, *, namespace: str | None = None) -> Object:
        """Change an object by a JSON merge patch: mappings merge, None removes, all else replaces."""
        key = self.key(kind, name, namespace)
        with self.objects.changed:
            found = self.objects.get(key)
            assert found is not None, f"no {kind} {name}"
            return self.objects.store(key, _merged(found, change))

    def remove(self, kind: str, name: str, *, namespace: str | None = None) -> None:
        """Remove an object at once."""
        self.objects.remove(self.key(kind, name, namespace))

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Object | None:
        return self.objects.get(self.key(kind, name, namespace))

    def all(self, kind: str, *, namespace: str | None = None) -> list[Object]:
        return self.objects.all(kind, namespace or NAMESPACE)

    def log(self, pod: str, container: str, *lines: str, at: str | None = None) -> None:
        """Append lines to the log of a container; `at` is their time, such as 2026-01-01T00:00:00.123456789Z."""
        self.logs.append(pod, container, lines, at)

    def end_log(self, pod: str, container: str) -> None:
        """End the log: who follows it has read all."""
        self.logs.end(pod, container)

    def bookmark(self) -> None:
        """Send a BOOKMARK to the watches that asked for them, as a real server does about once a minute."""
        with self.objects.changed:
            self.objects.version += 1
            self.bookmarks += 1
            self.objects.changed.notify_all()

    def compact(self) -> None:
        """Forget what happened: a watch from an older version ends with ERROR 410 Expired."""
        self.objects.compact()

    @property
    def deletion_seconds(self) -> float:
        return self.deletion.seconds

    @deletion_seconds.setter
    def deletion_seconds(self, seconds: float) -> None:
        self.deletion.seconds = seconds

    @property
    def hold_deletions(self) -> bool:
        return self.deletion.held

    @hold_deletions.setter
    def hold_deletions(self, held: bool) -> None:
        self.deletion.held = held

    def finish_deletions(self) -> None:
        """Let go of all that `hold_deletions` held."""
        self.deletion.finish()

    # ── What goes wrong ─────────────────────────────────────────────────────────────────────────────────────────────

    def plant(self, *faults: Fault, times: int = 1) -> None:
        """Let the next requests that meet these faults get them, each `times` times, in this order."""
        self._planted += [Planted(fault, times) for fault in faults]

    def warn(self, *texts: str) -> None:
        """Send these as Warning headers with every answer to an apply."""
        self.settings.warnings = list(texts)

    def fault_of(self, method: str, path: str) -> Fault:
        with self.objects.changed:
            for planted in self._planted:
                if planted.times and planted.fault.meets(method, path):
                    planted.times -= 1
                    return planted.fault
        return Fault()

    # ── How it is reached ───────────────────────────────────────────────────────────────────────────────────────────

    def key(self, kind: str, name: str, namespace: str | None = None) -> Key:
        return Key(kind, (namespace or NAMESPACE) if KINDS[kind].namespaced else "", name)

    def kubeconfig(self, path: Path, *, namespace: str | None = NAMESPACE, user: Object | None = None) -> Path:
        """Write a kubeconfig file with one context, `tests`.

        Args:
            path: The file.
            namespace: Namespace of the context; None leaves it out.
            user: The user's entry; None is the server's token.
        """
        context: Object = {"cluster": "tests", "user": "alice"} | ({"namespace": namespace} if namespace else {})
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": {"server": self.url}}],
            "contexts": [{"name": "tests", "context": context}],
            "users": [{"name": "alice", "user": user or {"token": self.settings.token or ""}}],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))  # JSON is YAML
        return path


def owned_by(owner: Object) -> list[Object]:
    """metadata.ownerReferences of an object that a controller made for `owner`."""
    return [
        {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def _merged(found: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    found = dict(found) if isinstance(found, dict) else {}
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key), value)
    return found
