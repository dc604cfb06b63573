"""HTTP requests of the API server used in tests: authentication, discovery, writes and injected faults."""

import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import api_statuses
from api_authorization import User, verb_of
from api_connection import TRUE, ConnectionCutError
from api_discovery import discovery_response
from api_kinds import Object
from api_openapi import openapi_response
from api_patches import json_patch, merge_patch
from api_paths import Target, parse_path, validate_metadata
from api_reads import ReadHandler
from api_statuses import ApiError
from api_writes import WriteOptions, Written

APPLY, MERGE, STRATEGIC, JSON_PATCH = (
    f"application/{name}"
    for name in ("apply-patch+yaml", "merge-patch+json", "strategic-merge-patch+json", "json-patch+json")
)


class Handler(ReadHandler):
    """Serves the requests of a connection."""

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_PATCH(self) -> None:
        self._serve(self._patch)

    def do_PUT(self) -> None:
        self._serve(self._update)

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
        if len(data) < length:  # the client was killed while it sent the request
            raise ConnectionCutError
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        is_json = data[:1] in {b"", b"{", b"["}  # kubectl create sends protobuf
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
                user = self._authenticate()
                if not is_json:
                    raise ApiError(api_statuses.status(415, "UnsupportedMediaType", "the body must be JSON"))
                kinds = [*self.api.objects.kinds.values()]
                content = discovery_response(url.path, kinds) or openapi_response(url.path, kinds)
                if content:
                    self._send_json(200, content)
                else:
                    target = parse_path(url.path, kinds)
                    self._authorize(user, target)
                    respond(target)
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

    def _authenticate(self) -> User:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if self.api.settings.token is None or (scheme.lower() == "bearer" and token == self.api.settings.token):
            return self.api.user
        if token not in self.api.other_users:
            raise ApiError(api_statuses.unauthorized())
        return self.api.other_users[token]

    def _authorize(self, user: User, target: Target) -> None:
        user.authorize(verb_of(self.command, target, is_watch=self.query.get("watch") in TRUE), target)
        is_apply = self.headers.get("Content-Type") == APPLY
        if self.command == "PATCH" and is_apply and self.api.objects.get(target.key) is None:
            user.authorize("create", target)

    # ── Writes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _create(self, target: Target) -> None:
        self._check_subresource(target)
        if name := self.body.get("metadata", {}).get("name", ""):
            target = target._replace(name=name)
            validate_metadata(target, self.body)
        self._admit_and_write(target, lambda options: self.api.writes.create(target.key, self.body, options))

    def _update(self, target: Target) -> None:
        self._check_subresource(target)
        validate_metadata(target, self.body)
        self._admit_and_write(
            target, lambda options: self.api.writes.update(target.key, self.body, options, target.subresource)
        )

    def _patch(self, target: Target) -> None:
        self._check_subresource(target)
        content_type = self.headers.get("Content-Type", "").partition(";")[0]
        if content_type == APPLY:
            self._apply(target)
            return
        accepted = [JSON_PATCH, MERGE, *([] if target.kind.definition else [STRATEGIC]), APPLY]
        if content_type not in accepted:
            raise ApiError(api_statuses.unsupported_media_type(*accepted))
        patch = json_patch if content_type == JSON_PATCH else merge_patch

        def change(obj: Object) -> Object:
            return patch(obj, self.body)

        self._admit_and_write(
            target, lambda options: self.api.writes.patch(target.key, change, options, target.subresource)
        )

    def _apply(self, target: Target) -> None:
        if not self.query.get("fieldManager"):
            message = "Required value: is required for apply patch"
            raise ApiError(api_statuses.invalid("PatchOptions", "", "fieldManager", message, "meta.k8s.io"))
        validate_metadata(target, self.body)
        self._admit_and_write(
            target, lambda options: self.api.writes.apply(target.key, self.body, options, target.subresource)
        )

    def _admit_and_write(self, target: Target, write: Callable[[WriteOptions], Written]) -> None:
        """Let webhooks review the object that a write would store, and then write it."""
        options, warnings = self._write_options(), self.api.settings.warnings
        old = self.api.objects.get(target.key) if target.name else None
        operation = "CREATE" if old is None else "UPDATE"
        if webhooks := self.api.admission.webhooks(target, operation):
            new = write(replace(options, dry_run=True)).object
            request = {"operation": operation, "object": new, "oldObject": old, "dryRun": options.dry_run}
            warnings = warnings + self.api.admission.review(webhooks, target, request)
        written = write(options)
        code = 201 if written.is_created else 200
        self._send_json(code, written.object, warnings=[*warnings, *written.warnings])

    def _delete(self, target: Target) -> None:
        options = {key: self.query[key] for key in ("propagationPolicy", "gracePeriodSeconds") if key in self.query}
        options |= self.body
        if "gracePeriodSeconds" in options:
            options["gracePeriodSeconds"] = int(options["gracePeriodSeconds"])
        self._send_json(200, self.api.deletion.delete(target.key, options))

    def _write_options(self) -> WriteOptions:
        agent = self.headers.get("User-Agent", "").partition("/")[0]
        return WriteOptions(
            self.query.get("fieldManager") or agent or "unknown",
            force=self.query.get("force") == "true",
            dry_run=self.query.get("dryRun") == "All",
            field_validation=self.query.get("fieldValidation") or "Warn",
        )

    @staticmethod
    def _check_subresource(target: Target) -> None:
        if target.subresource and not (target.subresource == "status" and target.kind.has_status):
            raise ApiError(api_statuses.unknown_api())
