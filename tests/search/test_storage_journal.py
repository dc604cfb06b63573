"""The journal of a search on a real S3 server."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.search.small_searches import MemoryJournal, complete, fixed_clock, make_search

from topwork.clients.s3.storage import Storage
from topwork.errors import DataError
from topwork.search.journal import JournalConflictError
from topwork.search.storage_journal import StorageJournal
from topwork.search.study import Study

EVENT = {"event": "ended", "time": "2026-01-01T00:00:00Z", "reason": "test"}


@pytest.fixture
def journal(storage: Storage) -> StorageJournal:
    return StorageJournal(storage, "cats-7242ac0a")


def test_events_are_read_in_order(journal: StorageJournal):
    events = [{**EVENT, "reason": str(number)} for number in range(12)]
    for number, event in enumerate(events):
        journal.append(number, event)
    assert journal.read() == events
    assert journal.read(10) == events[10:]
    assert journal.read(12) == []


def test_an_empty_journal_has_no_events(journal: StorageJournal):
    assert journal.read() == []


def test_events_are_objects_of_the_search(storage: Storage, journal: StorageJournal):
    journal.append(0, EVENT)
    assert [stored.key for stored in storage.list()] == ["searches/cats-7242ac0a/journal/00000000.json"]


def test_an_event_is_written_once(storage: Storage, journal: StorageJournal):
    journal.append(0, EVENT)
    with pytest.raises(JournalConflictError, match="Another coordinator of the search has written s3://"):
        StorageJournal(storage, "cats-7242ac0a").append(0, {**EVENT, "reason": "other"})
    assert journal.read() == [EVENT]


def test_objects_of_two_writers_differ(storage: Storage, journal: StorageJournal):
    """Storage takes an object with the same bytes for its own if the response to a write is lost."""
    journal.append(0, EVENT)
    StorageJournal(storage, "cats-7242ac0a").append(1, EVENT)
    first, second = (storage.read(stored.key) for stored in storage.list())
    assert first != second
    assert journal.read() == [EVENT, EVENT]


def test_one_of_many_writers_of_the_same_event_succeeds(storage: Storage):
    def append(_: int) -> bool:
        try:
            StorageJournal(storage, "cats-7242ac0a").append(0, EVENT)
        except JournalConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(append, range(8))) == 1


def test_a_missing_event_is_reported(storage: Storage, journal: StorageJournal):
    for number in range(3):
        journal.append(number, EVENT)
    storage.delete(["searches/cats-7242ac0a/journal/00000001.json"])
    with pytest.raises(DataError, match=r"00000001\.json is missing, but later events of the search exist"):
        journal.read()


@pytest.mark.parametrize("content", [b"{", b"[]", b""])
def test_a_damaged_event_is_reported(storage: Storage, journal: StorageJournal, content: bytes):
    storage.write("searches/cats-7242ac0a/journal/00000000.json", content)
    with pytest.raises(DataError, match=r"00000000\.json is not an event of a search: it was changed by hand"):
        journal.read()


def test_a_search_in_storage_is_the_same_as_in_memory(journal: StorageJournal):
    search, memory = make_search(trials=4, pruner="asha"), MemoryJournal()
    complete(Study(search, memory, fixed_clock)).finish()
    complete(Study(search, journal, fixed_clock)).finish()
    assert journal.read() == memory.events
    assert Study(search, journal).trials == Study(search, memory).trials
