"""What a product of floating-point numbers promises on a CPU, whatever row of the table serves it:
its error against float64, where infinities and NaN go, which results no number of threads changes,
and that memory does not grow with N x K."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import products

from sparsekern import SparseTensor, ops
from sparsekern.kernels import table
from sparsekern.kernels.core import LARGE
from sparsekern.kernels.cpu import few_tokens, panel
from sparsekern.kernels.problem import Problem, problem_of
from sparsekern.testing import Case, Tensors, mask_to_csr

needs_library = pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")

OPS = ("spmm", "spmm_t", "sddmm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = {  # their most tokens
    "few_tokens-bitmap": 8,
    "few_tokens-columns": 16,
    "few_tokens-window64": 1,
    "few_tokens-window128": 1,
    "few_tokens-columns32": 4,
}


def cpu_rows(op):
    """(name, row) of every row of the table for this op on a CPU; every format of `few_tokens`."""
    rows = [row for row in table.KERNELS if row.op == op and row.device in ("cpu", None)]
    for row in rows:
        has_formats = row.name == "few_tokens" and op == "spmm"
        yield from ((name, row) for name in (FORMATS if has_formats else [row.name]))


def takes(name, row, problem):
    """Whether the row can run the problem at all; what is merely slow there is run, too."""
    if row.name == "core":
        return True
    if name in FORMATS and (problem.M > FORMATS[name] or problem.K > 65536):
        return False
    reason = row.refuse(problem)
    return reason is None or "faster" in reason


def run(monkeypatch, name, row, operands):
    with monkeypatch.context() as patch:
        if name in FORMATS:
            format = name.removeprefix("few_tokens-")
            patch.setattr(few_tokens, "index_format", lambda problem, lanes: format)
        return row.run(*operands)


def every_result(monkeypatch, t, extra=()):
    """(op, name, result) of every row that takes these operands; extra: a bias for each op."""
    for op, operands in products(t).items():
        for name, row in cpu_rows(op):
            if takes(name, row, problem_of(op, *operands)):
                bias = extra[op] if extra and op != "sddmm" else ()
                yield op, name, run(monkeypatch, name, row, (*operands, *bias))


# The error of an element, against that of torch on the W that is written out.


def operands(op, M, length, density, dtype, is_positive):
    """A problem whose sums have `length` terms before pruning."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if is_positive else torch.randn
    M, N, K = {"spmm": (M, 20, length), "spmm_t": (M, length, 20), "sddmm": (length, 20, 30)}[op]
    mask = torch.rand(N, K, generator=generator) < density

    def numbers(*shape):
        return draw(shape, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(N, K)
    return Tensors(mask, *mask_to_csr(mask), weight[mask], numbers(M, K), numbers(M, N))


def in_more_bits(a, b):
    """a @ b as a NumPy array of at least 64 bits of mantissa for float64, else in float64."""
    if a.dtype != torch.float64:
        return (a.double() @ b.double()).numpy()
    if np.finfo(np.longdouble).nmant < 63:
        pytest.skip("this platform has no wider float than float64")
    wide = (np.ascontiguousarray(t.numpy(), dtype=np.longdouble) for t in (a, b))
    return np.matmul(*wide)


def check_errors(monkeypatch, op, t):
    """Each element errs by at most twice what torch errs by at worst, plus the last rounding."""
    a, b = {"spmm": (t.x, t.weight.t()), "spmm_t": (t.dy, t.weight), "sddmm": (t.dy.t(), t.x)}[op]
    want, dense = in_more_bits(a, b), a @ b
    if op == "sddmm":
        want, dense = want[t.mask.numpy()], dense[t.mask]

    def errors(y):
        return np.abs(y.to(torch.float64).numpy() - want)

    rounding = torch.finfo(t.x.dtype).eps / 2 * np.abs(want)
    bound = 2 * errors(dense).max() + rounding
    problem = problem_of(op, *products(t)[op])
    for name, row in cpu_rows(op):
        if takes(name, row, problem):
            error = errors(run(monkeypatch, name, row, products(t)[op]))
            assert (error <= bound).all(), (name, (error / bound).max())


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)


@needs_library
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("is_positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("length", [64, 1024, 4096, 16384, 65536])
@pytest.mark.parametrize("op", OPS)
def test_errors_float32(monkeypatch, op, length, is_positive):
    for density, M in ((0.05, 130), (0.2, 16), (0.5, 7), (0.5, 130), (0.9, 1), (0.9, 64)):
        if op != "sddmm" or M == 130:
            t = operands(op, M, length, density, torch.float32, is_positive)
            check_errors(monkeypatch, op, t)


@needs_library
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("M", [20, 64])
def test_errors_of_the_one_row_of_a_nearly_empty_matrix(M):
    """Blocks are wide there. A row and, in the transpose, a column that is full."""
    n = k = 65536
    w, x = torch.rand(k), torch.rand(M, k)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int32), torch.full((n,), k).int()])
    full_row = SparseTensor(offsets, torch.arange(k), w, (n, k))
    full_column = SparseTensor(torch.arange(n + 1), torch.zeros(n, dtype=torch.int32), w, (n, k))
    want, dense = x.double() @ w.double(), (x @ w[:, None])[:, 0]
    bound = 2 * (dense - want).abs().max()
    for y in (x @ full_row.T, x @ full_column):
        assert (y[:, 0] - want).abs().max() <= bound and not y[:, 1:].any()


@needs_library
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errors_other_types(monkeypatch, op, dtype):
    for length in (64, 4096, 65536 if dtype != torch.float64 else 16384):
        for density, M, is_positive in ((0.05, 64, False), (0.5, 1, True), (0.9, 16, False)):
            # The largest float16 is 65504.
            t = operands(op, M, length, density, dtype, is_positive and dtype != torch.float16)
            check_errors(monkeypatch, op, t)


@needs_library
def test_few_tokens_round_once(monkeypatch):
    """A bias is added before a 16-bit result is rounded: 256 + 1 and then 0.5 make 257.5, which
    goes to 258; 257 alone would go to 256."""
    W = SparseTensor.from_dense(torch.tensor([[256.0, 1.0]] * 20).bfloat16())
    operands = W.row_offsets, W.col_indices, W.values, 20, 2
    bias = torch.full((20,), 0.5).bfloat16()
    for name, row in cpu_rows("spmm"):
        x = torch.ones(3, 2).bfloat16()
        if takes(name, row, problem_of("spmm", *operands, x)):
            y = run(monkeypatch, name, row, (*operands, x, bias))
            assert torch.equal(y, torch.full((3, 20), 258).bfloat16()), name


# Infinities and NaN.


def stored_products(op, t, bias=None):
    """The product of stored values alone, term by term in float64."""
    rows = torch.arange(len(t.mask)).repeat_interleave(t.row_offsets.diff())
    cols, values, x, dy = t.col_indices.long(), t.values.double(), t.x.double(), t.dy.double()
    if op == "sddmm":
        return (dy[:, rows] * x[:, cols]).sum(dim=0)
    sources, targets, x = (cols, rows, x) if op == "spmm" else (rows, cols, dy)
    out = x.new_zeros(len(x), t.mask.shape[0 if op == "spmm" else 1])
    out.index_add_(1, targets, x[:, sources] * values)
    return out if bias is None else out + bias.double()


def spoil(t, bias):
    """Infinities and NaN of all kinds in some tokens of x and dy, some values and biases."""
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for x in (t.x, t.dy):
        for i, m in enumerate(range(0, len(x), 5)):
            x[m, (7 * i) % x.shape[1]] = bad[i % 3]
        x[-1, :2] = torch.tensor([torch.inf, -torch.inf])
    if len(t.values) > 40:
        t.values[20::39] = torch.cat([bad, torch.zeros(1)]).repeat(1000)[: len(t.values[20::39])]
    for b in bias.values():
        b[0][3:6] = bad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0, 0.01, 0.3, 0.9, 1])
def test_infinities_reach_what_is_stored(monkeypatch, density, dtype):
    """Each output is infinite, NaN or finite as the sum of its stored products is: forward and
    both gradients, of every row."""
    for M in (1, 16, 17, 64, 300):
        for spoils_values in (False, True):
            t = Case("nan", M, 37, 41, sparsity=1 - density).tensors(dtype)
            bias = {"spmm": (torch.randn(37).to(dtype),), "spmm_t": (torch.randn(41).to(dtype),)}
            spoil(t if spoils_values else t._replace(values=t.values.clone()), bias)
            want = {op: stored_products(op, t, *bias.get(op, ())) for op in OPS}
            for op, name, got in every_result(monkeypatch, t, bias):
                case = (op, name, M)
                assert torch.equal(got.isnan(), want[op].isnan()), case
                assert torch.equal(got.isposinf(), want[op].isposinf()), case
                assert torch.equal(got.isneginf(), want[op].isneginf()), case
                finite = want[op].isfinite()
                close = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-4)
                torch.testing.assert_close(
                    got[finite].double(), want[op][finite], rtol=close, atol=close * 5
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.9])
def test_a_pruned_place_hides_an_infinity_at_any_size(density, dtype):
    w = (torch.randn(40, 50) * (torch.rand(40, 50) < density)).to(dtype)
    w[0, 0] = 0
    W = SparseTensor.from_dense(w)
    for M in (1, 16, 17, 64, 300):
        x = torch.zeros(M, 50, dtype=dtype)
        x[0, 0] = torch.inf
        assert (x @ W.T)[0, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_stored_zero_meets_infinity(monkeypatch, dtype):
    t = Case("zeros", 20, 30, 40, sparsity=0.1).tensors(dtype)
    t.values.zero_()
    t.x[:, 3], t.dy[:, 3] = torch.inf, -torch.inf
    for op, name, got in every_result(monkeypatch, t):
        assert torch.equal(got.isnan(), stored_products(op, t).isnan()), (op, name)


# The same bits.


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.3, 0.9])
def test_panel_and_few_tokens_give_the_same_bits_whatever_the_threads(monkeypatch, density, dtype):
    """`expand` and `dense` are torch.mm, which promises no such thing."""
    for M in (1, 16, 40, 130, 700):
        t = Case("bits", M, 330, 410, sparsity=1 - density).tensors(dtype)
        results = []
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(
                {
                    (op, name): got
                    for op, name, got in every_result(monkeypatch, t)
                    if name.startswith(("panel", "few_tokens"))
                }
            )
        for result in results[1:]:
            for row, got in result.items():
                assert torch.equal(got, results[0][row]), (M, *row)


# Memory.

HUGE = """
import torch
import sparsekern
from sparsekern import ops
K, nnz = 10**8, 5
row_offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
cols = torch.tensor([0, 99_999_999, 3, 50_000_000, 99_999_998], dtype=torch.int32)
rows = torch.tensor([0, 0, 2, 2, 2])
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    values = torch.tensor([1, 2, 3, 4, 5], dtype=dtype)
    x = torch.zeros(1, K, dtype=dtype)
    x[0, cols] = torch.tensor([1, 2, 3, 4, 5], dtype=dtype)
    x[0, 7] = torch.inf  # no value is there
    y = ops.spmm(row_offsets, cols, values, 3, K, x)
    assert y.tolist() == [[5, 0, 50]] and y.dtype == dtype
    dy = torch.tensor([[2, torch.nan, 3]], dtype=dtype)
    assert ops.sddmm(row_offsets, cols, 3, K, dy, x).tolist() == [2, 4, 9, 12, 15]
    del x
    dx = ops.spmm_t(row_offsets, cols, values, 3, K, dy)
    assert dx[0, cols].tolist() == [2, 4, 9, 12, 15] and dx.count_nonzero() == 5
    del dx
# Of this program alone: ru_maxrss has that of the one which started it, too.
(line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
peak = int(line.split()[1]) * 1024
assert peak < 2 * 10**9, peak
"""


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_hundred_million_columns_in_every_dtype():
    subprocess.run([sys.executable, "-c", HUGE], check=True)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_nearly_empty_weight_is_not_written_out(dtype):
    """60000 x 60000 would be 28.8 GB in float64."""
    n = k = 60000
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(n * k, (5000,), generator=generator)
    places[0] = n * k - 1
    places = places.unique()
    rows, cols = places // k, places % k
    row_offsets = torch.zeros(n + 1, dtype=torch.int32)
    row_offsets[1:] = rows.bincount(minlength=n).cumsum(0)
    values, x, dy = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((len(places),), (4, k), (4, n))
    )
    w = row_offsets, cols.int(), values, n, k
    want = {
        "spmm": torch.zeros(4, n, dtype=torch.float64).index_add_(
            1, rows, x[:, cols].double() * values.double()
        ),
        "spmm_t": torch.zeros(4, k, dtype=torch.float64).index_add_(
            1, cols, dy[:, rows].double() * values.double()
        ),
        "sddmm": (dy[:, rows].double() * x[:, cols].double()).sum(0),
    }
    got = {
        "spmm": ops.spmm(*w, x),
        "spmm_t": ops.spmm_t(*w, dy),
        "sddmm": ops.sddmm(row_offsets, cols.int(), n, k, dy, x),
    }
    tolerance = 4 * torch.finfo(dtype).eps
    for op in OPS:
        assert got[op].dtype == dtype
        torch.testing.assert_close(got[op].double(), want[op], rtol=tolerance, atol=tolerance)


@needs_library
def test_the_core_serves_only_what_is_hollow(fresh_table):
    hollow = Problem("spmm", "cpu", torch.float32, 1, 10, LARGE, LARGE // 4)
    assert table.pick(hollow).name == "core"
    for full in (hollow._replace(nnz=LARGE // 4 + 1), hollow._replace(K=LARGE - 1)):
        assert table.pick(full).name != "core"
