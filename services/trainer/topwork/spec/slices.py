"""TFDS slicing, such as `train[:40%]` or `train[:100]+test`: read, and searched for overlaps."""

import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

from pydantic import AfterValidator

from topwork.spec.messages import shown
from topwork.spec.section import Meaning
from topwork.spec.uris import refused

TERM = re.compile(r"(?P<split>[A-Za-z0-9_.-]+?)(?:\[(?P<start>[^:\]]*):(?P<end>[^:\]]*)\])?")
BOUNDARY = re.compile(r"(?P<value>-?[0-9][0-9_]{0,15})(?P<percent>%?)")


@dataclass(frozen=True)
class Slice:
    """A piece of a source split whose size is not known yet.

    Attributes:
        text: The piece as it was written.
        split: Name of the source split.
        start: First image, as (percent of the images, images to add); (0, 0) is the first.
        end: Image after the last, in the same form; (100, 0) is the end.
    """

    text: str
    split: str
    start: tuple[int, int]
    end: tuple[int, int]

    def surely_overlaps(self, other: "Slice") -> bool:
        """Whether both hold a common image, whatever the size of the split."""
        return (
            self.split == other.split
            and _surely_before(self.start, other.end)
            and _surely_before(other.start, self.end)
        )


def parse_slices(text: str) -> tuple[Slice, ...]:
    """Read TFDS slicing.

    Args:
        text: One or more `name`, `name[a:b]` joined by `+`; a and b in images or whole percent, negative from the end.

    Returns:
        The slices in the order in which they stand.

    Raises:
        PydanticCustomError: With the reason, where the text is no slicing, a slice is empty or two overlap.
    """
    slices = tuple(_parse_term(term.strip()) for term in text.split("+"))
    for one, other in combinations(slices, 2):
        if one.surely_overlaps(other):
            raise refused(f"{one.text} and {other.text} overlap: an image would count twice")
    return slices


def check_slicing(text: str) -> str:
    """Refuse what `parse_slices` can't read."""
    parse_slices(text)
    return text


Slicing = Annotated[
    str, AfterValidator(check_slicing), Meaning("TFDS slicing, such as train, train[:40%] or train[100:]+test[:-50]")
]


def _parse_term(term: str) -> Slice:
    found = TERM.fullmatch(term)
    if not found:
        raise refused(f"{shown(term)} is no TFDS slice. Allowed: train, train[:40%], train[100:200], joined by +")
    if found["split"] == "all":
        raise refused("'all' takes in every split. Name the splits, such as train+test")
    start = _boundary(found["start"] or "", term, (0, 0))
    end = _boundary(found["end"] or "", term, (100, 0))
    if end[0] <= start[0] and end[1] <= start[1]:
        raise refused(f"{shown(term)} holds no image: its end is not after its start")
    return Slice(term, found["split"], start, end)


def _boundary(text: str, term: str, default: tuple[int, int]) -> tuple[int, int]:
    if not text.strip():
        return default
    found = BOUNDARY.fullmatch(text.strip())
    if not found:
        raise refused(f"{shown(text)} in {shown(term)} is no boundary: a whole number of images or whole percent is")
    value = int(found["value"].replace("_", ""))
    whole = 100 if text.strip().startswith("-") else 0
    if not found["percent"]:
        return whole, value
    if abs(value) > 100:
        raise refused(f"{shown(text)} in {shown(term)} is beyond 100%")
    return whole + value, 0


def _surely_before(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]
