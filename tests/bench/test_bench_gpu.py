"""The GPU's benchmark without a GPU: its race on a clock that only calls, its tables, its pages."""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsekern import SparseTensor
from sparsekern.bench import crossover, layouts_gpu, measure_gpu, peers_gpu, rates, records
from sparsekern.kernels import crossover as shipped
from sparsekern.kernels import derived
from sparsekern.kernels.cuda import cover
from sparsekern.kernels.cuda.gather import GatherLayout
from sparsekern.kernels.cuda.packs import pack_of

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/, which is a folder of scripts and not a package."""
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture(autouse=True)
def one_blas(monkeypatch):
    """torch without CUDA has no cuBLASLt to prefer: both names are then the CPU's product."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())


class CallingClock:
    """Replays are plain calls, and every call took as long as `seconds` says of its name."""

    def __init__(self, once_s: float = 1e-6, **seconds: float):
        self.once_s, self.seconds = once_s, seconds

    def once(self, call):
        return self.once_s

    def capture(self, calls):
        y = calls[-1]()

        def replay():
            for call in calls:
                new = call()
                for mine, other in zip(y, new, strict=True) if isinstance(y, list) else [(y, new)]:
                    mine.copy_(other)

        return replay, y

    def race(self, runners, rounds):
        for runner in runners:
            runner.replay()
        taken = [self.seconds.get(r.contender.name, 1.0) * r.launches for r in runners]
        return [[t * factor for factor in (2.0, 1.0, 0.5)] for t in taken]


def dense_way(name: str, multiply=F.linear, **options):
    """Multiplies by the dense W: right by construction."""
    return measure_gpu.Way(
        name,
        "ours",
        lambda W: W.to_dense(),
        lambda W: W.clone(),
        multiply,
        lambda W: W.nbytes // 2,
        **options,
    )


def small_grid(**options):
    fields = {"shapes": ((24, 16),), "tokens": (1, 5), "sparsities": (0.5,), "masks": ("random",)}
    return measure_gpu.Grid(**fields | options)


def run(grid, ways, clock=None) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    found = measure_gpu.cells(grid, ways, clock or CallingClock(), generator)
    return [rates.derive(cell) for cell in found]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_dense_call_is_right_for_both_masks(dtype):
    grid = small_grid(masks=("random", "pruned"), sparsities=(0.0, 0.5), dtype=dtype)
    cells = run(grid, [])
    assert [(c["mask"], c["sparsity"], c["M"]) for c in cells[::3]] == [
        ("random", 0.0, 1),
        ("random", 0.5, 5),
        ("pruned", 0.5, 1),
    ]
    for cell in cells:
        assert all(way["is_right"] and way["kind"] == "dense" for way in cell["ways"].values())
        assert ("mv cublas" in cell["ways"]) == (cell["M"] == 1)
    assert len(cells[0]["ways"]) == 7 and cells[0]["nnz"] == 24 * 16


def test_ratios_are_against_the_fastest_dense_call_that_is_right():
    clock = CallingClock(few_tokens=0.5, **{"F.linear cublaslt": 0.9})
    (_, cell) = run(small_grid(), [dense_way("few_tokens")], clock)
    assert cell["best_dense"] == "F.linear cublaslt" and cell["speedups"] == {"few_tokens": 1.8}
    way = cell["ways"]["few_tokens"]
    assert (way["median_s"], way["min_s"]) == (0.5, 0.25)
    cell["ways"]["F.linear cublaslt"]["is_right"] = False
    assert rates.derive(cell)["speedups"] == {"few_tokens": 2.0}


def test_slow_dense_calls_are_timed_for_one_mask_only():
    grid = small_grid(sparsities=(0.5, 0.75), tokens=(5,))
    slow = {f"{name} cublas": 2.0 for name in ("F.linear", "mm(W, x.t())")}
    first, second = run(grid, [], CallingClock(**slow))
    assert slow.keys() <= first["ways"].keys() and not slow.keys() & second["ways"].keys()
    assert len(second["ways"]) == 4


def test_who_is_wrong_or_fails_is_marked_and_the_others_go_on(bench):
    tables_gpu = bench("tables_gpu")

    def refuse(x, W):
        raise NotImplementedError("no such\nthing")

    ways = [
        dense_way("few_tokens", lambda x, W: 1.01 * F.linear(x, W)),
        dense_way("triton", refuse),
        dense_way("nan", lambda x, W: F.linear(x, W) * torch.nan),
        dense_way("right"),
    ]
    (_, cell) = run(small_grid(), ways)
    assert [cell["ways"][way.name]["is_right"] for way in ways] == [False, False, False, True]
    assert cell["ways"]["triton"]["failed"] == "NotImplementedError: no such"
    assert len(tables_gpu.failures([cell])) == 3
    lines = {
        line.split("|")[2].strip(): line for line in tables_gpu.competitors([cell]).split("\n")
    }
    assert "**wrong**" in lines["few_tokens"] and "1e-02" in lines["few_tokens"]
    assert "failed" in lines["triton"] and "nan" in lines["nan"] and "wrong" not in lines["right"]


def test_a_dense_call_that_fails_or_is_wrong_is_not_the_best(monkeypatch):
    contenders = measure_gpu.dense_contenders

    def some_bad(x, copies, turned):
        def fail():
            raise RuntimeError("not supported")

        broken = measure_gpu.Contender("broken", "dense", [fail])
        hasty = measure_gpu.Contender("hasty", "dense", [lambda: torch.zeros_like(x @ turned[0])])
        return [broken, hasty, *contenders(x, copies, turned)]

    monkeypatch.setattr(measure_gpu, "dense_contenders", some_bad)
    grid = small_grid(sparsities=(0.5, 0.75), tokens=(5,))
    first, second = run(grid, [], CallingClock(hasty=0.01))
    assert first["ways"]["broken"]["failed"] == "RuntimeError: not supported"
    assert not first["ways"]["hasty"]["is_right"] and first["best_dense"] == "F.linear cublas"
    assert second["ways"].keys() == first["ways"].keys() - {"broken", "hasty"}


def test_a_replay_that_writes_nothing_is_wrong():

    class LazyClock(CallingClock):
        def capture(self, calls):
            return (lambda: None), calls[-1]()

    (_, cell) = run(small_grid(), [], CallingClock())
    assert all(way["is_right"] for way in cell["ways"].values())
    with pytest.raises(ValueError, match="no dense call is right"):
        run(small_grid(), [], LazyClock())


def test_copies_are_cold_and_used_in_turn(monkeypatch):
    grid = small_grid(shapes=((6144, 2048),), sparsities=(0.5, 0.95))
    for N, K in measure_gpu.SHAPES:
        launches = measure_gpu.launches_of(N, K, grid)
        assert 40 <= launches <= 160
        for density in (0.05, 0.5, 1):
            nbytes = 2 * N * K * density
            copies = measure_gpu.copies_of(nbytes, launches)
            assert 2 <= copies <= launches and copies * nbytes > 200e6
    used = []
    calls = [lambda i=i: used.append(i) or torch.ones(1, 1) for i in range(3)]
    contender = measure_gpu.Contender("ours", "ours", calls)
    exact = torch.ones(1, 1, dtype=torch.float64)
    runner = measure_gpu.Runner(contender, 4, exact, CallingClock())
    used.clear()
    runner.replay()
    assert used == [0, 1, 2, 0] and runner.error == 0
    # A call of 8 ms: two of them are a replay too many, so the least number remains.
    assert measure_gpu.Runner(contender, 40, exact, CallingClock(once_s=8e-3)).launches == 3
    loop = replace(contender, is_graphed=False)
    assert measure_gpu.Runner(loop, 100, exact, CallingClock()).launches == 60


def test_the_check_finds_the_one_copy_that_is_wrong():
    exact = torch.ones(1, 2, dtype=torch.float64)
    for bad, is_found in ((1.5, 0.5), (torch.nan, None)):
        calls = [lambda y=y: torch.full((1, 2), y) for y in (1.0, bad, 1.0)]
        runner = measure_gpu.Runner(
            measure_gpu.Contender("ours", "ours", calls), 3, exact, CallingClock()
        )
        assert runner.error == is_found or (is_found is None and runner.error != runner.error)


def test_pruned_masks_are_uneven_in_rows_and_columns():
    weight = measure_gpu.weight
    generator = torch.Generator().manual_seed(0)
    spread = {}
    for mask in ("random", "pruned"):
        W, kept = weight(512, 512, 0.7, mask, torch.bfloat16, generator)
        assert abs(kept.float().mean() - 0.3) < 0.02 and not W[~kept].any()
        spread[mask] = [kept.sum(dim).float().std().item() for dim in (0, 1)]
    columns, rows = (p / r for p, r in zip(spread["pruned"], spread["random"], strict=True))
    assert columns > 4 and rows > 2


def test_ways_that_cannot_run_here_say_why():
    ways = {way.name: way for way in [*peers_gpu.decode_ways(), *peers_gpu.crossover_ways()]}
    assert ways.keys() >= {"few_tokens", "triton", "expand", "torch CSR", "CuPy CSR"}
    missing = {name: way.missing for name, way in ways.items() if way.missing}
    assert all(missing.values())
    assert peers_gpu.row("no such row").missing == "the kernel table has no row no such row"
    assert not ways["few_tokens"].where(65, 0.5, "random") or "few_tokens" in missing


def test_rows_of_the_table_and_torch_csr_compute_the_product():
    W, x = torch.randn(48, 16).relu(), torch.randn(5, 16)
    for way in (peers_gpu.row("dense"), peers_gpu.torch_csr(), peers_gpu.torch_bsr()):
        layout = way.lay_out(SparseTensor.from_dense(W))
        copy = way.clone(layout)
        assert 0 < way.nbytes(copy) == way.nbytes(layout) and copy is not layout
        for tokens in (x, x[:1]):
            y = way.result(way.multiply(way.prepare(tokens), copy))
            torch.testing.assert_close(y, tokens @ W.t())


def test_copies_of_a_weight_are_laid_out_once():
    W, made = SparseTensor.from_dense(torch.randn(48, 64).relu().bfloat16()), []

    def multiply(x, W):
        def make_layout(*indices):
            made.append(1)
            return GatherLayout(*indices, *W.shape)

        pattern = W.row_offsets, W.col_indices
        pack = pack_of("few_tokens", 1, make_layout, *pattern, W.values, *W.shape)
        used.append(pack)
        return x

    way = peers_gpu.in_csr("few_tokens", multiply)
    first = way.lay_out(W)
    twins = [first, way.clone(first), way.clone(first)]
    before = derived._store.keys() | set()
    for _ in range(2):
        used = []
        for each in twins:
            way.multiply(None, each)
        assert made == [1]
        packed = [pack.packed for pack in used]
        assert len({id(pack) for pack in used}) == 3
        assert len({p.values.data_ptr() for p in packed}) == 3
        assert all(torch.equal(p.values, packed[0].values) for p in packed)
    # A pack still follows its own values, and goes with its pattern.
    twins[1].W.values.mul_(2)
    way.multiply(None, twins[1])
    assert torch.equal(used[-1].packed.values, 2 * packed[0].values) and made == [1]
    assert torch.equal(packed[2].values, packed[0].values)
    del first, twins, each
    assert not derived._store.keys() - before


def test_a_layout_that_suits_two_numbers_of_tokens_is_made_once(monkeypatch):
    made = []
    monkeypatch.setattr(peers_gpu, "pack", lambda W, tokens: made.append(tokens) or tokens)
    choose = {1: "gather", 16: "cover", 32: "cover", 64: "pairs"}
    monkeypatch.setattr(peers_gpu, "choose_layout", lambda tokens, density: choose[tokens])
    W = SparseTensor.from_dense(torch.ones(10, 100))
    assert [way.lay_out(W) for way in peers_gpu.every_few_tokens()] == [1, 16, 16, 64]
    assert made == [1, 16, 64]


def test_a_way_with_another_weight_is_held_against_its_own_product():
    way = dense_way("2:4")
    way = replace(
        way,
        lay_out=lambda W: peers_gpu.largest_two_of_four(W.to_dense()),
        dense_of=lambda W: W,
        kind="other",
    )
    (cell, _) = run(small_grid(sparsities=(0.0,)), [way])
    assert cell["ways"]["2:4"]["is_right"]
    (cell, _) = run(small_grid(sparsities=(0.0,)), [replace(way, dense_of=None)])
    assert not cell["ways"]["2:4"]["is_right"]
    kept = peers_gpu.largest_two_of_four(torch.tensor([[1.0, -4, 3, 2, 0, 0, 5, -6]]))
    assert kept.tolist() == [[0, -4, 3, 0, 0, 0, 5, -6]]


def some_cells() -> list[dict]:
    """Dense takes 1 s; ours 1 / tokens, and twice as long on a pruned W or with Triton."""

    def cell(M: int, mask: str, sparsity: float, K: int) -> dict:
        ours_s = (1 if mask == "random" else 2) / M
        right = {"is_right": True, "error": 1e-3, "bytes": 1000}
        ways = {
            "F.linear cublas": {"kind": "dense", "median_s": 1.0, **right},
            "few_tokens": {"kind": "ours", "median_s": ours_s, **right},
        }
        if M == 16:
            ways["triton"] = {"kind": "ours", "median_s": 2 * ours_s, **right}
        sizes = {"M": M, "N": 8, "K": K, "nnz": 4 * K, "mask": mask, "sparsity": sparsity}
        fields = {"dtype": "bfloat16", "threads": 0, "is_cold": True, "ways": ways}
        return rates.derive({"op": "spmm", "device": "cuda", **sizes, **fields})

    return [
        cell(M, mask, sparsity, K)
        for mask in ("random", "pruned")
        for K in (8, 16)
        for sparsity in (0.5, 0.9)
        for M in (1, 8, 16)
    ]


def a_run(cells: list[dict], **about) -> records.Run:
    machine = {"gpu": "NVIDIA H200", "capability": "sm_90", "multiprocessors": 132}
    machine |= {"under_load": {"clocks.sm": "1980 MHz"}, "torch": "2.11.0", "cuda": "13.0"}
    machine["ceilings"] = {"cuda": {"bytes_per_s": {"memory": 2000.0}}}
    machine["missing"] = {"CuPy CSR": "no module named cupy"}
    head = {"benchmark": "decode", "date": "2026-01-02", "is_whole": True, "machine": machine}
    head["commit"] = {"id": "abc", "dirty": False}
    return records.Run(head | about, records.flat(cells))


def write(path: Path, cells: list[dict], **about) -> str:
    run = a_run(cells, **about)
    records.write(path, run.about, run.records)
    return str(path)


def rows_of(text: str) -> list[list[str]]:
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines()]
    return [lines[0], *lines[2:]]


def test_tables_hold_geometric_means(bench):
    tables_gpu, cells = bench("tables_gpu"), some_cells()
    assert rows_of(tables_gpu.summary(cells)) == [
        ["times dense", "50%", "90%"],
        ["1 token (2 shapes)", "1.00", "1.00"],
        ["8 and 16 tokens (2 shapes)", "11.31", "11.31"],
    ]
    assert rows_of(tables_gpu.triton(cells))[1:] == [["16", *["0.50 [0.50-0.50]"] * 2]]
    assert [row[1] for row in rows_of(tables_gpu.pruned(cells))[1:]] == ["0.50 [0.50-0.50]"] * 3
    assert rows_of(tables_gpu.bytes_read(cells, 2000.0))[1][1] == "0.00 (50%; 7.812)"
    assert rows_of(tables_gpu.by_shape(cells))[1][:4] == [
        "1",
        "8x8",
        "F.linear cublas",
        "1000000.0",
    ]


def test_results_are_a_page_a_plot_and_a_section(bench, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    run_gpu, cells = bench("run_gpu"), some_cells()
    monkeypatch.setattr(run_gpu.pages, "RESULTS", tmp_path / "results")
    docs = tmp_path / "benchmarks.md"
    monkeypatch.setattr(run_gpu.pages, "BENCHMARKS", docs)
    begin, end = run_gpu.pages.markers("bench-gpu")
    docs.write_text(f"before\n{begin}\nformer\n{end}\nafter\n")
    path = tmp_path / "decode.csv"

    assert run_gpu.main(["publish", write(path, cells)]) == 0
    name = "nvidia-h200-decode-bfloat16-2026-01-02"
    page = (tmp_path / "results" / f"{name}.md").read_text()
    assert (
        "no module named cupy" in page and "Not run." not in page and "clocks sm 1980 MHz" in page
    )
    assert (tmp_path / "results" / f"{name}.png").stat().st_size > 5_000
    text = docs.read_text()
    assert text.startswith(f"before\n{begin}\n| times dense") and text.endswith(f"{end}\nafter\n")
    assert "former" not in text and f"[bench/results/{name}.md]" in text

    with pytest.raises(SystemExit, match="some cells were not run"):
        run_gpu.main(["publish", write(path, cells, is_whole=False)])
    cells[0]["ways"]["few_tokens"]["is_right"] = False
    with pytest.raises(SystemExit, match="failed or was wrong"):
        run_gpu.main(["publish", write(path, cells)])


def test_parts_share_the_shapes_out(bench):
    run_gpu = bench("run_gpu")
    for verb, sizes in (("decode", [3, 4]), ("crossover", [1, 2])):
        grid = run_gpu.grid_of(verb, torch.bfloat16, quick=False)
        parts = [run_gpu.part_of(grid, (place, 2)).shapes for place in (1, 2)]
        assert sorted(parts[0] + parts[1]) == sorted(grid.shapes)
        assert [len(part) for part in parts] == sizes
    loads = [
        sum(n * k for n, k in run_gpu.part_of(measure_gpu.Grid(), (i, 2)).shapes) for i in (1, 2)
    ]
    assert max(loads) < 1.05 * min(loads)
    for text in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}"):
            run_gpu.parse_part(text)


def test_parts_are_published_together(bench, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    run_gpu, whole = bench("run_gpu"), a_run(some_cells())
    monkeypatch.setattr(run_gpu.pages, "RESULTS", tmp_path)
    docs = tmp_path / "benchmarks.md"
    monkeypatch.setattr(run_gpu.pages, "BENCHMARKS", docs)
    docs.write_text("\n".join(run_gpu.pages.markers("bench-gpu")))
    grid = measure_gpu.Grid(shapes=((8, 8), (8, 16)))
    monkeypatch.setattr(run_gpu, "grid_of", lambda *_, **__: grid)

    def written(place: int, **fields) -> str:
        cells = [c for c in some_cells() if c["K"] == 8 * place]
        return write(tmp_path / f"part{place}.csv", cells, **{"part": (place, 2)} | fields)

    first, second = written(1), written(2)
    assert run_gpu.main(["publish", second, first]) == 0
    published = records.read(tmp_path / f"{run_gpu.name_of(whole)}.csv")
    assert records.cases(published.records) == records.cases(whole.records)
    assert published.about["parts"] == 2 and "part" not in published.about
    assert "each W on one of 2 such GPUs" in docs.read_text()

    for fields, message in (
        ({"part": (1, 2)}, "expected all parts of a grid"),
        ({"commit": {"id": "def", "dirty": False}}, "expected parts of one measurement"),
        ({"is_whole": False}, "some cells were not run"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_gpu.main(["publish", first, written(2, **fields)])
    with pytest.raises(SystemExit, match="some cells were not run"):
        run_gpu.main(["publish", first])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(bench):
    with pytest.raises(SystemExit, match="finds no NVIDIA GPU"):
        bench("run_gpu").main(["decode"])


def test_a_crossing_lies_between_two_densities():
    crossing = crossover.crossing
    assert crossing({0.1: 4.0, 0.4: 0.25}) == 0.2
    assert crossing({0.1: 0.9, 0.4: 0.5}) == 0.0
    assert crossing({0.1: 0.9, 0.4: 2.0}) == 0.4  # one disturbed point does not decide
    assert crossing({0.1: 4.0, 1.0: 1.5}) == 1.0
    assert crossing({0.1: 4.0, 0.2: 2.0, 0.4: 0.5, 1.0: 2.0}) == pytest.approx(0.283)


def test_the_crossover_is_data_that_dispatch_reads(bench, monkeypatch, tmp_path):
    run_gpu = bench("run_gpu")
    monkeypatch.setattr(run_gpu, "CROSSOVER", tmp_path / "crossover.json")
    run_gpu.CROSSOVER.write_text('{"sm_80": {}, "sm_90": {"float16": {}}}')
    run_gpu.publish(a_run(some_cells(), benchmark="crossover"))
    data = json.loads(run_gpu.CROSSOVER.read_text())
    assert data.keys() == {"sm_80", "sm_90"} and "float16" in data["sm_90"]
    entry = data["sm_90"]
    assert entry["tokens"] == [1, 8, 16] and entry["measured"].startswith("NVIDIA H200")
    assert entry["bfloat16"]["triton"] == {"dense": [None, None, 0.5]}

    monkeypatch.setattr(shipped, "_measured", lambda: data)

    def limit(M, kernel="few_tokens", other="dense", dtype=torch.bfloat16, capability="sm_90"):
        return shipped.density_limit(capability, dtype, M, kernel, other)

    entry["bfloat16"]["few_tokens"]["dense"] = [0.7, 0.6, 0.5]
    assert [limit(M) for M in (0, 1, 2, 8, 16, 17)] == [0.7, 0.7, 0.6, 0.6, 0.5, 0.5]
    assert limit(1, kernel="triton") is None and limit(16, kernel="triton") == 0.5
    assert limit(1, other="expand") is None and limit(1, dtype=torch.float32) is None
    assert limit(1, capability="sm_75") is None


def test_the_shipped_crossover_is_sound():
    for entry in shipped._measured().values():
        for dtype in entry.keys() - {"measured", "tokens"}:
            for limits in (d for others in entry[dtype].values() for d in others.values()):
                assert len(limits) == len(entry["tokens"])
                assert all(d is None or 0 <= d <= 1 for d in limits)


@pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
def test_layouts_are_data_that_pack_reads(bench, monkeypatch, tmp_path):
    """Shares of the best dense time, by layout, shape, density and tokens."""
    run_gpu, cells = bench("run_gpu"), some_cells()
    monkeypatch.setattr(run_gpu.pages, "RESULTS", tmp_path)
    monkeypatch.setattr(run_gpu.times, "FILE", tmp_path / "packed_times.json")
    right = {"kind": "dense", "is_right": True, "error": 1e-3, "bytes": 1000}
    for cell in cells:
        if cell["M"] > 1:
            cell["ways"][layouts_gpu.KEPT] = {"median_s": 1.25, **right}
    run_gpu.publish(a_run(cells, benchmark="layouts"))
    times = run_gpu.times
    times.measured.cache_clear()
    times.share.cache_clear()
    try:
        data = times.measured()
        assert data.machine.startswith("NVIDIA H200, torch") and data.tokens == [1, 8, 16]
        (N, K), density = data.shapes[0], data.densities[0]
        assert times.share("gather", 1, N, K, density) == 1.0
        assert times.share("cover", 7, N, K, density) == 0.125
        assert [times.share("dense", M, N, K, density) for M in (1, 8, 99)] == [1.15, 1.25, 1.25]
        assert times.share("pairs", 1, N, K, density) is None
    finally:
        monkeypatch.undo()
        times.measured.cache_clear()
        times.share.cache_clear()
    assert (tmp_path / f"{run_gpu.name_of(a_run(cells, benchmark='layouts'))}.md").exists()


def test_every_layout_is_measured():
    assert [way.name for way in layouts_gpu.ways()] == ["gather", "cover", "pairs"]
    W = SparseTensor.from_dense(torch.ones(4, 8).bfloat16())
    assert layouts_gpu.ways()[-1].lay_out(W).name == "pairs"
