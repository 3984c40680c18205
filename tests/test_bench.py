"""What the benchmarks make of their times: ratios, tables, README's section."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, which is a folder of scripts and not a package."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.syspath_prepend(BENCH)
    import measure
    import run

    yield measure, run
    for name in ("measure", "run"):
        del sys.modules[name]


def result(op: str, M: int, sparsity: float, ours_s: float, peer_s: float | None = None) -> dict:
    rivals = {
        "F.linear": {"is_dense": True, "min_s": 3.0, "median_s": 4.0},
        "torch.mm": {"is_dense": True, "min_s": 6.0, "median_s": 6.0},
    }
    if peer_s:
        rivals["scipy CSR"] = {"is_dense": False, "min_s": peer_s, "median_s": peer_s}
    info = {"op": op, "M": M, "sparsity": sparsity, "threads": 1, "useful_flop": 10}
    return {"stats": {"median": ours_s}, "extra_info": {**info, "rivals": rivals}}


def test_ratios_are_against_the_best_dense_call(bench):
    measure, _ = bench
    benchmark = result("spmm", 16, 0.5, ours_s=2.0, peer_s=8.0)
    measure.derive_ratios(benchmark)
    info = benchmark["extra_info"]
    assert info["speedup"] == 2 and info["peer_speedups"] == {"scipy CSR": 0.5}
    assert info["useful_flop_per_s"] == 5


def test_tables_hold_geometric_means(bench, monkeypatch, tmp_path):
    measure, run = bench
    benchmarks = [
        result("spmm", 256, 0.5, ours_s=4.0, peer_s=8.0),
        result("spmm", 1024, 0.5, ours_s=1.0, peer_s=2.0),
        result("sddmm", 256, 0.75, ours_s=2.0, peer_s=16.0),
        result("train_step", 1024, 0.75, ours_s=2.0),
    ]
    for benchmark in benchmarks:
        measure.derive_ratios(benchmark)
    infos = [benchmark["extra_info"] for benchmark in benchmarks]
    assert run.table(infos, run.SUMMARY).splitlines() == [
        "| times dense | threads | 50% | 75% |",
        "|---|---|---|---|",
        "| forward, M = 256 and 1024 | 1 | 2.00 (1.00) |  |",
        "| both gradients, M = 256 and 1024 | 1 |  | 2.00 (0.25) |",
        "| GPT training step | 1 |  | 2.00 |",
    ]
    assert [row[0] for row in run.details(infos)] == [
        "forward, M = 256",
        "forward, M = 1024",
        "values' gradient, M = 256",
        "GPT training step, M = 1024",
    ]

    monkeypatch.setattr(run, "README", tmp_path / "README.md")
    run.README.write_text(f"before\n{run.MARKERS[0]}\nold\n{run.MARKERS[1]}\nafter\n")
    machine = {"cpu": "A CPU", "cores": 2, "isa": "avx2", "torch": "2.13.0"}
    machine["isa_of_torch"] = "AVX2"
    commit = {"id": "abc", "dirty": False}
    full = {"machine_info": machine, "commit_info": commit, "datetime": "2026-01-02T03:04"}
    run.update_readme("a-cpu", full, infos)
    text = run.README.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n| times dense")
    assert "old" not in text and text.endswith("-->\nafter\n")


def test_the_readme_has_a_place_for_the_table(bench):
    _, run = bench
    readme = run.README.read_text()
    assert all(readme.count(marker) == 1 for marker in run.MARKERS)
