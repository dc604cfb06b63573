"""Which stored images train, validate and test."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from topwork.data.dataset_manifest import DatasetFacts
from topwork.errors import DataError
from topwork.spec.dataset import Dataset, PerClass, Splits
from topwork.spec.slices import Slice, parse_slices

NAMES = ("train", "validation", "test")
SPLIT_WORDS = {"train": "training", "validation": "validation", "test": "test"}

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """The stored examples of one split of the source, in their stored order.

    Attributes:
        first: Position of its first example among all stored examples.
        labels: int64 (size,).
    """

    first: int
    labels: npt.NDArray[np.int64]


def check_splits(splits: Splits, facts: DatasetFacts) -> None:
    """Refuse splits that a stored dataset can't fill, by its counts alone.

    Args:
        splits: `spec.dataset.splits`.
        facts: What is stored.

    Raises:
        DataError: If a slice names what is not there or is empty, or a class has too few images.
    """
    if splits.per_class:
        _check_counts(splits.per_class, facts.class_counts)
        return
    sizes = {name: sum(counts.values()) for name, counts in facts.splits.items()}
    for name in NAMES:
        text = getattr(splits, name)
        if text:
            _ranges(name, text, sizes)


def count_images(splits: Splits, sizes: Mapping[str, int], classes: int | None) -> dict[str, int | None]:
    """Count the images of each split, before any is there.

    Args:
        splits: `spec.dataset.splits`.
        sizes: Images of the source's own splits, as far as they are known.
        classes: Number of classes; None where it isn't known.

    Returns:
        Images of each split that the spec names; None where that can't be told.

    Raises:
        DataError: If a slice reaches beyond what there is, or is empty.
    """
    if splits.per_class:
        counts = {name: getattr(splits.per_class, name) for name in NAMES}
        return {name: classes and count * classes for name, count in counts.items() if count}
    images: dict[str, int | None] = {}
    for name in NAMES:
        if text := getattr(splits, name):
            is_known = all(piece.split in sizes for piece in parse_slices(text))
            ranges = _ranges(name, text, sizes) if is_known else []
            images[name] = sum(end - start for _, start, end in ranges) if is_known else None
    return images


def choose(
    dataset: Dataset, sources: Mapping[str, Examples], class_names: tuple[str, ...], seed: int
) -> dict[str, Positions]:
    """Choose the examples of each split.

    Slices are taken from a permutation of each source split that depends on the seed and the split's name and size
    alone, so that a folder that was read class by class gives mixed slices. Counts a class are taken from all source
    splits together, permuted in the same way.

    Args:
        dataset: `spec.dataset`.
        sources: What is stored, by source split.
        class_names: Classes in the order of their labels.
        seed: `spec.seed`.

    Returns:
        Positions among all stored examples, int64 (size,), for each split that the spec names.

    Raises:
        DataError: If the splits can't be filled, or one lacks a class that it may not lack.
    """
    splits = dataset.splits
    if splits.per_class:
        chosen = _by_counts(splits.per_class, sources, class_names, seed)
    else:
        chosen = {name: _by_slices(name, text, sources, seed) for name in NAMES if (text := getattr(splits, name))}
    labels = np.concatenate([examples.labels for examples in sources.values()])
    for name, positions in chosen.items():
        if missing := missing_classes(labels[positions], class_names):
            _refuse_missing(name, missing, dataset)
    return chosen


def missing_classes(labels: npt.NDArray[np.int64], class_names: tuple[str, ...]) -> str:
    """Name the classes that a split lacks; empty where it lacks none.

    Args:
        labels: int64 (size,).
        class_names: Classes in the order of their labels.

    Returns:
        Their names, in one line.
    """
    missing = sorted(set(range(len(class_names))) - set(np.unique(labels).tolist()))
    return _named(class_names, missing) if missing else ""


def _refuse_missing(name: str, missing: str, dataset: Dataset) -> None:
    if name == "train" or dataset.on_missing_class == "fail":
        ways = [
            f"Enlarge spec.dataset.splits.{name}",
            "give counts with splits.perClass",
            "leave the class out of the source",
            *([] if name == "train" else ["evaluate without it: spec.dataset.onMissingClass: allow"]),
        ]
        raise DataError(
            f"The {SPLIT_WORDS[name]} split holds no image of {missing}. {', '.join(ways[:-1])}, or {ways[-1]}."
        )


def permutation(size: int, *seeds: int) -> Positions:
    """Shuffle 0 … size-1, the same way for the same seeds on every machine.

    Args:
        size: How many.
        seeds: Whole numbers from 0.

    Returns:
        int64 (size,).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds))).permutation(size)


def _by_slices(name: str, text: str, sources: Mapping[str, Examples], seed: int) -> Positions:
    sizes = {source: len(examples.labels) for source, examples in sources.items()}
    parts = []
    for source, start, end in _ranges(name, text, sizes):
        order = permutation(sizes[source], seed, zlib.crc32(source.encode()))
        parts.append(order[start:end] + sources[source].first)
    return np.concatenate(parts)


def _ranges(name: str, text: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Turn slicing into (source split, start, end), each checked against what is there."""
    ranges = []
    for piece in parse_slices(text):
        if piece.split not in sizes:
            raise DataError(
                f"spec.dataset.splits.{name} is {text}, but the dataset has no split {piece.split}. It has "
                f"{', '.join(f'{split} ({size} images)' for split, size in sizes.items())}."
            )
        size = sizes[piece.split]
        start, end = _position(piece.start, size), _position(piece.end, size)
        _check_range(f"spec.dataset.splits.{name}", piece, size, start, end)
        ranges.append((piece.split, start, end))
    return ranges


def _check_range(key: str, piece: Slice, size: int, start: int, end: int) -> None:
    if not (0 <= start <= size and 0 <= end <= size):
        raise DataError(f"{key}: {piece.text} reaches beyond the {size} images of {piece.split}.")
    if start >= end:
        raise DataError(f"{key}: {piece.text} holds no image: {piece.split} has {size} images. Widen the slice.")


def _position(boundary: tuple[int, int], size: int) -> int:
    percent, images = boundary
    # Rounded half up in whole numbers: one boundary is one position, however it is written.
    return (percent * size + 50) // 100 + images


def _by_counts(
    wanted: PerClass, sources: Mapping[str, Examples], class_names: tuple[str, ...], seed: int
) -> dict[str, Positions]:
    labels = np.concatenate([examples.labels for examples in sources.values()])
    _check_counts(wanted, {name: int((labels == index).sum()) for index, name in enumerate(class_names)})
    order = permutation(len(labels), seed)
    counts = {"train": wanted.train, "validation": wanted.validation, "test": wanted.test}
    chosen: dict[str, list[Positions]] = {name: [] for name, count in counts.items() if count}
    for label in range(len(class_names)):
        of_class = order[labels[order] == label]
        start = 0
        for name, parts in chosen.items():
            parts.append(of_class[start : start + counts[name]])
            start += counts[name]
    return {name: np.concatenate(parts) for name, parts in chosen.items()}


def _check_counts(wanted: PerClass, counts: Mapping[str, int]) -> None:
    needed = wanted.train + wanted.validation + wanted.test
    few = [f"{name} has {count}" for name, count in counts.items() if count < needed]
    if few:
        raise DataError(
            f"spec.dataset.splits.perClass asks for {needed} images of each class (train {wanted.train}, validation "
            f"{wanted.validation}, test {wanted.test}), but {', '.join(few[:20])}. Ask for fewer."
        )


def _named(class_names: tuple[str, ...], labels: list[int], most: int = 20) -> str:
    more = f" and {len(labels) - most} more classes" if len(labels) > most else ""
    return ", ".join(class_names[label] for label in labels[:most]) + more
