"""What a node does whose main thread has not ended after the failure of another node."""

import threading
from types import SimpleNamespace

import pytest

from topwork.cli.runtime import node_group
from topwork.errors import TopworkError, UnavailableError

ERROR = UnavailableError("Lost node 1: it sent no heartbeat for 20 s.")


@pytest.fixture
def exits(monkeypatch) -> list[TopworkError]:
    """The errors with which the process ended."""
    monkeypatch.setattr(node_group, "ANSWER_SECONDS", 0.05)
    return []


def exit_after_failure(exits, is_complete, *, is_chief: bool = True) -> None:
    container = SimpleNamespace(nodes=SimpleNamespace(is_chief=is_chief), exit_from_thread=exits.append)
    node_group._exit_after_failure(container, ERROR, is_complete)


def test_the_chief_continues_after_training_is_complete(exits, monkeypatch):
    monkeypatch.setattr(node_group, "ANSWER_SECONDS", 60.0)
    exit_after_failure(exits, lambda: True)
    assert exits == []


def test_the_chief_ends_before_training_is_complete(exits):
    exit_after_failure(exits, lambda: False)
    assert exits == [ERROR]


def test_the_chief_ends_if_storage_does_not_answer(exits):
    answer = threading.Event()
    exit_after_failure(exits, answer.wait)
    assert exits == [ERROR]
    answer.set()


def test_the_chief_ends_if_storage_fails(exits):
    def fail() -> bool:
        raise UnavailableError("Storage cannot be reached.")

    exit_after_failure(exits, fail)
    assert exits == [ERROR]


def test_another_node_ends_without_asking_storage(exits):
    exit_after_failure(exits, lambda: pytest.fail("asked"), is_chief=False)
    assert exits == [ERROR]
