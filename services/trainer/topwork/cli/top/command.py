"""The `topwork top` command: shows the progress of runs live in a terminal."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import As, Context, Kubeconfig, Namespace, open_cluster
from topwork.cluster.names import METRICS_PORTS, RunKind
from topwork.errors import SettingError, UnavailableError
from topwork.redaction import redact

if TYPE_CHECKING:
    from topwork.cli.top.sources import Source
    from topwork.cluster.status.snapshot import RunSnapshot

STYLES = {
    r"(?m)^.*\bRUN\b.*\bSTATE$": "bold",
    r"━+": "green",
    r"\brunning\b|\bdone\b": "green",
    r"\bgone\b|\bno progress\b.*|\d+ (retry|retries)\b|slow node\b|training is input-bound|\bstopped\b": "yellow",
    r"\b(failed|refused|gate not met)\b|\b(nan|inf)\b|\d+ not met": "red",
}
"""Styles of text on a terminal, by regular expression."""
ADVICE = (
    "Start a run with `topwork run FILE --metrics-port 9101`, or specify where to look for runs: --port or --url of a "
    "process, -n NAMESPACE of a cluster, or --prometheus URL."
)


def top(
    name: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Name of a job or run [default: all runs].")
    ] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65535, help="Metrics port on this machine; repeatable [default: 9101, 9102 and 9103]."),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="URL of a metrics page, such as http://host:9101/metrics; repeatable.")
    ] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Read from this Prometheus server; add -n to show only one namespace."),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two updates.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print once and exit; the default if the output is not a terminal.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print once as JSON: a list of runs.")] = False,
) -> None:
    """Show the progress of runs: stage, epoch, loss, metrics, speed, GPUs, storage and remaining time.

    Reads the metrics ports of this machine; with -n, --context or --kubeconfig, the pods of a cluster through its API
    server (requires get on pods/proxy); with --prometheus, the series that Prometheus scraped. One run is shown in
    detail, several as a table. The remaining time is that to the last planned epoch; early stopping can end training
    sooner. Press Ctrl-C to exit. Exit codes: 0 success, also if no run is in progress; 2 no such run, or access denied;
    75 no answer, or with --once or --json, a running container does not answer.
    """
    source, name = _open_source(name, port, url, prometheus, (namespace, context, kubeconfig), as_kind)
    if once or as_json or not sys.stdout.isatty():
        runs = _read_once(source, name, interval)
        _print(runs, source, as_json=as_json)
        if any(run.state == "running" and run.reason for run in runs):
            raise typer.Exit(UnavailableError.exit_code)
    else:
        _watch(source, name, interval)


def _open_source(
    name: str | None,
    ports: list[int] | None,
    urls: list[str] | None,
    prometheus: str | None,
    cluster_options: tuple[str | None, str | None, Path | None],
    kind: RunKind | None,
) -> "tuple[Source, str | None]":
    """Open the source that the options select; also return the name to filter by, unless the source filters itself."""
    from topwork.cli.top.sources import ClusterSource, MetricsPageSource, PrometheusSource

    namespace, *connection = cluster_options
    if sum([bool(ports or urls), bool(prometheus), any(connection)]) > 1 or (namespace and (ports or urls)):
        raise SettingError(
            "Choose one source of runs: --port and --url, a cluster (-n, --context, --kubeconfig), or --prometheus, "
            "which can be combined with -n."
        )
    if prometheus:
        from topwork.clients.prometheus.scrape import PrometheusClient

        return PrometheusSource(PrometheusClient(prometheus), prometheus, namespace), name
    if any(cluster_options):
        from topwork.cluster.operations.run_lookup import find_run

        cluster = open_cluster(*cluster_options)
        if name:
            find_run(cluster, name, kind)  # report an unknown name, and the existing runs, before the first update
        return ClusterSource(cluster, name, kind), None
    pages = [f"http://127.0.0.1:{port}/metrics" for port in ports or (() if urls else METRICS_PORTS.values())]
    return MetricsPageSource([*pages, *(urls or ())], ADVICE), name


def _read(source: "Source", name: str | None) -> "list[RunSnapshot]":
    from topwork.cli.top.sources import select_runs

    return select_runs(source.read(time.time()), name)


def _read_once(source: "Source", name: str | None, interval: float) -> "list[RunSnapshot]":
    runs = _read(source, name)
    if runs and not source.has_history:
        time.sleep(interval)  # rates need two readings
        runs = _read(source, name)
    return runs


def _print(runs: "Sequence[RunSnapshot]", source: "Source", *, as_json: bool) -> None:
    from topwork.cli.top.views import snapshot_to_json

    if as_json:
        print(json.dumps([snapshot_to_json(run) for run in runs], indent=2))
    elif not runs:
        print(source.empty_message, file=sys.stderr)
    else:
        for line in _format(runs, source):
            print(line)


def _format(runs: "Sequence[RunSnapshot]", source: "Source", error: str | None = None) -> Iterator[str]:
    from topwork.cli.top import views

    if not runs:
        lines: Iterator[str] = iter([source.empty_message])
    else:
        lines = views.format_details(runs[0]) if len(runs) == 1 else views.format_runs(runs)
    for line in (*lines, *(("", error) if error else ())):
        # Labels come from the processes: remove control sequences before they reach the terminal.
        yield "".join(character if character.isprintable() else "?" for character in redact(line))


def _watch(source: "Source", name: str | None, interval: float) -> None:
    """Show runs until Ctrl-C. If a read fails, its error is shown below the last values."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    runs, problem = _read(source, name), None
    try:
        with Live(console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                text = Text("\n".join(_format(runs, source, problem)), no_wrap=True, overflow="ellipsis")
                for pattern, style in STYLES.items():
                    text.highlight_regex(pattern, style)
                live.update(text, refresh=True)
                time.sleep(interval)
                try:
                    runs, problem = _read(source, name), None
                except (SettingError, UnavailableError) as error:
                    problem = str(error)
    except KeyboardInterrupt:
        _print(runs, source, as_json=False)
