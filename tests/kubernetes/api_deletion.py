"""Deletion of objects by the API server used in tests: propagation, grace periods, finalizers and dependents."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

from api_objects import KINDS, Key, Object, Objects
from api_statuses import ApiError, not_found, uid_conflict

FOREGROUND = "foregroundDeletion"


class Deletion:
    """Deletes objects as the API server, the garbage collector and the kubelet do.

    Attributes:
        seconds: Duration of pod shutdown, and of foreground deletion.
        is_on_hold: Whether deleted objects keep existing, with a deletionTimestamp, until `finish`.
    """

    def __init__(self, objects: Objects) -> None:
        self.seconds = 0.0
        self.is_on_hold = False
        self._objects = objects
        self._pending: list[tuple[Object, str]] = []

    def delete(self, key: Key, options: dict[str, Any]) -> Object:
        """Start the deletion of an object.

        Returns:
            A `Status` if the object is deleted, otherwise the object with its deletionTimestamp.
        """
        kind = KINDS[key.kind]
        with self._objects.changed:
            obj = self._objects.get(key)
            if obj is None:
                raise ApiError(not_found(kind.full, key.name))
            uid = options.get("preconditions", {}).get("uid")
            if uid and uid != obj["metadata"]["uid"]:
                raise ApiError(uid_conflict(kind.full, key.name, uid, obj["metadata"]["uid"]))
            # Jobs of batch/v1 orphan their pods by default.
            propagation = options.get("propagationPolicy") or ("Orphan" if key.kind == "Job" else "Background")
            if self._is_immediate(obj, propagation, options.get("gracePeriodSeconds")):
                self._remove(obj, propagation)
                details = {"name": key.name, "kind": kind.plural, "uid": obj["metadata"]["uid"]}
                details |= {"group": kind.group} if kind.group else {}
                return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
            return self._start(key, obj, propagation, options.get("gracePeriodSeconds"))

    def finish(self) -> None:
        """Finish all pending deletions."""
        self.is_on_hold = False
        with self._objects.changed:
            while self._pending:
                self._remove(*self._pending.pop(0))

    def _is_immediate(self, obj: Object, propagation: str, grace: int | None) -> bool:
        if obj["kind"] == "Pod":
            return grace == 0 or _is_finished(obj) or (not self.is_on_hold and self.seconds == 0)
        return propagation != "Foreground" and not obj["metadata"].get("finalizers")

    def _start(self, key: Key, obj: Object, propagation: str, grace: int | None) -> Object:
        metadata = obj["metadata"]
        if key.kind == "Pod":
            grace = obj.get("spec", {}).get("terminationGracePeriodSeconds", 30) if grace is None else grace
        elif propagation == "Foreground":
            metadata["finalizers"] = sorted({*metadata.get("finalizers", []), FOREGROUND})
            for dependent in self._dependents(metadata["uid"]):
                self._delete_dependent(dependent)
        deletion_time = datetime.now(UTC) + timedelta(seconds=grace or 0)
        metadata.setdefault("deletionTimestamp", deletion_time.strftime("%Y-%m-%dT%H:%M:%SZ"))
        metadata["deletionGracePeriodSeconds"] = grace or 0
        stored = self._objects.store(key, obj)
        if self.is_on_hold:
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
                for dependent in self._dependents(uid):
                    self._remove(dependent, "Background")
            stored = self._objects.get(_key(obj))
            if stored is None or stored["metadata"]["uid"] != uid:
                return
            self._objects.remove(_key(obj))
            if propagation != "Orphan":
                for dependent in self._dependents(uid):
                    self._delete_dependent(dependent)

    def _delete_dependent(self, obj: Object) -> None:
        if "deletionTimestamp" not in obj["metadata"]:
            self.delete(_key(obj), {"propagationPolicy": "Background"})

    def _dependents(self, uid: str) -> list[Object]:
        """Return the objects whose only remaining owner is this one."""
        dependents = []
        for kind in KINDS:
            for obj in self._objects.list_objects(kind):
                owners = [owner["uid"] for owner in obj["metadata"].get("ownerReferences", [])]
                others = [owner for owner in owners if owner != uid and self._exists(owner)]
                dependents += [obj] if uid in owners and not others else []
        return dependents

    def _exists(self, uid: str) -> bool:
        return any(obj["metadata"]["uid"] == uid for kind in KINDS for obj in self._objects.list_objects(kind))


def _key(obj: Object) -> Key:
    return Key(obj["kind"], obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def _is_finished(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
