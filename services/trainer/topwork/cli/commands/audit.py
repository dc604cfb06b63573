"""`topwork audit`: check the dataset of a job, without training."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork import __version__
from topwork.cli.options import Overrides, State
from topwork.cli.output.progress import open_progress
from topwork.cli.runtime.environment import default_state_directory
from topwork.cli.runtime.storage import lock_scratch, open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import SettingError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.audit.findings import AuditFindings

MAX_SHOWN = 10


def audit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Job spec with exactly one job; - reads standard input.")
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for audit.json and suspects.csv, in addition to storage.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print audit.json, or for cross-validation a list with that of each fold.")
    ] = False,
    state: State = None,
) -> None:
    """Check the dataset of a job: images in two splits, label errors, useless images. Nothing is trained.

    The dataset is pulled if it is not stored yet. The findings are stored with the run, as audit.json and suspects.csv,
    and the run uses them. spec.dataset.audit selects the checks; the exit code is 2 if its nearDuplicates is fail and
    more images than maxLeakRatio are in two splits.
    """
    jobs = [job for _, job in read_files([file], overrides or ())]
    if len(jobs) != 1:
        raise SettingError(f"{file} contains {len(jobs)} jobs. topwork audit checks one; divide the file.")
    findings = _audit(jobs[0], state or default_state_directory(), output)
    folds = jobs[0].spec.dataset.folds
    if as_json:
        content = [found.model_dump(mode="json", by_alias=True) for found in findings]
        print(json.dumps(content if folds else content[0], indent=2, ensure_ascii=False))
        return
    for number, found in enumerate(findings, start=jobs[0].spec.dataset.fold or 1):
        if folds:
            print(f"Fold {number} of {folds}:")
        for line in _format_findings(found):
            print(line)


def _audit(job: TransferJob, state: Path, output: Path | None) -> "list[AuditFindings]":
    from topwork.registry.cross_validation import fold_jobs
    from topwork.registry.datasets import select_dataset
    from topwork.registry.stage_keys import name_run

    metrics = Metrics(gpus=False)
    metrics.start_job(job=job.metadata.name, run="", stage="audit", version=__version__)
    with open_storage(job.spec.storage, state, metrics) as storage:
        workspace = Workspace(storage, metrics, open_progress(), state)
        with tempfile.TemporaryDirectory(prefix="topwork-") as scratch:
            selected = select_dataset(job, replace(workspace, scratch=Path(scratch)))
        if selected:
            job = name_run(job, selected.fingerprint, storage)
        with quiet_tensorflow_import():
            from topwork.pipeline import run_audit
            from topwork.report.audit import FINDINGS_FILE, SUSPECTS_FILE
        try:
            with lock_scratch(state, job.run) as scratch:
                findings = run_audit(job, replace(workspace, scratch=scratch))
        finally:
            # Also if the findings are not accepted: the user needs to know which images.
            for part in fold_jobs(job) or [job]:
                directory = output and (output / part.run.removeprefix(f"{job.run}-") if part is not job else output)
                for name in (FINDINGS_FILE, SUSPECTS_FILE):
                    if directory and (data := storage.read(f"runs/{part.run}/{name}")) is not None:
                        directory.mkdir(parents=True, exist_ok=True)
                        (directory / name).write_bytes(data)
    if not findings:
        raise SettingError(
            "spec.dataset.audit turns off all checks. Set nearDuplicates to warn or fail, or labelIssues to report."
        )
    return findings


def _format_findings(findings: "AuditFindings") -> list[str]:
    lines = [overlap.describe() for overlap in findings.overlaps or ()]
    lines += [
        f"  {pair.first.split} {pair.first.name} = {pair.second.split} {pair.second.name} ({pair.similarity:.2f})"
        for pair in findings.pairs[:MAX_SHOWN]
    ]
    if findings.contradictions:
        lines.append(f"{findings.contradictions} images have the same pixels as an image of another class.")
    if findings.label_issues is not None:
        lines.append(f"{findings.label_issues} images probably have a wrong class.")
        lines += [
            f"  {issue.image.split} {issue.image.name}: {issue.image.class_name}, probably {issue.suggested}"
            for issue in findings.label_examples[:MAX_SHOWN]
        ]
    if findings.quality:
        lines.append(", ".join(f"{count} {problem}" for problem, count in findings.quality.items()) + " images.")
    if findings.small_classes:
        small = ", ".join(f"{name} {count}" for name, count in list(findings.small_classes.items())[:MAX_SHOWN])
        lines.append(f"{len(findings.small_classes)} classes with few training images: {small}.")
    if findings.drift:
        lines.append(findings.drift.describe())
    return lines
