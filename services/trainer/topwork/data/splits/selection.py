"""Dataset splits: selects which stored images are used for training, validation and test."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.splits.groups import Groups, assign_groups, check_group_splits, check_whole_groups
from topwork.data.splits.inputs import PinnedTest, SplitInputs
from topwork.data.splits.lists import match_lists
from topwork.data.splits.pinned_test import select_pinned_test
from topwork.data.splits.predefined import carved_fractions, describe_predefined, match_splits
from topwork.data.splits.slices import resolve_slices
from topwork.data.splits.stratification import Counts, allocate
from topwork.errors import DataError
from topwork.spec.dataset import Dataset
from topwork.spec.splits import SPLIT_NAMES, PerClass, Splits

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredImages:
    """All images of a stored dataset, in stored order.

    Attributes:
        class_names: Class names, in label order.
        sources: The images, by source split.
        names: Name of each image, as in the source. Empty if the splits do not need names.
        digests: First 8 bytes of the pixel digest of each image, uint64 (size,).
        groups: Group of each image, if the spec sets `groupBy`.
        unavailable: Images of the source that were not stored, each with the reason; for lists only.
    """

    class_names: tuple[str, ...]
    sources: Mapping[str, "SourceSplit"]
    names: Sequence[str]
    digests: npt.NDArray[np.uint64]
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


def select_images(
    dataset: Dataset, metadata: DatasetMetadata, images: StoredImages, inputs: SplitInputs, seed: int
) -> Selection:
    """Select the images of each split: by lists, with a pinned test set, or by the rules of `select_splits`.

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
    splits = dataset.split_settings
    if (splits.lists and not inputs.lists) or (splits.pin_test and not inputs.pinned):
        raise ValueError("the inputs of the splits were not read")
    if splits.lists:
        selection = _select_listed(dataset, metadata, images, inputs)
    elif inputs.pinned:
        selection = _select_with_pinned_test(dataset, images, inputs.pinned, seed)
    else:
        notes = describe_predefined(splits, metadata.splits, metadata.origin) if splits.predefined else ()
        return Selection(select_splits(dataset, images.sources, images.class_names, seed, images.groups), notes)
    _check_split_classes(selection.positions, images.labels, images.class_names, dataset)
    return selection


def _select_listed(dataset: Dataset, metadata: DatasetMetadata, images: StoredImages, inputs: SplitInputs) -> Selection:
    left_out = metadata.class_selection.left_out if metadata.class_selection else {}
    hint = _explain_missing(metadata)
    listed = match_lists(inputs.lists, images.names, images.unavailable, _root(dataset), hint, left_out)
    split_of_image = np.array([listed.split_of.get(name, "") for name in images.names])
    selected = {name: np.flatnonzero(split_of_image == name) for name in inputs.lists}
    if images.groups is not None:
        fix = "Move each group to one list, or remove groupBy."
        check_whole_groups(selected, images.groups, "several lists", fix)
    unused = len(images.names) - sum(map(len, selected.values()))
    notes = (f"Not used: {unused} of {len(images.names)} images, which are in no list.",) if unused else ()
    return Selection(selected, (*notes, *listed.notes))


def _select_with_pinned_test(dataset: Dataset, images: StoredImages, pinned: PinnedTest, seed: int) -> Selection:
    labels, names = images.labels, images.class_names
    found = select_pinned_test(pinned, images.digests, [names[label] for label in labels], images.names, images.groups)
    others, fractions = found.others, dataset.split_settings.fractions
    if not len(others):
        raise DataError(
            f"All images belong to the test set of version {pinned.version}, which spec.dataset.splits.pinTest names. "
            "Add images for training."
        )
    groups = images.groups.subset(others) if images.groups else None
    divided = _select_fractions(dataset, fractions, labels[others], names, seed, groups)
    selected = {name: others[positions] for name, positions in divided.items()}
    return Selection(selected | {"test": found.test}, found.notes)


def _root(dataset: Dataset) -> str:
    """Return the directory in an archive that paths may be relative to."""
    return dataset.source.archive.root.strip("/") if dataset.source.archive else ""


def _explain_missing(metadata: DatasetMetadata) -> str:
    # An archive has no listing, so not all images that were dropped are known by name.
    found = metadata.contradictions
    if found is None or not found.dropped:
        return ""
    return (
        f" {found.images} images of the source were dropped, because an image of another class has the same "
        "pixels: see spec.dataset.onContradiction."
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
    if splits.folds:
        selected = _select_fold(dataset, labels, class_names, seed, groups)
    elif splits.predefined:
        selected = _select_predefined(dataset, sources, class_names, seed, groups)
    elif splits.per_class:
        check_counts(splits.per_class, dict(zip(class_names, class_sizes.tolist(), strict=True)))
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
        check_classes(dataset, len(fractions), class_sizes.tolist(), class_names)
    return _divide(fractions, labels if is_stratified else np.zeros_like(labels), seed, groups)


def _divide(
    fractions: Mapping[str, float], strata: Positions, seed: int, groups: Groups | None
) -> dict[str, Positions]:
    """Divide images by fractions: every stratum by the same ones, and whole groups if there are groups."""
    if groups is None:
        return _select_strata(fractions, allocate(np.bincount(strata), list(fractions.values())), strata, seed)
    split_of_image = assign_groups(strata, groups.of_image, list(fractions.values()), seed)
    order = permutation(len(strata), seed)
    selected = {name: order[split_of_image[order] == index] for index, name in enumerate(fractions)}
    check_group_splits(selected, groups)
    return selected


def _select_fold(
    dataset: Dataset, labels: Positions, class_names: tuple[str, ...], seed: int, groups: Groups | None
) -> dict[str, Positions]:
    """Select the splits of one fold of cross-validation or, if `splits.fold` is unset, of the final model.

    Checks all folds, so that the first one already fails if a later one would.
    """
    splits, folds = dataset.split_settings, dataset.folds
    shares = {f"fold {index + 1} test": 1 / folds for index in range(folds)}
    tests = _select_fractions(dataset, shares, labels, class_names, seed, groups)
    strata = labels if splits.stratify else np.zeros_like(labels)
    selected = {}
    for fold in (None, *range(1, folds + 1)):
        test = tests[f"fold {fold} test"] if fold else np.zeros(0, np.int64)
        rest = np.setdiff1d(np.arange(len(labels)), test)
        fractions = fractions_of_rest(splits, 1 / folds if fold else 0.0)
        if fold and not len(test):
            raise DataError(
                f"spec.dataset.splits.folds is {folds}, but the dataset has only {len(labels)} images. Use fewer folds."
            )
        parts = _divide(fractions, strata[rest], seed, groups.subset(rest) if groups else None)
        selected[fold] = {name: rest[positions] for name, positions in parts.items()} | ({"test": test} if fold else {})
        _check_split_classes(selected[fold], labels, class_names, dataset)
    return selected[splits.fold]


def fractions_of_rest(splits: Splits, test: float) -> dict[str, float]:
    """Return the fractions of train and validation among the images outside of the test split of a fold.

    Args:
        splits: `spec.dataset.splits`, with folds.
        test: Fraction of all images in the test split.
    """
    if not (validation := splits.fractions.get("validation")):
        return {"train": 1.0}
    return {"train": 1 - validation / (1 - test), "validation": validation / (1 - test)}


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
    splits = dataset.split_settings
    is_pinned = name == "test" and splits.pin_test
    enlarge = f"Enlarge spec.dataset.splits.{name}"
    if splits.folds and name != "validation":
        enlarge = "Use smaller groups or fewer spec.dataset.splits.folds" if splits.group_by else "Set stratify: true"
    divides = splits.lists or is_pinned or splits.folds
    fixes = [
        "Use a new test split instead of pinTest" if is_pinned else enlarge,
        *([] if divides else ["use fractions, such as train: 0.8, which divide every class"]),
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
    for source, start, end in resolve_slices(name, text, sizes):
        order = permutation(sizes[source], seed, zlib.crc32(source.encode()))
        parts.append(order[start:end] + sources[source].first)
    return np.concatenate(parts)


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
        check_whole_groups(selected, groups, "several splits of the source", fix)
    if fractions := carved_fractions(found):
        train = selected["train"]
        labels = sources[found["train"]].labels
        carved = _select_fractions(
            dataset, fractions, labels, class_names, seed, groups.subset(train) if groups else None
        )
        selected |= {split: train[positions] for split, positions in carved.items()}
    return {split: selected[split] for split in SPLIT_NAMES}


def check_classes(dataset: Dataset, needed: int, class_sizes: Sequence[int], class_names: tuple[str, ...]) -> None:
    """Check that every class has an image for each of the splits that divide it."""
    small = [label for label, size in enumerate(class_sizes) if size < needed]
    if small and dataset.on_missing_class == "fail":
        raise DataError(
            f"spec.dataset.splits divides each class into {needed} splits, but "
            f"{_format_class_names(class_names, small)} {'has' if len(small) == 1 else 'have'} fewer than {needed} "
            "images. Add images, remove the class from the source, or accept splits without it: "
            "spec.dataset.onMissingClass: allow."
        )


def check_counts(requested: PerClass, counts: Mapping[str, int]) -> None:
    """Check that every class has as many images as `perClass` requests."""
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
