"""Ratios, tables and sections that the benchmarks make of their times; and their race."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from sparsekern.bench import products, race, rates, records
from sparsekern.kernels.cpu import panel

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is a folder of scripts and not a package."""
    for package in ("threadpoolctl", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


def measured(op: str, M: int, sparsity: float, ours_s: float, **fields) -> dict:
    """Dense takes 4 s, a peer 8 s, and one that is wrong no time at all."""
    right = {"error": 0.0, "is_right": True}
    ways = {
        "sparsekern": {"kind": "ours", "median_s": ours_s, "error": 2e-7, "is_right": True},
        "F.linear": {"kind": "dense", "median_s": 4.0, **right},
        "torch.mm": {"kind": "dense", "median_s": 6.0, **right},
        "scipy CSR": {"kind": "sparse", "median_s": 8.0, "error": 1e-7, "is_right": True},
        "hasty": {"kind": "sparse", "median_s": 0.1, "error": 0.5, "is_right": False},
    }
    case = {"op": op, "device": "cpu", "M": M, "N": 768, "K": 768, "sparsity": sparsity}
    case |= {"nnz": 1000, "mask": "random", "dtype": "float32", "threads": 1, "is_cold": False}
    return rates.derive(case | {"ways": ways} | fields)


def of_a_model(op: str, M: int, **fields) -> dict:
    ways = {
        "sparsekern": {"kind": "ours", "median_s": 2.0, "error": 0.0, "is_right": True},
        "dense": {"kind": "dense", "median_s": 4.0, "error": 0.0, "is_right": True},
    }
    case = {"op": op, "device": "cpu", "model": "demo", "layers": 1, "width": 8, "vocabulary": 9}
    case |= {"context": 4, "batch": 1, "M": M, "sparsity": 0.75, "threads": 1, "ways": ways}
    return rates.derive(case | fields)


def some_cases() -> list[dict]:
    names = ("first call", "later call", "its results", "bound", "dense N x K")
    layer = {"op": "memory", "M": 1, "N": 8, "K": 8, "sparsity": 0.75, "threads": 1}
    return [
        measured("spmm", 256, 0.5, ours_s=4.0),
        measured("spmm", 256, 0.5, ours_s=2.0, threads=2),
        measured("spmm", 1024, 0.5, ours_s=1.0),
        measured("spmm", 1, 0.5, ours_s=1.0, is_cold=True),
        measured("sddmm", 256, 0.75, ours_s=2.0),
        of_a_model("train_step", 1024, linear_share=0.5, cap=2.0),
        of_a_model("generate", 4, batch=4, tokens=8),
        layer | {"ways": {name: {"bytes": 2**20} for name in names}},
    ]


def a_run(cases: list[dict], **machine) -> records.Run:
    about = {"cpu": "A CPU", "cores": 2, "isa": "avx2", "torch": "2.13.0", "isa_of_torch": "AVX2"}
    about |= {"peers": [], "ceilings": {}} | machine
    commit = {"id": "abc", "dirty": False}
    head = {"benchmark": "products", "date": "2026-01-02", "commit": commit, "machine": about}
    return records.Run(head, records.flat(cases))


def test_ratios_are_against_the_best_dense_call():
    case = measured("spmm", 16, 0.5, ours_s=2.0)
    assert case["ours_s"] == 2 and case["speedup"] == 2 and case["ours"] == "sparsekern"
    assert case["best_dense"] == "F.linear" and case["useful_flop_per_s"] == 16 * 1000


def test_who_is_wrong_is_shown_and_not_the_best(bench):
    case = measured("spmm", 16, 0.5, ours_s=2.0)
    assert case["speedups"] == {"sparsekern": 2.0, "scipy CSR": 0.5, "hasty": 40.0}
    assert case["best_peer"] == 0.5
    lines = bench("tables").competitors([case]).splitlines()
    assert "hasty" in lines[4] and "5e-01 **wrong**" in lines[4]
    assert "1e-07" in lines[3] and "wrong" not in lines[3]


def test_nothing_is_held_against_a_dense_call_that_is_wrong():
    ways = {"F.linear": {"kind": "dense", "median_s": 1.0, "error": 1.0, "is_right": False}}
    with pytest.raises(ValueError, match="no dense call is right"):
        measured("spmm", 16, 0.5, ours_s=2.0, ways=ways)


def test_tables_hold_geometric_means(bench):
    run, tables = bench("run"), bench("tables")
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in tables.summary(some_cases(), run.SUMMARY).splitlines()
    ]
    assert rows[0] == ["times dense", "threads", "50%", "75%"]
    assert rows[2:] == [
        ["forward, M = 256 and 1024", "1 (1 shape)", "2.00 (0.50)", ""],
        ["forward, M = 256", "2 (1 shape)", "2.00 (0.50)", ""],
        ["values' gradient, M = 256", "1 (1 shape)", "", "2.00 (0.50)"],
        ["forward, M = 1, weights cold", "1 (1 shape)", "4.00 (0.50)", ""],
        ["training step of the demo's GPT", "1", "", "2.00"],
    ]
    (scaling, dense) = tables.against_ourselves(some_cases()).splitlines()[2:]
    (*_, speeds) = tables.generation(some_cases()).splitlines()
    assert [part.strip() for part in speeds.split("|")[5:8]] == ["8.0", "16.0", "2.00"]
    assert "sparsekern, one thread" in scaling and "2.00" in scaling and "1.00" in dense


def test_results_are_a_page_a_plot_and_a_section(bench, monkeypatch, tmp_path):
    run = bench("run")
    peer = {"name": "absent", "layout": "its own", "missing": "no wheel"}
    cases = [*some_cases(), measured("spmm", 256, 0.75, ours_s=1.0)]
    found = a_run(cases, peers=[peer])
    run.write(tmp_path / "results", "a-cpu", found)
    page = (tmp_path / "results" / "a-cpu.md").read_text()
    assert "no wheel" in page and "Not run." not in page
    assert records.read(tmp_path / "results" / "a-cpu.csv") == found
    assert (tmp_path / "results" / "a-cpu.png").stat().st_size > 5_000

    docs = tmp_path / "benchmarks.md"
    monkeypatch.setattr(run.pages, "BENCHMARKS", docs)
    begin, end = run.pages.markers("bench")
    docs.write_text(f"before\n{begin}\nformer\n{end}\nafter\n")
    run.update_page("a-cpu", found)
    text = docs.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n| times dense")
    assert "former" not in text and text.endswith("-->\nafter\n")


def test_a_part_of_the_grid_is_a_page_that_says_so(bench, monkeypatch, tmp_path):
    run = bench("run")

    def run_pytest(arguments: list[str]) -> int:
        assert arguments[-2:] == ["-k", "trained"]
        (path,) = (a.split("=")[1] for a in arguments if a.startswith("--table="))
        found = a_run([measured("spmm", 256, 0.75, ours_s=2.0, mask="trained")])
        records.write(Path(path), found.about, found.records)
        return 0

    monkeypatch.setattr(run.pytest, "main", run_pytest)
    monkeypatch.setattr(run.pages, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CORES", [0, 1])
    monkeypatch.setattr(run, "update_page", None)
    arguments = ["--part", "trained", "--note", "Of a demo.", "-k", "trained"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    assert run.main() == 0

    written = sorted(tmp_path.iterdir())
    assert [path.suffix for path in written] == [".csv", ".md"]
    assert all("-2-cores-" in path.name and "-trained-" in path.name for path in written)
    page = written[1].read_text()
    assert "`bench/run.py --part trained -k trained`. Of a demo." in page
    assert "A CPU, 2 cores" in page and "pruned after training" in page
    assert "## By shape" in page and "## Memory" not in page and "Not run." not in page


def test_a_part_is_held_to_what_is_asked_of_it(bench, monkeypatch, tmp_path):
    run, targets = bench("run"), bench("targets")

    def run_pytest(arguments: list[str]) -> int:
        assert "--asked" in arguments
        (path,) = (a.split("=")[1] for a in arguments if a.startswith("--table="))
        cases = [measured("spmm", 256, 0.5, 2.0), measured("sddmm", 1024, 0.95, 8.0)]
        found = a_run(cases)
        records.write(Path(path), found.about, found.records)
        return 0

    monkeypatch.setattr(run.pytest, "main", run_pytest)
    monkeypatch.setattr(run.pages, "RESULTS", tmp_path)
    monkeypatch.setattr(run.pages, "PARTIAL", tmp_path / "table")
    monkeypatch.setattr(sys, "argv", ["run.py", "--part", targets.PART])
    (tmp_path / "table").mkdir()
    assert run.main() == 0
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert "2.00 (1.2) " in text and "0.50 (6.8) **missed**" in text and "F.linear" in text
    assert [path.suffix for path in sorted((tmp_path / "table").iterdir())] == [".csv", ".md"]


def test_what_is_asked_for(bench):
    targets = bench("targets")

    def asked(op: str, M: int, **fields) -> bool:
        return targets.is_asked(
            op, products.Workload(M, 768, 768, fields.pop("sparsity", 0.5), 1, **fields)
        )

    assert asked("spmm", 256) and asked("sddmm", 1024) and asked("spmm", 256, dtype=torch.bfloat16)
    assert not asked("spmm", 16) and not asked("spmm", 256, sparsity=0.98)
    assert not asked("spmm", 256, mask="banded") and not asked("sddmm", 256, dtype=torch.bfloat16)


def test_the_page_has_a_place_for_the_table(bench):
    pages = bench("pages")
    page = pages.BENCHMARKS.read_text()
    assert all(page.count(marker) == 1 for marker in pages.markers("bench"))


def test_cold_weights_are_many_copies_used_in_turn(monkeypatch):
    monkeypatch.setattr(products, "COLD_BYTES", 1000)
    W, dense = products.weight(products.Workload(1, 8, 8, 0.75, 1))
    for weight, size in ((dense, 256), (W, 36 + 2 * 64)):
        copies = products.cold_copies(weight)
        assert len(copies) == -(-1000 // size)
    assert len({each.values.data_ptr() for each in [W, *copies]}) == len(copies) + 1

    used = []
    rivals = (race.ours(lambda i=i: used.append(i)) for i in range(3))
    rival = race.rotate(rivals)
    for _ in range(4):
        rival.run()
    assert rival.copies == 3 and used == [0, 1, 2, 0]


def test_the_check_finds_the_one_copy_that_is_wrong():
    one, scale = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    copies = [race.ours(lambda y=y: torch.full((2,), y)) for y in (1.0, 1.5, 1.0)]
    assert race.check(race.rotate(copies), (one, scale))[0] == 0.5
    copies[2] = race.ours(lambda: torch.full((2,), torch.nan))
    assert not race.check(race.rotate(copies), (one, scale))[0] < 1e9


def test_pruned_rows_are_uneven():
    W, dense = products.weight(products.Workload(1, 64, 64, 0.75, 1, mask="pruned"))
    assert W.nnz == 64 * 64 // 4 and torch.equal(W.to_dense(), dense)
    counts = W.row_offsets.diff()
    assert counts.max() > 3 * counts.min()


def test_every_peer_computes_the_product(bench):
    pytest.importorskip("scipy")
    peers = bench("peers")
    W, dense = products.weight(products.Workload(1, 48, 32, 0.75, 1))
    for M in (1, 5):
        x = products.normal(M, 32)
        exact = race.exact(lambda x, W: x @ W.t(), x, dense)
        for rival in peers.race_entries(W, x, is_forward=True):
            assert race.check(rival, exact)[0] < 1e-6, rival.name


@pytest.mark.skipif(panel._C is None, reason="without the C++ library W is expanded")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_dense_matrix_appears_in_forward_and_backward(bench, threads):
    memory = bench("bench_memory")
    memory.check(memory.Layer(threads=threads))


def test_pytest_benchmark_reports_what_the_race_measured(tmp_path):
    for package in ("pytest_benchmark", "threadpoolctl"):
        pytest.importorskip(package)
    dump = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/bench_generate.py"]
    done = subprocess.run(
        [*command, "--quick", f"--benchmark-json={dump}"],
        cwd=BENCH.parent,
        # A worker of xdist has variables that switch benchmarks off.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    case = "test_generate[tiny-B2-75%-1T]"
    assert f"benchmark '{case}': 2 tests" in done.stdout
    entries = json.loads(dump.read_text())["benchmarks"]
    assert [(entry["group"], entry["name"]) for entry in entries] == [
        (case, "sparsekern"),
        (case, "dense"),
    ]
    assert len({entry["fullname"] for entry in entries}) == 2  # --benchmark-compare goes by it
    for entry in entries:
        assert median(entry["stats"]["data"]) == entry["extra_info"]["median_s"]
