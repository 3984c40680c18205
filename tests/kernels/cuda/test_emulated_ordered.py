"""Free patterns in an order of their columns, without a GPU: the emulator's kernels around the
stand-in of tests/cuda/cusparselt.cpp."""

import pytest
import torch
from emulated_cusparselt import (  # noqa: F401
    WRONG,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import ordered
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick
from sparsekern.testing import relative_error

pytestmark = pytest.mark.usefixtures("stand_in", "fresh_table")
N, K, M = 96, 128, 96
TOLERANCE = 2**-8  # one rounding of the result


def layer(n=N, k=K, density=0.08):
    """(W, w, mask); a stored value is 0."""
    mask = torch.rand(n, k) < density
    mask[0, :3] = mask[:3, 0] = True  # not two-way
    w = torch.randn(n, k).bfloat16() * mask
    w[tuple(mask.nonzero()[3])] = 0
    return SparseTensor.from_dense(w, mask), w, mask


def problem(W, op="spmm", m=M, dtype=torch.bfloat16):
    asked = Problem(op, "cuda", dtype, m, *W.shape, W.nnz)
    return ordered.recognised(asked, W.row_offsets, W.col_indices)


def product(W, x, bias=None, op="spmm"):
    row = pick(problem(W, op, x.shape[0]))
    assert row.name == "ordered"
    return row.run(W.row_offsets, W.col_indices, W.values, *W.shape, x, bias)


def check(y, x, w, bias=None):
    exact, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert relative_error(y, exact, scale) <= TOLERANCE


@pytest.mark.parametrize("n, k, m", [(16, 48, 72), (N, K, M), (1040, 64, 72)])
def test_forward_and_input_gradient_follow_values_and_bias(n, k, m, nan_memory):
    W, w, _ = layer(n, k, 0.02 if n > 1000 else 0.08)
    x, dy = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    bias, bias_t = torch.randn(n).bfloat16(), torch.randn(k).bfloat16()
    for scale in (1, 2):
        W.values.mul_(scale), bias.mul_(scale)
        w = w * scale
        check(product(W, x, bias), x, w, bias)
        check(product(W, x), x, w)
        check(product(W, dy, op="spmm_t"), dy, w.T)
        check(product(W, dy, bias_t, op="spmm_t"), dy, w.T, bias_t)
    shifted = torch.randn(m * k + 1).bfloat16()[1:].view(m, k)  # not on a multiple of 16 bytes
    check(product(W, shifted), shifted, w)
