"""`topwork compare`: compare published versions and runs on the same images."""

import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.model_address import MODEL_URI, find_version, parse_model_address
from topwork.cli.options import State
from topwork.cli.output.progress import open_progress
from topwork.cli.runtime.environment import default_state_directory
from topwork.cli.runtime.storage import lock_scratch, open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import SettingError
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.clients.s3.storage import Storage
    from topwork.report.comparison.candidates import Candidate
    from topwork.report.comparison.result import Comparison

RUN_URI = re.compile(r"(?P<storage>s3://.+)/runs/(?P<run>[^/]+)/?")


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL MODEL...",
            help="s3://…/models/NAME[/VERSION|/latest] or s3://…/runs/RUN; after the first one, also "
            "models/NAME[/VERSION] or runs/RUN in the same storage.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report with pictures to this HTML file.")] = None,
    state: State = None,
) -> None:
    """Compare published versions or runs on the same images.

    The first model is compared with each of the others, on the images of its test split that no other one was trained
    on or selected with: metrics with intervals, McNemar's exact test, images newly misclassified and newly correct,
    what changed in spec and dataset, and cost. Models of other classes, or without common images, are refused with exit
    code 2.
    """
    uris = _complete(models)
    if html and not html.absolute().parent.is_dir():
        raise SettingError(f"--html {html}: the directory does not exist. Create it first.")
    comparison = _compare(uris, state or default_state_directory(), html)
    if as_json:
        print(json.dumps(comparison.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False))
        return
    from topwork.cli.output.model_comparison import format_model_comparison

    for line in format_model_comparison(comparison):
        print(line)


def _complete(models: Sequence[str]) -> list[str]:
    """Complete the URIs of models in the storage of the first one."""
    if len(models) < 2:
        raise SettingError("Got one model. Expected at least two to compare.")
    storage = _storage_of(models[0])
    uris = [model if model.startswith("s3://") else f"{storage}/{model}" for model in models]
    for uri in uris:
        _storage_of(uri)
    return uris


def _storage_of(uri: str) -> str:
    match = RUN_URI.fullmatch(uri) or MODEL_URI.fullmatch(uri)
    if not match:
        raise SettingError(
            f"{uri} is neither a published model nor a run. Use a URI such as "
            "s3://bucket/prefix/models/cats-vs-dogs/3 or s3://bucket/prefix/runs/cats-vs-dogs-1a2b3c4d."
        )
    return match["storage"]


def _compare(uris: Sequence[str], state: Path, html: Path | None) -> "Comparison":
    with ExitStack() as stack:
        storage = stack.enter_context(open_storage(_storage_of(uris[0]), state))
        with quiet_tensorflow_import():
            from topwork.report.comparison.compare import compare_models
            from topwork.report.comparison.document import render_comparison
        candidates = [_read_candidate(uri, storage) for uri in uris]
        names = [candidate.uri for candidate in candidates]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise SettingError(f"{repeated} is listed twice. Name different models.")
        if len({candidate.name for candidate in candidates}) < len(candidates):  # of several storages
            candidates = [replace(candidate, name=candidate.uri) for candidate in candidates]
        scratch = stack.enter_context(lock_scratch(state, "compare"))
        workspace = Workspace(storage, Metrics(gpus=False), open_progress(), scratch)
        comparison, images = compare_models(candidates, workspace)
        if html:
            html.write_text(render_comparison(comparison, images), "utf-8")
        return comparison


def _read_candidate(uri: str, storage: "Storage") -> "Candidate":
    from topwork.report.comparison.candidates import read_run_candidate, read_version_candidate

    if match := RUN_URI.fullmatch(uri):
        return read_run_candidate(storage.at(match["storage"]), match["run"])
    address = parse_model_address(uri)
    own = storage.at(address.storage)
    return read_version_candidate(own, find_version(own, address))
