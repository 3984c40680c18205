"""The CUDA kernels of packed weights: every M, format and number of parts, awkward patterns, odd
layouts of x, graphs, streams, changing values."""

import pytest
import torch
from infinities import check_stored, tokens_with_infinities, weight_with_infinities

from sparsekern import SparseLinear, SparseTensor, explain, linear
from sparsekern.gpt.presets import UniformMask
from sparsekern.kernels.cuda import expand
from sparsekern.kernels.cuda.choose import pack
from sparsekern.kernels.cuda.cover import CoverLayout
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.kernels.cuda.gather import GatherLayout
from sparsekern.kernels.cuda.pairs import PairsLayout
from sparsekern.kernels.reference import mm
from sparsekern.nn import PackedLinear, pack_, sparsify_
from sparsekern.testing import PROBLEMS, exact, relative_error

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # one rounding of the result
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random_weight(n, k, density, dtype=torch.bfloat16):
    w = torch.randn(n, k, device="cuda") * (torch.rand(n, k, device="cuda") < density)
    return w.to(dtype)


# (bits, pieces) of a gather
GATHERS = {"d4": (4, 50), "d8": (8, 50), "d4-whole": (4, 1), "d8-cut": (8, 999)}
LAYOUTS = [*GATHERS, "cover", "pairs"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def packed_as(layout, w):
    """w, dense or a SparseTensor, in one of LAYOUTS."""
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    indices = W.row_offsets, W.col_indices, *W.shape
    if layout == "cover":
        return CoverLayout(*indices).fill(W.values)
    if layout == "pairs":
        return PairsLayout(*indices).fill(W.values)
    bits, pieces = GATHERS[layout]
    return GatherLayout(*indices, pieces, bits).fill(W.values)


def check(y, x, w, bias=None):
    want, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    assert relative_error(y, want, scale) <= TOLERANCE[w.dtype]


@DTYPES
@layouts
@pytest.mark.parametrize("case", [c for c in PROBLEMS if c.M <= 64], ids=lambda case: case.name)
def test_awkward_problems(case, layout, dtype, nan_memory):
    t = case.tensors(dtype)
    W = SparseTensor(t.row_offsets.cuda(), t.col_indices.cuda(), t.values.cuda(), t.mask.shape)
    y = spmm_packed(t.x.cuda(), packed_as(layout, W))
    want, scale = exact(t)["spmm"]
    # Below its smallest normal number a type rounds to a fixed step.
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(dtype).tiny))
    assert relative_error(y.cpu(), want, scale) <= TOLERANCE[dtype]


@DTYPES
@layouts
def test_every_number_of_tokens(layout, dtype, nan_memory):
    w = random_weight(300, 1300, 0.3, dtype)
    packed, bias = packed_as(layout, w), torch.randn(300).cuda().to(dtype)
    for m in range(66):
        x = torch.randn(m, 1300, device="cuda").to(dtype)
        y = spmm_packed(x, packed, bias)
        check(y, x, w, bias)
        assert torch.equal(y, spmm_packed(x, packed, bias))
        assert not packed.arrived.any()


@DTYPES
@pytest.mark.parametrize(
    "m, n, k",
    [
        pytest.param(130, 300, 1031, marks=pytest.mark.sanitize),
        pytest.param(40, 2048, 640, marks=pytest.mark.sanitize),
        (96, 2048, 4096),
        (128, 6144, 2048),
        (200, 1000, 2056),
        (256, 12288, 640),
    ],
)
def test_pairs_of_more_tokens(m, n, k, dtype, nan_memory):
    w = random_weight(n, k, 0.3, dtype)
    w[n // 2], w[n // 3] = 1.5, 0
    packed, bias = packed_as("pairs", w), torch.randn(n).cuda().to(dtype)
    x = torch.randn(m, k, device="cuda").to(dtype)
    y = spmm_packed(x, packed, bias)
    check(y, x, w, bias)
    for _ in range(3):
        assert torch.equal(y, spmm_packed(x, packed, bias))
    assert not packed.arrived.any()


@pytest.mark.sanitize
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 30, 64])
@layouts
@pytest.mark.parametrize("n, k", [(300, 700), (129, 1031), (5, 64)])
def test_tiles_of_every_fill(n, k, layout, m):
    w = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16)
    for i in range(0, k, 64):  # from empty to full
        w[:, i : i + 64] = random_weight(n, min(64, k - i), i / max(1, k - 64))
    w[n // 2] = 1.5
    w[n // 3] = 0
    packed, x = packed_as(layout, w), torch.randn(m, k).bfloat16().cuda()
    check(spmm_packed(x, packed), x, w)
    assert torch.equal(packed.expand(), w)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_damaged", [pytest.param(False, marks=pytest.mark.sanitize), True])
def test_kernels_that_read_csr(dtype, is_damaged):
    """With infinities, so that all of them run; with indices that are anything, where rows overlap,
    so that threads race for a place."""
    n, k, m = 67, 5000, 19
    W = SparseTensor.from_dense(random_weight(n, k, 0.1, dtype))
    x, dy = torch.randn(m, k).to(dtype).cuda(), torch.randn(m, n).to(dtype).cuda()
    x[5, 70], dy[m - 1, 3] = torch.inf, torch.nan
    stored = W.to_dense() != 0
    args = W.row_offsets, W.col_indices, W.values, n, k
    y, dx = expand.spmm(*args, x), expand.spmm_t(*args, dy)
    assert torch.equal(~y[5].isfinite(), stored[:, 70])
    assert torch.equal(~dx[m - 1].isfinite(), stored[3])
    dvalues = expand.sddmm(*args[:2], n, k, dy, x.nan_to_num(posinf=0))
    assert torch.equal(dvalues.isnan(), stored.nonzero()[:, 0] == 3)
    if is_damaged:
        for indices, step in ((W.col_indices.data, 150), (W.row_offsets.data, 4)):
            some = indices[::step]
            some.copy_(torch.randint(-(2**31), 2**31 - 1, some.shape))
        assert expand.spmm(*args, x).shape == y.shape
        assert expand.spmm_t(*args, dy).shape == dx.shape
        assert expand.sddmm(*args[:2], n, k, dy, x).shape == dvalues.shape
        torch.cuda.synchronize()


@layouts
@pytest.mark.parametrize("m", [1, 8, 40])
def test_layouts_of_x_and_bias(m, layout):
    w = random_weight(96, 256, 0.4)
    packed = packed_as(layout, w)
    big = torch.randn(2 * m + 1, 520, device="cuda").bfloat16()
    bias = torch.randn(97, device="cuda").bfloat16()[1:]
    for x in (
        big[1 : m + 1, 1:257],
        big[: 2 * m : 2, 8:264],
        big.t().contiguous().t()[:m, :256],
        big.flatten()[1 : 1 + m * 256].view(m, 256),  # contiguous, at an odd address
    ):
        check(spmm_packed(x, packed, bias), x, w, bias)


@pytest.mark.parametrize(
    "n, k, tokens",
    [
        pytest.param(70, 515, (1, 16, 64), marks=pytest.mark.sanitize),
        (700, 2053, (1, 2, 4, 8, 16, 30, 64, 70, 300)),
    ],
)
@DTYPES
@layouts
def test_infinities_reach_what_a_stored_value_connects(layout, dtype, n, k, tokens, nan_memory):
    w, mask, bias = weight_with_infinities(n, k, dtype, "cuda")
    packed = packed_as(layout, SparseTensor.from_dense(w, mask))
    for m in tokens:
        x = tokens_with_infinities(m, k, dtype, "cuda")
        for b in (bias, None):
            y = spmm_packed(x, packed, b)
            mended = torch.ones(m, dtype=torch.bool)
            if m > packed.most_tokens:  # W is written out: else it is torch.mm's, to the bit
                mended = ~x.isfinite().all(1)
                dense = mm(x, w.t(), b)
                torch.testing.assert_close(
                    y[~mended], dense[~mended], rtol=0, atol=0, equal_nan=True
                )
            check_stored(y[mended], x[mended], w, mask, b)
        assert not packed.arrived.any()


def test_infinite_x_does_not_leak_from_waiting_lanes():
    w = random_weight(64, 512, 0.1)
    w[:, 100] = 1
    x = torch.randn(1, 512, device="cuda").bfloat16()
    x[0, 100] = torch.inf
    assert torch.isposinf(spmm_packed(x, pack(SparseTensor.from_dense(w)))).all()


@layouts
def test_few_values_and_wide_rows(layout):
    w = torch.zeros(64, 70000, device="cuda", dtype=torch.bfloat16)
    w[5, 69999] = w[6, 0] = w[7, 35000] = 2
    x = torch.randn(4, 70000, device="cuda").bfloat16()
    check(spmm_packed(x, packed_as(layout, w)), x, w)


@pytest.mark.parametrize("m, kernel", [(1, "gather"), (16, "cover"), (64, "pairs")])
def test_sparse_tensors_use_the_kernel_and_see_new_values(m, kernel):
    w = random_weight(256, 512, 0.2)
    W, x = SparseTensor.from_dense(w), torch.randn(m, 512, device="cuda").bfloat16()
    assert f"-> few_tokens ({kernel} kernel" in explain(x, W)
    check(linear(x, W), x, w)
    W.values.mul_(2)
    check(linear(x, W), x, 2 * w)
    values = W.values.clone().requires_grad_()
    trained = SparseTensor(W.row_offsets, W.col_indices, values, W.shape)
    check(linear(x, trained).detach(), x, 2 * w)
    values.data.mul_(2)  # no version counter sees this
    check(linear(x, trained).detach(), x, 4 * w)


def test_cuda_graph_replays_new_tokens():
    w = random_weight(256, 512, 0.2)
    W, x = SparseTensor.from_dense(w), torch.randn(4, 512, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="call the product once before the capture"):
        with torch.cuda.graph(graph):
            linear(x, W)
    linear(x, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, W)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        check(y, x, w)


def test_other_stream_and_last_device():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    w = random_weight(256, 2048, 0.2).to(device)
    packed, x = pack(SparseTensor.from_dense(w), 16), torch.randn(16, 2048).bfloat16().to(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        y = spmm_packed(x, packed)
    side.synchronize()
    check(y, x, w)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_packed_modules(tokens, dtype):
    model = torch.nn.Sequential(
        torch.nn.Linear(512, 384), torch.nn.GELU(), torch.nn.Linear(384, 256)
    )
    model = sparsify_(model, UniformMask(0.75)).cuda().to(dtype)
    x = torch.randn(3, 7, 512, device="cuda").to(dtype)
    long = torch.randn(100, 512, device="cuda").to(dtype)
    with torch.no_grad():
        want, want_long = model(x), model(long)
    packed = pack_(model, tokens)
    assert isinstance(packed[0], PackedLinear) and packed[0].packed_bytes < 0.55 * 2 * 512 * 384
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(packed(long), want_long, rtol=2e-2, atol=2e-2)
        compiled = torch.compile(packed, fullgraph=True)
        torch.testing.assert_close(compiled(x), want, rtol=2e-2, atol=2e-2)


def test_packed_linear_refuses_what_it_cannot_do():
    layer = SparseLinear.from_linear(torch.nn.Linear(64, 32).cuda().bfloat16())
    packed, x = PackedLinear.from_sparse(layer), torch.randn(2, 64, device="cuda").bfloat16()
    with pytest.raises(NotImplementedError, match="expected x on the weight's GPU, got x on cpu"):
        packed(x.cpu())
    with pytest.raises(RuntimeError, match="expected x of dtype torch.bfloat16, got torch.float16"):
        packed(x.half())
    with pytest.raises(RuntimeError, match=r"expected x \[\.\.\., 64\], got \(2, 63\)"):
        packed(x[:, 1:])
    with pytest.raises(RuntimeError, match="it has no gradient"):
        packed(x.requires_grad_())
