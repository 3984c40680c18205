"""Indices that change between products, by writes that torch counts and by writes that it does not:
the right product, a ValueError that names the array, or a stale product; never a crash. What is
derived from patterns stays bounded in memory."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_dense
from torch.autograd.graph import increment_version

from sparsekern import SparseTensor
from sparsekern.kernels import derived
from sparsekern.kernels.cpu import panel
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick

WORKER = Path(__file__).with_name("mutations_worker.py")


def run_python(*arguments, **env):
    """Output of another process, which may crash."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True
    )


def test_writes_of_every_kind():
    """4 numbers of tokens x 3 densities x 12 writes, counted and not: forward, dX and dvalues."""
    run = run_python(WORKER, "float32", "bfloat16", "float16", "float64")
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert not failed, "\n".join(failed[:20])
    assert run.returncode == 0 and lines[-1] == "end", f"{lines[-1:]}: {run.stderr[-2000:]}"


# The shapes in which faults were found.


@pytest.fixture
def large():
    """W [1024, 1024] whose indices are more than the sample that every call compares."""
    return SparseTensor.from_dense(torch.randn(1024, 1024), torch.rand(1024, 1024) < 0.1)


def test_a_write_between_two_kinds_of_product():
    """A schedule made after a write that was missed."""
    script = """
import torch
from sparsekern import SparseTensor
torch.manual_seed(0)
for bad in (-1, -5, -10**9, 10**9, 40000):
    for backward in (False, True):
        W = SparseTensor.from_dense(torch.randn(1024, 1024), torch.rand(1024, 1024) < .1)
        x = torch.randn(64, 1024)
        if backward:
            W.values.requires_grad_()
            y = x.requires_grad_() @ W.T
        else:
            x[:1] @ W.T
        W.col_indices.numpy()[50_001] = bad
        try:
            y.sum().backward() if backward else x @ W.T
            print("accepted", bad)
        except ValueError as error:
            print(str(error).split(":")[0])
"""
    run = run_python("-c", script)
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(run.stdout.split()) == {"col_indices"}


def test_a_column_that_moves(large):
    """Counted: seen at once. Not counted: at the latest when the versions are moved by hand."""
    ends = set((large.row_offsets[1:] - 1).tolist())
    steps = large.col_indices.diff()
    places = [p for p in range(2000, 100_000, 997) if p not in ends and steps[p] > 1][:40]
    for m in (1, 8, 64):
        x = torch.randn(m, 1024)
        x @ large.T
        for place in places[::4]:
            large.col_indices[place] += 1
            torch.testing.assert_close(x @ large.T, x @ large.to_dense().T, rtol=0, atol=1e-3)
            large.col_indices.data[place] -= 1
            increment_version((large.row_offsets, large.col_indices))
            torch.testing.assert_close(x @ large.T, x @ large.to_dense().T, rtol=0, atol=1e-3)


def test_versions_whose_sum_is_as_before(large):
    """row_offsets replaced by its .data, whose counter is 0, and one column written."""
    large.row_offsets[0] = 0
    x = torch.randn(64, 1024)
    x @ large.T
    steps = large.col_indices.diff()
    place = next(p for p in range(50_001, 60_000) if steps[p] > 1)
    before = large.row_offsets._version + large.col_indices._version
    large.row_offsets = large.row_offsets.data
    large.col_indices[place] += 1
    assert large.row_offsets._version + large.col_indices._version == before
    torch.testing.assert_close(x @ large.T, x @ large.to_dense().T, rtol=0, atol=1e-3)


def test_a_scipy_matrix_that_is_edited_on():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    a = scipy_sparse.random(300, 400, 0.2, "csr", dtype="float32", random_state=0)
    a.sort_indices()
    parts = (torch.from_numpy(part) for part in (a.indptr, a.indices, a.data))
    W = SparseTensor(*parts, a.shape)
    x = torch.randn(64, 400)
    for edit in range(20):
        row = 10 * edit
        first, last = a.indptr[row : row + 2]
        a.indices[first:last] = sorted(torch.randperm(400)[: last - first].tolist())
        increment_version((W.row_offsets, W.col_indices))
        want = torch.from_numpy(x.numpy() @ a.T.toarray())
        torch.testing.assert_close(x @ W.T, want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.97])
def test_indices_made_in_inference_mode(dtype, density):
    """Nobody counts their writes, so each product looks at all of them."""
    for m in (1, 64):
        with torch.inference_mode():
            w = torch.randn(96, 128).to(dtype)
            W = SparseTensor.from_dense(w, torch.rand(96, 128) < density)
            x = torch.randn(m, 128).to(dtype)
            x @ W.T
            place = int((W.col_indices.diff() > 1).nonzero()[20])
            W.col_indices[place] += 1
            want = x.float() @ W.to_dense().float().T
            torch.testing.assert_close((x @ W.T).float(), want, rtol=2e-3, atol=2e-3)
            W.col_indices[place] = 10**9
            with pytest.raises(ValueError, match="col_indices"):
                x @ W.T


@pytest.mark.parametrize(
    ("array", "place", "number", "text"),
    [
        ("col_indices", 1, 7, r"col_indices: expected to lie in \[0, 4\), got .*7"),
        ("col_indices", 0, -1, r"col_indices: expected to lie in \[0, 4\), got -1"),
        ("col_indices", 1, 0, "strictly in each row, got 0 before 0 in row 0: a duplicate"),
        ("col_indices", 0, 3, "strictly in each row, got 3 before 2 in row 0: not sorted"),
        ("row_offsets", 1, 4, "row_offsets: expected not to decrease, got 4 before 2 at row 1"),
        ("row_offsets", 0, 1, "expected to start at 0 and end at nnz = 3, got 1 and 3"),
        ("row_offsets", 3, 2, "expected to start at 0 and end at nnz = 3, got 0 and 2"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_wrong_number_is_named(dtype, array, place, number, text):
    w = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=dtype)
    for m in (1, 64):
        W = SparseTensor.from_dense(w)
        getattr(W, array)[place] = number
        with pytest.raises(ValueError, match=text):
            torch.ones(m, 4, dtype=dtype) @ W.T


def test_replaced_patterns_and_sizes():
    for dtype in (torch.float32, torch.float64):
        for m in (1, 16, 64, 300):
            W = SparseTensor.from_dense(random_dense(60, 90, 0.3, dtype))
            x = torch.randn(m, 90, dtype=dtype)
            for density in (0.05, 0.3, 0.97):
                other = SparseTensor.from_dense(random_dense(60, 90, density, dtype))
                W.row_offsets, W.col_indices = other.row_offsets, other.col_indices
                with pytest.raises(ValueError, match="values: expected shape"):
                    x @ W.T
                W.values = other.values
                torch.testing.assert_close(x @ W.T, x @ other.to_dense().T)
            W.k = 40
            with pytest.raises(ValueError, match="col_indices: expected"):
                x[:, :40] @ W.T
            W.n, W.k = 59, 90
            with pytest.raises(ValueError, match="row_offsets: expected"):
                x @ W.T


# Memory.


@pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as Linux has it")
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_in_a_thread_is_a_memory_error(threads):
    """Panels of 2^21 columns have no room; with room again, the product is right."""
    script = f"""
import resource, torch
from sparsekern import SparseTensor
torch.set_num_threads({threads})
K = 2**21
W = SparseTensor(torch.tensor([0, 2, 3]), torch.tensor([1, K - 1, 5]), torch.ones(3), (2, K))
x = torch.ones(256, K)
torch.ones(64, 64) @ SparseTensor.from_dense(torch.eye(64)).T
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, limit[1]))
try:
    x @ W.T
except MemoryError as error:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, limit)
y = x[:3] @ W.T
assert y.tolist() == [[2, 1]] * 3, y
print("right")
"""
    run = run_python("-c", script, SPARSEKERN_KERNEL="panel")
    assert run.stdout.split() == ["MemoryError", "right"], run.stderr[-2000:]
    assert run.returncode == 0


@pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")
def test_what_one_pattern_keeps_is_bounded(large):
    """Six times the bytes of its indices, whatever the numbers of tokens and threads."""
    W = large
    W.values.requires_grad_()
    pattern = panel.pattern_of(W.row_offsets, W.col_indices, *W.shape)
    most = 6 * 4 * (W.shape[0] + W.nnz)
    kept = []
    for i, m in enumerate(range(2, 450, 16)):
        torch.set_num_threads(1 + i % 8)
        x = torch.randn(m, 1024, requires_grad=True)
        y = x @ W.T
        y.sum().backward()
        kept.append(pattern.kept_bytes())
        if i % 9 == 0:
            torch.testing.assert_close(y, x @ W.to_dense().T, rtol=0, atol=1e-3)
    assert 0 < max(kept) <= most
    assert len(kept) == 28


def test_what_is_derived_goes_with_its_tensors():
    gc.collect()
    before = len(derived._store)
    x = torch.randn(2, 24)
    most = 0
    for i in range(10_000):
        W = SparseTensor(
            torch.tensor([0, 1, 2]), torch.tensor([i % 24, (i + 7) % 24]), torch.ones(2), (2, 24)
        )
        y = x @ W.T
        most = max(most, len(derived._store) - before)
    assert torch.equal(y, x[:, [i % 24, (i + 7) % 24]])
    assert most <= 4
    del W
    gc.collect()
    assert len(derived._store) == before


def test_many_problems_are_forgotten():
    """The choices of kernels are bounded, too."""
    for m in range(5000):
        pick(Problem("spmm", "cpu", torch.float32, m, 8, 8, 3))
    assert pick.cache_info().currsize <= 4096
