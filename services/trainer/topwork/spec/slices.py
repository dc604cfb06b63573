"""TFDS slicing expressions such as `train[:40%]` or `train[:100]+test`: parsing and detecting overlaps."""

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

from pydantic import AfterValidator

from topwork.spec.messages import format_value
from topwork.spec.spec_model import ValueDescription
from topwork.spec.uris import invalid_value

TERM = re.compile(r"(?P<split>[A-Za-z0-9_.-]+?)(?:\[(?P<start>[^:\]]*):(?P<end>[^:\]]*)\])?")
NUMBER = re.compile(r"[0-9]*\.?[0-9]+ ?%?")
BOUNDARY = re.compile(r"(?P<value>-?[0-9][0-9_]{0,15})(?P<percent>%?)")


@dataclass(frozen=True)
class Slice:
    """A slice of a source split whose size is not known yet.

    Attributes:
        text: The slice as written.
        split: Name of the source split.
        start: First image, as (percent of the split, offset in images); (0, 0) is the first image.
        end: Image after the last one, in the same form; (100, 0) is the end of the split.
    """

    text: str
    split: str
    start: tuple[int, int]
    end: tuple[int, int]

    def definitely_overlaps(self, other: "Slice") -> bool:
        """Whether both slices share an image for every possible size of the split."""
        return (
            self.split == other.split
            and _definitely_before(self.start, other.end)
            and _definitely_before(other.start, self.end)
        )


def parse_slices(text: str) -> tuple[Slice, ...]:
    """Parse a TFDS slicing expression.

    Args:
        text: `name` or `name[a:b]`, joined by `+`; a and b count images or whole percent, negative from the end.

    Returns:
        The slices in the order in which they are written.

    Raises:
        PydanticCustomError: If the text is not a slicing expression, a slice is empty or two slices overlap.

    Example:
        >>> parse_slices("train[:40%]")
        (Slice(text='train[:40%]', split='train', start=(0, 0), end=(40, 0)),)
    """
    slices = tuple(_parse_term(term.strip()) for term in text.split("+"))
    for first, second in combinations(slices, 2):
        if first.definitely_overlaps(second):
            raise invalid_value(f"{first.text} and {second.text} overlap: the same images would be used twice")
    return slices


def validate_slicing(text: str) -> str:
    """Return the text if `parse_slices` can parse it, or raise its error."""
    parse_slices(text)
    return text


Slicing = Annotated[
    str,
    AfterValidator(validate_slicing),
    ValueDescription("TFDS slicing, such as train, train[:40%] or train[100:]+test[:-50]"),
]


def _parse_term(term: str) -> Slice:
    if NUMBER.fullmatch(term):
        raise invalid_value(f"{format_value(term)} is text. Write a fraction as a number, such as 0.8")
    match = TERM.fullmatch(term)
    if not match:
        raise invalid_value(
            f"{format_value(term)} is not a TFDS slice. Allowed: train, train[:40%], train[100:200], joined by +"
        )
    if match["split"] == "all":
        raise invalid_value("'all' combines every split. Name the splits, such as train+test")
    start = _parse_boundary(match["start"] or "", term, (0, 0))
    end = _parse_boundary(match["end"] or "", term, (100, 0))
    if end[0] <= start[0] and end[1] <= start[1]:
        raise invalid_value(f"{format_value(term)} contains no images: its end is not after its start")
    return Slice(term, match["split"], start, end)


def _parse_boundary(text: str, term: str, default: tuple[int, int]) -> tuple[int, int]:
    if not text.strip():
        return default
    match = BOUNDARY.fullmatch(text.strip())
    if not match:
        raise invalid_value(
            f"{format_value(text)} in {format_value(term)} is not a boundary. "
            "Use a number of images or a whole percentage"
        )
    value = int(match["value"].replace("_", ""))
    base = 100 if text.strip().startswith("-") else 0
    if not match["percent"]:
        return base, value
    if abs(value) > 100:
        raise invalid_value(f"{format_value(text)} in {format_value(term)} is more than 100%")
    return base + value, 0


def _definitely_before(first: tuple[int, int], second: tuple[int, int]) -> bool:
    return first != second and first[0] <= second[0] and first[1] <= second[1]
