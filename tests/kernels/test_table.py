"""The table: which kernel for which problem, forced choices, and what it tells."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import random_dense, sparse

import sparsekern
from sparsekern.kernels import reference, table
from sparsekern.kernels.problem import Kernel, Problem

OPS = ("spmm", "spmm_t", "sddmm")
PROBLEM = Problem("spmm", "cpu", torch.float32, M=4, N=8, K=16, nnz=32)


def picky(problem):
    return "M is odd" if problem.M % 2 else None


PICKY = Kernel("spmm_picky", "spmm", "cpu", picky, reference.spmm)


@pytest.fixture
def with_picky(fresh_table):
    """A table whose first row refuses odd M."""
    fresh_table.setattr(table, "KERNELS", (PICKY, *table.KERNELS[-3:]))
    return fresh_table


def test_problem():
    assert PROBLEM.density == 0.25
    assert Problem("spmm", "cpu", torch.float32, 1, 0, 5, 0).density == 0
    assert str(PROBLEM) == "spmm M=4 N=8 K=16 nnz=32 (density 0.25) torch.float32 on cpu"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_problem_has_a_kernel(fresh_table, op, device, dtype):
    kernel = table.pick(PROBLEM._replace(op=op, device=device, dtype=dtype))
    assert kernel.op == op and kernel.device in (None, device)


def test_names_are_unique_per_op_and_device():
    rows = [(row.op, row.device, row.name) for row in table.KERNELS]
    assert len(set(rows)) == len(rows)
    assert {row.op for row in table.KERNELS} == set(OPS)


def test_first_row_that_does_not_refuse(with_picky):
    assert table.pick(PROBLEM).name == "spmm_picky"
    assert table.pick(PROBLEM._replace(M=3)).name == "dense"
    assert table.pick(PROBLEM._replace(op="sddmm")).name == "dense"


def test_refusals(with_picky):
    assert table.refusals(PROBLEM) == []
    assert table.refusals(PROBLEM._replace(M=3)) == [("spmm_picky", "M is odd")]
    assert table.refusals(PROBLEM._replace(device="cuda")) == []  # it concerns a CPU alone


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
@pytest.mark.parametrize("op", OPS)
def test_only_rows_for_the_device_are_told_of(op, device, other):
    elsewhere = {row.name for row in table.KERNELS if row.device == other}
    elsewhere -= {row.name for row in table.KERNELS if row.device == device}
    for m in (1, 300):
        problem = PROBLEM._replace(op=op, device=device, dtype=torch.float64, M=m)
        assert elsewhere.isdisjoint(dict(table.refusals(problem)))
        text = table.describe(problem, table.pick(problem))
        assert "it runs on" not in text and "there are no kernels" not in text


def test_a_device_without_kernels(fresh_table):
    problem = PROBLEM._replace(device="mps")
    text = table.describe(problem, table.pick(problem))
    assert text.endswith("on mps -> dense; there are no kernels for mps")


def test_forced(with_picky):
    with_picky.setenv("SPARSEKERN_KERNEL", "dense")
    assert table.pick(PROBLEM).name == "dense"
    table.forget_choices()
    with_picky.setenv("SPARSEKERN_KERNEL", "spmm_picky")
    assert table.pick(PROBLEM).name == "spmm_picky"
    assert table.pick(PROBLEM._replace(op="sddmm")).name == "dense"  # has no row of that name
    with pytest.raises(ValueError, match=r"spmm_picky refuses spmm M=3 .*: M is odd"):
        table.pick(PROBLEM._replace(M=3))


def test_forced_name_whose_row_of_this_op_is_another_devices(fresh_table):
    on_a_gpu = Kernel("picky", "spmm", "cuda", lambda problem: None, reference.spmm)
    here = [replace(on_a_gpu, op=op, device="cpu") for op in ("spmm", "spmm_t")]
    fresh_table.setattr(table, "KERNELS", (*here, on_a_gpu, *table.KERNELS[-3:]))
    fresh_table.setenv("SPARSEKERN_KERNEL", "picky")
    gpu = PROBLEM._replace(device="cuda")
    assert table.pick(gpu).device == "cuda"
    assert table.pick(gpu._replace(op="spmm_t")).name == "dense"
    with pytest.raises(ValueError, match="picky refuses spmm .*: it runs on cpu"):
        table.pick(PROBLEM._replace(device="mps"))


def test_forced_unknown(with_picky):
    with_picky.setenv("SPARSEKERN_KERNEL", "fastest")
    text = "SPARSEKERN_KERNEL: expected one of dense, spmm_picky, got fastest"
    with pytest.raises(ValueError, match=re.escape(text)):
        table.pick(PROBLEM)


def test_the_old_name_of_a_row(fresh_table):
    fresh_table.setenv("SPARSEKERN_KERNEL", "stream")
    few = PROBLEM._replace(device="cuda")
    with pytest.warns(FutureWarning, match="SPARSEKERN_KERNEL: stream is called few_tokens now"):
        with pytest.raises(ValueError, match="SPARSEKERN_KERNEL: few_tokens refuses spmm"):
            table.pick(few)


def test_debug_prints_each_new_problem_once(with_picky, capsys):
    with_picky.setenv("SPARSEKERN_DEBUG", "1")
    for _ in range(2):
        table.pick(PROBLEM._replace(M=3))
    assert capsys.readouterr().err == (
        "sparsekern: spmm M=3 N=8 K=16 nnz=32 (density 0.25) torch.float32 on cpu -> dense; "
        "spmm_picky refused: M is odd\n"
    )


def test_explain_names_what_it_takes():
    with pytest.raises(TypeError, match="W: expected a SparseTensor or a packed layer, got Tensor"):
        sparsekern.explain(torch.randn(2, 3), torch.randn(3, 3))
    with pytest.raises(ValueError, match="Linear has none; of a SparseLinear give its weight"):
        sparsekern.explain(torch.randn(2, 3), torch.nn.Linear(3, 3))


def test_explain(with_picky):
    W = sparse(random_dense(8, 16))
    x = torch.zeros(3, 5, 16, dtype=torch.float64)
    lines = sparsekern.explain(x, W).splitlines()
    assert [line.split(":")[0] for line in lines] == ["forward", "dx", "dvalues"]
    assert f"spmm M=15 N=8 K=16 nnz={W.nnz}" in lines[0]
    assert lines[0].endswith("torch.float64 on cpu -> dense; spmm_picky refused: M is odd")
    assert lines[2].endswith("-> dense")
    with pytest.raises(ValueError, match=r"x: expected a last dimension of K = 16, .* shape \(8,"):
        sparsekern.explain(torch.zeros(8), W)


@pytest.mark.parametrize("n", [8, 16])
def test_explain_of_a_transposed_view_is_that_of_its_product(n):
    """A square one, too, for which no shape tells them apart."""
    W = sparse(random_dense(n, 16))
    x = torch.zeros(3, n, dtype=torch.float64)
    assert torch.nn.functional.linear(x, W.T).shape == (x @ W).shape == (3, 16)
    lines = sparsekern.explain(x, W.T).splitlines()
    heads = [f"{name} M=3 N={n} K=16" for name in ("spmm_t", "spmm", "sddmm")]
    assert [line.split(": ")[1].split(" nnz")[0] for line in lines] == heads
    if n == 8:
        with pytest.raises(ValueError, match=r"K = 16, as W is 8 x 16 .*; explain\(x, W.T\) is"):
            sparsekern.explain(x, W)
        with pytest.raises(ValueError, match="K = 8, as W is 16 x 8 "):
            sparsekern.explain(torch.zeros(3, 16), W.T)


def test_explain_refuses_what_the_product_refuses():
    W = sparse(random_dense(8, 16, dtype=torch.float32))
    for x in (torch.zeros(3, 16).double(), torch.zeros(3, 16, device="meta")):
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(x, W)
        with pytest.raises(TypeError, match=f"x: expected torch.float32 on cpu .*{x.dtype} on"):
            sparsekern.explain(x, W)
    with pytest.raises(TypeError, match="got torch.float32 on cpu, torch.sparse_coo"):
        sparsekern.explain(torch.zeros(3, 16).to_sparse(), W)
    for wrong in ("a", 3, None):
        with pytest.raises(TypeError, match=f"x: expected a Tensor .*, got {wrong!r}"):
            sparsekern.explain(wrong, W)
    with torch.autocast("cpu", torch.bfloat16):
        assert "torch.bfloat16 on cpu" in sparsekern.explain(torch.zeros(3, 16), W)
