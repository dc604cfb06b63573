"""Dataset splits: selects which stored images are used for training, validation and test."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.groups import Groups, assign_groups, check_group_splits, check_whole_groups
from topwork.data.predefined_splits import carved_fractions, describe_predefined, match_splits
from topwork.data.split_inputs import SplitInputs
from topwork.data.split_lists import count_lines, match_lists
from topwork.data.stratification import Counts, allocate
from topwork.errors import DataError
from topwork.spec.dataset import Dataset
from topwork.spec.slices import Slice, parse_slices
from topwork.spec.splits import SPLIT_NAMES, PerClass, Splits

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredImages:
    """All images of a stored dataset, in stored order.

    Attributes:
        class_names: Class names, in label order.
        sources: The images, by source split.
        names: Name of each image, as in the source.
        groups: Group of each image, if the spec sets `groupBy`.
        unavailable: Images of the source that were not stored, each with the reason.
    """

    class_names: tuple[str, ...]
    sources: Mapping[str, "SourceSplit"]
    names: Sequence[str]
    groups: Groups | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> Positions:
        """Label of each image, int64 (size,)."""
        return np.concatenate([source.labels for source in self.sources.values()])


@dataclass(frozen=True)
class Selection:
    """The images of each split.

    Attributes:
        positions: For each split that the spec defines, the positions of its images among all stored images, int64
            (size,).
        notes: What is not obvious about the splits, in sentences for the log and the report.
    """

    positions: dict[str, Positions]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SourceSplit:
    """The stored examples of one split of the source, in stored order.

    Attributes:
        first: Position of its first example among all stored examples.
        labels: int64 (size,).
    """

    first: int
    labels: npt.NDArray[np.int64]


def check_splits(settings: Dataset, dataset: DatasetMetadata) -> None:
    """Check that a stored dataset can fill the splits of a spec, using only the counts in its metadata.

    Args:
        settings: `spec.dataset`.
        dataset: Metadata of the stored dataset.

    Raises:
        DataError: If a slice is empty or out of range, names an unknown split, or a class has too few images.
    """
    splits = settings.split_settings
    if splits.predefined:
        _check_predefined(settings, dataset)
        return
    if splits.per_class:
        _check_counts(splits.per_class, dataset.class_counts)
    if splits.fractions and splits.stratify:
        _check_classes(settings, len(splits.fractions), list(dataset.class_counts.values()), dataset.class_names)
    sizes = {name: sum(counts.values()) for name, counts in dataset.splits.items()}
    for name, text in splits.slices.items():
        _resolve_slices(name, text, sizes)


def _check_predefined(settings: Dataset, dataset: DatasetMetadata) -> None:
    found = match_splits(dataset.splits, dataset.origin)
    if settings.split_settings.stratify and (fractions := carved_fractions(found)):
        counts = dataset.splits[found["train"]]
        sizes = [counts.get(name, 0) for name in dataset.class_names]
        _check_classes(settings, len(fractions), sizes, dataset.class_names)


def count_images(
    splits: Splits,
    sizes: Mapping[str, int],
    classes: int | None,
    class_sizes: Sequence[int] = (),
    inputs: SplitInputs | None = None,
) -> dict[str, int | None]:
    """Compute the number of images in each split of a spec, before the dataset is pulled.

    Args:
        splits: `spec.dataset.splits` in its full form.
        sizes: Number of images in each split of the source, for the splits where it is known.
        classes: Number of classes, or None if unknown.
        class_sizes: Number of images of each class, if known.
        inputs: Further inputs of the splits, if known.

    Returns:
        Number of images in each split that the spec defines. None where it can't be determined.

    Raises:
        DataError: If a slice is empty or out of range.

    Example:
        >>> count_images(Splits(train="train[:80%]", test="train[80%:]"), {"train": 1000}, None)
        {'train': 800, 'test': 200}
    """
    if splits.predefined:
        return _count_predefined(sizes)
    if splits.per_class:
        counts = {name: getattr(splits.per_class, name) for name in SPLIT_NAMES}
        return {name: classes and count * classes for name, count in counts.items() if count}
    if fractions := splits.fractions:
        strata = class_sizes if class_sizes and splits.stratify else [sum(sizes.values())]
        totals = allocate(strata, list(fractions.values())).sum(axis=0).tolist()
        return dict(zip(fractions, totals if sizes else [None] * len(totals), strict=True))
    images: dict[str, int | None] = {
        name: count_lines(inputs.lists[name], name) if inputs else None for name in splits.lists
    }
    for name, text in splits.slices.items():
        is_known = all(piece.split in sizes for piece in parse_slices(text))
        ranges = _resolve_slices(name, text, sizes) if is_known else []
        images[name] = sum(end - start for _, start, end in ranges) if is_known else None
    return images


def _count_predefined(sizes: Mapping[str, int]) -> dict[str, int | None]:
    if not sizes:
        return dict.fromkeys(SPLIT_NAMES)
    found = match_splits(sizes, "The source")
    images: dict[str, int | None] = {split: sizes[name] for split, name in found.items()}
    if fractions := carved_fractions(found):
        carved = allocate([sizes[found["train"]]], list(fractions.values()))[0].tolist()
        images |= dict(zip(fractions, carved, strict=True))
    return images


def describe_splits(settings: Dataset, dataset: DatasetMetadata) -> tuple[str, ...]:
    """Describe what is not obvious about the splits of a job, in sentences for the log and the report.

    Args:
        settings: `spec.dataset`.
        dataset: Metadata of the stored dataset.
    """
    splits = settings.split_settings
    return describe_predefined(splits, dataset.splits, dataset.origin) if splits.predefined else ()


def select_images(
    dataset: Dataset, metadata: DatasetMetadata, images: StoredImages, inputs: SplitInputs, seed: int
) -> Selection:
    """Select the images of each split, by the rules of `select_splits` or by lists.

    Args:
        dataset: `spec.dataset`.
        metadata: Metadata of the stored dataset.
        images: The stored images.
        inputs: Further inputs of the splits.
        seed: `spec.seed`.

    Returns:
        The images of each split.

    Raises:
        DataError: If the splits can't be filled, or a split lacks a class that it must contain.
    """
    notes = describe_splits(dataset, metadata)
    if not dataset.split_settings.lists:
        return Selection(select_splits(dataset, images.sources, images.class_names, seed, images.groups), notes)
    listed = match_lists(inputs.lists, images.names, images.unavailable, _root(dataset), _explain_missing(metadata))
    split_of_image = np.array([listed.split_of.get(name, "") for name in images.names])
    selected = {name: np.flatnonzero(split_of_image == name) for name in inputs.lists}
    if images.groups is not None:
        fix = "Move each group to one list, or remove groupBy."
        check_whole_groups(selected, images.groups, "the lists", fix)
    _check_split_classes(selected, images.labels, images.class_names, dataset)
    if unused := len(images.names) - sum(map(len, selected.values())):
        notes += (f"{unused} of {len(images.names)} images are in no list and are not used.",)
    return Selection(selected, (*notes, *listed.notes))


def _root(dataset: Dataset) -> str:
    """Return the directory in an archive that paths may be relative to."""
    return dataset.source.archive.root.strip("/") if dataset.source.archive else ""


def _explain_missing(metadata: DatasetMetadata) -> str:
    # An archive has no listing, so not all images that were dropped are known by name.
    found = metadata.contradictions
    if found is None or not found.dropped:
        return ""
    return (
        f" {found.images} images of the source were dropped, because an image of another class has the same pixels: "
        "see spec.dataset.onContradiction."
    )


def select_splits(
    dataset: Dataset,
    sources: Mapping[str, SourceSplit],
    class_names: tuple[str, ...],
    seed: int,
    groups: Groups | None = None,
) -> dict[str, Positions]:
    """Select the examples of each split.

    Slices are taken from a permutation of each source split. The permutation depends only on the seed and on the name
    and size of the source split, so slices mix the classes even if the images were stored class by class. Fractions and
    counts per class are taken from a permutation of all source splits together. Predefined splits are used as they are,
    and a missing one is a fraction of the train split.

    Args:
        dataset: `spec.dataset`.
        sources: The stored examples, by source split.
        class_names: Class names, in label order.
        seed: `spec.seed`.
        groups: Group of each stored example, if the spec sets `groupBy`.

    Returns:
        For each split that the spec defines, the positions of its examples among all stored examples, int64 (size,).

    Raises:
        DataError: If the splits can't be filled, or a split lacks a class that it must contain.
    """
    splits = dataset.split_settings
    labels = np.concatenate([source.labels for source in sources.values()])
    class_sizes = np.bincount(labels, minlength=len(class_names))
    if splits.predefined:
        selected = _select_predefined(dataset, sources, class_names, seed, groups)
    elif splits.per_class:
        _check_counts(splits.per_class, dict(zip(class_names, class_sizes.tolist(), strict=True)))
        requested = {name: count for name in SPLIT_NAMES if (count := getattr(splits.per_class, name))}
        counts = np.tile(np.array(list(requested.values()), np.int64), (len(class_names), 1))
        selected = _select_strata(requested, counts, labels, seed)
    elif fractions := splits.fractions:
        selected = _select_fractions(dataset, fractions, labels, class_names, seed, groups)
    else:
        selected = {name: _select_slices(name, text, sources, seed) for name, text in splits.slices.items()}
    _check_split_classes(selected, labels, class_names, dataset)
    return selected


def _check_split_classes(
    selected: Mapping[str, Positions], labels: Positions, class_names: tuple[str, ...], dataset: Dataset
) -> None:
    for name, positions in selected.items():
        if missing := format_missing_classes(labels[positions], class_names):
            _check_missing_classes(name, missing, dataset)


def _select_fractions(
    dataset: Dataset,
    fractions: Mapping[str, float],
    labels: Positions,
    class_names: tuple[str, ...],
    seed: int,
    groups: Groups | None,
) -> dict[str, Positions]:
    """Divide images by fractions, class by class if they are stratified, and by whole groups if there are groups."""
    is_stratified = dataset.split_settings.stratify
    if is_stratified:
        class_sizes = np.bincount(labels, minlength=len(class_names))
        _check_classes(dataset, len(fractions), class_sizes.tolist(), class_names)
    strata = labels if is_stratified else np.zeros_like(labels)
    if groups is None:
        return _select_strata(fractions, allocate(np.bincount(strata), list(fractions.values())), strata, seed)
    split_of_image = assign_groups(strata, groups.of_image, list(fractions.values()), seed)
    order = permutation(len(strata), seed)
    selected = {name: order[split_of_image[order] == index] for index, name in enumerate(fractions)}
    check_group_splits(selected, groups)
    return selected


def format_missing_classes(labels: npt.NDArray[np.int64], class_names: tuple[str, ...]) -> str:
    """List the classes that a split does not contain.

    Args:
        labels: Labels of the split, int64 (size,).
        class_names: Class names, in label order.

    Returns:
        The missing class names on one line, or an empty string if there are none.
    """
    missing = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0).tolist()
    return _format_class_names(class_names, missing) if missing else ""


def _check_missing_classes(name: str, missing: str, dataset: Dataset) -> None:
    if name != "train" and dataset.on_missing_class != "fail":
        return
    fixes = [
        f"Enlarge spec.dataset.splits.{name}",
        *([] if dataset.split_settings.lists else ["use fractions, such as train: 0.8, which divide every class"]),
        "remove the class from the source",
        *([] if name == "train" else ["evaluate without it: spec.dataset.onMissingClass: allow"]),
    ]
    split = "training" if name == "train" else name
    raise DataError(f"The {split} split contains no image of {missing}. {', '.join(fixes[:-1])}, or {fixes[-1]}.")


def permutation(size: int, *seeds: int) -> Positions:
    """Return a permutation of 0..size-1 that is the same for the same seeds on every machine.

    Args:
        size: Number of elements.
        seeds: Non-negative integers.

    Returns:
        int64 (size,).
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds))).permutation(size)


def _select_slices(name: str, text: str, sources: Mapping[str, SourceSplit], seed: int) -> Positions:
    sizes = {source: len(examples.labels) for source, examples in sources.items()}
    parts = []
    for source, start, end in _resolve_slices(name, text, sizes):
        order = permutation(sizes[source], seed, zlib.crc32(source.encode()))
        parts.append(order[start:end] + sources[source].first)
    return np.concatenate(parts)


def _resolve_slices(name: str, text: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
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


def _select_strata(names: Iterable[str], counts: Counts, strata: Positions, seed: int) -> dict[str, Positions]:
    """Select a number of examples of each stratum for each split, from one permutation.

    Args:
        names: Names of the splits.
        counts: int64 (strata, splits).
        strata: Stratum of each stored example, such as its label, int64 (size,).
        seed: `spec.seed`.
    """
    sizes = np.bincount(strata, minlength=len(counts))
    order = permutation(len(strata), seed)
    # A stable sort keeps the examples of a stratum in the order of the permutation; `rank` counts them from 0.
    order = order[np.argsort(strata[order], kind="stable")]
    rank = np.arange(len(strata)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ends = np.cumsum(counts, axis=1)[strata[order]]
    starts = ends - counts[strata[order]]
    return {name: order[(rank >= starts[:, i]) & (rank < ends[:, i])] for i, name in enumerate(names)}


def _select_predefined(
    dataset: Dataset,
    sources: Mapping[str, SourceSplit],
    class_names: tuple[str, ...],
    seed: int,
    groups: Groups | None,
) -> dict[str, Positions]:
    found = match_splits(sources, "The stored dataset")
    selected = {split: sources[name].first + np.arange(len(sources[name].labels)) for split, name in found.items()}
    if groups:
        fix = "Move each group to one split, or use fractions, such as {train: 0.8, validation: 0.1, test: 0.1}."
        check_whole_groups(selected, groups, "the source", fix)
    if fractions := carved_fractions(found):
        train = selected["train"]
        labels = sources[found["train"]].labels
        carved = _select_fractions(
            dataset, fractions, labels, class_names, seed, groups.subset(train) if groups else None
        )
        selected |= {split: train[positions] for split, positions in carved.items()}
    return {split: selected[split] for split in SPLIT_NAMES}


def _check_classes(dataset: Dataset, needed: int, class_sizes: Sequence[int], class_names: tuple[str, ...]) -> None:
    """Check that every class has an image for each of the splits that divide it."""
    small = [label for label, size in enumerate(class_sizes) if size < needed]
    if small and dataset.on_missing_class == "fail":
        raise DataError(
            f"spec.dataset.splits divides each class into {needed} splits, but "
            f"{_format_class_names(class_names, small)} {'has' if len(small) == 1 else 'have'} fewer than {needed} "
            "images. Add images, remove the class from the source, or accept splits without it: "
            "spec.dataset.onMissingClass: allow."
        )


def _check_counts(requested: PerClass, counts: Mapping[str, int]) -> None:
    needed = requested.train + requested.validation + requested.test
    too_few = [f"{name} has {count}" for name, count in counts.items() if count < needed]
    if too_few:
        raise DataError(
            f"spec.dataset.splits.perClass requests {needed} images per class (train {requested.train}, validation "
            f"{requested.validation}, test {requested.test}), but {', '.join(too_few[:20])}. Request fewer."
        )


def _format_class_names(class_names: tuple[str, ...], labels: list[int], limit: int = 20) -> str:
    more = f" and {len(labels) - limit} more classes" if len(labels) > limit else ""
    return ", ".join(class_names[label] for label in labels[:limit]) + more
