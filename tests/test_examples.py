"""Every example runs, and prints what its docstring says it prints; so do the notebook's cells."""

import ast
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import besides_progress

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NEEDS = dict.fromkeys(("prune_and_generate", "save_and_share", "spdf"), "safetensors")
NEEDS |= dict.fromkeys(("prune_transformers", "llm_on_cpu", "llm_on_gpu"), "transformers")
NEEDS |= {"lora_on_sparse": "peft"}
MOST_LINES = 60
MOST_NOTEBOOK_BYTES = 300_000


def words(line: str) -> list[str]:
    """What stays from machine to machine: no numbers, and nothing after dots that leave out."""
    return re.findall(r"[A-Za-z]{2,}", line.split("...")[0])


def expected_lines(path: Path) -> list[str]:
    """The indented lines of the docstring after the command."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    lines = [line.strip() for line in docstring.splitlines() if line.startswith("    ")]
    return [line for line in lines[1:] if words(line)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_it_says(path, tmp_path, monkeypatch, capfd):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="error"):
        runpy.run_path(str(path), run_name="__main__")
    out, err = capfd.readouterr()
    assert not besides_progress(err)
    printed = [words(line) for line in out.splitlines()]
    for line in expected_lines(path):
        wanted = words(line)
        assert any(got[: len(wanted)] == wanted for got in printed), line


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < MOST_LINES
    assert f"    python examples/{path.name}\n" in ast.get_docstring(ast.parse(text)) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_ships_executed_and_its_cells_run(path, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    assert path.stat().st_size < MOST_NOTEBOOK_BYTES
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    names: dict = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")


def test_there_are_examples_and_a_notebook():
    assert len(EXAMPLES) >= 6 and NOTEBOOKS
