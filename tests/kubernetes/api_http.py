"""HTTP requests of the API server used in tests: verbs, watches, logs and injected faults."""

import base64
import json
import socket
import struct
import time
import urllib.request
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import api_logs
import api_statuses
from api_connection import ConnectionCutError, ConnectionHandler
from api_objects import Object, ObjectChange
from api_paths import Target, discovery_response, parse_path, validate_metadata
from api_selectors import matches_selectors
from api_statuses import ApiError

TRUE = {"1", "true", "True"}


class Handler(ConnectionHandler):
    """Serves the requests of a connection."""

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_PATCH(self) -> None:
        self._serve(self._apply)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def do_POST(self) -> None:
        self._serve(self._create)

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _serve(self, respond: Any) -> None:
        from api_server import Request

        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        is_json = data[:1] in {b"", b"{"}  # kubectl create sends protobuf
        self.body = json.loads(data) if data and is_json else {}
        self.fault = self.api.next_fault(self.command, url.path)
        self.sent = 0
        self.record = Request(self.command, url.path, self.query, dict(self.headers), self.body)
        self.api.requests.append(self.record)
        time.sleep(self.fault.delay_seconds)
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            raise ConnectionCutError
        try:
            if not self._send_injected_response():
                self._authenticate()
                if not is_json:
                    raise ApiError(api_statuses.status(415, "UnsupportedMediaType", "the body must be JSON"))
                if discovery := discovery_response(url.path):
                    self._send_json(200, discovery)
                else:
                    respond(parse_path(url.path))
        except ApiError as error:
            self._send_json(error.status["code"], error.status, {**error.headers, **self.fault.headers})

    def _send_injected_response(self) -> bool:
        if self.fault.status and self.fault.body is None:
            raise ApiError(self.fault.status)
        if self.fault.body is None:
            return False
        code = self.fault.status["code"] if self.fault.status else 200
        self._send_bytes(code, self.fault.body, {"Content-Type": "text/plain; charset=utf-8"} | self.fault.headers)
        return True

    def _authenticate(self) -> None:
        token = self.api.settings.token
        if token is None:
            return
        if self.headers.get("Authorization", "").removeprefix("Bearer ").removeprefix("bearer ") != token:
            raise ApiError(api_statuses.unauthorized())

    # ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _get(self, target: Target) -> None:
        if target.subresource == "log":
            self._log(target)
        elif target.subresource.startswith("proxy/"):
            self._proxy(target)
        elif target.name:
            obj = self.api.objects.get(target.key)
            if obj is None:
                raise ApiError(api_statuses.not_found(target.kind.full, target.name))
            self._send_json(200, obj)
        elif self.query.get("watch") in TRUE:
            self._watch(target)
        else:
            self._list(target)

    def _apply(self, target: Target) -> None:
        if self.headers.get("Content-Type") != "application/apply-patch+yaml":
            raise ApiError(api_statuses.status(415, "UnsupportedMediaType", "this server takes server-side apply only"))
        if not self.query.get("fieldManager"):
            message = "Required value: is required for apply patch"
            raise ApiError(api_statuses.invalid("PatchOptions", "", "fieldManager", message, "meta.k8s.io"))
        validate_metadata(target, self.body)
        is_update = self.api.objects.get(target.key) is not None
        stored = self.api.objects.apply(
            target.key,
            self.body,
            self.query["fieldManager"],
            force=self.query.get("force") == "true",
            dry_run=self.query.get("dryRun") == "All",
        )
        self._send_json(200 if is_update else 201, stored, warnings=self.api.settings.warnings)

    def _create(self, target: Target) -> None:
        name = self.body["metadata"]["name"]
        target = target._replace(name=name)
        validate_metadata(target, self.body)
        if self.api.objects.get(target.key):
            details = {"name": name, "kind": target.kind.plural}
            message = f'{target.kind.full} "{name}" already exists'
            raise ApiError(api_statuses.status(409, "AlreadyExists", message, details))
        dry_run = self.query.get("dryRun") == "All"
        self._send_json(201, self.api.objects.apply(target.key, self.body, "create", dry_run=dry_run))

    def _delete(self, target: Target) -> None:
        options = {key: self.query[key] for key in ("propagationPolicy", "gracePeriodSeconds") if key in self.query}
        options |= self.body
        if "gracePeriodSeconds" in options:
            options["gracePeriodSeconds"] = int(options["gracePeriodSeconds"])
        self._send_json(200, self.api.deletion.delete(target.key, options))

    def _proxy(self, target: Target) -> None:
        """Forward a request to a pod port if a test has set its local port."""
        name, _, port = unquote(target.name).partition(":")
        if self.api.objects.get(target.key._replace(name=name)) is None:
            raise ApiError(api_statuses.not_found("pods", name))
        local_port = self.api.pod_ports.get((name, int(port)))
        try:
            if local_port is None:
                raise ConnectionRefusedError(111, "connect: connection refused")
            path = target.subresource.removeprefix("proxy/")
            headers = {"Accept": self.headers.get("Accept", "*/*")}
            request = urllib.request.Request(f"http://127.0.0.1:{local_port}/{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=60) as response:
                data, content_type = response.read(), response.headers["Content-Type"]
        except OSError as error:
            message = f"error trying to reach service: dial tcp 10.0.0.7:{port}: {error.strerror or error}"
            raise ApiError(api_statuses.status(503, "ServiceUnavailable", message)) from None
        self._send_bytes(200, data, {"Content-Type": content_type})

    # ── Lists and watches ─────────────────────────────────────────────────────────────────────────────────────────────

    def _is_selected(self, obj: Object) -> bool:
        return matches_selectors(obj, self.query.get("labelSelector", ""), self.query.get("fieldSelector", ""))

    def _list(self, target: Target) -> None:
        objects = self.api.objects
        with objects.changed:
            version = objects.version
            selected = [
                obj for obj in objects.list_objects(target.kind.name, target.namespace) if self._is_selected(obj)
            ]
        start = 0
        if token := self.query.get("continue"):
            version, start = json.loads(base64.b64decode(token))
            if version < objects.oldest:
                message = "The provided continue parameter is too old to display a consistent list result."
                raise ApiError(api_statuses.expired(message))
        limit = int(self.query.get("limit") or 0) or len(selected)
        end = start + min(limit, self.api.settings.page_size)
        metadata: Object = {"resourceVersion": str(version)}
        if len(selected) > end:
            metadata["continue"] = base64.b64encode(json.dumps([version, end]).encode()).decode()
            metadata["remainingItemCount"] = len(selected) - end
        items = [
            {key: value for key, value in obj.items() if key not in {"apiVersion", "kind"}}
            for obj in selected[start:end]
        ]
        kind = target.kind
        self._send_json(
            200, {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}
        )

    def _watch(self, target: Target) -> None:
        version = int(self.query.get("resourceVersion") or 0)
        deadline = time.monotonic() + float(self.query.get("timeoutSeconds") or 1800)
        self._begin_stream("application/json")
        oldest = self.api.objects.oldest
        if not version or self.query.get("sendInitialEvents") == "true":
            version = self._send_initial_events(target)
        elif version < oldest:
            self._send_event("ERROR", api_statuses.expired(f"too old resource version: {version} ({oldest})"))
            return self._end_stream()
        self._send_changes(target, version, deadline)
        return self._end_stream()

    def _send_initial_events(self, target: Target) -> int:
        """Send the existing objects as ADDED, and return their resource version."""
        with self.api.objects.changed:
            objects = self.api.objects.list_objects(target.kind.name, target.namespace)
            version = self.api.objects.version
        for obj in objects:
            if self._is_selected(obj):
                self._send_event("ADDED", obj)
        if self.query.get("sendInitialEvents") == "true":
            self._send_bookmark(target, version, {"k8s.io/initial-events-end": "true"})
        return version

    def _send_changes(self, target: Target, version: int, deadline: float) -> None:
        objects, bookmarks_sent = self.api.objects, self.api.bookmarks
        while True:
            with objects.changed:
                changes = objects.changes_since(version)
                bookmarks = self.api.bookmarks
                if not changes and bookmarks == bookmarks_sent:
                    if self.api.is_closing or time.monotonic() >= deadline or self._is_client_gone():
                        break
                    objects.changed.wait(min(0.1, max(0.0, deadline - time.monotonic())))
                    continue
                version = objects.version
            for change in changes:
                self._send_change(target, change)
            if bookmarks != bookmarks_sent:
                bookmarks_sent = bookmarks
                self._send_bookmark(target, version)
        if not self.api.is_closing:
            self._send_bookmark(target, version)

    def _send_bookmark(self, target: Target, version: int, annotations: dict[str, str] | None = None) -> None:
        if self.query.get("allowWatchBookmarks") in TRUE:
            metadata: Object = {"resourceVersion": str(version), "creationTimestamp": None}
            metadata |= {"annotations": annotations} if annotations else {}
            kind = target.kind
            self._send_event("BOOKMARK", {"kind": kind.name, "apiVersion": kind.api_version, "metadata": metadata})

    def _send_change(self, target: Target, change: ObjectChange) -> None:
        """Send a change as this watch sees it: an object that no longer matches the selectors is DELETED."""
        obj = change.object
        if change.kind != target.kind.name or target.namespace not in {"", obj["metadata"].get("namespace", "")}:
            return
        was_selected = change.before is not None and self._is_selected(change.before)
        is_selected = change.type != "DELETED" and self._is_selected(obj)
        if was_selected and not is_selected:
            self._send_event("DELETED", obj)
        elif is_selected:
            self._send_event("MODIFIED" if was_selected else "ADDED", obj)

    def _send_event(self, type_: str, obj: Object) -> None:
        self._send_chunk(json.dumps({"type": type_, "object": obj}).encode() + b"\n")

    # ── Logs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _log(self, target: Target) -> None:
        pod = self.api.objects.get(target.key)
        if pod is None:
            raise ApiError(api_statuses.not_found("pods", target.name))
        container = self.query.get("container", "")
        if not api_logs.has_container(pod, container):
            raise ApiError(api_statuses.bad_request(f"container {container} is not valid for pod {target.name}"))
        if self.query.get("previous") in TRUE:
            message = f'previous terminated container "{container}" in pod "{target.name}" not found'
            raise ApiError(api_statuses.bad_request(message))
        log, state = self.api.logs.get(target.name, container), api_logs.container_state(pod, container)
        if "waiting" in (state or {}) or (log is None and not state):
            reason = (state or {}).get("waiting", {}).get("reason", "PodInitializing")
            raise ApiError(api_statuses.container_waiting(container, target.name, reason))
        log = log or api_logs.Log()
        self._begin_stream("text/plain")
        with self.api.objects.changed:
            lines, position = api_logs.select_lines(log, self.query), len(log.lines)
        self._send_lines(lines)
        if self.query.get("follow") in TRUE:
            self._follow_log(target, container, position)
        self._end_stream()

    def _follow_log(self, target: Target, container: str, position: int) -> None:
        while True:
            with self.api.objects.changed:
                log = self.api.logs.get(target.name, container) or api_logs.Log()
                lines, position = log.lines[position:], len(log.lines)
                if not lines:
                    pod = self.api.objects.get(target.key)
                    is_terminated = pod is None or "terminated" in (api_logs.container_state(pod, container) or {})
                    if log.ended or is_terminated or self.api.is_closing or self._is_client_gone():
                        return
                    self.api.objects.changed.wait(0.1)
                    continue
            self._send_lines(lines)

    def _send_lines(self, lines: list[tuple[str, str]]) -> None:
        with_timestamps = self.query.get("timestamps") in TRUE
        for timestamp, line in lines:
            self._send_chunk((f"{timestamp} {line}" if with_timestamps else line).encode() + b"\n")
