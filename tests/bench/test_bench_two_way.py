"""`run_gpu.py two-way` without a GPU: its ways through cuSPARSELt's stand-in, and its page."""

import sys
from pathlib import Path

import torch
from test_bench_gpu import CallingClock, a_run, bench, one_blas, rows_of  # noqa: F401

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda"))
from emulated_cusparselt import (  # noqa: E402, F401
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)

from sparsekern.bench import measure_gpu, rates, two_way_gpu  # noqa: E402
from sparsekern.kernels.cuda import compressed  # noqa: E402

GRID = measure_gpu.Grid(shapes=((64, 96),), tokens=(16, 32), sparsities=(0.75,), masks=("two-way",))


def test_all_ways_are_right_and_on_the_page(stand_in, bench, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    monkeypatch.setattr(measure_gpu, "COLD_BYTES", 1e4)
    monkeypatch.setattr(measure_gpu, "LAUNCHES", (2, 2))
    clock = CallingClock(**{"two-way": 0.5, "two-way E4M3": 0.25})
    generator = torch.Generator().manual_seed(0)
    cells = [
        rates.derive(cell) for cell in measure_gpu.cells(GRID, two_way_gpu.ways(), clock, generator)
    ]
    for cell in cells:
        assert {
            name: way.get("failed") for name, way in cell["ways"].items() if "failed" in way
        } == {}
        assert all(way["is_right"] for way in cell["ways"].values())
        assert cell["speedups"]["two-way"] == 2 and cell["speedups"]["two-way E4M3"] == 4
        assert 0 <= cell["ways"]["two-way"]["bytes"] - 9 * 64 * 96 / 8 < 1024
        assert 0 <= cell["ways"]["two-way E4M3"]["bytes"] - 5 * 64 * 96 / 8 < 1024
        assert 0.01 < cell["ways"]["two-way E4M3"]["rounding"] < 0.05
    text = bench("two_way").page("name", a_run(cells, benchmark="two-way"))
    assert "| two-way E4M3 (the cast of x in the time)" in text and "wrong" in text
    run_gpu = bench("run_gpu")
    assert run_gpu.grid_of("two-way", torch.bfloat16, quick=True).masks == ("two-way",)
    assert run_gpu.grid_of("two-way", torch.bfloat16, quick=False).tokens[-1] == 8192


def test_without_the_library_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(two_way_gpu.compressed, "refuse_gpu", lambda: "no cuSPARSELt")
    (way,) = two_way_gpu.ways()
    assert way.missing == "no cuSPARSELt"
