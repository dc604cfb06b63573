"""Draws docs/images/monitoring-*.png: dashboard panels with data of a real run from a real Prometheus server.

    python benchmarks/monitoring.py        about five minutes on two CPU cores; requires make prometheus

Runs solar-base.yaml and solar-transfer.yaml of tests/fixtures/jobs with two replicas, while Prometheus scrapes them and
evaluates the rules of the chart. Then sends the queries of the panels and draws the responses, except for panels that
require GPUs or a cluster.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.monitoring.dashboards import panels, substitute_variables  # noqa: E402 - requires the path above
from tests.monitoring.prometheus_server import Prometheus, free_port  # noqa: E402

IMAGES = ROOT / "docs/images"
RUNS = (("solar-base", ["spec.transfer.epochs=10"]), ("solar-transfer", []))
LINGER_SECONDS = 15
COLUMNS = 3
NODE_TITLES = ("Number of nodes", "Slowest node", "Step skew", "Nodes")
EXCLUDED_TITLES = ("GPU", "Pods", "Startup time", "Pending", "Reconcile", "Oldest due", *NODE_TITLES)
"""Prefixes of the titles of panels that require GPUs, a cluster or several nodes."""
STAGES = ("pull", "transfer", "fine-tune", "publish")
Responses = list[tuple[str, list[dict[str, Any]]]]
"""Legend and series of each query of a panel, with times in seconds since the start of the run."""


def main() -> None:
    """Run the examples, then query Prometheus and draw the dashboards."""
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as directory:
        port = free_port()
        targets = [{"targets": [f"127.0.0.1:{port}"]}]
        prometheus = Prometheus(Path(directory) / "prometheus", [{"job_name": "topwork", "static_configs": targets}])
        try:
            start = time.time()
            runs = list(run_examples(Path(directory), port, prometheus))
            run, run_start, end = runs[-1]
            all_runs = {"namespace": ".*", "team": ".*", "transferjob": ".*", "run": ".*"}
            draw("jobs", prometheus, start, end, all_runs)
            draw("job", prometheus, run_start, end, all_runs | {"run": run})
        finally:
            prometheus.stop()


def run_examples(directory: Path, port: int, prometheus: Prometheus) -> Iterator[tuple[str, float, float]]:
    """Run the examples one after another; yields the name, start time and end time of each run."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    environment = variables | {"TOPWORK_STATE": str(directory / "state")}
    subprocess.run([sys.executable, ROOT / "examples/solar/upload_images.py"], env=environment, check=True)
    for name, overrides in RUNS:
        start = time.time()
        values = [*overrides, f"spec.metrics.lingerSeconds={LINGER_SECONDS}"]
        settings = [argument for value in values for argument in ("--set", value)]
        command = [sys.executable, "-m", "topwork", "run", ROOT / f"tests/fixtures/jobs/{name}.yaml", "--replicas", "2"]
        process = subprocess.Popen([*command, "--metrics-port", str(port), *settings], env=environment)
        query = f'topwork_stage_duration_seconds{{transferjob="{name}", stage="publish"}}'
        prometheus.wait_for(query, process, seconds=600)
        time.sleep(5)
        series, end = prometheus.query(query), time.time()
        if process.wait(timeout=120):
            sys.exit(f"topwork run failed with exit code {process.returncode}.")
        yield series[0]["metric"]["run"], start, end


def draw(name: str, prometheus: Prometheus, start: float, end: float, values: dict[str, str]) -> None:
    """Draw the panels of a dashboard, stat panels above the others, without the table of runs."""
    values |= {"__range": f"{int(end - start)}s", "__rate_interval": "15s"}
    shown = [panel for panel in panels(f"{name}.json") if not panel["title"].startswith(EXCLUDED_TITLES)]
    results = [(panel, query_panel(panel, prometheus, start, end, values)) for panel in shown]
    stats = [result for result in results if result[0]["type"] == "stat"]
    charts = [result for result in results if result[0]["type"] in DRAW and any(series for _, series in result[1])]
    plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})
    rows = -(-len(charts) // COLUMNS)
    figure = plt.figure(figsize=(12, 2.2 * rows + 0.8), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=[0.8, 2.2 * rows])
    for axis, (panel, responses) in zip(top.subplots(1, len(stats)).flat, stats, strict=True):
        draw_stat(axis, panel, responses)
    axes = below.subplots(rows, COLUMNS, squeeze=False).flat
    for axis, (panel, responses) in zip(axes, charts, strict=False):
        unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"])
        title = f"{panel['title']}, {unit}" if unit else panel["title"]
        axis.set_title(title, loc="left", fontsize=8, fontweight="bold")
        DRAW[panel["type"]](axis, responses)
    for axis in list(below.axes)[len(charts) :]:
        axis.set_axis_off()
    figure.savefig(IMAGES / f"monitoring-{name}.png", dpi=100)
    plt.close(figure)


def draw_stat(axis: Axes, panel: dict[str, Any], responses: Responses) -> None:
    """Draw the values of a stat panel as text, as Grafana does."""
    defaults = panel["fieldConfig"]["defaults"]
    texts = {
        value: result["text"]
        for mapping in defaults.get("mappings", [])
        for value, result in mapping["options"].items()
    }
    lines = []
    for legend, results in responses:
        for series in results:
            value = series["value"][1]
            number = f"{float(value):,.{int(defaults['decimals'])}f}"
            unit = " s" if defaults["unit"] == "s" else ""
            name = f"{format_legend(legend, series['metric'])} " if len(responses) > 1 else ""
            lines.append(name + texts.get(value, number + unit))
    axis.set_axis_off()
    axis.set_title(panel["title"], loc="left", fontsize=8, fontweight="bold")
    axis.text(0, 0.5, "\n".join(lines), fontsize=10 if len(lines) == 1 else 8, va="center", color="C0", wrap=True)


def query_panel(
    panel: dict[str, Any], prometheus: Prometheus, start: float, end: float, values: dict[str, str]
) -> Responses:
    """Send the queries of a panel as Grafana does; returns each response with its legend."""
    responses = []
    for target in panel["targets"]:
        query = substitute_variables(target["expr"], values)
        results = prometheus.query(query, end) if target.get("instant") else prometheus.query_range(query, start, end)
        for series in results:
            series["values"] = [(timestamp - start, value) for timestamp, value in series.get("values", [])]
        responses.append((target["legendFormat"], results))
    return responses


def format_legend(legend: str, labels: dict[str, str]) -> str:
    """Replace the labels in a legend with their values, and remove those that a series does not have."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def draw_lines(axis: Axes, responses: Responses) -> None:
    """Draw series over time, in seconds since the start."""
    for legend, results in responses:
        for series in results:
            times, values = zip(*series["values"], strict=True)
            axis.plot(
                times, [float(value) for value in values], linewidth=1.2, label=format_legend(legend, series["metric"])
            )
    axis.set_xlabel("seconds")
    axis.legend(frameon=False, fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))


def draw_bars(axis: Axes, responses: Responses) -> None:
    """Draw one bar per series."""
    bars = {
        format_legend(legend, series["metric"]): float(series["value"][1])
        for legend, results in responses
        for series in results
    }
    names = sorted(bars, key=stage_order, reverse=True)
    axis.barh(names, [bars[name] for name in names], height=0.6)
    axis.set_xlim(left=0, right=None if any(bars.values()) else 1)


def draw_states(axis: Axes, responses: Responses) -> None:
    """Draw when each stage ran: a bar of one second for each sample with the value 1."""
    times = {
        format_legend(legend, series["metric"]): [timestamp for timestamp, value in series["values"] if value == "1"]
        for legend, results in responses
        for series in results
    }
    for name in sorted(times, key=stage_order, reverse=True):
        axis.barh([name] * len(times[name]), 1, left=times[name], height=0.6, color="C0")
    axis.set_xlabel("seconds")


def stage_order(name: str) -> int:
    """Return the position of a stage in the pipeline."""
    return STAGES.index(name) if name in STAGES else -1


UNITS = {"s": "in seconds", "percentunit": "as a share", "Bps": "bytes per second"}
DRAW = {"timeseries": draw_lines, "bargauge": draw_bars, "state-timeline": draw_states}


if __name__ == "__main__":
    main()
