"""The termination message that each container writes: outcome, best metric, model URI or error, as JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

# Kubernetes limit per container.
MAX_BYTES = 4096
TRUNCATION_STEP = 32


class TerminationMessage(BaseModel):
    """The termination message of a container.

    Attributes:
        stage: The stage that ended.
        outcome: `done`, `stopped` by SIGTERM with its checkpoint stored, or `failed`.
        exit_code: Exit code of the process; see `topwork.errors`.
        run: Name of the run.
        epochs: Number of epochs that the stage trained.
        metric: Name of the best metric, such as `validation_accuracy`, or of the first metric evaluated.
        value: Value of that metric.
        metrics: Metrics on the validation split of a run that publishes nothing, including `loss`.
        dataset: Identifies the images of such a run; see `identify_split_images`.
        model: URI of the published model.
        weights_from: Stage and epoch that its weights come from.
        error: Why the stage failed, in one sentence.
        node: Index of the node, from 0; None for a run on one node.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    stage: Literal["pull", "transfer", "fine-tune"]
    outcome: Literal["done", "stopped", "failed"]
    exit_code: int
    run: str
    epochs: int | None = None
    metric: str | None = None
    value: float | None = None
    metrics: dict[str, float] | None = None
    dataset: str | None = None
    model: str | None = None
    weights_from: str | None = None
    error: str | None = None
    node: int | None = None

    def to_json(self) -> str:
        """Serialize the message, truncating its error to stay within the Kubernetes limit."""
        text = self.model_dump_json(exclude_none=True)
        length = MAX_BYTES
        # JSON escapes and UTF-8 need more bytes than characters: truncate until the result fits.
        while len(text.encode()) > MAX_BYTES and self.error and length > 0:
            length -= TRUNCATION_STEP
            text = self.model_copy(update={"error": f"{self.error[:length]}…"}).model_dump_json(exclude_none=True)
        return text


def parse_termination_message(text: str) -> TerminationMessage | None:
    """Parse a termination message.

    Args:
        text: `terminated.message` of a container status.

    Returns:
        The message; None if the text is the end of the log, which Kubernetes uses if a process wrote no message.

    Example:
        >>> message = parse_termination_message('{"stage":"pull","outcome":"done","exit_code":0,"run":"cats-1a2b3c4d"}')
        >>> message.outcome
        'done'
    """
    try:
        return TerminationMessage.model_validate_json(text)
    except ValidationError:
        return None
