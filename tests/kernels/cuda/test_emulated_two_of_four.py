"""Two-way patterns through cuSPARSELt's interface without a GPU: the emulator's kernels around the
stand-in of tests/cuda/cusparselt.cpp."""

import threading
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_cusparselt import (  # noqa: F401
    CHANGING,
    REFUSED,
    WRONG,
    check,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)
from infinities import check_stored
from test_two_of_four import two_way

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import algorithms, compressed, cusparselt, two_of_four, vendor
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick, refusals

pytestmark = pytest.mark.usefixtures("stand_in", "fresh_table")
N, K, M = 48, 80, 96
CPU = torch.device("cpu")
SIZES = {torch.bfloat16: 16}


def layer(n=N, k=K):
    """(W, w, mask): a two-way pattern; a stored value is 0."""
    mask = two_way(n, k)
    w = torch.randn(n, k).bfloat16() * mask
    w[tuple(mask.nonzero()[3])] = 0
    return SparseTensor.from_dense(w, mask), w, mask


def problem(W, op="spmm", m=M, dtype=None):
    asked = Problem(op, "cuda", dtype or W.values.dtype, m, *W.shape, W.nnz)
    return two_of_four.recognised(asked, W.row_offsets, W.col_indices)


def product(W, x, bias=None, op="spmm"):
    row = pick(problem(W, op, x.shape[0]))
    assert row.name == "two_of_four"
    return row.run(W.row_offsets, W.col_indices, W.values, *W.shape, x, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, m", [(16, 16, 72), (N, K, M), (144, 64, 72)])
def test_forward_and_input_gradient_follow_values_and_bias(n, k, m, dtype, nan_memory):
    W, w, _ = layer(n, k)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    bias, bias_t = torch.randn(n).to(dtype), torch.randn(k).to(dtype)
    W, w = W.to(dtype), w.to(dtype)
    for scale in (1, 2):
        W.values.mul_(scale), bias.mul_(scale)
        w = w * scale
        check(product(W, x, bias), x, w, bias)
        check(product(W, x), x, w)
        check(product(W, dy, op="spmm_t"), dy, w.T)
        check(product(W, dy, bias_t, op="spmm_t"), dy, w.T, bias_t)
    shifted = torch.randn(m * k + 1).to(dtype)[1:].view(m, k)  # not on a multiple of 16 bytes
    check(product(W, shifted), shifted, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_infinities_reach_what_a_stored_value_connects(dtype, nan_memory):
    W, w, mask = layer()
    mask[:, 7] = mask[5] = False
    w = w * mask
    w = w.to(dtype)
    W = SparseTensor.from_dense(w, mask)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    for token in range(0, M, 3):
        bad = (torch.inf, -torch.inf, torch.nan)[token % 9 // 3]
        x[token, (5 * token) % K] = dy[token, (5 * token) % N] = bad
    x[1, 7] = dy[1, 5] = torch.inf  # nothing is stored there
    bias = torch.randn(N).to(dtype)
    check_stored(product(W, x, bias), x, w, mask, bias)
    check_stored(product(W, x), x, w, mask)
    check_stored(product(W, dy, op="spmm_t"), dy, w.T.contiguous(), mask.T.contiguous())


def test_a_plan_is_made_once_for_each_thread_and_shape(stand_in, monkeypatch):  # noqa: F811
    W, w, _ = layer()
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    plans = cusparselt._threads.plans

    def grows_by(count, *operands):
        before = len(plans)
        check(product(W, *operands), operands[0], w, *operands[1:])
        assert len(plans) == before + count

    for operands in ((x,), (x, bias), (x[:72],)):
        grows_by(1, *operands)
        grows_by(0, *operands)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 8)
    grows_by(0, x, bias.clone())  # of another address
    live, failed = stand_in.live(), []

    def in_another_thread():  # whose handle is its own, or the stand-in refuses
        try:
            assert not cusparselt._threads.plans
            check(product(W, x, bias), x, w, bias)
        except BaseException as error:
            failed.append(error)

    for _ in range(2):  # one after the other: the emulator has one GPU
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
    assert not failed and stand_in.live() == live  # plans end with their thread
    monkeypatch.setattr(cusparselt, "MOST_PLANS", 2)
    grows_by(-1, x[:80])


def test_while_a_graph_is_captured_nothing_is_timed(stand_in):  # noqa: F811
    W, w, _ = layer()
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    product(W, x, bias)  # the warm-up
    ((key, plan),) = cusparselt._threads.plans.items()
    stand_in.is_capturing = True
    bias.normal_()
    check(product(W, x, bias), x, w, bias)
    assert [*cusparselt._threads.plans] == [key]
    # Of an unknown shape the library chooses.
    assert algorithms.algorithm_of(N, K, 8 * M, torch.bfloat16, CPU) is None


def test_the_first_look_at_the_library_is_not_captured(stand_in):  # noqa: F811
    W, *_ = layer()
    stand_in.is_capturing = True
    with pytest.raises(RuntimeError, match="cannot capture the first look at cuSPARSELt"):
        problem(W)
        pick(problem(W))


def products_of(stand_in):  # noqa: F811
    """How often each number has multiplied since the last look."""
    counts = {i: stand_in.products(i) for i in range(-1, 30)}
    return {i: count for i, count in counts.items() if count}


def test_no_wrong_or_refused_algorithm_multiplies(stand_in, recwarn, monkeypatch):  # noqa: F811
    W, w, _ = layer()
    costs = {8: 50, 11: 40, 12: 30, 15: 20, 16: 60, 17: 90, 20: 70}
    monkeypatch.setitem(algorithms.CANDIDATES, torch.bfloat16, tuple(costs))
    wrong = {11: REFUSED, 12: WRONG, 15: CHANGING}
    for number, cost in costs.items():
        stand_in.algorithm(number, wrong.get(number, 0), cost)
    x = torch.randn(M, K).bfloat16()
    y = product(W, x)
    check(y, x, w)
    assert set(products_of(stand_in)) == {*costs} - {11}  # what was looked at
    before = products_of(stand_in)
    for m in (72, 96, 128):  # they share an algorithm
        x = torch.randn(m, K).bfloat16()
        check(product(W, x), x, w)
    after = products_of(stand_in)
    assert {i for i in after if after[i] != before.get(i)} == {8}  # the fastest of the right ones
    assert not recwarn.list
    # The next process reads what was chosen.
    algorithms._known.cache_clear()
    before = products_of(stand_in)
    assert algorithms.algorithm_of(N, K, M, torch.bfloat16, CPU) == 8
    # Those that were wrong are not tried with another shape either.
    assert algorithms.algorithm_of(N, 2 * K, M, torch.bfloat16, CPU) == 8
    now = products_of(stand_in)
    assert {i for i in now if now[i] != before.get(i)} == {*costs} - {11, 12, 15}
    # Where others are tried, all is looked at anew.
    monkeypatch.setitem(algorithms.CANDIDATES, torch.bfloat16, (7, 12, 16))
    algorithms._known.cache_clear()
    before = now
    assert algorithms.algorithm_of(N, K, M, torch.bfloat16, CPU) == 16
    now = products_of(stand_in)
    assert {i for i in now if now[i] != before.get(i)} == {7, 12, 16}


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
def test_without_a_right_algorithm_w_is_written_out(op, stand_in):  # noqa: F811
    for number in algorithms.CANDIDATES[torch.bfloat16]:
        stand_in.algorithm(number, (REFUSED, WRONG, CHANGING)[number % 3])
    W, w, _ = layer()
    x = torch.randn(M, K if op == "spmm" else N).bfloat16()
    with pytest.warns(UserWarning, match="no algorithm multiplies .* right"):
        y = product(W, x, op=op)
    check(y, x, w if op == "spmm" else w.T)
    tried = products_of(stand_in)
    with warnings.catch_warnings(action="error"):
        check(product(W, x, op=op), x, w if op == "spmm" else w.T)
    assert products_of(stand_in) == tried


CALLS = [name for name in cusparselt._SIGNATURES if not name.endswith("Destroy")]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "GetProperty"])
def test_a_call_that_fails_is_an_error_with_its_name(name, stand_in):  # noqa: F811
    W, w, _ = layer()
    x, bias = torch.randn(M, K).bfloat16(), torch.randn(N).bfloat16()
    pattern = two_of_four._pattern(W.row_offsets, W.col_indices, N, K)
    operand = two_of_four._operand("spmm", pattern, W.values, N, K)
    cusparselt._threads.handles.clear()
    stand_in.fail(name, 6)
    live = stand_in.live()
    text = rf"^cusparseLt{name}: CUSPARSE_STATUS_EXECUTION_FAILED \(status 6\)$"
    with pytest.raises(cusparselt.Error, match=text):
        cusparselt.compress(w)
        cusparselt.multiply(operand, x, x.new_empty(M, N), bias, 8)
    stand_in.reset()
    cusparselt._threads.plans.clear()
    assert stand_in.live() == live  # what had been made is destroyed
    check(product(W, x, bias), x, w, bias)  # and the next call works


def test_calls_are_made_with_the_gpu_of_the_operands(monkeypatch):
    """Whichever is the current one: a handle is tied to it."""
    current, seen = ["another"], {}
    call = vendor.Library.call

    @contextmanager
    def device(of):
        current.append(of)
        yield
        current.pop()

    def noted(self, name, *args):
        seen[name] = {*seen.get(name, ()), current[-1]}
        return call(self, name, *args)

    W, w, bias = layer()
    product(W, torch.randn(M, K).bfloat16())
    cusparselt._threads.handles.clear()
    monkeypatch.setattr(vendor.Library, "call", noted)
    monkeypatch.setattr(torch.cuda, "device", device)
    algorithms._known.cache_clear()
    operand, x = cusparselt.compress(w), torch.randn(2 * M, K).bfloat16()
    cusparselt.operand_bytes(N, K, w.dtype, None)
    check(compressed.multiply(operand, x, N, None), x, w)
    cusparselt.Plan(N, K, M, None, bias=torch.randn(N).bfloat16())
    assert set(seen) >= {*CALLS} - {"GetProperty"} and set.union(*seen.values()) == {None}


def test_what_the_library_does_not_take_is_an_error():
    for n, k, m in ((24, K, M), (N, 72, M), (N, K, 76)):
        with pytest.raises(cusparselt.Error, match=r"CUSPARSE_STATUS_NOT_SUPPORTED \(status 10\)"):
            cusparselt.Plan(n, k, m, None)
    with pytest.raises(cusparselt.Error, match="SpMMACompress2: .*EXECUTION_FAILED"):
        cusparselt.compress(torch.ones(16, 16).bfloat16())


def reason(W, **asked):
    return dict(refusals(problem(W, **asked)))["two_of_four"]


def test_refusals_say_why(stand_in, monkeypatch):  # noqa: F811
    W, *_ = layer()
    free = SparseTensor.from_dense((torch.rand(N, K) < 0.4).bfloat16())
    assert "not two-way" in reason(free)
    full = SparseTensor.from_dense(torch.ones(N, K).bfloat16())
    assert reason(full) == "more than two of four are stored"
    assert "it takes bfloat16 and float16" in reason(W, dtype=torch.float32)
    with monkeypatch.context() as measured:  # in bfloat16 alone
        measured.setattr(two_of_four, "_least_size", lambda m, dtype: SIZES.get(dtype))
        assert f"[{N}, {K}] out is as fast at {M} tokens" in reason(W, dtype=torch.float16)
        assert problem(W).is_two_way and not problem(W, dtype=torch.float16).is_two_way
    assert "as fast at 64 tokens" in reason(W, m=64) and "multiples" in reason(W, m=76)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    compressed.refuse_gpu.cache_clear()
    assert "9.0 alone, not 8.0" in reason(W)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compressed.refuse_gpu.cache_clear()
    assert reason(W) == "there is no GPU"


@pytest.mark.parametrize("fault", ["layout", "version", "property", "missing"])
def test_a_library_that_is_no_use_is_refused(fault, stand_in, monkeypatch):  # noqa: F811
    W, *_ = layer()
    if fault == "layout":
        stand_in.slots_in_columns()
        want = "cuSPARSELt 0.8.1 lays out its operands in another way"
    elif fault == "version":
        stand_in.minor_version(7)
        want = "cuSPARSELt is not usable: it is version 0.7.1, older than 0.8.0"
    elif fault == "property":
        stand_in.fail("GetProperty", 3)
        want = "cuSPARSELt is not usable: cusparseLtGetProperty: CUSPARSE_STATUS_INVALID_VALUE"
    else:
        monkeypatch.setattr(cusparselt, "SONAME", "libnone.so.0")  # of no wheel either
        want = "cuSPARSELt is not usable: libnone.so.0"
    assert reason(W).startswith(want)


def test_the_library_of_a_wheel_is_found(cusparselt_library, monkeypatch):  # noqa: F811
    path = Path(cusparselt_library)

    def files(wheel):
        if wheel == "nvidia-cusparselt-cu13":
            raise PackageNotFoundError
        return [SimpleNamespace(name=name, locate=lambda: path) for name in ("lib.a", path.name)]

    monkeypatch.setattr(cusparselt, "files", files)
    monkeypatch.setattr(cusparselt, "SONAME", path.name)
    assert cusparselt.library().version == (0, 8, 1)
