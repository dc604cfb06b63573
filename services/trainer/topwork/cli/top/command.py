"""`topwork top`: how runs go on, live, for people without Grafana."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, Namespace, open_cluster
from topwork.cluster.names import METRICS_PORTS
from topwork.errors import SettingError, UnavailableError
from topwork.redaction import without_secrets

if TYPE_CHECKING:
    from topwork.cli.top.snapshot import Figures
    from topwork.cli.top.sources import Source

COLOURS = {
    r"(?m)^.*\bRUN\b.*\bSTATE$": "bold",
    r"━+": "green",
    r"\brunning\b|\bdone\b": "green",
    r"\bgone\b|\bno progress\b.*|\d+ (retry|retries)\b|more than a third.*|\bstopped\b": "yellow",
    r"\b(failed|refused|gate not met)\b|\b(nan|inf)\b|\d+ not met": "red",
}
"""What stands out on a terminal."""
ADVICE = (
    "Start a run with: topwork run FILE --metrics-port 9101 - or say where runs are: --port or --url of a process, "
    "-n NAMESPACE of a cluster, --prometheus URL."
)


def top(
    name: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A job or a run; none: all runs.")] = None,
    port: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65535, help="Port on this machine, repeatable [default: 9101, 9102 and 9103]."),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(help="Page of metrics, such as http://host:9101/metrics; repeatable.")
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(metavar="URL", help="Read from this Prometheus; with -n that namespace's runs alone.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds from one reading to the next.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print once and end; so it is, too, off a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print once, as JSON: a list of runs.")] = False,
) -> None:
    """Watch runs: stage, epoch, loss, metrics, speed, input, GPUs, checkpoint, storage, time left. Ctrl-C ends it.

    Reads the metrics ports of this machine; with -n, --context or --kubeconfig the pods of a cluster, through its API
    server (get on pods/proxy); with --prometheus what that has scraped. One run is shown in detail, several as a table.
    Time left is that until the last epoch that is planned; early stopping may come before. Exit codes: 0; 2 no such
    run, or refused; 75 nothing answers.
    """
    source, name = _source(name, port, url, prometheus, (namespace, context, kubeconfig))
    if once or as_json or not sys.stdout.isatty():
        _print(_read_once(source, name, interval), source, as_json=as_json)
    else:
        _watch(source, name, interval)


def _source(
    name: str | None,
    ports: list[int] | None,
    urls: list[str] | None,
    prometheus: str | None,
    cluster: tuple[str | None, str | None, Path | None],
) -> "tuple[Source, str | None]":
    """Open the place that the options name; and the name of the run, where it has not chosen that already."""
    from topwork.cli.top.sources import Pages, Pods, Scrapes

    given = {"--port or --url": bool(ports or urls), "--prometheus": bool(prometheus)}
    given["--context or --kubeconfig"] = any(cluster[1:])
    if sum(given.values()) > 1 or (cluster[0] and (ports or urls)):
        raise SettingError("Runs are read from one place: ports and URLs, a cluster, or --prometheus.")
    if prometheus:
        from topwork.clients.prometheus.scrape import Prometheus

        return Scrapes(Prometheus(prometheus), prometheus, cluster[0]), name
    if any(cluster):
        from topwork.cluster.operations.find_runs import find_run

        opened = open_cluster(*cluster)
        return Pods(opened, find_run(opened, name).run if name else None), None
    pages = [f"http://127.0.0.1:{port}/metrics" for port in ports or (() if urls else METRICS_PORTS.values())]
    return Pages([*pages, *(urls or ())], ADVICE), name


def _read(source: "Source", name: str | None) -> "list[Figures]":
    from topwork.cli.top.sources import chosen

    return chosen(source.read(time.time()), name)


def _read_once(source: "Source", name: str | None, interval: float) -> "list[Figures]":
    found = _read(source, name)
    if found and not source.remembers:
        time.sleep(interval)  # rates are between two readings
        found = _read(source, name)
    return found


def _print(found: "Sequence[Figures]", source: "Source", *, as_json: bool) -> None:
    from topwork.cli.top.views import as_json as in_json

    if as_json:
        print(json.dumps([in_json(one) for one in found], indent=2))
    elif not found:
        print(source.nothing, file=sys.stderr)
    else:
        for line in _lines(found, source):
            print(line)


def _lines(found: "Sequence[Figures]", source: "Source", trouble: str | None = None) -> Iterator[str]:
    from topwork.cli.top import views

    shown = views.detail(found[0]) if len(found) == 1 else views.table(found) if found else (source.nothing,)
    for line in (*shown, *(("", trouble) if trouble else ())):
        # Labels are what a process says of itself: no control sequence of theirs reaches the terminal.
        yield "".join(sign if sign.isprintable() else "?" for sign in without_secrets(line))


def _watch(source: "Source", name: str | None, interval: float) -> None:
    """Show runs until Ctrl-C; what can't be read for once is said below what was read last."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    found, trouble = _read(source, name), None
    try:
        with Live(console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                text = Text("\n".join(_lines(found, source, trouble)), no_wrap=True, overflow="ellipsis")
                for pattern, style in COLOURS.items():
                    text.highlight_regex(pattern, style)
                live.update(text, refresh=True)
                time.sleep(interval)
                try:
                    found, trouble = _read(source, name), None
                except (SettingError, UnavailableError) as error:
                    trouble = str(error)
    except KeyboardInterrupt:
        _print(found, source, as_json=False)
