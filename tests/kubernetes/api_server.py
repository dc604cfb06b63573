"""A fake Kubernetes API server: real HTTP, objects in memory, no controllers.

It stores built-in kinds (api_kinds.py) and those of CustomResourceDefinitions. It supports POST, PUT, PATCH (merge
patch, JSON patch, server-side apply), GET, LIST (selectors, `continue`, Tables), WATCH, DELETE (propagation, grace
period, preconditions), status subresources, dry runs, logs, GET through pods/proxy (to `pod_ports`), discovery,
OpenAPI v3 and validating webhooks, and responds with the error messages of a real server. Tests change objects as
controllers would, or let `SimulatedControllers` do so.

    from api_server import ApiServer

    def test_something(api_server, cluster):          # fixtures of conftest.py; `cluster` is a connected Cluster
        api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {...}})   # ADDED
        api_server.patch("Pod", "p", {"status": {"phase": "Running"}})     # JSON merge patch, status too: MODIFIED
        api_server.append_log("p", "pull", "first line", "second line")   # sent immediately to clients that follow
        api_server.end_log("p", "pull")
        api_server.remove("Pod", "p")                                      # DELETED, immediately

        api_server.inject(Fault(api_statuses.too_many_requests(), headers={"Retry-After": "0"}))   # for one request
        api_server.inject(Fault(cut_after_bytes=100, path="/log"), times=2)    # for the next two that match
        assert [f"{request.method} {request.path}" for request in api_server.requests] == [...]

        api_server.install_crd(definition())          # serves TransferJobs; or ApiServer(crds=[definition()])
        api_server.allow(role["rules"], namespace="team-a")    # RBAC: everything else is forbidden from now on

    Without the fixture: `with ApiServer() as server: server.kubeconfig(tmp_path / "config")`; the path is for
    KUBECONFIG or --kubeconfig. The namespaces `default` and `team-a` exist. Requests must send the server's token.

Differences from a real server: objects of built-in kinds are not validated, except immutable fields of Jobs; a
strategic merge patch replaces lists; the cost of CEL rules is not estimated, and their type check does not compare int
with double; dates are strings in CEL.

Deletions: `deletion_seconds` is the duration of pod shutdown and of foreground deletion (0.0: immediate).
`hold_deletions = True` keeps deleted objects, with a deletionTimestamp, until `finish_deletions()`. Dependents
(ownerReferences) are deleted with their owner unless they are orphaned. Pods of a Job need ownerReferences, as in a
real cluster: `owner_references(job)` returns them.
"""

import json
import ssl
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import api_logs
from api_admission import Admission
from api_authorization import User
from api_custom_resources import decode
from api_deletion import Deletion
from api_http import Handler
from api_kinds import Key, Object
from api_objects import Objects
from api_patches import merge_patch
from api_statuses import Fault
from api_writes import Writes
from crd_definition import definition_problems

TOKEN = "token-of-the-tests"
NAMESPACE = "team-a"
USER = "alice"


@dataclass
class Request:
    """A received request, and the status code of its response (0: no response was sent)."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any = None
    code: int = 0


@dataclass
class InjectedFault:
    fault: Fault
    times: int


@dataclass
class Settings:
    """Settings of the server."""

    token: str | None = TOKEN
    page_size: int = 500
    warnings: list[str] = field(default_factory=list)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *arguments: Any) -> None:
        """Ignore clients that disconnect or whose certificate is rejected."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*arguments)


class ApiServer:
    """A fake API server, described in the docstring of this module.

    Args:
        token: Token that requests must send; None accepts all requests.
        tls: TLS context of the server; None serves plain HTTP.
        crds: CustomResourceDefinitions to install.
    """

    def __init__(
        self, *, token: str | None = TOKEN, tls: ssl.SSLContext | None = None, crds: Iterable[Object] = ()
    ) -> None:
        self.settings = Settings(token)
        self.user = User(USER)
        self.other_users: dict[str, User] = {}
        self.objects = Objects()
        self.writes = Writes(self.objects)
        self.admission = Admission(self.objects)
        self.logs = api_logs.Logs(self.objects.changed)
        self.deletion = Deletion(self.objects)
        self.requests: list[Request] = []
        # Local ports that pods/proxy forwards to, by pod name and pod port.
        self.pod_ports: dict[tuple[str, int], int] = {}
        self.is_closing = False
        self.bookmarks = 0
        self._faults: list[InjectedFault] = []
        for name in ("default", NAMESPACE):
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        for definition in crds:
            self.install_crd(definition)
        self._http = _HttpServer(("127.0.0.1", 0), Handler)
        self._http.api = self  # type: ignore[attr-defined]
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.objects.changed:
            self.is_closing = True
            self.objects.changed.notify_all()
        self._http.shutdown()
        self._http.server_close()

    # ── Objects and logs ──────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, obj: Object, *, manager: str = "") -> Object:
        """Create or replace an object with its defaults, including its status.

        Args:
            obj: The object. It is not validated.
            manager: If set, this manager owns its fields from then on.
        """
        key = self.key(obj["kind"], obj["metadata"]["name"], obj["metadata"].get("namespace"))
        with self.objects.changed:
            stored = self.objects.store(key, decode(self.objects.kinds[key.kind], obj).object)
            if manager:
                self.writes.set_owner(key, manager, obj)
            return stored

    def install_crd(self, definition: Object) -> Object:
        """Create or update a CustomResourceDefinition, and serve its kind."""
        problems = definition_problems(definition)
        assert problems == [], problems
        return self.put(definition)

    def patch(self, kind: str, name: str, change: Object, *, namespace: str | None = None) -> Object:
        """Change an object with a JSON merge patch: mappings merge, None removes, other values replace."""
        key = self.key(kind, name, namespace)
        with self.objects.changed:
            stored = self.objects.get(key)
            assert stored is not None, f"no {kind} {name}"
            return self.objects.store(key, merge_patch(stored, change))

    def remove(self, kind: str, name: str, *, namespace: str | None = None) -> None:
        """Remove an object immediately."""
        self.objects.remove(self.key(kind, name, namespace))

    def get(self, kind: str, name: str, *, namespace: str | None = None) -> Object | None:
        return self.objects.get(self.key(kind, name, namespace))

    def append_log(self, pod: str, container: str, *lines: str, at: str | None = None) -> None:
        """Append lines to a container log; `at` is their timestamp, such as 2026-01-01T00:00:00.123456789Z."""
        self.logs.append(pod, container, lines, at)

    def end_log(self, pod: str, container: str) -> None:
        """End a container log, and the responses of the clients that follow it."""
        self.logs.end(pod, container)

    def send_bookmark(self) -> None:
        """Send a BOOKMARK to watches that allow bookmarks, as a real server does about once a minute."""
        with self.objects.changed:
            self.objects.version += 1
            self.bookmarks += 1
            self.objects.changed.notify_all()

    def compact(self) -> None:
        """Discard the history: a watch from an older version ends with ERROR 410 Expired."""
        self.objects.compact()

    @property
    def deletion_seconds(self) -> float:
        return self.deletion.seconds

    @deletion_seconds.setter
    def deletion_seconds(self, seconds: float) -> None:
        self.deletion.seconds = seconds

    @property
    def hold_deletions(self) -> bool:
        return self.deletion.is_on_hold

    @hold_deletions.setter
    def hold_deletions(self, value: bool) -> None:
        self.deletion.is_on_hold = value

    def finish_deletions(self) -> None:
        """Finish all pending deletions, and stop holding deletions."""
        self.deletion.finish()

    # ── Faults ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def inject(self, *faults: Fault, times: int = 1) -> None:
        """Inject faults into the next matching requests in this order, each for `times` requests."""
        self._faults += [InjectedFault(fault, times) for fault in faults]

    def add_user(self, name: str) -> str:
        """Add a user, and return the token of its requests."""
        token = f"token-of-{name}"
        self.other_users[token] = User(name)
        return token

    def allow(self, rules: Iterable[Object], *, namespace: str = "", user: str = USER) -> None:
        """Allow a user only what the rules of its roles allow: `apiGroups`, `resources`, `verbs`, `resourceNames`.

        Args:
            rules: Rules of a Role or ClusterRole.
            namespace: Namespace of the Role; empty for a ClusterRole.
            user: Name of the user.
        """
        users = [self.user, *self.other_users.values()]
        next(item for item in users if item.name == user).allow(rules, namespace)

    def send_warnings(self, *texts: str) -> None:
        """Send these texts as Warning headers with every response to an apply."""
        self.settings.warnings = [*texts]

    def next_fault(self, method: str, path: str) -> Fault:
        with self.objects.changed:
            for injected in self._faults:
                if injected.times and injected.fault.matches(method, path):
                    injected.times -= 1
                    return injected.fault
        return Fault()

    # ── Access ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def key(self, kind: str, name: str, namespace: str | None = None) -> Key:
        return Key(kind, (namespace or NAMESPACE) if self.objects.kinds[kind].namespaced else "", name)

    def kubeconfig(self, path: Path, *, namespace: str | None = NAMESPACE, user: Object | None = None) -> Path:
        """Write a kubeconfig file with one context, `tests`.

        Args:
            path: The file.
            namespace: Namespace of the context; None omits it.
            user: The user; None for a user with the server's token.
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

    def list(self, kind: str, *, namespace: str | None = None) -> list[Object]:
        """Return the objects of a kind in a namespace, sorted by name."""
        return self.objects.list_objects(kind, namespace or NAMESPACE)


def owner_references(owner: Object) -> list[Object]:
    """Return the metadata.ownerReferences of an object that a controller creates for `owner`."""
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
