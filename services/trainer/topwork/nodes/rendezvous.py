"""The rendezvous of the nodes of a run: node 0 waits at the coordinator's address until all others have connected."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from topwork import __version__
from topwork.cancellation import STOPPED_MESSAGE, StopRequest
from topwork.errors import Stopped, UnavailableError
from topwork.nodes.addresses import resolve
from topwork.nodes.coordinator import Coordinator
from topwork.nodes.coordinator_client import CoordinatorClient
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node

log = structlog.get_logger(__name__)

WAIT_SECONDS = 0.5
COMPLETE_SECONDS = 10.0
"""Interval of the check whether another node has completed the work in the meantime."""
REPORT_SECONDS = 30.0
NAMES_SECONDS = 120.0
NAME_POLL_SECONDS = 2.0


def join(
    node: Node,
    facts: dict[str, Any],
    *,
    is_complete: Callable[[], bool],
    stop: StopRequest,
    identity: Mapping[str, str] | None = None,
) -> NodeGroup | None:
    """Wait until all nodes of the run have started, and connect them.

    Args:
        node: This node.
        facts: What this node reports to the others, as JSON values of at most 64 KiB.
        is_complete: Whether there is nothing left to do for this group. Called now and then while this node waits.
        stop: Stop request; a node that is stopped leaves, and the others wait for its next process.
        identity: What must be the same on all nodes, such as the name of the run and a digest of the spec; the version
            of topwork always is.

    Returns:
        The connected nodes with the facts of each; a single node if there is only one. None if `is_complete` returned
        True while this node waited.

    Raises:
        UnavailableError: If a node has not started after `node.peer_timeout_seconds`, or runs something else.
        Stopped: If a stop was requested.
    """
    if node.count == 1:
        return NodeGroup(node, [facts])
    identity = {**(identity or {}), "version": __version__}
    waiting = (Coordinator if node.is_chief else CoordinatorClient)(node, facts, identity)
    try:
        group = _wait(node, waiting, is_complete, stop)
    except BaseException as error:
        waiting.fail(error)
        raise
    if group is None:
        waiting.close()
        return None
    try:
        _wait_for_names(node)
    except BaseException as error:
        group.fail(error)
        raise
    return group


def _wait(
    node: Node, waiting: Coordinator | CoordinatorClient, is_complete: Callable[[], bool], stop: StopRequest
) -> NodeGroup | None:
    started = time.monotonic()
    deadline = started + node.peer_timeout_seconds
    next_check, next_report = started + COMPLETE_SECONDS, started
    while (group := waiting.wait(WAIT_SECONDS)) is None:
        now = time.monotonic()
        if stop.is_set():
            raise Stopped(STOPPED_MESSAGE)
        if now > deadline:
            raise UnavailableError(_timeout_message(node, waiting))
        if now > next_report:
            next_report = now + REPORT_SECONDS
            log.info("waiting for nodes", missing=waiting.missing(), of=node.count, reason=waiting.problem or None)
        if now > next_check:
            if is_complete():
                return None
            next_check = time.monotonic() + COMPLETE_SECONDS
    log.info("nodes connected", nodes=node.count, node=node.index, seconds=round(time.monotonic() - started, 1))
    return group


def _wait_for_names(node: Node) -> None:
    """Wait until the names of all nodes resolve: the name server of a cluster learns of a new pod with a delay."""
    deadline = time.monotonic() + NAMES_SECONDS
    for address in node.addresses:
        while (problem := resolve(address)) is not None:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"Cannot resolve {address} ({problem}). Check the headless Service of the run and the name server."
                )
            log.info("waiting for the name of a node", address=address, reason=problem)
            time.sleep(NAME_POLL_SECONDS)


def _timeout_message(node: Node, waiting: Coordinator | CoordinatorClient) -> str:
    missing = waiting.missing()
    names = f"node{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    problem = f" Last problem: {waiting.problem}." if waiting.problem else ""
    return (
        f"Waited {node.peer_timeout_seconds:g} s for {names} of {node.count}.{problem} Check whether the other pods of "
        f"the run are pending, and whether this one can reach them at {node.coordinator}."
    )
