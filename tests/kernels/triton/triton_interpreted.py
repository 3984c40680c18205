"""The Triton kernels in Triton's interpreter, on CPU tensors. Run by test_triton.py in a process of
its own: TRITON_INTERPRET must be set before triton is imported."""

from dataclasses import replace

import pytest
import torch
from conftest import products
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from interpreted import patched_once  # noqa: F401  (a fixture)

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import cover, expand
from sparsekern.kernels.triton import rows as triton_rows
from sparsekern.kernels.triton.rows import Config
from sparsekern.testing import PROBLEMS, Case, exact, relative_error

assert triton_rows._device().INTERPRETED

covers = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
TYPES = {"float32": torch.float32, "float16": torch.float16}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# 131 tokens have a last block that is not full, and others before it, in every configuration.
MOST_TOKENS = 131
GPT = ("gpt-128x128-50%", "gpt-128x128-90%", "gpt-128x128-99%", "gpt-128x512-90%")
CASES = [
    replace(c, M=min(c.M, MOST_TOKENS))
    for c in PROBLEMS
    if c.name in GPT or not c.name.startswith(("gpt", "many"))
]
CONFIGS = (
    Config(16, 4, 1),
    Config(16, 4, 2, split=2),
    Config(32, 8, 4, split=3),
    Config(16, 4, 4, split=3, ahead=True),
)


def in_turns(types, most_tokens=MOST_TOKENS):
    """Each case in one of two types: every mask and every number of tokens meets both."""
    names = list(types)
    return [
        pytest.param(case, types[name := names[(i + i // 4) % 2]], id=f"{case.name}-{name}")
        for i, case in enumerate(CASES)
        if case.M <= most_tokens
    ]


def error_of(got, op, t):
    want, scale = exact(t)[op]
    # Below its smallest normal number a type rounds to a fixed step.
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(got.dtype).tiny))
    return relative_error(got, want, scale)


@pytest.mark.parametrize("case, dtype", in_turns(TYPES))
def test_products(case, dtype, nan_memory):
    t = case.tensors(dtype)
    for kernel in triton_rows.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert got.dtype == dtype and got.is_contiguous()
        assert error_of(got, kernel.op, t) <= TOLERANCE[got.dtype], kernel.op


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(config, nan_memory):
    t = Case("configurations", 20, 40, 1100, sparsity=0.4).tensors()  # 5 tiles of K: uneven parts
    for run, op in (
        (triton_rows._spmm, "spmm"),
        (triton_rows._spmm_t, "spmm_t"),
        (triton_rows._sddmm, "sddmm"),
    ):
        assert error_of(run(*products(t)[op], config=config), op, t) <= 2e-6, op


@pytest.mark.parametrize("M", [3, 40])
def test_bias(M, nan_memory):
    t = Case("bias", M, 70, 300).tensors()
    for run, op in ((triton_rows._spmm, "spmm"), (triton_rows._spmm_t, "spmm_t")):
        want, scale = exact(t)[op]
        bias = torch.randn(want.shape[1])
        got = run(*products(t)[op], bias)
        assert relative_error(got, want + bias.double(), scale + bias.double().abs()) <= 2e-6


def test_bfloat16(nan_memory):
    """The interpreter cuts a bfloat16 off where a GPU rounds it."""
    t = Case("bfloat16", 7, 50, 300).tensors(torch.bfloat16)
    for kernel in triton_rows.KERNELS:
        got = kernel.run(*products(t)[kernel.op])
        assert error_of(got, kernel.op, t) <= TOLERANCE[torch.bfloat16], kernel.op


COVER_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def check_cover(t, split=None):
    got = triton_rows._spmm_cover(*products(t)["spmm"], split=split)
    assert got.dtype == t.x.dtype and got.is_contiguous()
    assert error_of(got, "spmm", t) <= TOLERANCE[got.dtype]


@covers
@pytest.mark.parametrize("case, dtype", in_turns(COVER_TYPES, most_tokens=64))
def test_cover(case, dtype, nan_memory):
    check_cover(case.tensors(dtype))


@covers
@pytest.mark.parametrize(
    "sparsity, split", [(0.0, 2), (0.3, 3), (0.9, 1), (0.9, 2), (0.9, 3), (0.999, 3)]
)
def test_cover_split(sparsity, split, nan_memory):
    check_cover(Case("split", 5, 40, 520, sparsity=sparsity).tensors(torch.float16), split)


@covers
@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 32, 33, 64])
def test_cover_tokens(M, nan_memory):
    check_cover(Case("tokens", M, 40, 300).tensors(torch.float16))


@covers
@pytest.mark.parametrize("mask", ["full row", "full tile", "empty tile", "one value"])
def test_cover_of_uneven_masks(mask, nan_memory):
    """Rows and tiles of 32 x 256 unlike their neighbours."""
    W = torch.randn(96, 600) * (torch.rand(96, 600) < 0.1)
    if mask == "full row":
        W[40] = torch.randn(600)
    elif mask == "full tile":
        W[32:64, 256:512] = torch.randn(32, 256)
    elif mask == "empty tile":
        W[:, 256:512] = 0
    else:
        W = torch.zeros(96, 600)
        W[95, 599] = 3
    W, x, bias = W.half(), torch.randn(7, 600).half(), torch.randn(96).half()
    A = SparseTensor.from_dense(W)
    pattern = A.row_offsets, A.col_indices, A.values, 96, 600
    for split in (1, 2):
        got = triton_rows._spmm_cover(*pattern, x, bias, split=split).double()
        want = x.double() @ W.double().T + bias.double()
        scale = x.double().abs() @ W.double().abs().T + bias.double().abs()
        assert relative_error(got, want, scale) <= TOLERANCE[torch.float16]


INFINITE = [*COVER_TYPES.values(), torch.float32]


@pytest.mark.parametrize("dtype", INFINITE, ids=str)
def test_infinities_reach_what_a_stored_value_connects(dtype, nan_memory):
    """Each way with a bias in one type of 16 bits, and without in the other."""
    n, k = 40, 260
    w, mask, bias = weight_with_infinities(n, k, dtype)
    W = SparseTensor.from_dense(w, mask)
    pattern = W.row_offsets, W.col_indices, W.values, n, k
    x, dy = tokens_with_infinities(7, k, dtype), tokens_with_infinities(7, n, dtype)
    b, b_t = (bias, None) if dtype == torch.float16 else (None, torch.randn(k).to(dtype))
    y = triton_rows._spmm(*pattern, x, b, config=Config(16, 4, 1, split=2))
    check_stored(y, x, w, mask, b)
    check_stored(triton_rows._spmm_t(*pattern, dy, b_t), dy, w.t(), mask.t(), b_t)
    if cover.is_built() and dtype.itemsize == 2:
        y = triton_rows._spmm_cover(*pattern, x, b, split=1 if dtype == torch.float16 else 2)
        check_stored(y, x, w, mask, b)


@pytest.mark.parametrize("dtype", INFINITE, ids=str)
def test_infinities_of_a_weight_that_is_written_out(dtype, nan_memory, monkeypatch):
    """The rows `expand` where no CUDA kernel can run."""
    monkeypatch.setattr(expand.cuda_library, "refusal", lambda: "none here")
    w, mask, bias = weight_with_infinities(20, 260, dtype)
    W = SparseTensor.from_dense(w, mask)
    weight = W.row_offsets, W.col_indices, W.values, 20, 260
    x, dy = tokens_with_infinities(7, 260, dtype), tokens_with_infinities(7, 20, dtype)
    for b, b_t in ((None, None), (bias, torch.randn(260).to(dtype))):
        check_stored(expand.spmm(*weight, x, b), x, w, mask, b)
        check_stored(expand.spmm_t(*weight, dy, b_t), dy, w.t(), mask.t(), b_t)


@covers
def test_cover_of_infinite_x(nan_memory):
    """It reaches every row that has its column, no other token, and no row of a slice of rows that
    is empty."""
    W = torch.randn(96, 300).half()
    W[32:64] = 0
    A = SparseTensor.from_dense(W)
    x = torch.randn(3, 300).half()
    x[1, 7] = torch.inf
    got = triton_rows._spmm_cover(A.row_offsets, A.col_indices, A.values, 96, 300, x)
    assert not got[1, :32].isfinite().any() and not got[1, 64:].isfinite().any()
    assert got[[0, 2]].isfinite().all() and not got[:, 32:64].any()


@covers
@pytest.mark.parametrize("n, k", [(1, 1), (40, 70)])
def test_cover_of_a_full_weight_and_infinite_x(n, k, nan_memory):
    w, x = torch.randn(n, k).half(), torch.randn(3, k).half()
    A = SparseTensor.from_dense(w)
    x[1, 0], x[2] = -torch.inf, torch.nan
    got = triton_rows._spmm_cover(A.row_offsets, A.col_indices, A.values, n, k, x)
    check_stored(got, x, w, w != 0)


@covers
def test_cover_sees_new_values():
    t = Case("change", 4, 50, 300).tensors(torch.float16)
    before = triton_rows._spmm_cover(*products(t)["spmm"])
    t.values.mul_(2)
    assert torch.equal(triton_rows._spmm_cover(*products(t)["spmm"]), 2 * before)


def test_values_may_change():
    """Nothing that depends on the values is kept."""
    t = Case("change", 4, 50, 300).tensors()
    before = triton_rows._spmm(*products(t)["spmm"])
    t.values.data.mul_(2)
    assert torch.equal(triton_rows._spmm(*products(t)["spmm"]), 2 * before)
