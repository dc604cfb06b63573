"""The audit of a dataset before training: duplicates across splits, image quality, label errors and drift."""

from collections.abc import Iterator
from itertools import combinations
from typing import get_args

import numpy as np
import numpy.typing as npt
import structlog

from topwork.audit.findings import (
    AuditedImage,
    AuditFindings,
    Drift,
    DuplicatePair,
    FeatureSummary,
    LabelIssue,
    Overlap,
    Problem,
    QualityIssue,
)
from topwork.audit.near_duplicates import NearDuplicates
from topwork.audit.quality import find_blank, find_blurred, find_tiny
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset, read_dataset_metadata
from topwork.data.local_dataset import LocalDataset, Split, fetch_dataset
from topwork.data.signatures import Signatures, Thumbnails, open_signatures
from topwork.errors import DataError
from topwork.registry import versions
from topwork.registry.stage_keys import read_base_version
from topwork.report.audit import (
    FINDINGS_FILE,
    SUSPECTS_FILE,
    findings_key,
    read_findings,
    read_shared_findings,
    read_version_findings,
    write_shared_findings,
)
from topwork.spec import TransferJob
from topwork.spec.digest import DIGEST_LENGTH, digest_of
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

MIN_TRAINING_IMAGES = 10
"""Classes with fewer training images are reported."""

MAX_WARNED_PAIRS = 3

MAX_COMPARISONS, MIN_SEARCHED = 200_000_000, 1000
"""Comparisons of two images for each pair of splits, unless nearDuplicates is fail, and images that are searched at
least. So many comparisons take two or three minutes on two CPU cores, during which the GPUs of a job have to wait."""


def audit(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> AuditFindings | None:
    """Audit the dataset of a job, and stop the job if `spec.dataset.audit` does not accept what is found.

    The findings are stored as `audit.json` and `suspects.csv` with the run. Findings that the run has stored for the
    same dataset and settings are used again. Runs that publish nothing, such as the trials of a search, also store them
    with the dataset for all other runs.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The findings; None if `spec.dataset.audit` turns off all searches.

    Raises:
        DataError: If more evaluated images have a duplicate in the train split than `maxLeakRatio` allows.

    Example:
        >>> audit(job, pull(job, workspace), workspace).leak_ratio
        0.0
    """
    settings = job.spec.dataset.audit
    if settings.near_duplicates == "off" and settings.label_issues == "off":
        return None
    findings = read_findings(job, dataset, workspace.storage)
    if findings is None:
        complete = _find_shared(job, dataset, workspace)
        findings = complete.without_long_lists()
        prefix, data = f"runs/{job.run}", findings.model_dump_json(by_alias=True, indent=1).encode()
        workspace.storage.write(f"{prefix}/{SUSPECTS_FILE}", complete.to_csv(), content_type="text/csv")
        workspace.storage.write(f"{prefix}/{FINDINGS_FILE}", data, content_type="application/json")
    report(findings, workspace)
    check_leaks(job, findings)
    return findings


def report(findings: AuditFindings, workspace: Workspace) -> None:
    """Set the metrics of the findings, and log them, unless the previous run of this process had the same ones."""
    if findings.leak:
        workspace.metrics.set_leaked_images(findings.leak.duplicates)
    if findings.label_issues is not None:
        workspace.metrics.set_label_issues(findings.label_issues)
    content = findings.model_dump_json()
    if not workspace.recent.find("logged audit", content):
        _log(findings)
        workspace.recent.keep("logged audit", content, result=True)


def _log(findings: AuditFindings) -> None:
    for overlap in findings.overlaps or ():
        if overlap.duplicates:
            log.warning("duplicates across splits", note=overlap.describe())
    for pair in findings.pairs[:MAX_WARNED_PAIRS]:
        names = {pair.first.split: pair.first.name, pair.second.split: pair.second.name}
        log.warning("duplicate", **names, similarity=round(pair.similarity, 3))
    if findings.label_issues is not None:
        log.info("labels that are probably wrong", images=findings.label_issues, features=findings.label_features)
    if quality := {problem: count for problem, count in findings.quality.items() if count}:
        log.warning("images that may be useless", **quality)
    if findings.small_classes:
        small = ", ".join(f"{name} {count}" for name, count in list(findings.small_classes.items())[:20])
        log.warning("classes with few training images", images=small)
    if findings.drift:
        log.info("changes since the last version", note=findings.drift.describe())


def check_leaks(job: TransferJob, findings: AuditFindings) -> None:
    """Check the findings against `spec.dataset.audit`.

    Raises:
        DataError: If more evaluated images have a duplicate in the train split than `maxLeakRatio` allows.
    """
    settings, leak = job.spec.dataset.audit, findings.leak
    if settings.near_duplicates != "fail" or leak is None or findings.leak_ratio <= settings.max_leak_ratio:
        return
    first = next(pair for pair in findings.pairs if pair.second.split == "train")
    raise DataError(
        f"{leak.describe()} That is {findings.leak_ratio:.2%}, more than spec.dataset.audit.maxLeakRatio "
        f"{settings.max_leak_ratio:g} allows, so the metrics would be too high. The first one: {first.first.name} and "
        f"{first.second.name}. runs/{job.run}/{SUSPECTS_FILE} lists all. Remove the copies from the source, keep them "
        "in one split with spec.dataset.splits.groupBy, or accept them: raise maxLeakRatio, or set nearDuplicates: "
        "warn."
    )


def _find_shared(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> AuditFindings:
    """Return the findings that are stored with the dataset, or examine it."""
    storage = workspace.storage
    findings = read_shared_findings(job, dataset, storage)
    if findings is None:
        findings = _examine(job, dataset, workspace)
        if not job.spec.publish.enabled:
            write_shared_findings(job, dataset, storage, findings)
        return findings
    # The latest version of the model may be another one.
    drift = _drift(job, dataset, storage)
    if drift and findings.features:
        drift = _compare_features(drift, findings.features, job, storage)
    return findings.model_copy(update={"drift": drift})


def _examine(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> AuditFindings:
    """Run all checks that the spec selects."""
    local, settings = fetch_dataset(dataset, job, workspace), job.spec.dataset.audit
    splits = local.splits
    findings = AuditFindings(
        key=findings_key(job, dataset),
        dataset=dataset.prefix,
        evaluated_split="test" if "test" in splits else "validation" if "validation" in splits else "",
        images={name: split.size for name, split in splits.items()},
        contradictions=dataset.metadata.contradictions.images if dataset.metadata.contradictions else 0,
        small_classes=_small_classes(local),
        drift=_drift(job, dataset, workspace.storage),
    )
    if settings.near_duplicates != "off":
        limit = None if settings.near_duplicates == "fail" else MAX_COMPARISONS
        findings = _examine_images(findings, dataset, local, workspace, limit)
    # Labels do not depend on the splits, so the first fold is enough.
    if settings.label_issues == "report" and job.spec.dataset.fold in {None, 1}:
        findings = _examine_labels(findings, job, local, workspace)
    return findings


def _examine_images(
    findings: AuditFindings, dataset: StoredDataset, local: LocalDataset, workspace: Workspace, limit: int | None
) -> AuditFindings:
    """Search duplicates across splits, with at most `limit` comparisons for each pair of splits, and useless images."""
    splits, names = local.splits, local.class_names
    if local.records is None:
        raise ValueError("the dataset has no index of its images")
    file = open_signatures(workspace.scratch / dataset.prefix, local.records, workspace)
    signatures = file.find(np.concatenate([split.digests for split in splits.values()]))
    search = NearDuplicates(signatures.thumbnails)
    thumbnails = {name: file.find(split.digests).thumbnails for name, split in splits.items()}
    overlaps, pairs = [], []
    # The pair of splits that matters most comes first: evaluated images and train.
    order = sorted(combinations(splits, 2), key=lambda two: (two[1] != findings.evaluated_split, two[0] != "train"))
    with workspace.track("audit: near duplicates", len(order)) as tracker:
        for corpus, query in order:
            searched = choose_images(splits[query].size, splits[corpus].size, limit)
            found = list(_duplicates(search, (query, corpus), splits, thumbnails, names, searched))
            exact = {pair.first.index for pair in found if pair.is_exact}
            overlaps.append(
                Overlap(
                    split=query,
                    other_split=corpus,
                    images=splits[query].size,
                    searched=len(searched),
                    exact=len(exact),
                    near=len({pair.first.index for pair in found} - exact),
                )
            )
            pairs += found
            tracker.advance(1)
    quality = list(_quality(splits, signatures, names))
    return findings.model_copy(
        update={
            "overlaps": tuple(overlaps),
            "pairs": tuple(pairs),
            "quality": {problem: sum(issue.problem == problem for issue in quality) for problem in get_args(Problem)},
            "quality_examples": tuple(quality),
        }
    )


def choose_images(size: int, corpus: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Choose the images of a split that are compared with all images of another one.

    Args:
        size: Number of images in the split.
        corpus: Number of images in the other split.
        limit: Largest number of comparisons; None for all.

    Returns:
        Indices of evenly spaced images, int64 (n,).
    """
    searched = size if limit is None else min(size, max(MIN_SEARCHED, limit // corpus))
    return np.linspace(0, size - 1, searched).round().astype(np.int64)


def _duplicates(
    search: NearDuplicates,
    pair: tuple[str, str],
    splits: dict[str, Split],
    thumbnails: dict[str, Thumbnails],
    class_names: tuple[str, ...],
    searched: npt.NDArray[np.int64],
) -> Iterator[DuplicatePair]:
    """Yield the duplicates of the images of the first split in the second one: exact ones, then the most similar.

    Exact ones are found among all images, others among the `searched` ones, int64 (n,).
    """
    one, other = (splits[name] for name in pair)
    matches = search.find(thumbnails[pair[0]].select(searched), thumbnails[pair[1]])
    digests, first = np.unique(other.digests, return_index=True)
    nearest = np.minimum(np.searchsorted(digests, one.digests), len(digests) - 1)
    exact = {index: int(first[nearest[index]]) for index in np.flatnonzero(digests[nearest] == one.digests).tolist()}
    found = [(index, position, 1.0, True) for index, position in exact.items()]
    for match in np.argsort(-matches.similarity, kind="stable"):
        index, position = int(searched[matches.query[match]]), int(matches.corpus[match])
        if one.digests[index] != other.digests[position]:
            found.append((index, position, float(matches.similarity[match]), False))
    for index, position, similarity, is_exact in found:
        yield DuplicatePair(
            first=_image(pair[0], one, index, class_names),
            second=_image(pair[1], other, position, class_names),
            similarity=similarity,
            is_exact=is_exact,
        )


def _image(name: str, split: Split, index: int, class_names: tuple[str, ...]) -> AuditedImage:
    return AuditedImage(
        split=name, index=index, name=split.names[index], class_name=class_names[int(split.labels[index])]
    )


def _quality(splits: dict[str, Split], signatures: Signatures, class_names: tuple[str, ...]) -> Iterator[QualityIssue]:
    """Yield useless images; blurred ones are compared with all others."""
    image_size = next(iter(splits.values())).image_size
    is_blank = find_blank(signatures.thumbnails)
    masks: dict[Problem, npt.NDArray[np.bool_]] = {
        "blank": is_blank,
        "blurred": find_blurred(signatures.sharpness, is_blank),
        "tiny": find_tiny(signatures.width, signatures.height, image_size),
    }
    for problem, mask in masks.items():
        first = 0
        for name, split in splits.items():
            for index in np.flatnonzero(mask[first : first + split.size]).tolist():
                yield QualityIssue(image=_image(name, split, index, class_names), problem=problem)
            first += split.size


def _examine_labels(
    findings: AuditFindings, job: TransferJob, local: LocalDataset, workspace: Workspace
) -> AuditFindings:
    from topwork.audit.label_errors import find_label_errors
    from topwork.training.label_features import compute_label_features

    splits, names = local.splits, local.class_names
    features, source = compute_label_features(job, list(splits.values()), workspace)
    labels = np.concatenate([split.labels for split in splits.values()])
    errors = find_label_errors(features, labels, len(names), job.spec.seed)
    images = [(name, index) for name, split in splits.items() for index in range(split.size)]

    def image(position: int) -> AuditedImage:
        name, index = images[position]
        return _image(name, splits[name], index, names)

    issues = tuple(
        LabelIssue(image=image(position), suggested=names[suggested], probability=round(float(own), 4))
        for position, suggested, own in zip(errors.index, errors.suggested, errors.probability, strict=True)
    )
    summary = FeatureSummary(
        key=_features_key(job, source, workspace.storage),
        mean=tuple(round(float(value), 5) for value in features.mean(0, dtype=np.float64)),
        deviation=tuple(round(float(value), 5) for value in features.std(0, dtype=np.float64)),
    )
    return findings.model_copy(
        update={
            "label_issues": len(issues),
            "label_features": source,
            "label_examples": issues,
            "features": summary,
            "drift": findings.drift and _compare_features(findings.drift, summary, job, workspace.storage),
        }
    )


def _features_key(job: TransferJob, source: str, storage: Storage) -> str:
    base, settings = job.spec.model.base, job.spec.dataset
    content = [base.model_dump(mode="json"), read_base_version(base, storage)] if source == "base" else []
    return digest_of([source, *content, settings.image_size, settings.image_fit])[:DIGEST_LENGTH]


def _compare_features(drift: Drift, summary: FeatureSummary, job: TransferJob, storage: Storage) -> Drift:
    """Add the distance from the features of the last version, if it stored features of the same kind."""
    before = read_version_findings(storage, job.model_name, drift.version)
    if before is None or before.features is None or before.features.key != summary.key:
        return drift
    return drift.model_copy(update={"features": round(summary.distance(before.features), 6)})


def _small_classes(local: LocalDataset) -> dict[str, int]:
    counts = np.bincount(local.train.labels, minlength=len(local.class_names)).tolist()
    return {name: count for name, count in zip(local.class_names, counts, strict=True) if count < MIN_TRAINING_IMAGES}


def _drift(job: TransferJob, dataset: StoredDataset, storage: Storage) -> Drift | None:
    """Compare the classes with those of the dataset of the latest version."""
    latest = versions.read_latest(storage, job.model_name)
    before = read_dataset_metadata(storage, latest.dataset) if latest and latest.dataset else None
    if latest is None or before is None:
        return None
    old, new = before.class_counts, dataset.metadata.class_counts
    shares = [
        abs(old.get(name, 0) / max(1, before.images) - new.get(name, 0) / max(1, dataset.metadata.images))
        for name in {*old, *new}
    ]
    return Drift(
        version=latest.version, dataset=latest.dataset, distance=round(sum(shares) / 2, 6), before=old, now=new
    )
