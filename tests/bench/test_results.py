"""Committed results: small tables that are read, and pages that they make again."""

from importlib import import_module
from pathlib import Path

import pytest
from conftest import RESULTS, needs_results

from sparsekern.bench import records
from sparsekern.bench.rates import derived

pytestmark = needs_results
MOST_BYTES, MOST_BYTES_OF_A_FILE = 2_000_000, 400_000
TABLES = sorted(RESULTS.rglob("*.csv"))


def test_results_are_small():
    sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < MOST_BYTES
    assert not [path for path, size in sizes.items() if size > MOST_BYTES_OF_A_FILE]
    assert not [path for path in sizes if path.suffix not in (".csv", ".jsonl", ".md", ".png")]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_has_its_run_and_its_records(path):
    run = records.read(path)
    assert run.about["benchmark"] and run.about["date"] and run.about["commit"]["id"]
    assert run.about["machine"]["torch"] and run.records
    assert all("contender" in record for record in run.records)


def test_a_page_of_training_without_a_table_says_so():
    pages = [path for path in RESULTS.glob("*-train*.md") if not path.with_suffix(".csv").exists()]
    assert not [path for path in pages if "The single records of this run" not in path.read_text()]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("run", "amd-epyc-2-cores-avx2-trained-2026-11-28"),
        ("decode", "nvidia-h200-decode-bfloat16-2026-11-29"),
        ("models", "minilm-pruned-2026-11-29"),
        ("models", "smollm2-pruned-2026-11-29"),
    ],
)
def test_a_page_is_what_its_table_makes(script, name, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    made = import_module(script).page(name, records.read(RESULTS / f"{name}.csv"))
    assert made == (RESULTS / f"{name}.md").read_text()


def test_the_shipped_crossover_is_that_of_its_table():
    from sparsekern.bench import crossover
    from sparsekern.kernels import crossover as shipped

    run = records.read(RESULTS / "nvidia-h200-crossover-bfloat16-2026-11-28.csv")
    entry = shipped._measured()["sm_90"]
    if run.about["commit"]["id"][:10] not in entry["measured"]:
        pytest.skip("another measurement is shipped")
    assert crossover.summarize(derived(run), "")["bfloat16"] == entry["bfloat16"]
