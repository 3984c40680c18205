"""python -m sparsekern bench: what it measures, stores, and compares."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_bench_gpu import CallingClock

from sparsekern import SparseTensor
from sparsekern.bench import (
    calibrate,
    ceilings,
    measure,
    measure_gpu,
    noise,
    products,
    products_gpu,
    rates,
    records,
)
from sparsekern.bench.peers_gpu import torch_csr
from sparsekern.bench.products import Workload
from sparsekern.bench.race import ours, race
from sparsekern.bench.work_gpu import checked
from sparsekern.cli import main
from sparsekern.kernels import crossover
from sparsekern.kernels.cpu import panel
from sparsekern.kernels.cpu.machine import machine_name
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick

needs_library = pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")


@pytest.fixture
def small(monkeypatch):
    """Small sizes; the cores stay as they are."""
    monkeypatch.setattr(measure, "pin", torch.set_num_threads)
    monkeypatch.setattr(calibrate, "pin", torch.set_num_threads)
    monkeypatch.setattr(measure, "QUICK_SHAPES", ((48, 64),))
    monkeypatch.setattr(calibrate, "SHAPES", ((48, 64),))
    monkeypatch.setattr(products, "COLD_BYTES", 1e5)
    for name in ("READ_BYTES", "MEMORY_BYTES"):
        monkeypatch.setattr(ceilings, name, 2**22)


def test_the_command_measures_every_product(small, tmp_path, capsys):
    out = tmp_path / "new" / "bench.csv"
    assert main(["bench", "--quick", "--device=cpu", f"--out={out}", "--commit=abc"]) == 0
    printed = capsys.readouterr().out
    run = records.read(out)
    machine = run.about["machine"]
    (limits,) = machine["ceilings"].values()
    cases = [rates.derive(case, limits) for case in records.cases(run.records)]
    assert {case["op"] for case in cases} == set(products.PRODUCTS)
    assert {"cpu", "cores", "isa", "torch", "python", "sparsekern"} <= machine.keys()
    assert run.about["commit"] == {"id": "abc", "dirty": False} and "commit abc" in printed
    for case in cases:
        assert case["error"] < 2e-6 and case["speedup"] > 0 and case["kernel"]
        assert all(way["is_right"] for way in case["ways"].values())
        assert case["useful_flop"] == case["passes"] * 2 * case["M"] * case["nnz"]
        if panel._C:
            assert 0 < case["shares"]["roofline"] and (case["level"] == "memory") >= case["is_cold"]
    assert len([line for line in printed.splitlines() if line.startswith("| ")]) == len(cases) + 2
    assert ("No ceilings" in printed) == (panel._C is None)


def test_what_was_measured_before_an_error_is_kept_apart(small, tmp_path, monkeypatch, capsys):
    made = iter(measure.cpu_work(quick=True, threads=1)[:2])

    def fail():
        raise ArithmeticError("the third is wrong")

    monkeypatch.setattr(measure, "cpu_work", lambda quick, threads: [*made, fail])
    out = tmp_path / "bench.csv"
    assert main(["bench", "--quick", "--device=cpu", f"--out={out}"]) == 2
    assert "the third is wrong" in capsys.readouterr().err
    partial = records.read(out.with_suffix(".partial.csv"))
    assert len(records.cases(partial.records)) == 2 and not out.exists()


def test_a_table_has_its_suffix(capsys):
    assert main(["bench", "--quick", "--device=cpu", "--out=bench.json"]) == 2
    assert "out: expected a .csv file, got bench.json" in capsys.readouterr().err


@needs_library
def test_ceilings_are_in_the_order_of_the_levels(small):
    limits = ceilings.of_cpu(1)
    assert 1e8 < limits["clock_hz"] < 1e10 and limits["flop_per_s"] > 1e9
    assert list(limits["bytes_per_s"]) == ["l1", "l2", "l3", "memory"]
    assert all(1e8 < rate < 1e13 for rate in limits["bytes_per_s"].values())


def test_shares_of_the_ceilings():
    """4 values of 4 + 2 bytes and 1 * (2 + 4) activations of 4 bytes; 8 operations in a second."""
    limits = {
        "flop_per_s": 100.0,
        "bytes_per_s": {"l1": 96.0, "memory": 12.0},
        "bytes": {"l1": 24, "memory": 1000},
    }
    right = {"median_s": 1.0, "error": 0.0, "is_right": True}
    ways = {"mm": {"kind": "dense", **right}, "ours": {"kind": "ours", **right}}
    case = {"op": "spmm", "device": "cpu", "M": 1, "N": 2, "K": 4, "nnz": 4, "dtype": "float32"}
    warm = rates.derive(case | {"is_cold": False, "ways": ways}, limits)
    assert warm["level"] == "l1" and warm["moved_bytes"] == 48 and warm["density"] == 0.5
    assert warm["shares"] == {"flop": 0.08, "bytes": 0.5, "roofline": 0.5}
    cold = rates.derive(case | {"is_cold": True, "ways": ways}, limits)
    assert cold["level"] == "memory" and cold["shares"]["roofline"] == 4
    packed = {"mm": ways["mm"], "ours": ways["ours"] | {"bytes": 10}}
    assert rates.derive(case | {"is_cold": True, "ways": packed})["moved_bytes"] == 34
    assert rates.level_of(49, limits) == "memory" and rates.level_of(10**9, limits) == "memory"
    untouched = {"op": "memory", "ways": {"bound": {"bytes": 1}}}
    assert rates.derive(dict(untouched)) == untouched


@pytest.mark.parametrize("mask", products.MASKS)
def test_masks_have_their_density_and_their_shape(mask):
    W, dense = products.weight(Workload(1, 96, 64, 0.75, 1, mask=mask))
    counts = W.row_offsets.diff()
    assert W.density == pytest.approx(0.25, abs=0.02) and torch.equal(W.to_dense(), dense)
    if mask == "banded":
        assert counts.unique().tolist() == [16] and dense[0, 32] == 0 and dense[0, 0] != 0
    if mask == "uneven":
        assert counts.max() > 4 * counts.min() and counts.max() <= 64


@pytest.mark.parametrize("op", products.PRODUCTS)
def test_every_rival_computes_the_product(op):
    product = products.PRODUCTS[op](Workload(5, 48, 32, 0.5, 1))
    ways = product.race(most_rounds=1)["ways"]
    assert len(ways) > 1 and all(way["is_right"] for way in ways.values())


def test_nobody_is_timed_when_we_are_wrong():
    exact = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for wrong in (1.1, torch.nan):
        with pytest.raises(ArithmeticError, match="sparsekern: error .* against fp64"):
            race(ours(lambda y=wrong: torch.full((2,), y)), [], 1, exact, 1e-6)


# What dispatch reads


@needs_library
def test_dispatch_takes_what_was_calibrated_here(small, monkeypatch, tmp_path, capsys, fresh_table):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "sparsekern" / "crossover.json"
    path.parent.mkdir()
    path.write_text('{"sm_90": {"tokens": [1], "bfloat16": {"stream": {"dense": [0.5]}}}}')
    # As conftest would have it for good: no file of this machine's user.
    monkeypatch.setattr(crossover, "_calibrated", calibrated(path))
    ratio = lambda op, w: calibrate.Ratio(0.25 if w.sparsity < 0.85 else 4.0, 0.0)  # noqa: E731
    monkeypatch.setattr(calibrate, "_ratio", ratio)
    assert main(["bench", "--calibrate", "--quick", "--device=cpu"]) == 0
    assert f"Dispatch now uses this: {path}" in capsys.readouterr().out
    stored = json.loads(path.read_text())
    key = machine_name(panel.machine())
    assert stored.keys() == {"sm_90", key} and stored[key]["tokens"] == [16, 256]
    assert stored[key]["float32"].keys() == {"panel spmm", "panel spmm_t", "panel sddmm"}

    def name(nnz: int) -> str:
        return pick(Problem("spmm_t", "cpu", torch.float32, 100, 100, 100, nnz)).name

    assert (name(1300), name(1500)) == ("panel", "expand")  # sqrt(0.1 * 0.2) = 0.141
    assert crossover.density_limit("sm_90", torch.bfloat16, 7, "few_tokens", "dense") == 0.5


def calibrated(path: Path):
    """kernels.crossover's reader without its cache."""

    def read() -> dict:
        return json.loads(path.read_text())

    read.cache_clear = lambda: None
    return read


def quiet_or_not(op: str, w: Workload) -> calibrate.Ratio:
    """SDDMM alone can be measured; panel wins below a density of 0.15."""
    spread = 0.01 if op == "sddmm" else 0.9
    return calibrate.Ratio(0.25 if w.sparsity < 0.85 else 4.0, spread)


@needs_library
def test_noise_is_measured_again_and_never_stored(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out, path = tmp_path / "mine.json", tmp_path / "sparsekern" / "crossover.json"
    monkeypatch.setattr(crossover, "_calibrated", calibrated(path))
    calls = []

    def ratio(op: str, w: Workload) -> calibrate.Ratio:
        calls.append((op, w))
        return quiet_or_not(op, w)

    monkeypatch.setattr(calibrate, "_ratio", ratio)
    arguments = ["bench", "--calibrate", "--quick", "--device=cpu", f"--out={out}"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "spmm M = 16 torch.float32: noisy (spread 90%)" in printed
    assert "8 of 12 are missing: too noisy" in printed and "To undo it, delete" in printed
    (entry,) = json.loads(path.read_text()).values()
    for dtype in ("float32", "bfloat16"):
        assert entry[dtype]["panel spmm"] == {"expand": [None, None]}
        assert entry[dtype]["panel sddmm"] == {"expand": [0.141, 0.141]}
    assert json.loads(out.read_text()) == json.loads(path.read_text())
    once = [call for call in calls if call[0] == "spmm" and call[1].dtype == torch.float32]
    assert len(once) == 2 * (1 + noise.REPEATS)  # of two numbers of tokens, the first density
    # What is missing is as if nobody had calibrated.
    limit = crossover.density_limit
    key = machine_name(panel.machine())
    assert limit(key, torch.float32, 16, "panel spmm", "expand") is None
    assert limit(key, torch.float32, 16, "panel sddmm", "expand") == 0.141

    before = path.read_bytes()
    monkeypatch.setattr(calibrate, "_ratio", lambda op, w: calibrate.Ratio(4.0, 0.9))
    assert main(arguments) == 0
    assert "Nothing is stored." in capsys.readouterr().out and path.read_bytes() == before


def test_a_spread_is_of_the_quartiles():
    assert noise.spread([1.0, 1.0, 1.0, 1.0, 9.0]) == 0  # one disturbed round is none
    assert noise.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    found = iter([0.9, 0.5, 0.7, 0.1])
    assert noise.quietest(lambda: next(found), lambda x: x) == 0.5
    found = iter([0.9, 0.1, 0.0])
    assert noise.quietest(lambda: next(found), lambda x: x) == 0.1 and next(found) == 0.0


def test_a_noisy_product_is_flagged_and_kept_apart(small, tmp_path, monkeypatch, capsys):
    def work(quick: bool, threads: int):
        for spread in (0.01, 0.5):
            case = measure._on_cpu("spmm", Workload(4, 48, 64, 0.5, threads), True)
            case["ways"]["sparsekern"]["spread"] = spread
            yield lambda case=case: case

    monkeypatch.setattr(measure, "cpu_work", lambda *a: list(work(*a)))
    monkeypatch.setattr(noise, "of_case", lambda c: c["ways"]["sparsekern"]["spread"])
    out = tmp_path / "bench.csv"
    assert main(["bench", "--quick", "--device=cpu", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| spmm")]
    assert "50% noisy" in rows[1] and "noisy" not in rows[0]
    assert "1 of 2 are noisy" in printed
    assert [case["is_noisy"] for case in records.cases(records.read(out).records)] == [False, True]


def test_a_gpus_noisy_cell_gives_no_limit():
    from sparsekern.bench.crossover import limit

    def cell(sparsity: float, spread: float) -> dict:
        ways = {
            "few_tokens": {"kind": "ours", "median_s": 1.0, "is_right": True, "spread": 0.01},
            "F.linear": {"kind": "dense", "median_s": 2.0, "is_right": True, "spread": spread},
        }
        return {"sparsity": sparsity, "ways": ways, "best_dense": "F.linear", "dense_s": 2.0}

    assert limit([cell(0.5, 0.1), cell(0.9, 0.1)], "few_tokens", "dense") == 0.5
    assert limit([cell(0.5, 0.9), cell(0.9, 0.1)], "few_tokens", "dense") is None


def test_info_says_that_a_calibration_is_in_force(monkeypatch, capsys):
    assert main(["info"]) == 0
    assert re.search(r"crossovers +as shipped", capsys.readouterr().out)
    if panel._C:
        data = {machine_name(panel.machine()): {"measured": "A CPU, 2026-01-02"}}
        monkeypatch.setattr(crossover, "_calibrated", lambda: data)
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert f"A CPU, 2026-01-02: {crossover.calibrated_file()}" in out


# Comparing


def result(path: Path, scale: float, noisy: str = "", **seconds: float) -> Path:
    """A table whose models took so many seconds, dense `scale` seconds."""
    right = {"median_s": 9.0, "error": 0.0, "is_right": True}
    cases = [
        {
            **{"op": "generate", "model": model, "M": 1, "sparsity": 0.5, "threads": 1},
            "is_noisy": model == noisy,
            "ways": {
                "ours": {"kind": "ours", "min_s": each, **right},
                "F.linear": {"kind": "dense", "min_s": scale, **right},
                "hasty": {"kind": "dense", "min_s": 1e-9, **right, "is_right": False},
                "broken": {"kind": "ours", "failed": "no such thing", "is_right": False},
            },
        }
        for model, each in seconds.items()
    ]
    cases.append({"op": "memory", "ways": {"bound": {"bytes": 1}}})
    records.write(path, {"benchmark": "products"}, records.flat(cases))
    return path


def test_compare_fails_where_something_is_slower(tmp_path, capsys):
    old = result(tmp_path / "old.csv", 1.0, a=1.0, b=1.0, gone=1.0)
    new = result(tmp_path / "new.csv", 2.0, a=1.3, b=0.5, fresh=1.0)
    assert main(["bench", "compare", str(old), str(new)]) == 1
    out = capsys.readouterr().out
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in out.splitlines()
        if line.startswith("| ")
    ]
    assert out.endswith("Not in NEW, or wrong there: generate gone-M1-50%-1T ours.\n")
    assert [row[0] for row in rows[2:]] == [f"generate {x}-M1-50%-1T ours" for x in "ab"]
    assert rows[2][3:] == ["1.30", "2.00", "slower"] and rows[3][3:] == ["0.50", "2.00", ""]
    assert main(["bench", "compare", str(old), str(new), "--threshold=0.31"]) == 0
    assert main(["bench", "compare", str(old), str(old)]) == 0


def test_compare_tells_contexts_apart(tmp_path, capsys):
    """Generation of one model at several lengths: the last alone was compared."""
    files = []
    for name, times in (("old", (1.0, 1.0)), ("new", (3.0, 1.0))):
        run = records.read(result(tmp_path / f"{name}.csv", 1.0, a=1.0))
        longer = [
            record | {"context": context} | ({"min_s": s} if record["kind"] == "ours" else {})
            for context, s in zip((16, 512), times, strict=True)
            for record in run.records
            if "model" in record
        ]
        records.write(tmp_path / f"{name}.csv", run.about, longer)
        files.append(str(tmp_path / f"{name}.csv"))
    assert main(["bench", "compare", *files]) == 1
    assert "| generate a-M1-context 16-50%-1T ours " in capsys.readouterr().out


def test_compare_concludes_nothing_from_noise(tmp_path, capsys):
    old = result(tmp_path / "old.csv", 1.0, a=1.0, b=1.0)
    new = result(tmp_path / "new.csv", 1.0, noisy="b", a=1.0, b=3.0)
    assert main(["bench", "compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "0 slower by more than 10%. 1 noisy: nothing is concluded" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| generate b"))
    assert row.endswith(" noisy |")


def test_compare_mistakes(tmp_path, capsys):
    old = result(tmp_path / "old.csv", 1.0, a=1.0)
    other = result(tmp_path / "other.csv", 1.0, b=1.0)
    (tmp_path / "not.csv").write_text("[]")
    calls = [{"op": "call", "contender": "torch", "kind": "dense", "median_s": 1.0}]
    records.write(tmp_path / "calls.csv", {"benchmark": "calls"}, calls)
    for files, message in {
        (old, tmp_path / "calls.csv"): "compare: expected a table of products, training steps or",
        (old, other): "have no group in common",
        (old, tmp_path / "not.csv"): "not.csv is not a table of measurements",
        (old, tmp_path / "none.csv"): "compare: {} does not exist".format(tmp_path / "none.csv"),
        (old, old, "--threshold=nan"): "threshold: expected 0 or more, got nan",
    }.items():
        assert main(["bench", "compare", *map(str, files)]) == 2
        assert message in capsys.readouterr().err


# On a GPU, by a clock that only calls


@pytest.fixture
def gpu_cells(monkeypatch) -> list[dict]:
    if not torch.cuda.is_available():
        monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())
    generator = torch.Generator().manual_seed(0)
    grid = measure_gpu.Grid(((24, 16),), (1, 5), (0.5,), ("random",))
    ways = [products_gpu.dispatch(), torch_csr()]
    with torch.no_grad():
        forward = list(measure_gpu.cells(grid, ways, CallingClock(), generator))
        gradients = list(products_gpu.gradients(grid, CallingClock(), generator))
        steps = list(products_gpu.training_steps(grid, CallingClock(), generator))
    return [*forward, *gradients, *steps]


def test_a_gpus_products_are_cases_like_a_cpus(gpu_cells):
    made = [rates.derive(checked(cell)) for cell in gpu_cells]
    assert [rates.case_name(case) for case in made] == [
        f"{op} 24x16-M{M}-50%-GPU-bfloat16" + "-cold" * (op != "linear")
        for ops in (("spmm",), ("spmm_t", "sddmm"), ("linear",))
        for M in (1, 5)
        for op in ops
    ]
    for case in made:
        assert case["speedup"] == 1 and case["device"] == "cuda" and case["kernel"]
        assert all(way["is_right"] or "failed" in way for way in case["ways"].values())
        assert len(measure.row(case)) == len(measure.COLUMNS)
        assert case["useful_flop"] == case["passes"] * 2 * case["M"] * case["nnz"]
    ways = {case["op"]: case["ways"].keys() for case in made}
    assert ways["linear"] == {"sparsekern", "F.linear"}
    assert ways["spmm_t"] >= {"F.linear cublas", "mm(x, W[K, N]) cublaslt"}
    assert ways["sddmm"] >= {"mm(dy.t(), x) cublas", "mm(x.t(), dy) cublaslt", "torch CSR"}


def test_torchs_input_gradient_is_the_product():
    W, dy = SparseTensor.from_dense(torch.randn(24, 16).relu()), torch.randn(5, 24)
    peer = products_gpu.torch_input_gradient(W, dy)
    torch.testing.assert_close(peer.result(peer.calls[0]()), dy @ W.to_dense())


def test_a_peer_gets_no_gradient_that_takes_it_seconds(monkeypatch):
    monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())
    monkeypatch.setattr(products_gpu, "PEER_PRODUCTS", 24 * 16)
    grid = measure_gpu.Grid(((24, 16),), (1, 5), (0.5,), ("random",))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        cells = list(products_gpu.gradients(grid, CallingClock(), generator))
    assert [(c["M"], "torch CSR" in c["ways"]) for c in cells] == [
        (1, True),
        (1, True),
        (5, False),
        (5, False),
    ]


def test_a_gpus_product_that_is_wrong_is_an_error(gpu_cells):
    for change, message in (
        ({"is_right": False, "error": 0.5}, "error 5.0e-01 against fp64"),
        (
            {"is_right": False, "failed": "no such thing"},
            "spmm 24x16-M1-50%-GPU.*: no such thing",
        ),
    ):
        change["kind"] = "ours"
        cell = gpu_cells[0] | {"ways": {**gpu_cells[0]["ways"], products_gpu.NAME: change}}
        with pytest.raises(ArithmeticError, match=message):
            checked(cell)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    assert main(["bench", "--device=cuda"]) == 2
    assert "device: expected cpu, this torch sees no GPU, got cuda" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    out = tmp_path / "bench.csv"
    assert main(["bench", "--quick", "--device=cuda", f"--out={out}"]) == 0
    run = records.read(out)
    ops = {"spmm", "spmm_t", "sddmm", "linear", "train_step"}
    assert {record["op"] for record in run.records} == ops
    assert not any("failed" in r for r in records.select(run.records, op="train_step"))
    assert run.about["machine"]["under_load"]
