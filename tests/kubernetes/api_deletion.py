"""How objects go, in the API server that tests use: propagation, grace periods, finalizers, dependents."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

from api_objects import KINDS, Key, Object, Objects
from api_statuses import Refused, not_found, uid_conflict

FOREGROUND = "foregroundDeletion"


class Deletion:
    """Deletes objects as the API server, the garbage collector and the kubelet do together.

    Attributes:
        seconds: What a pod takes to stop after SIGTERM, and what foreground deletion takes besides.
        held: Leave what is being deleted until `finish`.
    """

    def __init__(self, objects: Objects) -> None:
        self.seconds = 0.0
        self.held = False
        self._objects = objects
        self._waiting: list[tuple[Object, str]] = []

    def delete(self, key: Key, options: dict[str, Any]) -> Object:
        """Begin to delete an object.

        Returns:
            The `Status` of a deletion that is done, or the object as it is while it waits.
        """
        kind = KINDS[key.kind]
        with self._objects.changed:
            found = self._objects.get(key)
            if found is None:
                raise Refused(not_found(kind.full, key.name))
            uid = options.get("preconditions", {}).get("uid")
            if uid and uid != found["metadata"]["uid"]:
                raise Refused(uid_conflict(kind.full, key.name, uid, found["metadata"]["uid"]))
            # Jobs of batch/v1 orphan their pods where nobody says otherwise.
            propagation = options.get("propagationPolicy") or ("Orphan" if key.kind == "Job" else "Background")
            if self._at_once(found, propagation, options.get("gracePeriodSeconds")):
                self._gone(found, propagation)
                details = {"name": key.name, "kind": kind.plural, "uid": found["metadata"]["uid"]}
                details |= {"group": kind.group} if kind.group else {}
                return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
            return self._begin(key, found, propagation, options.get("gracePeriodSeconds"))

    def finish(self) -> None:
        """Let go of all that waits."""
        self.held = False
        with self._objects.changed:
            while self._waiting:
                self._gone(*self._waiting.pop(0))

    def _at_once(self, found: Object, propagation: str, grace: int | None) -> bool:
        if found["kind"] == "Pod":
            return grace == 0 or _finished(found) or (not self.held and self.seconds == 0)
        return propagation != "Foreground" and not found["metadata"].get("finalizers")

    def _begin(self, key: Key, found: Object, propagation: str, grace: int | None) -> Object:
        metadata = found["metadata"]
        if key.kind == "Pod":
            grace = found.get("spec", {}).get("terminationGracePeriodSeconds", 30) if grace is None else grace
        elif propagation == "Foreground":
            metadata["finalizers"] = sorted({*metadata.get("finalizers", []), FOREGROUND})
            for dependent in self._dependents(metadata["uid"]):
                self._delete_dependent(dependent)
        when = datetime.now(UTC) + timedelta(seconds=grace or 0)
        metadata.setdefault("deletionTimestamp", when.strftime("%Y-%m-%dT%H:%M:%SZ"))
        metadata["deletionGracePeriodSeconds"] = grace or 0
        stored = self._objects.store(key, found)
        if self.held:
            self._waiting.append((stored, propagation))
        elif self.seconds == 0:
            self._gone(stored, propagation)
        else:
            timer = threading.Timer(self.seconds, self._gone, (stored, propagation))
            timer.daemon = True
            timer.start()
        return stored

    def _gone(self, found: Object, propagation: str) -> None:
        uid = found["metadata"]["uid"]
        with self._objects.changed:
            if propagation == "Foreground":
                # The owner goes last, whichever timer was the first.
                for dependent in self._dependents(uid):
                    self._gone(dependent, "Background")
            present = self._objects.get(_key(found))
            if present is None or present["metadata"]["uid"] != uid:
                return
            self._objects.remove(_key(found))
            if propagation != "Orphan":
                for dependent in self._dependents(uid):
                    self._delete_dependent(dependent)

    def _delete_dependent(self, found: Object) -> None:
        if "deletionTimestamp" not in found["metadata"]:
            self.delete(_key(found), {"propagationPolicy": "Background"})

    def _dependents(self, uid: str) -> list[Object]:
        """Objects whose owners are all gone but for this one."""
        found = []
        for kind in KINDS:
            for each in self._objects.all(kind):
                owners = [owner["uid"] for owner in each["metadata"].get("ownerReferences", [])]
                others = [owner for owner in owners if owner != uid and self._alive(owner)]
                found += [each] if uid in owners and not others else []
        return found

    def _alive(self, uid: str) -> bool:
        return any(each["metadata"]["uid"] == uid for kind in KINDS for each in self._objects.all(kind))


def _key(found: Object) -> Key:
    return Key(found["kind"], found["metadata"].get("namespace", ""), found["metadata"]["name"])


def _finished(pod: Object) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"}
