"""Failures of a node, as the nodes report them to each other."""

from dataclasses import dataclass
from typing import Any

from topwork.errors import Stopped, TopworkError, UnavailableError, limit_message
from topwork.nodes.frames import Frame, FrameError, Kind, json_frame
from topwork.redaction import redact


@dataclass(frozen=True)
class Failure:
    """The failure of a node.

    Attributes:
        node: Index of the node.
        text: Its error, or why it counts as lost.
        outcome: `failed` with an error of its own, `stopped` by a signal, or `lost` without a message.
    """

    node: int
    text: str
    outcome: str = "failed"

    def error(self) -> TopworkError:
        """Return the error that the other nodes raise: they stop together with a stopped node."""
        if self.outcome == "stopped":
            return Stopped(f"Stopped because node {self.node} was stopped. Start the same job again to resume.")
        if self.outcome == "lost":
            return UnavailableError(f"Lost node {self.node}: {self.text}. The run resumes from its last checkpoint.")
        return UnavailableError(f"Node {self.node} failed: {self.text}")

    def frame(self) -> Frame:
        """Return the frame that reports this failure."""
        return json_frame(Kind.failure, node=self.node, text=self.text, outcome=self.outcome)


def failure_of(node: int, error: BaseException) -> Failure:
    """Describe an error that ended this node, without secrets.

    Args:
        node: Index of this node.
        error: The error.
    """
    text = str(error) if isinstance(error, TopworkError) else f"{type(error).__name__}: {error}"
    # Half of the limit of a frame in characters, each of which needs up to 12 bytes in JSON.
    return Failure(node, limit_message(redact(text)), "stopped" if isinstance(error, Stopped) else "failed")


def read_failure(frame: Frame) -> Failure:
    """Parse the failure that another node reports.

    Raises:
        FrameError: If the frame does not describe a failure.
    """
    values: dict[str, Any] = frame.values()
    node, text, outcome = values.get("node"), values.get("text"), values.get("outcome")
    if not isinstance(node, int) or not isinstance(text, str) or outcome not in {"failed", "stopped", "lost"}:
        raise FrameError(f"a failure frame has the values {sorted(values)}")
    return Failure(node, limit_message(redact(text)), outcome)
