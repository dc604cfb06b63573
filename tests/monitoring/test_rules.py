"""Rule and dashboard files: promtool accepts the rules, every alert has a runbook, every panel has a description."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.monitoring.dashboards import DASHBOARD_DIRECTORY, DASHBOARDS, load_dashboard, panels, queries
from tests.monitoring.prometheus_server import ROOT, RULES, require_command

DIRECTORY = Path(__file__).parent
ALERTS = [rule for group in yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
RUNBOOKS = "https://github.com/topwork/topwork/blob/main/docs/runbooks.md"


def test_promtool_accepts_the_rules():
    completed = subprocess.run(
        [require_command("promtool"), "check", "rules", *RULES.glob("*.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (0, ""), completed.stdout


def test_promtool_rule_tests_pass():
    completed = subprocess.run(
        [require_command("promtool"), "test", "rules", "alerts_test.yaml"],
        cwd=DIRECTORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def test_each_alert_has_a_test_in_which_it_fires():
    cases = [
        case
        for test in yaml.safe_load((DIRECTORY / "alerts_test.yaml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_each_alert_links_to_its_runbook(rule):
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["runbook_url"] == f"{RUNBOOKS}#{rule['alert'].lower()}"
    assert f"\n## {rule['alert']}\n" in (ROOT / "docs/runbooks.md").read_text()


def test_each_runbook_belongs_to_an_alert():
    sections = re.findall(r"^## (Topwork\w+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in ALERTS]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_committed_dashboard_is_up_to_date(name):
    """`make verify` checks this too, but does not name the dashboard."""
    spec = importlib.util.spec_from_file_location("dashboards", ROOT / "charts/dashboards.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "charts"))
        generated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(generated)
        assert dict(generated.files())[f"dashboards/{name}"] == (DASHBOARD_DIRECTORY / name).read_text()


def test_prometheus_configurations_in_the_docs_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    configs = [block for block in blocks if "scrape_configs" in block]
    assert len(configs) == 3
    for config in configs:
        # Prometheus from Debian is built without Kubernetes service discovery.
        static_config = config.replace(
            "kubernetes_sd_configs: [{role: pod}]", "static_configs: [{targets: [localhost:9101]}]"
        )
        (tmp_path / "prometheus.yml").write_text(static_config)
        completed = subprocess.run(
            [require_command("promtool"), "check", "config", tmp_path / "prometheus.yml"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr


@pytest.mark.parametrize("name", DASHBOARDS)
def test_each_panel_has_a_description_a_unit_and_thresholds(name):
    for panel in panels(name):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"], panel["title"]
        assert defaults["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_fill_their_rows_and_do_not_overlap(name):
    cells = [
        (panel["gridPos"]["x"] + column, panel["gridPos"]["y"] + line)
        for panel in load_dashboard(name)["panels"]
        for column in range(panel["gridPos"]["w"])
        for line in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    last_row = max(line for _, line in cells)
    assert set(cells) == {(column, line) for column in range(24) for line in range(last_row + 1)}


def test_dashboard_uids_do_not_change():
    assert [load_dashboard(name)["uid"] for name in DASHBOARDS] == ["topwork-jobs", "topwork-job"]


def test_each_recording_rule_is_used():
    recorded = {
        rule["record"]
        for group in yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
        for rule in group["rules"]
    }
    texts = [query.expr for query in queries()] + [rule["expr"] for rule in ALERTS]
    texts += [(RULES / "recording.yaml").read_text().replace("record: ", "")]
    used = set(re.findall(r"topwork:\w+(?::\w+)?(?=[{\[\s)]|$)", "\n".join(texts)))
    assert recorded <= used
