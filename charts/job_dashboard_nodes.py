"""Row of the *Job* dashboard that compares the nodes of a run; it has no data for a run on one node."""

from panels import GREEN, RED, Panels, Query, stat_panel, state_timeline, time_series

RUN = 'namespace=~"$namespace", transferjob=~"$transferjob", run="$run"'
NODES = f'{RUN}, node!=""'
WAIT = f"sum by (node) (rate(topwork_input_wait_seconds_total{{{NODES}}}[5m]))"
COMPUTE = f"sum by (node) (rate(topwork_step_compute_seconds_total{{{NODES}}}[5m]))"
STATES = {"0": ("ended", GREEN), "1": ("running", "blue")}


def node_panels() -> Panels:
    """Differences between the nodes of a run."""
    return [
        *_skew_panels(),
        state_timeline(
            "Nodes",
            "When each node ran a stage. After training, only node 0 runs.",
            Query(f"max by (node) (topwork_stage_running{{{NODES}}})", "node {{node}}"),
            states=STATES,
            span=12,
            height=4,
        ),
        time_series(
            "Evaluation speed of each node",
            "Images per second that each node evaluates without communication, over 30 minutes. Training steps take "
            "equally long on all nodes, because the nodes wait for each other: they do not show which node is slow.",
            Query(
                f"1 / max by (node) (topwork:node_evaluation_time:seconds_per_image_rate30m{{{RUN}}})", "node {{node}}"
            ),
            unit="short",
            span=12,
        ),
        time_series(
            "Input wait of each node",
            "Share of training time that each node spends waiting for its next batch, over five minutes. The time for "
            "which the other nodes wait for it counts as their computation.",
            Query(f"{WAIT} / ({WAIT} + {COMPUTE} > 0)", "node {{node}}"),
            unit="percentunit",
            span=12,
            maximum=1,
            steps=[(None, GREEN), (0.3333, RED)],
        ),
    ]


def _skew_panels() -> Panels:
    """Number of nodes, the slowest one, and the difference between their input waits."""
    steps = f"sum(rate(topwork_steps_total{{{RUN}}}[5m])) > 0"
    slowest = f"max(last_over_time(topwork:run_slowest_node:ratio_rate30m{{{RUN}}}[$__range]))"
    return [
        stat_panel(
            "Number of nodes",
            "Nodes that train the run (spec.compute.nodes).",
            Query(f"max(last_over_time(topwork_nodes{{{RUN}}}[$__range]))", "nodes"),
            unit="none",
            span=4,
        ),
        stat_panel(
            "Slowest node",
            "How many times as long the slowest node takes to evaluate an image as the median of the nodes. With two "
            "nodes, the median is their mean. An alert fires above 1.2.",
            Query(slowest, "ratio"),
            unit="none",
            span=4,
            decimals=2,
            steps=[(None, GREEN), (1.2, RED)],
        ),
        stat_panel(
            "Step skew",
            "Mean time per step for which the node with the longest input wait delays the node with the shortest, over "
            "five minutes.",
            Query(f"(max({WAIT}) - min({WAIT})) / ({steps})", "skew"),
            unit="s",
            span=4,
            decimals=3,
        ),
    ]
