"""The events of a search's journal. The state of a search is a function of its events."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from topwork.errors import DataError, FormatError
from topwork.search.journal import Event

JOURNAL_FORMAT = 1


TrialNumber = Annotated[int, Field(ge=0)]


class _SearchEvent(BaseModel):
    """An event with the time at which its coordinator appended it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    time: AwareDatetime

    def dump(self) -> Event:
        """Return the event as JSON types."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"event": self.__dict__["event"]}


class Created(_SearchEvent):
    """The first event: the search was started."""

    event: Literal["created"] = "created"
    format: int
    search: str


class Started(_SearchEvent):
    """A trial was started: a run with its parameters and a number of epochs has to be carried out."""

    event: Literal["started"] = "started"
    number: TrialNumber
    params: dict[str, Any]
    epochs: int
    digest: str


class Repeated(_SearchEvent):
    """A trial whose spec is that of an earlier one. It has the state and results of that one, and no run."""

    event: Literal["repeated"] = "repeated"
    number: TrialNumber
    params: dict[str, Any]
    equal_to: TrialNumber


class Rejected(_SearchEvent):
    """A trial whose combination of values the spec refuses. It failed without a run."""

    event: Literal["rejected"] = "rejected"
    number: TrialNumber
    params: dict[str, Any]
    error: str


class Promoted(_SearchEvent):
    """A paused trial is continued with more epochs."""

    event: Literal["promoted"] = "promoted"
    number: TrialNumber
    epochs: int


class Finished(_SearchEvent):
    """A run ended with a result, and the trial has a new state."""

    event: Literal["finished"] = "finished"
    number: TrialNumber
    state: Literal["paused", "complete", "pruned"]
    epochs: int
    run: str
    value: float
    metrics: dict[str, float]
    seconds: float
    gpu_seconds: float = 0.0
    dataset: str = ""


class Failed(_SearchEvent):
    """A run failed for good."""

    event: Literal["failed"] = "failed"
    number: TrialNumber
    error: str
    seconds: float = 0.0
    gpu_seconds: float = 0.0


class Ended(_SearchEvent):
    """No further run starts. Paused trials become pruned. A search with more trials can continue."""

    event: Literal["ended"] = "ended"
    reason: str


class Published(_SearchEvent):
    """The model of the best trial was published."""

    event: Literal["published"] = "published"
    uri: str


SearchEvent = Created | Started | Repeated | Rejected | Promoted | Finished | Failed | Ended | Published
_EVENT: TypeAdapter[SearchEvent] = TypeAdapter(Annotated[SearchEvent, Field(discriminator="event")])


def parse_event(number: int, event: Event) -> SearchEvent:
    """Read an event of a journal.

    Args:
        number: Number of the event, for messages.
        event: The event as JSON types.

    Raises:
        FormatError: If another version of topwork has written the journal.
        DataError: If the event is damaged.
    """
    if number == 0 and event.get("event") == "created" and event.get("format") != JOURNAL_FORMAT:
        raise FormatError(
            f"The journal of the search has format {event.get('format')}, but this version of topwork reads format "
            f"{JOURNAL_FORMAT}. Continue with the topwork version that started the search, or start a new search by "
            "changing its seed."
        )
    try:
        return _EVENT.validate_python(event, strict=False)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise DataError(
            f"Event {number} of the journal of the search is invalid: {place}: {problem['msg']}. Another version of "
            "topwork may have written it. Use that version, or start a new search by changing its seed."
        ) from error
