"""A GPT's step in the GPU's benchmark, without a GPU: on a clock that only calls."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_bench_gpu import CallingClock

from sparsekern import SparseTensor
from sparsekern.bench import (
    gpt_gpu,
    measure,
    measure_gpu,
    records,
    train_products_gpu,
    work_gpu,
)
from sparsekern.bench.rates import case_name, derive
from sparsekern.bench.work_gpu import checked
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.step import compute_gradients
from sparsekern.report import models
from sparsekern.report.load import load
from sparsekern.report.nearest import choose, this
from sparsekern.report.view import View
from sparsekern.two_way import is_two_way
from sparsekern.wafer import compare as wafer
from sparsekern.wafer.machine import machine

HUGE = GPTConfig(12, 12, 1536, 1024, 50304)


@pytest.fixture
def step(monkeypatch) -> gpt_gpu.Step:
    monkeypatch.setattr(gpt_gpu, "compiled_blocks", lambda model: model)
    return gpt_gpu.Step("tiny", GPTConfig(1, 2, 16, 8, 32), 2, (0.5, 0.75))


def gpt_cells(step: gpt_gpu.Step, **seconds: float) -> list[dict]:
    with torch.no_grad():
        clock = CallingClock(**seconds)
        return list(gpt_gpu.training_steps(step, clock, torch.device("cpu")))


def test_a_gpts_step_is_a_case_that_the_report_reads(step, tmp_path):
    pytest.importorskip("matplotlib")
    cells = gpt_cells(step, **{"dense, compiled": 0.5, "sparsekern": 0.25})
    made = [derive(checked(cell)) for cell in cells]
    assert [case_name(case) for case in made] == [
        f"train_step tiny-M2-{s}-GPU-bfloat16" for s in ("50%", "75%")
    ]
    for case in made:
        assert case["ours"] == "sparsekern" and case["best_dense"] == "dense, compiled"
        assert case["speedup"] == 2 and 0 < case["error"] < 1e-2 and case["M"] == 16
        names = {"sparsekern", "sparsekern, compiled", "dense", "dense, compiled"}
        assert case["ways"].keys() == names
        assert all(way["is_right"] for way in case["ways"].values())
        assert len(measure.row(case)) == len(measure.COLUMNS)
        assert case["useful_flop"] < case["dense_flop"]
    machine_info = {"gpu": "NVIDIA H200", "isa": "avx2", "torch": "2.11.0"}
    about = {"benchmark": "products", "date": "2026-01-02", "machine": machine_info}
    about["commit"] = {"id": "abc", "dirty": False}
    records.write(tmp_path / "result.csv", about, records.flat(made))
    results = load(tmp_path)
    section = models.training(View(results, choose(results, this())))
    assert section.rows == [["tiny, GPU", "32", "2.00", "2.00"]]
    (pair, _) = wafer.compare(machine("wse2"), {"result": results[0].records})
    assert pair.what == "train_step tiny, 16 tokens, GPU" and pair.measured == 2


def test_a_captured_step_and_two_way_masks(step):
    forms = gpt_gpu.EAGER, gpt_gpu.CAPTURED
    step = replace(step, sparsities=(0.75,), two_way=(0.75,), forms=forms)
    cells = gpt_cells(step, **{"dense, captured": 0.5, "sparsekern, captured": 0.25})
    assert [cell["mask"] for cell in cells] == ["random", "two-way"]
    for cell in map(checked, cells):
        names = {f"{who}{form}" for who in ("dense", "sparsekern") for form in forms}
        assert cell["ways"].keys() == names
        assert all(way["is_right"] for way in cell["ways"].values())
        assert derive(cell)["speedup"] == 2


def test_a_step_of_several_batches_has_the_gradient_of_one(step, monkeypatch):
    sizes = []

    def seen(model, x, y, dtype, micro_batch):
        sizes.append((len(x), micro_batch))
        return compute_gradients(model, x, y, dtype, micro_batch)

    monkeypatch.setattr(gpt_gpu, "compute_gradients", seen)
    step = replace(step, sparsities=(0.75,), forms=(gpt_gpu.EAGER,), accumulated=3)
    (cell,) = gpt_cells(step)
    assert set(sizes) == {(6, 2)} and (cell["batch"], cell["micro_batch"], cell["M"]) == (6, 2, 48)
    assert all(way["is_right"] for way in checked(cell)["ways"].values())


def test_two_way_masks_of_tiles():
    for n, k in ((48, 16), (16, 64), (8, 8)):
        mask = gpt_gpu.TwoWayMask(0.75).mask("W", torch.empty(n, k))
        assert mask.shape == (n, k) and mask.sum() == n * k // 4
        W = SparseTensor.from_dense(mask.float(), mask)
        assert is_two_way(W.row_offsets, W.col_indices, k)
    with pytest.raises(ValueError, match="W: expected N and K with a common multiple of 4"):
        gpt_gpu.TwoWayMask(0.75).mask("W", torch.empty(8, 6))


def test_a_gpts_step_with_a_wrong_gradient_is_an_error(step, monkeypatch):
    def skips_a_layer(model, *batch):
        compute_gradients(model, *batch)
        for name, parameter in model.named_parameters():
            if name.endswith("down.values"):
                parameter.grad.zero_()

    monkeypatch.setattr(gpt_gpu, "compute_gradients", skips_a_layer)
    with pytest.raises(ArithmeticError, match="tiny-M2-50%-GPU-bfloat16: error .* against fp64"):
        checked(gpt_cells(step)[0])


def test_a_gpts_step_that_does_not_compile_is_named(step, monkeypatch):
    class Broken(GPT):
        def forward(self, *args):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(gpt_gpu, "compiled_blocks", lambda model: Broken(model.config))
    case = derive(checked(gpt_cells(step)[0]))
    failed = {name: way["failed"] for name, way in case["ways"].items() if "failed" in way}
    reason = "RuntimeError: no compiler"
    assert failed == {"dense, compiled": reason, "sparsekern, compiled": reason}
    assert case["ours"] == "sparsekern" and case["best_dense"] == "dense"


def test_all_that_a_gpu_measures_is_made(step, monkeypatch, tmp_path):
    """With the names of CUDA in work_gpu.py standing for a CPU."""
    monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())
    grids = (
        measure_gpu.Grid(((24, 16),), tokens, (0.5,), ("random",)) for tokens in ((1, 5), (5,))
    )
    sizes = train_products_gpu.Sizes(((24, 16),), 5, ())
    work = work_gpu.Work(*grids, sizes, (step, replace(step, model="huge", config=HUGE)))
    fitting, left_out = work.within(10**9)
    assert left_out == {"huge": "its race takes 25 GB, the GPU has 1"} and fitting.steps == (step,)
    names = {"no_grad": torch.no_grad, "Generator": lambda device: torch.Generator()}
    names["bfloat16"] = torch.bfloat16
    names["device"] = lambda device: torch.device("cpu")
    names["cuda"] = SimpleNamespace(Stream=lambda: None, stream=lambda stream: nullcontext())
    monkeypatch.setattr(work_gpu, "torch", SimpleNamespace(**names))
    monkeypatch.setattr(work_gpu, "CudaClock", CallingClock)
    every = work_gpu.cases(fitting)
    assert len(every) == fitting.count and 30 < fitting.expected_s < 60
    made = [make() for make in every]
    ops = [case["op"] for case in made]
    three = [op for op in train_products_gpu.OPS for _ in sizes.masks]
    assert ops == ["spmm", "spmm", "spmm_t", "sddmm", "linear", *three, "train_step", "train_step"]
    assert all(any("kernel" in way for way in case["ways"].values()) for case in made)
    for case in map(derive, made):  # as the command shows and stores it
        assert case["speedup"] and len(measure.row(case | {"is_noisy": False}))
    with pytest.raises(StopIteration):
        every[-1]()
