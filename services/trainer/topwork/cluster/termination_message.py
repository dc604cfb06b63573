"""How a container of a job ended, in the few words that Kubernetes keeps of it: the termination message."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

# Kubernetes keeps no more of a container's message.
MOST_BYTES = 4096
CUT = 32


class Ending(BaseModel):
    """The termination message of a container, as JSON.

    Attributes:
        stage: The stage that ended.
        outcome: `done`, `stopped` by SIGTERM with its checkpoint stored, or `failed`.
        exit_code: Exit code of the process; see `topwork.errors`.
        run: Name of the run.
        epochs: Epochs that the stage has trained.
        metric: Name of the best metric, such as `validation_accuracy`, or of the first one evaluated.
        value: Its value.
        model: Where the published model lies.
        error: Why it failed, in a sentence.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: Literal["pull", "transfer", "fine-tune"]
    outcome: Literal["done", "stopped", "failed"]
    exit_code: int
    run: str
    epochs: int | None = None
    metric: str | None = None
    value: float | None = None
    model: str | None = None
    error: str | None = None

    def text(self) -> str:
        """Write the message, with its error cut where it would be too long for Kubernetes."""
        text = self.model_dump_json(exclude_none=True)
        kept = MOST_BYTES
        # Quotes and characters beyond ASCII take more room in JSON than they look: cut until it fits.
        while len(text.encode()) > MOST_BYTES and self.error and kept > 0:
            kept -= CUT
            text = self.model_copy(update={"error": f"{self.error[:kept]}…"}).model_dump_json(exclude_none=True)
        return text


def read_ending(text: str) -> Ending | None:
    """Read a termination message; None for the end of a log that Kubernetes takes where a process left none."""
    try:
        return Ending.model_validate_json(text)
    except ValidationError:
        return None
