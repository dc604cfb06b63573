"""`topwork search`: run a search on this machine, and show searches."""

import dataclasses
import json
import logging
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer
from typer.core import TyperGroup

from topwork.cancellation import StopRequest
from topwork.cli.options import (
    Context,
    Kubeconfig,
    LogFormatOption,
    MetricsPort,
    Namespace,
    Overrides,
    Quiet,
    Replicas,
    State,
    format_overrides,
    serve_metrics,
)
from topwork.cli.output.progress import NoProgress
from topwork.cli.output.search_table import format_best, format_overrides_of, format_state, format_trials, ranked
from topwork.cli.runtime.environment import configure_tracking, default_state_directory, visible_gpus
from topwork.cli.runtime.logging import LogFormat, configure_logging, is_verbose, set_log_level, stderr_console
from topwork.cli.runtime.shutdown import record_outcome, to_topwork_error
from topwork.cli.runtime.signals import stop_on_signals
from topwork.cli.runtime.storage import lock_scratch, open_optional_storage, open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.cli.search_address import OpenSearch, SearchAddress, open_search, read_one_search
from topwork.clients.prometheus.metrics import Metrics
from topwork.errors import SettingError, TopworkError
from topwork.progress import Progress
from topwork.spec import TransferJob
from topwork.spec.search import TransferSearch
from topwork.workspace import Workspace

if TYPE_CHECKING:
    from topwork.report.search_report import SearchResults
    from topwork.search.study import Study
    from topwork.search_pipeline import SearchOutcome

log = structlog.get_logger(__name__)

SEARCH_LOGGERS = ("topwork.search_pipeline", "topwork.search", "topwork.cli.commands.search")


class SearchGroup(TyperGroup):
    """`topwork search FILE` is short for `topwork search run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `run` unless the first argument is a command, or a mistyped one."""
        if args and args[0] not in {*self.commands, "--help"} and not self._is_mistyped(args[0]):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def _is_mistyped(self, word: str) -> bool:
        return bool(get_close_matches(word, self.commands)) and not Path(word).exists()


app = typer.Typer(
    cls=SearchGroup,
    help="Search for the best hyperparameters: topwork search FILE is short for topwork search run FILE.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Where = Annotated[
    str,
    typer.Argument(
        help="File of the search, s3://bucket/prefix of its storage, s3://bucket/prefix/searches/ID, or name of a "
        "TransferSearch in the cluster."
    ),
]
Name = Annotated[str | None, typer.Argument(help="Name or ID of the search, if WHERE is a storage.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TransferSearch; - reads standard input.")],
    overrides: Overrides = None,
    replicas: Replicas = None,
    state: State = None,
    metrics_port: MetricsPort = None,
    log_format: LogFormatOption = LogFormat.text,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log all messages of the trials, and the output of TensorFlow.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run a search on this machine: its trials one after the other, then publish the best one.

    An interrupted search continues where it stopped, and a finished one is evaluated again only if its gates changed.
    More trials (spec.trials) continue the same search; another space, metric, sampler or seed starts a new one.
    """
    search = read_one_search(file, overrides or ())
    verbose = verbose or is_verbose()
    state = state or default_state_directory()
    metrics = Metrics(gpus=replicas is None, visible_devices=visible_gpus())
    with _open_display(search, log_format, quiet=quiet, verbose=verbose) as (progress, observe):
        if metrics_port is not None:
            log.info("metrics", port=serve_metrics(metrics, metrics_port))
        template = TransferJob(
            api_version=search.api_version, kind="TransferJob", metadata=search.metadata, spec=search.spec.template
        )
        with record_outcome(template, metrics, served=metrics_port is not None):
            outcome = _Runner(metrics, progress, observe, state, replicas, verbose).run(search)
    for line in outcome.summary():
        print(line, flush=True)


@app.command()
def show(
    where: Where,
    name: Name = None,
    overrides: Overrides = None,
    as_json: Json = False,
    state: State = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show the trials of a search, the best first, also while it runs."""
    address = SearchAddress(where, name, overrides or (), state, namespace, context, kubeconfig)
    with open_search(address) as opened:
        study, search = opened.study, opened.search
        if as_json:
            typer.echo(json.dumps(_to_json(opened.id, study, search), indent=2, default=str))
            return
        typer.echo(f"{opened.id}: {format_state(study.trials, study.best, search)}")
        if opened.status:
            typer.echo(f"  status     {opened.status}")
        if study.end_reason:
            typer.echo(f"  ended      {study.end_reason}")
        if study.published:
            typer.echo(f"  published  {study.published}")
        typer.echo("")
        for line in format_trials(ranked(study.trials, search), search):
            typer.echo(line)


@app.command()
def best(
    where: Where,
    name: Name = None,
    overrides: Overrides = None,
    as_json: Json = False,
    as_options: Annotated[
        bool, typer.Option("--options", help="Print --set options for topwork run or topwork submit.")
    ] = False,
    state: State = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the parameters of the best trial as YAML that replaces those of a TransferJob."""
    address = SearchAddress(where, name, overrides or (), state, namespace, context, kubeconfig)
    with open_search(address) as opened:
        trial = opened.study.best
        if trial is None:
            raise SettingError(f"No trial of {opened.id} is complete yet. See topwork search show.")
        if as_json:
            content = {"search": opened.id, "trial": trial.number, "value": trial.value, "params": trial.params}
            typer.echo(json.dumps(content, indent=2))
        elif as_options:
            typer.echo(" ".join(format_overrides(format_overrides_of(trial.params))))
        else:
            typer.echo(format_best(trial, opened.search, opened.id), nl=False)


@app.command()
def report(
    where: Where,
    name: Name = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [default: ID.html].", show_default=False)
    ] = None,
    state: State = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Write the HTML report of a search to a file, also while it runs.

    Of a search in a cluster, the value of the published model on the test split requires access to its storage from
    this machine; without, the report is written without it.
    """
    from topwork.report.search_report import render_search_report

    address = SearchAddress(where, name, overrides or (), state, namespace, context, kubeconfig)
    with open_search(address) as opened:
        path = output or Path(f"{opened.id}.html")
        try:
            path.write_text(render_search_report(_read_results(opened)), "utf-8")
        except OSError as error:
            raise SettingError(f"Cannot write {path} ({error.strerror}). Choose another file with --output.") from error
    typer.echo(f"Wrote {path}")


def _read_results(opened: OpenSearch) -> "SearchResults":
    """Collect what the report shows; of a search in a cluster, the published version only if it can be read here."""
    from topwork.report.search_report import read_results

    search, study = opened.search, opened.study
    if opened.storage or not study.published:
        return read_results(search, study, opened.storage)
    try:
        with open_optional_storage(search.spec.template.storage) as storage:
            results = read_results(search, study, storage)
        problem = "it is not there" if storage else "no access to S3 is configured on this machine"
    except TopworkError as error:
        results, problem = read_results(search, study, None), str(error)
    if results.version and results.version.run != opened.publisher:
        # A storage with the same name at another endpoint.
        problem = f"the one in the storage of this machine is of the run {results.version.run}"
        results = dataclasses.replace(results, version=None)
    if results.version is None:
        typer.echo(f"The report lacks the value on the test split: cannot read {study.published}: {problem}", err=True)
    return results


@contextmanager
def _open_display(
    search: TransferSearch, log_format: LogFormat, *, quiet: bool, verbose: bool
) -> Iterator[tuple[Progress, "Callable[[Study], None]"]]:
    """Show a live view on a terminal, and a log line per trial elsewhere; `verbose` adds those of the trials."""
    if log_format is LogFormat.json:
        configure_logging(log_format)
    is_live = sys.stderr.isatty() and not quiet and not verbose
    set_log_level(logging.DEBUG if verbose else logging.CRITICAL if quiet else logging.WARNING)
    with ExitStack() as stack:
        progress: Progress = NoProgress()
        observe: Callable[[Study], None] = lambda _: None  # noqa: E731
        if is_live:
            from topwork.cli.output.search_view import SearchView

            progress = view = stack.enter_context(SearchView(search, stderr_console()))
            observe = view.observe
        elif not quiet:
            for name in SEARCH_LOGGERS:
                stack.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
                logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
        yield progress, observe


@dataclasses.dataclass(frozen=True)
class _Runner:
    """Runs a search with the options of the command.

    Attributes:
        metrics: Metrics of the process.
        progress: Progress display of the trials.
        observe: Shows the state of the search.
        state: State directory.
        replicas: Replicas on the CPU; None for one per GPU, or one without GPUs.
        verbose: Whether to show the output of TensorFlow.
    """

    metrics: Metrics
    progress: Progress
    observe: "Callable[[Study], None]"
    state: Path
    replicas: int | None
    verbose: bool

    def run(self, search: TransferSearch) -> "SearchOutcome":
        from topwork.search.search_id import search_id

        configure_tracking(search.spec.template.tracking)
        stop, name = StopRequest(), search_id(search)
        with (
            open_storage(search.spec.template.storage, self.state, self.metrics) as storage,
            stop_on_signals(stop),
            # Only one process of this machine at a time: the next one need not wait until the lease expires.
            lock_scratch(self.state, name) as scratch,
        ):
            log.info("search", id=name, trials=search.spec.trials, storage=storage.uri)
            workspace = Workspace(storage, self.metrics, self.progress, scratch, self.replicas, stop=stop)
            with quiet_tensorflow_import(verbose=self.verbose):
                from topwork import search_pipeline
            coordination = search_pipeline.Coordination(_read_holder(self.state), self.observe, to_topwork_error)
            return search_pipeline.run(search, workspace, coordination)


def _read_holder(state: Path) -> str:
    """Return the ID of a state directory, which is created at its first use."""
    path = state / "coordinator-id"
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    if not path.exists():
        part.write_text(uuid.uuid4().hex)
        try:
            path.hardlink_to(part)
        except FileExistsError:  # another process was faster
            pass
        finally:
            part.unlink()
    return path.read_text()


def _to_json(name: str, study: "Study", search: TransferSearch) -> dict[str, Any]:
    return {
        "id": name,
        "metric": search.spec.metric,
        "trials": [dataclasses.asdict(trial) | {"value": trial.value} for trial in study.trials],
        "best": study.best.number if study.best else None,
        "endReason": study.end_reason,
        "published": study.published,
    }
