"""The lease of a search in object storage: at most one coordinator on a laptop or server carries out its trials.

Holders are numbered: the object `searches/<search id>/coordinators/<number>.json` with the highest number is the lease,
and its creation decides who holds it. The holder rewrites its object every few seconds. Clocks of different machines
are never compared: a candidate takes the lease over if it has not seen it change for its whole duration.

The lease only saves work. Two coordinators can't spoil a search: its journal accepts one of two conflicting decisions.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from topwork.clients.s3.storage import Storage
from topwork.errors import DataError, SettingError, TopworkError, UnavailableError
from topwork.search.storage_journal import search_prefix

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0
RELEASE_SECONDS = 2.0
"""Time for a renewal in progress to end. During an outage, it takes minutes, and the lease expires instead."""


@dataclass(frozen=True)
class LeaseSettings:
    """Durations of a lease.

    Attributes:
        duration_seconds: Others take the lease over if its holder has not renewed it for this long.
        renew_seconds: Time between two renewals.
    """

    duration_seconds: float = 30.0
    renew_seconds: float = 8.0


class LeaseRecord(BaseModel):
    """Content of the object of a holder.

    Attributes:
        format: Format version of the record.
        holder: Identifies the holder; see `hold_lease`.
        process: Host and process ID, for the user.
        renewals: Number of renewals.
        released: Whether the holder has ended.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    holder: str
    process: str
    renewals: int = 0
    released: bool = False


class _Numbered(NamedTuple):
    """A lease record and its number."""

    number: int
    record: LeaseRecord


class CoordinatorLease:
    """The lease while this process holds it. A thread renews it."""

    def __init__(self, storage: Storage, search_id: str, settings: LeaseSettings) -> None:
        self._storage, self._search_id, self._settings = storage, search_id, settings
        self._prefix = f"{search_prefix(search_id)}/coordinators/"
        self._own: _Numbered | None = None
        self._lost_to = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="coordinator-lease", daemon=True)

    def check(self) -> None:
        """Check that no other coordinator has taken the lease over.

        Raises:
            UnavailableError: If one has, because this process was suspended or could not reach storage for a while.
        """
        if self._lost_to:
            raise UnavailableError(
                f"{self._lost_to} has taken over the search {self._search_id}, because this process did not renew its "
                "lease in time: it was suspended, or could not reach storage. The other process continues the search."
            )

    def acquire(self, holder: str) -> None:
        """Acquire the lease, and start to renew it.

        Args:
            holder: Identifies this process and those before it on the same state directory.

        Raises:
            SettingError: If another process holds the lease and renews it.
            UnavailableError: If storage cannot be reached.
        """
        own = LeaseRecord(holder=holder, process=f"{socket.gethostname()}, process {os.getpid()}")
        while not self._take_over(own, self._wait_until_free(holder)):
            pass
        self._thread.start()

    def release(self) -> None:
        """Give the lease up, so that another process can continue the search immediately."""
        self._stop.set()
        self._thread.join(RELEASE_SECONDS)
        # A renewal that still waits for storage would overwrite the record.
        if self._thread.is_alive() or self._own is None or self._lost_to:
            return
        try:
            self._write(self._own._replace(record=self._own.record.model_copy(update={"released": True})))
        except TopworkError as error:
            log.warning(
                "lease of the search not released",
                reason=str(error),
                hint=f"another machine can continue the search in {self._settings.duration_seconds:g} s",
            )

    def _wait_until_free(self, holder: str) -> int:
        """Wait until the lease is free or expired, and return the number of its last holder; -1 if there was none."""
        seen, since, is_reported = self._read_latest(), time.monotonic(), False
        while seen and not seen.record.released and seen.record.holder != holder:
            if time.monotonic() - since >= self._settings.duration_seconds:
                log.warning("the coordinator of the search has ended without releasing it", was=seen.record.process)
                break
            if not is_reported:
                log.info(
                    "waiting to see whether another coordinator of the search is alive",
                    coordinator=seen.record.process,
                    seconds=self._settings.duration_seconds,
                )
                is_reported = True
            time.sleep(min(POLL_SECONDS, self._settings.duration_seconds / 10))
            current = self._read_latest()
            if current and current != seen and not current.record.released:
                raise SettingError(
                    f"Another process is running the search {self._search_id}: {current.record.process}. Wait until it "
                    "ends, or stop it."
                )
            if current != seen:
                seen, since = current, time.monotonic()
        return seen.number if seen else -1

    def _take_over(self, own: LeaseRecord, last: int) -> bool:
        candidate = _Numbered(last + 1, own)
        created = self._storage.write(self._key(candidate.number), own.model_dump_json().encode(), only_if_absent=True)
        numbers = self._list_numbers()
        # Holders delete the objects of earlier ones, so that a number that was free may be an old one.
        if not created or numbers[-1:] != [candidate.number]:
            return False
        self._own = candidate
        self._storage.delete(self._key(number) for number in numbers[:-1])
        return True

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self._settings.renew_seconds):
            try:
                self._renew()
            except TopworkError as error:
                log.warning("lease of the search not renewed", reason=str(error))
            if self._lost_to:
                log.warning("another coordinator has taken over the search", coordinator=self._lost_to)
                return

    def _renew(self) -> None:
        assert self._own
        latest = self._read_latest()
        if latest and latest.number > self._own.number:
            self._lost_to = latest.record.process
            return
        record = self._own.record
        self._own = self._own._replace(record=record.model_copy(update={"renewals": record.renewals + 1}))
        self._write(self._own)

    def _read_latest(self) -> _Numbered | None:
        for number in reversed(self._list_numbers()):
            data = self._storage.read(self._key(number))
            if data is not None:
                try:
                    return _Numbered(number, LeaseRecord.model_validate_json(data))
                except ValidationError as error:
                    uri = self._storage.uri_of(self._key(number))
                    raise DataError(
                        f"{uri} is not the lease of a search: {error.errors()[0]['msg']}. Delete it if no process is "
                        "running the search."
                    ) from error
        return None

    def _list_numbers(self) -> list[int]:
        names = (stored.key.removeprefix(self._prefix) for stored in self._storage.list(self._prefix))
        return sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit())

    def _write(self, numbered: _Numbered) -> None:
        self._storage.write(
            self._key(numbered.number), numbered.record.model_dump_json().encode(), content_type="application/json"
        )

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08}.json"


@contextmanager
def hold_lease(
    storage: Storage, search_id: str, holder: str, settings: LeaseSettings = LeaseSettings()
) -> Iterator[CoordinatorLease]:
    """Hold the lease of a search while the block runs.

    Args:
        storage: Storage of the search.
        search_id: ID of the search.
        holder: Identifies the holder. Two processes of the same holder must not run at the same time: one continues
            immediately where the other was killed.
        settings: Durations.

    Yields:
        The lease.

    Raises:
        SettingError: If another process holds the lease.
        UnavailableError: If storage cannot be reached.
    """
    lease = CoordinatorLease(storage, search_id, settings)
    lease.acquire(holder)
    try:
        yield lease
    finally:
        lease.release()
