"""Reads of the API server used in tests: objects, lists and watches."""

import base64
import json
import time

import api_statuses
from api_connection import TRUE
from api_kinds import Object
from api_objects import ObjectChange
from api_paths import Target
from api_pods import PodHandler
from api_selectors import matches_selectors
from api_statuses import ApiError
from api_tables import table


class ReadHandler(PodHandler):
    """Serves reads."""

    _has_sent_columns = False

    def _get(self, target: Target) -> None:
        if target.subresource == "log":
            self._log(target)
        elif target.subresource.startswith("proxy/"):
            self._proxy(target)
        elif target.name:
            obj = self.api.objects.get(target.key)
            if obj is None:
                raise ApiError(api_statuses.not_found(target.kind.full, target.name))
            self._send_object(target, obj)
        elif self.query.get("watch") in TRUE:
            self._watch(target)
        else:
            self._list(target)

    def _send_object(self, target: Target, obj: Object) -> None:
        if self._wants_table():
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            obj = table(target.kind, [obj], metadata, include=self.query.get("includeObject", ""))
        self._send_json(200, obj)

    def _wants_table(self) -> bool:
        return "as=Table" in self.headers.get("Accept", "")

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
        kind = target.kind
        if self._wants_table():
            self._send_json(
                200, table(kind, selected[start:end], metadata, include=self.query.get("includeObject", ""))
            )
            return
        items = [
            {key: value for key, value in obj.items() if key not in {"apiVersion", "kind"}}
            for obj in selected[start:end]
        ]
        self._send_json(
            200, {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}
        )

    def _watch(self, target: Target) -> None:
        version = int(self.query.get("resourceVersion") or 0)
        self._has_sent_columns = False
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
                self._send_object_event(target, "ADDED", obj)
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
            self._send_object_event(target, "DELETED", obj)
        elif is_selected:
            self._send_object_event(target, "MODIFIED" if was_selected else "ADDED", obj)

    def _send_object_event(self, target: Target, type_: str, obj: Object) -> None:
        if self._wants_table():
            include, with_columns = self.query.get("includeObject", ""), not self._has_sent_columns
            metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
            obj = table(target.kind, [obj], metadata, include=include, with_columns=with_columns)
            self._has_sent_columns = True
        self._send_event(type_, obj)

    def _send_event(self, type_: str, obj: Object) -> None:
        self._send_chunk(json.dumps({"type": type_, "object": obj}).encode() + b"\n")
