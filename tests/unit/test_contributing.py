"""The index in CONTRIBUTING.md names modules, functions and classes that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "services" / "trainer" / "topwork"
ROWS = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| ") and "?" in line]


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods and fields that a module defines; the last two as `Class.name`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(member, ast.FunctionDef):
                names.add(f"{node.name}.{member.name}")
            elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                names.add(f"{node.name}.{member.target.id}")
    return names


def test_index_has_rows() -> None:
    assert len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_index_names_existing_code(row: str) -> None:
    module: Path | None = None
    for code in re.findall(r"`([^`]+)`", row.split("|")[2]):
        if "/" in code or code.endswith(".py"):
            module = ROOT / code if code.startswith(("charts/", "tests/")) else PACKAGE / code
            assert module.exists(), f"{code} does not exist"
        elif module is not None and module.suffix == ".py" and re.fullmatch(r"[A-Za-z_]+(\.[A-Za-z_]+)?", code):
            assert code in defined_names(module), f"{module.name} does not define {code}"
