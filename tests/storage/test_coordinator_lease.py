"""The lease of a search: one coordinator at a time, and a killed one does not block the next one for long."""

import threading
import time

import pytest

from topwork.errors import SettingError, UnavailableError
from topwork.search.coordinator_lease import CoordinatorLease, LeaseSettings, hold_lease

FAST = LeaseSettings(duration_seconds=2.0, renew_seconds=0.2)
NEVER_RENEWED = LeaseSettings(duration_seconds=1.0, renew_seconds=3600.0)
SEARCH = "digits-0f1e2d3c"


def abandon(storage, holder, settings=NEVER_RENEWED) -> CoordinatorLease:
    """Acquire the lease like a process that is killed before it renews it."""
    lease = CoordinatorLease(storage, SEARCH, settings)
    lease.acquire(holder)
    return lease


def test_a_released_lease_is_acquired_at_once(storage):
    for holder in ("one", "two"):
        with hold_lease(storage, SEARCH, holder, LeaseSettings(duration_seconds=3600.0)) as lease:
            lease.check()
    assert len(list(storage.list(f"searches/{SEARCH}/coordinators/"))) == 1


def test_a_renewed_lease_is_refused_with_its_process(storage):
    with (
        hold_lease(storage, SEARCH, "one", FAST),
        pytest.raises(SettingError, match=rf"running the search {SEARCH}: .*, process \d+\. Wait until it ends"),
        hold_lease(storage, SEARCH, "two", FAST),
    ):
        pass


def test_the_next_process_of_a_killed_holder_does_not_wait(storage):
    abandon(storage, "one", LeaseSettings(duration_seconds=3600.0, renew_seconds=3600.0))
    with hold_lease(storage, SEARCH, "one", LeaseSettings(duration_seconds=3600.0)) as lease:
        lease.check()


def test_another_holder_takes_over_after_the_duration(storage):
    killed = abandon(storage, "one")
    started = time.monotonic()
    with hold_lease(storage, SEARCH, "two", NEVER_RENEWED) as lease:
        assert time.monotonic() - started >= NEVER_RENEWED.duration_seconds
        lease.check()
        # The first process was only suspended.
        killed._renew()
        with pytest.raises(UnavailableError, match="has taken over the search"):
            killed.check()
    killed.release()
    assert [stored.key[-13:] for stored in storage.list(f"searches/{SEARCH}/coordinators/")] == ["00000001.json"]


def test_one_of_several_candidates_takes_over(storage):
    abandon(storage, "killed")
    acquired, refused = [], []
    release = threading.Event()

    def run(holder: str) -> None:
        try:
            with hold_lease(storage, SEARCH, holder, LeaseSettings(3.0, 0.1)):
                acquired.append(holder)
                release.wait(60)
        except SettingError:
            refused.append(holder)

    threads = [threading.Thread(target=run, args=(f"candidate {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(refused) < 3:
        assert len(acquired) <= 1
        assert any(thread.is_alive() for thread in threads)
        time.sleep(0.05)
    release.set()
    for thread in threads:
        thread.join()
    assert len(acquired) == 1
