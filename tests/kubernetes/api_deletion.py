"""Deletion of objects by the API server used in tests: propagation, grace periods, finalizers and dependents."""

import copy
import threading
from datetime import timedelta
from typing import Any

from api_apply import timestamp
from api_kinds import Key, Object
from api_objects import Objects
from api_statuses import ApiError, not_found, uid_conflict

FOREGROUND = "foregroundDeletion"


class Deletion:
    """Deletes objects as the API server, the garbage collector and the kubelet do.

    Attributes:
        seconds: Duration of pod shutdown, and of foreground deletion.
        is_on_hold: Whether deleted objects keep existing, with a deletionTimestamp, until `finish`.
        has_controllers: Whether a simulated kubelet and garbage collector finish the deletions.
    """

    def __init__(self, objects: Objects) -> None:
        self.seconds = 0.0
        self.is_on_hold = False
        self.has_controllers = False
        self._objects = objects
        self._pending: list[tuple[Object, str]] = []

    def delete(self, key: Key, options: dict[str, Any]) -> Object:
        """Start the deletion of an object.

        Returns:
            A `Status` if the object is deleted, otherwise the object with its deletionTimestamp.
        """
        kind = self._objects.kinds[key.kind]
        with self._objects.changed:
            obj = self._objects.get(key)
            if obj is None:
                raise ApiError(not_found(kind.full, key.name))
            uid = options.get("preconditions", {}).get("uid")
            if uid and uid != obj["metadata"]["uid"]:
                raise ApiError(uid_conflict(kind.full, key.name, uid, obj["metadata"]["uid"]))
            if key.kind == "Namespace":
                return self._delete_namespace(key, obj)
            # Jobs of batch/v1 orphan their pods by default.
            propagation = options.get("propagationPolicy") or ("Orphan" if key.kind == "Job" else "Background")
            if self._is_immediate(obj, propagation, options.get("gracePeriodSeconds")):
                self._remove(obj, propagation)
                details = {"name": key.name, "kind": kind.plural, "uid": obj["metadata"]["uid"]}
                details |= {"group": kind.group} if kind.group else {}
                return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
            return self._start(key, obj, propagation, options.get("gracePeriodSeconds"))

    def _delete_namespace(self, key: Key, obj: Object) -> Object:
        """Delete all objects of a namespace; the namespace itself is removed last."""
        obj["metadata"].setdefault("deletionTimestamp", timestamp(self._objects.now()))
        obj["status"] = {"phase": "Terminating"}
        stored = self._objects.store(key, obj)
        for content in self._objects.list_all():
            if content["metadata"].get("namespace") == key.name and self._objects.get(_key(content)):
                self.delete(_key(content), {"propagationPolicy": "Background"})
        self._finish_namespaces()
        return stored

    def _finish_namespaces(self) -> None:
        objects = self._objects.list_all()
        used = {obj["metadata"].get("namespace") for obj in objects}
        for obj in objects:
            is_terminating = obj["kind"] == "Namespace" and "deletionTimestamp" in obj["metadata"]
            if is_terminating and obj["metadata"]["name"] not in used:
                self._objects.remove(_key(obj))

    def finish(self) -> None:
        """Finish all pending deletions."""
        self.is_on_hold = False
        with self._objects.changed:
            while self._pending:
                self._remove(*self._pending.pop(0))

    def _is_immediate(self, obj: Object, propagation: str, grace: int | None) -> bool:
        if obj["kind"] == "Pod":
            is_bound = "nodeName" in obj.get("spec", {})
            is_immediate = not is_bound if self.has_controllers else not self.is_on_hold and self.seconds == 0
            return grace == 0 or _is_finished(obj) or is_immediate
        return propagation != "Foreground" and not obj["metadata"].get("finalizers")

    def _start(self, key: Key, obj: Object, propagation: str, grace: int | None) -> Object:
        metadata = obj["metadata"]
        if key.kind == "Pod":
            grace = obj.get("spec", {}).get("terminationGracePeriodSeconds", 30) if grace is None else grace
        elif propagation == "Foreground":
            metadata["finalizers"] = sorted({*metadata.get("finalizers", []), FOREGROUND})
            for dependent in self.dependents(metadata["uid"]):
                self._delete_dependent(dependent, "Foreground" if self.has_controllers else "Background")
        deletion_time = self._objects.now() + timedelta(seconds=grace or 0)
        metadata.setdefault("deletionTimestamp", timestamp(deletion_time))
        metadata["deletionGracePeriodSeconds"] = grace or 0
        stored = self._objects.store(key, obj)
        if self.has_controllers:
            pass
        elif self.is_on_hold:
            self._pending.append((stored, propagation))
        elif self.seconds == 0:
            self._remove(stored, propagation)
        else:
            timer = threading.Timer(self.seconds, self._remove, (stored, propagation))
            timer.daemon = True
            timer.start()
        return stored

    def _remove(self, obj: Object, propagation: str) -> None:
        uid = obj["metadata"]["uid"]
        with self._objects.changed:
            if propagation == "Foreground":
                # The owner is removed last, whichever timer fires first.
                for dependent in self.dependents(uid):
                    self._remove(dependent, "Background")
            stored = self._objects.get(_key(obj))
            if stored is None or stored["metadata"]["uid"] != uid:
                return
            self._objects.remove(_key(obj))
            if propagation != "Orphan":
                for dependent in self.dependents(uid):
                    self._delete_dependent(dependent)
            self._finish_namespaces()

    def _delete_dependent(self, obj: Object, propagation: str = "Background") -> None:
        if "deletionTimestamp" not in obj["metadata"]:
            has_dependents = obj["kind"] != "Pod" and self.dependents(obj["metadata"]["uid"])
            self.delete(_key(obj), {"propagationPolicy": propagation if has_dependents else "Background"})

    def collect_garbage(self) -> None:
        """Delete objects whose owners are gone, and owners in foreground deletion whose dependents are gone."""
        with self._objects.changed:
            objects = self._objects.list_all()
            existing = {obj["metadata"]["uid"] for obj in objects}
            for obj in objects:
                owners = {owner["uid"] for owner in obj["metadata"].get("ownerReferences", [])}
                if owners and not owners & existing:
                    self._delete_dependent(obj)
                if FOREGROUND in obj["metadata"].get("finalizers", []) and not self.dependents(obj["metadata"]["uid"]):
                    self._objects.remove(_key(obj))
            self._finish_namespaces()

    def dependents(self, uid: str) -> list[Object]:
        """Return the objects whose only remaining owner is this one."""
        objects = self._objects.list_all()
        existing = {obj["metadata"]["uid"] for obj in objects}
        dependents = []
        for obj in objects:
            owners = {owner["uid"] for owner in obj["metadata"].get("ownerReferences", [])}
            dependents += [copy.deepcopy(obj)] if uid in owners and not (owners - {uid}) & existing else []
        return dependents


def _key(obj: Object) -> Key:
    return Key(obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def _is_finished(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
