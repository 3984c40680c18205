"""README's table is what bench/readme.py makes of committed results, and losses are called so."""

from importlib import import_module
from pathlib import Path

import pytest
from conftest import needs_results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readme(monkeypatch):
    """bench/readme.py, which is a script and in no package."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return import_module("readme")


def section(readme, path: Path) -> str:
    begin, end = readme.pages.markers("readme")
    return path.read_text().split(begin)[1].split(end)[0].strip()


@needs_results
def test_tables_are_those_of_the_results(readme):
    assert section(readme, readme.README) == readme.front_table()
    assert section(readme, readme.pages.BENCHMARKS) == readme.sources_table()


def test_losses_are_called_losses(readme):
    assert readme.cell({0.75: 0.69}, 0.75) == "**0.69, a loss**"
    assert readme.cell({0.7: 1.5}, 0.75) == "1.50 at 70%"
    assert readme.cell({0.7: 1.5}, 0.9) == "not measured"


def test_the_newest_of_several_results_is_taken(readme, monkeypatch, tmp_path):
    monkeypatch.setattr(readme.pages, "RESULTS", tmp_path)
    assert readme.newest("gpu-train") == "gpu-train"
    for name in ("gpu-train-2026-11-29", "gpu-train-2026-12-01", "gpu-train-products-2027-01-01"):
        (tmp_path / f"{name}.csv").touch()
    assert readme.newest("gpu-train") == "gpu-train-2026-12-01"


@needs_results
def test_every_row_names_one_record_for_each_sparsity(readme):
    row = readme.ROWS[1]
    loose = readme.Row(row.label, row.what, row.machine, row.file, {"op": "spmm"})
    with pytest.raises(ValueError, match="expected one case a sparsity"):
        loose.speedups()
