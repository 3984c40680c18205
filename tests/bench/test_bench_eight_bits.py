"""`run_gpu.py eight-bits` without a GPU: its ways through the emulator, and its page."""

import sys
from pathlib import Path

import pytest
import torch
from test_bench_gpu import CallingClock, a_run, bench, one_blas  # noqa: F401

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda"))
from emulated_cuda import emulated_cuda, emulator  # noqa: E402, F401

from sparsekern import SparseTensor  # noqa: E402
from sparsekern.bench import eight_bits_gpu, measure_gpu, rates  # noqa: E402
from sparsekern.bench.records import OTHER, OURS  # noqa: E402
from sparsekern.kernels.cuda import few_tokens  # noqa: E402
from sparsekern.kernels.cuda import library as cuda_library  # noqa: E402
from sparsekern.kernels.cuda.layout import Gpu  # noqa: E402

GRID = measure_gpu.Grid(shapes=((64, 128),), tokens=(1, 64), sparsities=(0.75,), masks=("random",))


@pytest.mark.usefixtures("emulated_cuda", "one_blas")
def test_all_ways_are_right_and_on_the_page(bench, monkeypatch):  # noqa: F811
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: Gpu(3, 227 * 1024, True))
    monkeypatch.setattr(cuda_library, "refusal", lambda: None)
    monkeypatch.setattr(measure_gpu, "COLD_BYTES", 1e4)
    monkeypatch.setattr(measure_gpu, "LAUNCHES", (2, 2))
    clock = CallingClock(**{"few_tokens int8": 0.25, "few_tokens e4m3": 0.5})
    generator = torch.Generator().manual_seed(0)
    ways = eight_bits_gpu.ways()
    names = [way.name for way in ways if way.kind == OTHER]
    assert names == ["dense E4M3", "dense E4M3, row-wise", "dense int4"]
    ways = [way for way in ways if way.kind == OURS]
    cells = [rates.derive(cell) for cell in measure_gpu.cells(GRID, ways, clock, generator)]
    for cell in cells:
        assert all(way["is_right"] for way in cell["ways"].values())
        assert cell["speedups"]["few_tokens int8"] == 4 and cell["speedups"]["few_tokens e4m3"] == 2
        found = {name: way.get("rounding") for name, way in cell["ways"].items()}
        assert 0.003 < found["few_tokens int8"] < 0.01 < 0.02 < found["few_tokens e4m3"] < 0.03
    text = bench("eight_bits").page("name", a_run(cells, benchmark="eight-bits"))
    assert "| few_tokens e4m3" in text and "75% zeros" in text


def test_peers_round_as_their_kernels_do(monkeypatch):
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda packed, tiles: packed)
    int4 = eight_bits_gpu._int4(weight())
    numbers = torch.stack([int4.held[0] >> 4, int4.held[0] & 15], 2).view(16, 256).float()
    scales, zeros = int4.held[1].float().transpose(0, 1).repeat_interleave(128, 1).unbind(2)
    torch.testing.assert_close((numbers - 8) * scales + zeros, int4.values, rtol=1e-5, atol=1e-5)
    for by_row, shape in ((True, (1, 16)), (False, ())):
        rounded = eight_bits_gpu._dense_e4m3(weight(), by_row)
        w8, w_scales = rounded.held
        assert w_scales.shape == shape and w_scales.is_contiguous()
        torch.testing.assert_close(w8.float() * w_scales.t(), rounded.values)
        assert rounded.nbytes == 16 * 256 + 4 * w_scales.numel()
        assert rounded.clone().held[0] is not w8


def weight():
    w = torch.randn(16, 256).bfloat16()
    return SparseTensor.from_dense(w, torch.rand(16, 256) < 0.5)
