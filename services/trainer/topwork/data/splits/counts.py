"""What is known about the splits of a job without its images: from the metadata of a dataset, or before the pull."""

from collections import Counter
from collections.abc import Mapping

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.splits.inputs import SplitInputs
from topwork.data.splits.lists import count_lines
from topwork.data.splits.predefined import carved_fractions, describe_predefined, match_splits
from topwork.data.splits.selection import check_classes, check_counts, fractions_of_rest
from topwork.data.splits.slices import resolve_slices
from topwork.data.splits.stratification import allocate
from topwork.spec.dataset import Dataset
from topwork.spec.slices import parse_slices
from topwork.spec.splits import SPLIT_NAMES, Splits


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
        check_counts(splits.per_class, dataset.class_counts)
    if (needed := splits.folds or len(splits.fractions)) and splits.stratify:
        check_classes(settings, needed, list(dataset.class_counts.values()), dataset.class_names)
    sizes = {name: sum(counts.values()) for name, counts in dataset.splits.items()}
    for name, text in splits.slices.items():
        resolve_slices(name, text, sizes)


def _check_predefined(settings: Dataset, dataset: DatasetMetadata) -> None:
    found = match_splits(dataset.splits, dataset.origin)
    if settings.split_settings.stratify and (fractions := carved_fractions(found)):
        counts = dataset.splits[found["train"]]
        sizes = [counts.get(name, 0) for name in dataset.class_names]
        check_classes(settings, len(fractions), sizes, dataset.class_names)


def count_images(
    splits: Splits,
    sizes: Mapping[str, int],
    classes: int | None,
    class_counts: Mapping[str, int] | None = None,
    inputs: SplitInputs | None = None,
) -> dict[str, int | None]:
    """Compute the number of images in each split of a spec, before the dataset is pulled.

    Args:
        splits: `spec.dataset.splits` in its full form.
        sizes: Number of images in each split of the source, for the splits where it is known.
        classes: Number of classes, or None if unknown.
        class_counts: Number of images of each class, if known.
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
    if splits.folds:
        strata = list(class_counts.values()) if class_counts and splits.stratify else [sum(sizes.values())]
        return _count_fold(splits, splits.folds, strata if sizes else None)
    if splits.fractions:
        return _count_fractions(splits, sizes, class_counts or {}, inputs)
    images: dict[str, int | None] = {
        name: count_lines(inputs.lists[name], name) if inputs else None for name in splits.lists
    }
    for name, text in splits.slices.items():
        is_known = all(piece.split in sizes for piece in parse_slices(text))
        ranges = resolve_slices(name, text, sizes) if is_known else []
        images[name] = sum(end - start for _, start, end in ranges) if is_known else None
    return images


def _count_fold(splits: Splits, folds: int, strata: list[int] | None) -> dict[str, int | None]:
    """Count the images of a fold; without `fold`, of the first one, from which others differ by at most one image."""
    rest = fractions_of_rest(splits, 1 / folds)
    if strata is None:
        return dict.fromkeys([*rest, "test"])
    test = allocate(strata, [1 / folds] * folds)[:, (splits.fold or 1) - 1]
    counts = allocate(strata - test, list(rest.values())).sum(axis=0)
    return dict(zip([*rest, "test"], [*counts.tolist(), int(test.sum())], strict=True))


def _count_fractions(
    splits: Splits, sizes: Mapping[str, int], class_counts: Mapping[str, int], inputs: SplitInputs | None
) -> dict[str, int | None]:
    fractions, pinned = splits.fractions, inputs.pinned.images if inputs and inputs.pinned else ()
    test: dict[str, int | None] = {"test": len(pinned) or None} if splits.pin_test else {}
    if not sizes or (splits.pin_test and not pinned):
        return dict.fromkeys(fractions) | test
    strata = [sum(sizes.values()) - len(pinned)]
    if class_counts and splits.stratify:
        others = Counter(class_counts)
        others.subtract(image.class_name for image in pinned)
        strata = [max(0, others[name]) for name in class_counts]
    totals = allocate(strata, list(fractions.values())).sum(axis=0).tolist()
    return dict(zip(fractions, totals, strict=True)) | test


def _count_predefined(sizes: Mapping[str, int]) -> dict[str, int | None]:
    if not sizes:
        return dict.fromkeys(SPLIT_NAMES)
    found = match_splits(sizes, "The source")
    images: dict[str, int | None] = {split: sizes[name] for split, name in found.items()}
    if fractions := carved_fractions(found):
        carved = allocate([sizes[found["train"]]], list(fractions.values()))[0].tolist()
        images |= dict(zip(fractions, carved, strict=True))
    return images


def describe_splits(settings: Dataset, dataset: DatasetMetadata, inputs: SplitInputs | None) -> tuple[str, ...]:
    """Describe what is not obvious about the splits of a job, as far as this is known without its images.

    Args:
        settings: `spec.dataset`.
        dataset: Metadata of the stored dataset.
        inputs: Further inputs of the splits, if known.

    Returns:
        Sentences.
    """
    splits = settings.split_settings
    notes = list(describe_predefined(splits, dataset.splits, dataset.origin)) if splits.predefined else []
    if inputs and inputs.pinned:
        notes.append(inputs.pinned.describe())
    if splits.group_by:
        notes.append("The numbers of images are approximate: splits contain whole groups.")
    return tuple(notes)
