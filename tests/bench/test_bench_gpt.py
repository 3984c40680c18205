"""A GPT's step in the GPU's benchmark, without a GPU: on a clock that only calls."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_bench_gpu import CallingClock

from sparsekern.bench import gpt_gpu, measure, measure_gpu, work_gpu
from sparsekern.bench.race import derive
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.step import compute_gradients
from sparsekern.report import sections
from sparsekern.report.load import load
from sparsekern.wafer import compare as wafer
from sparsekern.wafer.machine import machine


@pytest.fixture
def step(monkeypatch) -> gpt_gpu.Step:
    monkeypatch.setattr(gpt_gpu, "compiled_blocks", lambda model: model)
    return gpt_gpu.Step("tiny", GPTConfig(1, 2, 16, 8, 32), 2, (0.5, 0.75))


def gpt_cells(step: gpt_gpu.Step, **seconds: float) -> list[dict]:
    with torch.no_grad():
        clock = CallingClock(**seconds)
        return list(gpt_gpu.training_steps(step, clock, torch.device("cpu")))


def test_a_gpts_step_is_a_benchmark_that_the_report_reads(step, tmp_path):
    pytest.importorskip("matplotlib")
    cells = gpt_cells(step, **{"dense, compiled": 0.5, "sparsekern": 0.25})
    made = [gpt_gpu.benchmark(cell) for cell in cells]
    assert [b["group"] for b in made] == [
        f"train_step tiny-1x16-{s}-bfloat16-cuda" for s in ("50%", "75%")
    ]
    for benchmark in made:
        derive(benchmark)
        info = benchmark["extra_info"]
        assert info["way"] == "sparsekern" and info["best_dense"] == "dense, compiled"
        assert info["speedup"] == 2 and 0 < info["error"] < 1e-2 and info["M"] == 16
        assert set(info["rivals"]) == {"dense", "dense, compiled", "sparsekern, compiled"}
        assert all(rival["is_right"] for rival in info["rivals"].values())
        assert len(measure.row(benchmark)) == len(measure.COLUMNS)
        assert info["useful_flop"] < info["dense_flop"]
    path = tmp_path / "result.json"
    about = {"gpu": "NVIDIA H200", "cpu": "", "cores": 2, "isa": "avx2", "torch": "2.11.0"}
    commit = {"id": "abc", "dirty": False}
    fields = {"machine_info": about, "commit_info": commit, "datetime": "2026-01-02T00:00:00"}
    path.write_text(json.dumps(fields | {"benchmarks": made}))
    (part,) = sections.training(load(tmp_path))
    assert [row[:2] for row in part.rows] == [
        ["tiny 50% zeros", "GPU"],
        ["tiny 75% zeros", "GPU"],
    ]
    (pair, _) = wafer.compare(machine("wse2"), [path])
    assert pair.what == "train_step tiny, 16 tokens, GPU" and pair.measured == 2


def test_a_gpts_step_with_a_wrong_gradient_is_an_error(step, monkeypatch):
    def skips_a_layer(model, x, y, dtype):
        compute_gradients(model, x, y, dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("down.values"):
                parameter.grad.zero_()

    monkeypatch.setattr(gpt_gpu, "compute_gradients", skips_a_layer)
    with pytest.raises(ArithmeticError, match="tiny-1x16-50%: error .* against fp64"):
        gpt_gpu.benchmark(gpt_cells(step)[0])


def test_a_gpts_step_that_does_not_compile_is_named(step, monkeypatch):
    class Broken(GPT):
        def forward(self, *args):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(gpt_gpu, "compiled_blocks", lambda model: Broken(model.config))
    info = gpt_gpu.benchmark(gpt_cells(step)[0])["extra_info"]
    reason = "RuntimeError: no compiler"
    assert info["failed"] == {"dense, compiled": reason, "sparsekern, compiled": reason}
    assert info["way"] == "sparsekern" and set(info["rivals"]) == {"dense"}


def test_all_that_a_gpu_measures_is_made(step, monkeypatch, tmp_path):
    """With the names of CUDA in work_gpu.py standing for a CPU."""
    monkeypatch.setattr(measure_gpu, "blas", lambda library: nullcontext())
    monkeypatch.setattr(gpt_gpu, "QUICK", step)
    for name, tokens in (("QUICK", (1, 5)), ("QUICK_STEP", (5,))):
        grid = measure_gpu.Grid(((24, 16),), tokens, (0.5,), ("random",))
        monkeypatch.setattr(work_gpu, name, grid)
    names = {"no_grad": torch.no_grad, "Generator": lambda device: torch.Generator()}
    names["device"] = lambda device: torch.device("cpu")
    names["cuda"] = SimpleNamespace(Stream=lambda: None, stream=lambda stream: nullcontext())
    monkeypatch.setattr(work_gpu, "torch", SimpleNamespace(**names))
    monkeypatch.setattr(work_gpu, "CudaClock", CallingClock)
    work = work_gpu.work(quick=True)
    made = [make() for make in work]
    ops = [benchmark["extra_info"]["op"] for benchmark in made]
    assert ops == ["spmm", "spmm", "spmm_t", "sddmm", "linear", "train_step", "train_step"]
    with pytest.raises(StopIteration):
        work[-1]()
