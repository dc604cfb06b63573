"""topwork submit, status, list and cancel with TransferSearches."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sample_objects
import sample_searches
from api_server import ApiServer
from controller_process import until
from ruamel.yaml import YAML
from running_controller import running_controller
from sample_searches import RATE, SearchWorld

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.definition import TRANSFER_SEARCH, definition
from topwork.registry.versions import Version

Command = Callable[..., tuple[int, list[str]]]
Object = dict[str, Any]
FOLLOW = "  follow  topwork status transfersearch/flowers -n team-a --follow"


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer(crds=[definition(), definition(TRANSFER_SEARCH)]) as server:
        yield server


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> SearchWorld:
    return SearchWorld(api_server, cluster)


@pytest.fixture
def submit(topwork: Command, tmp_path: Path) -> Command:
    """Function that submits a search with changed keys of its spec; positional arguments are options."""

    def run(*options: str, **spec: Any) -> tuple[int, list[str]]:
        path = tmp_path / "search.yaml"
        path.write_text(json.dumps(sample_searches.search(**spec)))
        return topwork("submit", path, "-n", "team-a", *options)

    return run


def test_a_search_is_submitted_once_and_changed_in_place(submit: Command, api_server: ApiServer) -> None:
    assert submit() == (0, ["transfersearch/flowers submitted in namespace team-a", FOLLOW])
    assert submit() == (0, ["transfersearch/flowers unchanged in namespace team-a", FOLLOW])
    assert submit(trials=9) == (0, ["transfersearch/flowers changed in namespace team-a", FOLLOW])
    stored = api_server.get("TransferSearch", "flowers")
    assert (stored["spec"]["trials"], stored["metadata"]["generation"]) == (9, 2)


def test_only_values_that_the_file_sets_are_applied(submit: Command, api_server: ApiServer) -> None:
    text = "spec:\n  storage: s3://own/topwork\n  compute: {queue: team-a}\n"
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "topwork-defaults"}}
    api_server.put(config_map | {"data": {"defaults.yaml": text}})
    template = {key: value for key, value in sample_searches.TEMPLATE.items() if key not in {"storage", "compute"}}
    code, lines = submit("--image", "own:1", template=template)
    assert (code, lines[0]) == (
        0,
        'from configmap/topwork-defaults: spec.storage "s3://own/topwork", spec.compute.queue "team-a"',
    )
    stored = api_server.get("TransferSearch", "flowers")["spec"]["template"]
    assert "storage" not in stored
    assert stored["compute"] == {"image": "own:1"}


def test_dry_runs_store_nothing(submit: Command, api_server: ApiServer) -> None:
    code, lines = submit("--dry-run", "server")
    assert (code, lines) == (0, ["transfersearch.topwork.dev/flowers serverside-applied (server dry run)"])
    code, lines = submit("--dry-run", "client")
    printed = YAML(typ="safe").load("\n".join(lines))
    assert (code, printed["kind"], printed["spec"]["space"]) == (
        0,
        "TransferSearch",
        sample_searches.SEARCH["spec"]["space"],
    )
    assert api_server.list("TransferSearch") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as", "job"), "A TransferSearch needs a cluster with the controller"),
        (("--restart",), "--restart applies to jobs only"),
        (("--pinned",), "--pinned applies to jobs only"),
    ],
)
def test_options_that_do_not_apply_to_searches_are_rejected(
    submit: Command, api_server: ApiServer, options: tuple[str, ...], message: str
) -> None:
    code, lines = submit(*options)
    assert code == 2
    assert message in lines[-1]
    assert api_server.list("TransferSearch") == []


def test_a_template_with_local_files_is_rejected(submit: Command, api_server: ApiServer) -> None:
    dataset = sample_searches.TEMPLATE["dataset"] | {"source": {"folder": {"uri": "./photos"}}}
    code, lines = submit(template=sample_searches.TEMPLATE | {"dataset": dataset})
    assert code == 2
    assert "./photos" in "\n".join(lines)
    assert api_server.list("TransferSearch") == []


def test_status_and_list_show_a_search_with_its_trials(world: SearchWorld, topwork: Command) -> None:
    world.apply(sample_searches.search(trials=2))
    world.finish()
    status = world.search_status()
    code, lines = topwork("status", "flowers", "-n", "team-a")
    assert code == 0
    assert lines[0] == "transfersearch/flowers in namespace team-a: complete"
    assert "  trials    2/2 finished: 2 complete" in lines
    assert f"  best      {status['metric']}, trial {status['best']['trial']}" in lines
    assert f"  {RATE}: {status['best']['params'][RATE]}" in lines
    assert lines[-1] == f"see  topwork models show {status['model'].rstrip('/')}"
    code, lines = topwork("list", "-n", "team-a")
    assert code == 0
    assert lines[0].split() == ["SEARCH", "TRIALS", "RUNNING", "BEST", "AGE", "STATUS"]
    assert lines[1].split()[:3] == ["flowers", "2/2", "0"]
    # Jobs of the same second have no order.
    name, *jobs = [line.split()[0] for line in lines[3:]]
    assert (name, set(jobs)) == ("NAME", set(world.trial_jobs()))
    code, lines = topwork("status", "ts/flowers", "-n", "team-a", "--json")
    assert json.loads("\n".join(lines))["best"]["params"] == status["best"]["params"]


def test_a_transfer_job_with_the_name_of_a_search_takes_precedence(world: SearchWorld, topwork: Command) -> None:
    world.apply(sample_searches.search(trials=1))
    world.apply(sample_objects.spec())
    world.settle()
    assert topwork("status", "flowers", "-n", "team-a")[1][0].startswith(sample_objects.RUN)
    assert topwork("status", "ts/flowers", "-n", "team-a")[1][0].startswith("transfersearch/flowers")


def test_a_search_that_does_not_exist_is_named(world: SearchWorld, topwork: Command) -> None:
    code, lines = topwork("status", "transfersearch/cats", "-n", "team-a")
    assert (code, lines) == (2, ["topwork: transfersearch/cats does not exist in namespace team-a."])


def test_following_a_search_returns_its_exit_code(api_server: ApiServer, cluster: Cluster, submit: Command) -> None:
    with running_controller(api_server, cluster, SearchWorld, stage_seconds=0.0) as world:
        code, lines = submit("--follow", trials=1)
        assert code == 0
        assert lines[-1] == f"model  {world.search_status()['model']}"
        world.kubernetes.kubelet.script = {"fine-tune": [0, 3]}
        code, lines = submit("--follow", trials=1, seed=7)
        assert (code, lines[0]) == (3, "transfersearch/flowers changed in namespace team-a")
        assert "transferjob/flowers-best: " in lines[-1]
        code, lines = submit("--follow", trials=1, seed=7)
        assert (code, lines[0]) == (0, "transfersearch/flowers resumed in namespace team-a")


def test_a_search_without_a_complete_trial_is_replaced(
    api_server: ApiServer, cluster: Cluster, submit: Command
) -> None:
    with running_controller(api_server, cluster, SearchWorld, stage_seconds=0.0, script={"pull": [2] * 3}) as world:
        code, lines = submit("--follow", trials=3)
        assert code == 2
        assert "No trial of the search" in lines[-1]
        first = world.search_status()
        code, lines = submit("--follow", trials=3)
        assert code == 0
        replaced = "transfersearch/flowers has failed and is replaced: its trials reuse what is stored"
        assert lines[:2] == [replaced, "transfersearch/flowers submitted in namespace team-a"]
        assert world.search_status()["startTime"] >= first["startTime"]
        assert world.search_status()["trials"]["failed"] == 0


def test_a_canceled_search_is_resumed_when_it_is_submitted_again(
    api_server: ApiServer, cluster: Cluster, submit: Command, topwork: Command
) -> None:
    with running_controller(api_server, cluster, SearchWorld, stage_seconds=1e6) as world:
        submit(trials=1)
        until(lambda: world.search_status().get("state") == "Running", "running search")
        code, lines = topwork("cancel", "flowers", "-n", "team-a")
        assert code == 0
        assert "transfersearch/flowers is canceled. If you submit the same spec again, it continues." in lines
        assert world.active_pods() == []
        world.kubernetes.kubelet.stage_seconds = 0.0
        code, lines = submit("--follow", trials=1)
        assert (code, lines[0]) == (0, "transfersearch/flowers resumed in namespace team-a")


def test_search_show_best_and_report_read_the_journal_in_the_cluster(
    world: SearchWorld, topwork: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("topwork.cli.runtime.storage.has_storage_configuration", lambda: False)
    world.apply(sample_searches.search(trials=2))
    world.finish()
    status = world.search_status()
    best = status["best"]
    code, lines = topwork("search", "show", "flowers", "-n", "team-a")
    assert code == 0
    assert lines[0].startswith(f"{status['search']}: 2 of 2 trials: 2 complete")
    assert "  status     Complete" in lines
    assert f"  published  {status['model']}" in lines
    assert lines[-2].split()[:3] == [str(best["trial"]), "complete", f"{best['value']:.4f}"]
    shown = json.loads("\n".join(topwork("search", "show", "ts/flowers", "-n", "team-a", "--json")[1]))
    assert (shown["best"], len(shown["trials"])) == (best["trial"], 2)
    printed = json.loads("\n".join(topwork("search", "best", "flowers", "-n", "team-a", "--json")[1]))
    assert {name: json.dumps(value) for name, value in printed["params"].items()} == best["params"]
    code, lines = topwork("search", "report", "flowers", "-n", "team-a")
    assert (code, lines[0]) == (0, f"Wrote {status['search']}.html")
    assert lines[1:] == [
        f"The report lacks the value on the test split: cannot read {status['model']}: no access to S3 is configured "
        "on this machine"
    ]
    html = (tmp_path / f"{status['search']}.html").read_text()
    assert f"{status['model']} was not read for this report" in html


@pytest.mark.parametrize("is_same_run", [True, False])
def test_the_report_shows_only_the_version_that_the_search_in_the_cluster_published(
    world: SearchWorld, topwork: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_same_run: bool
) -> None:
    world.apply(sample_searches.search(trials=1))
    world.finish()
    status = world.search_status()
    run = world.status("flowers-best")["run"] if is_same_run else "flowers-best-00000000"
    facts = {"name": "flowers", "version": 1, "uri": status["model"], "run": run, "weights": "00", "published": ""}
    version = Version(**facts, main_metric="accuracy", metrics={"accuracy": 0.8125}, split="test", images=64)
    monkeypatch.setattr("topwork.cli.commands.search.open_optional_storage", lambda _: nullcontext(object()))
    monkeypatch.setattr("topwork.registry.versions.read_version", lambda *_: version)
    report = tmp_path / "report.html"
    code, lines = topwork("search", "report", "flowers", "-n", "team-a", "-o", report)
    assert (code, len(lines)) == (0, 1 if is_same_run else 2)
    assert ("0.8125" in report.read_text()) == is_same_run
    if not is_same_run:
        assert lines[1].endswith("the one in the storage of this machine is of the run flowers-best-00000000")


def test_search_show_says_why_a_search_in_the_cluster_cannot_be_shown(
    world: SearchWorld, topwork: Command, tmp_path: Path
) -> None:
    code, lines = topwork("search", "show", "cats", "-n", "team-a")
    assert (code, lines) == (2, ["topwork: transfersearch/cats does not exist in namespace team-a."])
    code, lines = topwork("search", "show", tmp_path / "search.yaml", "-n", "team-a")
    assert code == 2
    assert "Expected the name of a TransferSearch" in lines[0]
    world.apply(sample_searches.search(trials=1))
    code, lines = topwork("search", "show", "flowers", "-n", "team-a")
    assert code == 2
    assert lines == [
        "topwork: transfersearch/flowers in namespace team-a has not started: the controller has not accepted it yet"
    ]
    world.settle()
    name = f"{world.search_status()['search']}-journal"
    world.server.patch("ConfigMap", name, {"data": {"search.yaml": "kind: TransferSearch"}})
    code, lines = topwork("search", "best", "flowers", "-n", "team-a")
    assert code == 2
    assert f"configmap/{name} in namespace team-a does not contain the spec of" in lines[0]
