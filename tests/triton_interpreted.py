"""The Triton kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of
its own: TRITON_INTERPRET must be set before triton is imported."""

import pytest
import torch
from conftest import products

from sparsekern.kernels import triton
from sparsekern.kernels.triton import Config
from sparsekern.testing import PROBLEMS, Case, exact, relative_error

assert triton._device().INTERPRETED

TYPES = {"float32": torch.float32, "float16": torch.float16}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# The others take up to a minute each.
CASES = [c for c in PROBLEMS if c.M * c.N * c.K < 3e6 or c.name == "gpt-128x512-90%"]
CONFIGS = (
    Config(16, 4, 1),
    Config(16, 4, 2, split=2),
    Config(32, 8, 4, split=3),
    Config(16, 4, 4, split=3, ahead=True),
)


def error_of(got, op, t):
    want, scale = exact(t)[op]
    # Below its smallest normal number a type rounds to a fixed step.
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(got.dtype).tiny))
    return relative_error(got, want, scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_products(case, dtype, nan_memory):
    t = case.tensors(TYPES[dtype])
    for kernel in triton.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert got.dtype == TYPES[dtype] and got.is_contiguous()
        assert error_of(got, kernel.op, t) <= TOLERANCE[got.dtype], kernel.op


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(config, nan_memory):
    t = Case("configurations", 20, 130, 600, sparsity=0.4).tensors()
    for run, op in ((triton._spmm, "spmm"), (triton._spmm_t, "spmm_t"), (triton._sddmm, "sddmm")):
        assert error_of(run(*products(t)[op], config=config), op, t) <= 2e-6, op


@pytest.mark.parametrize("M", [3, 40])
def test_bias(M, nan_memory):
    t = Case("bias", M, 70, 300).tensors()
    for run, op in ((triton._spmm, "spmm"), (triton._spmm_t, "spmm_t")):
        want, scale = exact(t)[op]
        bias = torch.randn(want.shape[1])
        got = run(*products(t)[op], bias)
        assert relative_error(got, want + bias.double(), scale + bias.double().abs()) <= 2e-6


def test_bfloat16(nan_memory):
    """The interpreter cuts a bfloat16 off where a GPU rounds it."""
    t = Case("bfloat16", 7, 50, 300).tensors(torch.bfloat16)
    for kernel in triton.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert error_of(got, kernel.op, t) <= TOLERANCE[torch.bfloat16], kernel.op


def test_values_may_change():
    """Nothing that depends on the values is kept."""
    t = Case("change", 4, 50, 300).tensors()
    before = triton._spmm(*products(t)["spmm"])
    t.values.data.mul_(2)
    assert torch.equal(triton._spmm(*products(t)["spmm"]), 2 * before)
