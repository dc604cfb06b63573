"""The `topwork backbones` command in a separate process."""

import json
import subprocess
import sys

from topwork.spec.applications import APPLICATIONS


def run_backbones(*arguments: str, setup: str = "") -> str:
    command = ["topwork", "backbones", *arguments]
    script = f"import sys\n{setup}\nsys.argv = {command}\nfrom topwork.cli import main\nmain()"
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")
    return completed.stdout


def test_backbones_prints_a_table_that_fits_a_terminal() -> None:
    header, *rows = run_backbones().splitlines()
    assert header == "model             input min  parameters without top depth   MB top-1 top-5"
    assert [row.split()[0] for row in rows] == list(APPLICATIONS)
    by_name = {row.split()[0]: row.split()[1:] for row in rows}
    assert by_name["Xception"] == ["299", "71", "22,910,480", "20,861,480", "81", "88", "79.0%", "94.5%"]
    assert by_name["MobileNetV3Small"] == ["224", "32", "2,554,968", "939,120", "88", "10", "68.1%", "-"]
    assert all(len(line) <= 80 for line in (header, *rows))


def test_backbones_json_lists_the_same_models() -> None:
    backbones = {backbone["name"]: backbone for backbone in json.loads(run_backbones("--json"))}
    assert list(backbones) == list(APPLICATIONS)
    assert backbones["ConvNeXtXLarge"] == {
        "name": "ConvNeXtXLarge",
        "defaultSide": 224,
        "leastSide": 32,
        "scaling": "inside",
        "parameters": 350_196_968,
        "parametersWithoutTop": 348_147_968,
        "depth": 190,
        "sizeMB": 1310,
        "top1": 0.867,
        "top5": None,
    }


def test_backbones_imports_no_training_library() -> None:
    block_imports = "for name in ('numpy', 'tensorflow', 'keras'): sys.modules[name] = None"
    assert len(run_backbones(setup=block_imports).splitlines()) == 42
