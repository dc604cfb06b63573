"""Slices of the splits of a source, such as `train[:80%]`: which images they contain."""

from collections.abc import Mapping

from topwork.errors import DataError
from topwork.spec.slices import Slice, parse_slices


def resolve_slices(name: str, text: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Convert slices to (source split, start, end) and check each against the size of its source split."""
    ranges = []
    for piece in parse_slices(text):
        if piece.split not in sizes:
            raise DataError(
                f"spec.dataset.splits.{name} is {text}, but the dataset has no split {piece.split}. It has "
                f"{', '.join(f'{split} ({size} images)' for split, size in sizes.items())}."
            )
        size = sizes[piece.split]
        start, end = _resolve_boundary(piece.start, size), _resolve_boundary(piece.end, size)
        _check_range(f"spec.dataset.splits.{name}", piece, size, start, end)
        ranges.append((piece.split, start, end))
    return ranges


def _check_range(key: str, piece: Slice, size: int, start: int, end: int) -> None:
    if not (0 <= start <= size and 0 <= end <= size):
        raise DataError(f"{key}: {piece.text} is out of range: {piece.split} has {size} images.")
    if start >= end:
        raise DataError(f"{key}: {piece.text} is empty: {piece.split} has {size} images. Widen the slice.")


def _resolve_boundary(boundary: tuple[int, int], size: int) -> int:
    percent, images = boundary
    # Integer arithmetic, rounding half up: 70% and -30% resolve to the same position.
    return (percent * size + 50) // 100 + images
