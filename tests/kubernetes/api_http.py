"""HTTP of the API server that tests use: paths, bodies, streams, and the faults that a test has planted."""

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
from api_discovery import discovery
from api_objects import Happened, Object
from api_selectors import selected
from api_statuses import Refused
from api_target import Target, check, target_of
from api_wire import BrokenOffError, Wire


class Handler(Wire):
    """One connection to the server."""

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_PATCH(self) -> None:
        self._serve(self._apply)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def do_POST(self) -> None:
        self._serve(self._create)

    # ── One request ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _serve(self, answer: Any) -> None:
        from api_server import Request

        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(length)
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        json_body = data[:1] in {b"", b"{"}  # kubectl create writes protobuf
        self.body = json.loads(data) if data and json_body else {}
        self.fault = self.api.fault_of(self.command, url.path)
        self.sent = 0
        self.asked = Request(self.command, url.path, self.query, dict(self.headers), self.body)
        self.api.requests.append(self.asked)
        time.sleep(self.fault.delay)
        if self.fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            raise BrokenOffError
        try:
            if not self._planted_answer():
                self._authenticate()
                if not json_body:
                    raise Refused(api_statuses.status(415, "UnsupportedMediaType", "the body must be JSON"))
                if found := discovery(url.path):
                    self._json(200, found)
                else:
                    answer(target_of(url.path))
        except Refused as refused:
            self._json(refused.status["code"], refused.status, {**refused.headers, **self.fault.headers})

    def _planted_answer(self) -> bool:
        if self.fault.answer and self.fault.body is None:
            raise Refused(self.fault.answer)
        if self.fault.body is None:
            return False
        code = self.fault.answer["code"] if self.fault.answer else 200
        self._bytes(code, self.fault.body, {"Content-Type": "text/plain; charset=utf-8"} | self.fault.headers)
        return True

    def _authenticate(self) -> None:
        token = self.api.settings.token
        if token is None:
            return
        if self.headers.get("Authorization", "").removeprefix("Bearer ").removeprefix("bearer ") != token:
            raise Refused(api_statuses.unauthorized())

    # ── Verbs ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _get(self, target: Target) -> None:
        if target.sub == "log":
            self._log(target)
        elif target.sub.startswith("proxy/"):
            self._proxy(target)
        elif target.name:
            found = self.api.objects.get(target.key)
            if found is None:
                raise Refused(api_statuses.not_found(target.kind.full, target.name))
            self._json(200, found)
        elif self.query.get("watch") in {"1", "true", "True"}:
            self._watch(target)
        else:
            self._list(target)

    def _apply(self, target: Target) -> None:
        if self.headers.get("Content-Type") != "application/apply-patch+yaml":
            raise Refused(api_statuses.status(415, "UnsupportedMediaType", "this server takes server-side apply only"))
        if not self.query.get("fieldManager"):
            why = "Required value: is required for apply patch"
            raise Refused(api_statuses.invalid("PatchOptions", "", "fieldManager", why, "meta.k8s.io"))
        check(target, self.body)
        existed = self.api.objects.get(target.key) is not None
        stored = self.api.objects.apply(
            target.key,
            self.body,
            self.query["fieldManager"],
            force=self.query.get("force") == "true",
            dry_run=self.query.get("dryRun") == "All",
        )
        self._json(200 if existed else 201, stored, warnings=self.api.settings.warnings)

    def _create(self, target: Target) -> None:
        name = self.body["metadata"]["name"]
        target = target._replace(name=name)
        check(target, self.body)
        if self.api.objects.get(target.key):
            details = {"name": name, "kind": target.kind.plural}
            message = f'{target.kind.full} "{name}" already exists'
            raise Refused(api_statuses.status(409, "AlreadyExists", message, details))
        dry = self.query.get("dryRun") == "All"
        self._json(201, self.api.objects.apply(target.key, self.body, "create", dry_run=dry))

    def _delete(self, target: Target) -> None:
        options = {key: self.query[key] for key in ("propagationPolicy", "gracePeriodSeconds") if key in self.query}
        options |= self.body
        if "gracePeriodSeconds" in options:
            options["gracePeriodSeconds"] = int(options["gracePeriodSeconds"])
        self._json(200, self.api.deletion.delete(target.key, options))

    def _proxy(self, target: Target) -> None:
        """Pass a request on to a port of a pod, as far as a test says where that is."""
        name, _, port = unquote(target.name).partition(":")
        if self.api.objects.get(target.key._replace(name=name)) is None:
            raise Refused(api_statuses.not_found("pods", name))
        address = self.api.ports.get((name, int(port)))
        try:
            if address is None:
                raise ConnectionRefusedError(111, "connect: connection refused")
            path = target.sub.removeprefix("proxy/")
            headers = {"Accept": self.headers.get("Accept", "*/*")}
            asked = urllib.request.Request(f"http://127.0.0.1:{address}/{path}", headers=headers)
            with urllib.request.urlopen(asked, timeout=60) as answer:
                data, kind = answer.read(), answer.headers["Content-Type"]
        except OSError as error:
            why = f"error trying to reach service: dial tcp 10.0.0.7:{port}: {error.strerror or error}"
            raise Refused(api_statuses.status(503, "ServiceUnavailable", why)) from None
        self._bytes(200, data, {"Content-Type": kind})

    # ── Lists and watches ───────────────────────────────────────────────────────────────────────────────────────────

    def _selected(self, found: Object) -> bool:
        return selected(found, self.query.get("labelSelector", ""), self.query.get("fieldSelector", ""))

    def _list(self, target: Target) -> None:
        with self.api.objects.changed:
            version = self.api.objects.version
            found = [each for each in self.api.objects.all(target.kind.name, target.namespace) if self._selected(each)]
        start = 0
        if token := self.query.get("continue"):
            version, start = json.loads(base64.b64decode(token))
            if version < self.api.objects.oldest:
                raise Refused(
                    api_statuses.expired(
                        "The provided continue parameter is too old to display a consistent list result."
                    )
                )
        limit = int(self.query.get("limit") or 0) or len(found)
        limit = min(limit, self.api.settings.page)
        metadata: Object = {"resourceVersion": str(version)}
        if len(found) > start + limit:
            metadata["continue"] = base64.b64encode(json.dumps([version, start + limit]).encode()).decode()
            metadata["remainingItemCount"] = len(found) - start - limit
        items = [
            {key: value for key, value in each.items() if key not in {"apiVersion", "kind"}}
            for each in found[start : start + limit]
        ]
        kind = target.kind
        self._json(
            200, {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}
        )

    def _watch(self, target: Target) -> None:
        version = int(self.query.get("resourceVersion") or 0)
        ends = time.monotonic() + float(self.query.get("timeoutSeconds") or 1800)
        self._begin_stream("application/json")
        if not version or self.query.get("sendInitialEvents") == "true":
            version = self._there(target)
        elif version < self.api.objects.oldest:
            self._event(
                "ERROR", api_statuses.expired(f"too old resource version: {version} ({self.api.objects.oldest})")
            )
            return self._end_stream()
        self._events(target, version, ends)
        return self._end_stream()

    def _there(self, target: Target) -> int:
        """Tell what is there; the version of it."""
        with self.api.objects.changed:
            found = self.api.objects.all(target.kind.name, target.namespace)
            version = self.api.objects.version
        for each in found:
            if self._selected(each):
                self._event("ADDED", each)
        if self.query.get("sendInitialEvents") == "true":
            self._bookmark(target, version, {"k8s.io/initial-events-end": "true"})
        return version

    def _events(self, target: Target, version: int, ends: float) -> None:
        objects, bookmarks = self.api.objects, self.api.bookmarks
        while True:
            with objects.changed:
                news = objects.since(version)
                asked = self.api.bookmarks
                if not news and bookmarks == asked:
                    if self.api.closing or time.monotonic() >= ends or self._hung_up():
                        break
                    objects.changed.wait(min(0.1, max(0.0, ends - time.monotonic())))
                    continue
                version = objects.version
            for each in news:
                self._tell(target, each)
            if bookmarks != asked:
                bookmarks = asked
                self._bookmark(target, version)
        if not self.api.closing:
            self._bookmark(target, version)

    def _bookmark(self, target: Target, version: int, annotations: dict[str, str] | None = None) -> None:
        if self.query.get("allowWatchBookmarks") in {"1", "true", "True"}:
            metadata: Object = {"resourceVersion": str(version), "creationTimestamp": None}
            metadata |= {"annotations": annotations} if annotations else {}
            kind = target.kind
            self._event("BOOKMARK", {"kind": kind.name, "apiVersion": kind.api_version, "metadata": metadata})

    def _tell(self, target: Target, happened: Happened) -> None:
        """Tell one change as this watch sees it: what no longer meets its selectors is DELETED to it."""
        now = happened.object
        if happened.kind != target.kind.name or target.namespace not in {"", now["metadata"].get("namespace", "")}:
            return
        before = happened.before is not None and self._selected(happened.before)
        after = happened.type != "DELETED" and self._selected(now)
        if before and not after:
            self._event("DELETED", now)
        elif after:
            self._event("MODIFIED" if before else "ADDED", now)

    def _event(self, type_: str, found: Object) -> None:
        self._stream(json.dumps({"type": type_, "object": found}).encode() + b"\n")

    # ── Logs ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _log(self, target: Target) -> None:
        pod = self.api.objects.get(target.key)
        if pod is None:
            raise Refused(api_statuses.not_found("pods", target.name))
        container = self.query.get("container", "")
        if not api_logs.has_container(pod, container):
            raise Refused(api_statuses.bad_request(f"container {container} is not valid for pod {target.name}"))
        if self.query.get("previous") in {"1", "true"}:
            message = f'previous terminated container "{container}" in pod "{target.name}" not found'
            raise Refused(api_statuses.bad_request(message))
        log, state = self.api.logs.of(target.name, container), api_logs.state_of(pod, container)
        if "waiting" in (state or {}) or (log is None and not state):
            reason = (state or {}).get("waiting", {}).get("reason", "PodInitializing")
            raise Refused(api_statuses.waiting(container, target.name, reason))
        log = log or api_logs.Log()
        self._begin_stream("text/plain")
        with self.api.objects.changed:
            lines, read = api_logs.wanted(log, self.query), len(log.lines)
        self._lines(lines)
        if self.query.get("follow") in {"1", "true", "True"}:
            self._follow(target, container, read)
        self._end_stream()

    def _follow(self, target: Target, container: str, read: int) -> None:
        while True:
            with self.api.objects.changed:
                log = self.api.logs.of(target.name, container) or api_logs.Log()
                lines, read = log.lines[read:], len(log.lines)
                if not lines:
                    pod = self.api.objects.get(target.key)
                    ended = pod is None or "terminated" in (api_logs.state_of(pod, container) or {})
                    if log.ended or ended or self.api.closing or self._hung_up():
                        return
                    self.api.objects.changed.wait(0.1)
                    continue
            self._lines(lines)

    def _lines(self, lines: list[tuple[str, str]]) -> None:
        stamped = self.query.get("timestamps") in {"1", "true", "True"}
        for at, line in lines:
            self._stream((f"{at} {line}" if stamped else line).encode() + b"\n")
