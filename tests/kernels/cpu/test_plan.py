"""The planner: a pure function whose plans are legal for any problem, machine and threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern
from sparsekern.kernels.cpu import panel
from sparsekern.kernels.cpu.machine import Machine, machine_name
from sparsekern.kernels.cpu.plan import SMALL_WORK, dense_wins_above, describe, make_plan
from sparsekern.kernels.problem import Problem

AVX2 = Machine("avx2", 8, 32 * 2**10, 512 * 2**10, False)
AVX512 = Machine("avx512", 16, 48 * 2**10, 2**21, True)
ZEN5 = Machine("avx512", 16, 48 * 2**10, 2**20, False, True, True, True, True)
UNKNOWN = Machine("portable", 4, 0, 0, False)

sizes = st.integers(0, 2**17)
machines = st.sampled_from([AVX2, AVX512, ZEN5, UNKNOWN])
threads = st.integers(1, 129)


@st.composite
def problems(draw):
    M, N, K = draw(sizes), draw(sizes), draw(sizes)
    nnz = draw(st.integers(0, min(N * K, 2**31 - 1)))
    op = draw(st.sampled_from(["spmm", "spmm_t", "sddmm"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Problem(op, "cpu", dtype, M, N, K, nnz)


@given(problems(), machines, threads)
def test_every_plan_is_legal(problem, machine, threads):
    plan = make_plan(problem, machine, threads)
    assert 1 <= plan.threads <= threads
    assert plan.vecs in (1, 2, 4, 8)
    assert plan.tile_parts in ((1, 2) if plan.vecs == 8 else (1,))
    assert 1 <= plan.rows <= 65536 and 1 <= plan.cols <= 65536
    assert plan.row_parts * plan.col_parts >= 1
    if problem.M * problem.nnz < SMALL_WORK:
        assert plan.threads == 1
    if problem.op == "sddmm":
        assert plan.row_parts * plan.col_parts == plan.threads
    else:
        assert plan.col_parts == 1


@given(problems(), machines, threads)
def test_threads_do_not_change_the_order_of_sums(problem, machine, threads):
    """Tiles keep their width, or 8 vectors are halved. SpMM sums column blocks from 0: it keeps
    them too."""
    one, many = make_plan(problem, machine, 1), make_plan(problem, machine, threads)
    assert many.vecs == one.vecs
    if problem.op != "sddmm":
        assert many.cols == one.cols


@given(problems(), machines, threads)
def test_panels_stay_within_their_bound(problem, machine, threads):
    """The x panel of a tile is K or N rows of at most 512 bytes, the y panel 192 KiB, or more where
    W is nearly empty."""
    plan = make_plan(problem, machine, threads)
    width = plan.vecs * machine.lanes * (1 + plan.pairs) // plan.tile_parts
    assert width * (2 if plan.pairs else 4) <= 512
    y_bytes = 2 if plan.pairs and problem.op == "sddmm" else 4
    most = max(1, 196608 // (width * y_bytes), int(1 / max(problem.density, 1e-9)) // 8)
    assert plan.rows <= most


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
@pytest.mark.parametrize("machine", [AVX2, AVX512, ZEN5, UNKNOWN], ids=lambda m: m.isa)
def test_blocks_of_a_nearly_empty_matrix_are_few(machine, op):
    """Each row is looked at in each column block, for spmm_t also each column in each row block."""
    for n, nnz in ((30000, 10**5), (2**20, 2**22), (2**24, 2**25)):
        for threads in (1, 16):
            plan = make_plan(Problem(op, "cpu", torch.float32, 64, n, n, nnz), machine, threads)
            looks = n * -(-n // plan.cols) + (op == "spmm_t") * n * -(-n // plan.rows)
            assert looks <= 12 * max(nnz, n * -(-n // 65536))
            assert op != "sddmm" or -(-n // plan.cols) >= plan.col_parts


def test_tokens_go_round():
    problem = Problem("spmm", "cpu", torch.float32, 1024, 2048, 2048, 2**20)
    assert make_plan(problem, AVX512, 1).tile_parts == 1
    halved = make_plan(problem, AVX512, 16)
    assert halved.tile_parts == 2 and halved.row_parts == 1  # 16 tiles of 64 tokens
    few = make_plan(problem._replace(M=256), AVX512, 16)
    assert few.row_parts == 4  # 4 tiles, each for 4 threads
    grid = make_plan(problem._replace(op="sddmm"), AVX512, 16)
    assert (grid.row_parts, grid.col_parts) == (4, 4)


def test_dense_crossover_falls_with_tokens_and_with_tiles_of_bfloat16():
    problem = Problem("spmm", "cpu", torch.bfloat16, 16, 768, 768, 1)
    few, many = (dense_wins_above(problem._replace(M=M), AVX2) for M in (16, 1024))
    assert few > many > 0.5
    assert dense_wins_above(problem._replace(M=1024), AVX512) < 0.1


@given(problems(), threads)
def test_a_machine_with_one_load_a_cycle_keeps_its_plans(problem, threads):
    """What two loads a cycle want is nothing for the others; of two machines with the same name the
    plans are equal."""
    plan = make_plan(problem, AVX512, threads)
    assert not plan.pairs
    slower = ZEN5._replace(l1_feeds=False, has_pairs=False, has_dots=False)
    assert plan == make_plan(problem, slower._replace(l2_bytes=AVX512.l2_bytes), threads)


def test_plans_for_two_loads_a_cycle():
    """A column block of x fits L1; bfloat16 stays in panels, and a sum has at most 96 terms."""
    problem = Problem("spmm", "cpu", torch.float32, 1024, 2048, 2048, 2**21)
    assert make_plan(problem, ZEN5, 1)[1:5] == (8, 1, 342, 72)
    quarter = make_plan(problem._replace(nnz=2**20), ZEN5, 1)
    assert (quarter.vecs, quarter.cols) == (4, 144)
    in_pairs = problem._replace(dtype=torch.bfloat16, nnz=2**20)
    forward, values = (make_plan(in_pairs._replace(op=op), ZEN5, 1) for op in ("spmm", "sddmm"))
    assert (forward.pairs, forward.vecs, forward.cols) == (True, 4, 144)
    for changed in ({"M": 160}, {"nnz": 2**17}):  # a second tile for 32 tokens; 95 % zeros
        assert make_plan(in_pairs._replace(**changed), ZEN5, 1).vecs == 2
    no_dots = make_plan(in_pairs, ZEN5._replace(has_dots=False), 1)
    assert (no_dots.pairs, no_dots.vecs, no_dots.cols) == (True, 2, 288)
    assert (values.pairs, values.vecs, values.cols) == (True, 8, 72)
    assert not make_plan(in_pairs._replace(M=16), ZEN5, 1).pairs
    assert quarter._replace(in_place=True) == make_plan(problem._replace(M=256, nnz=2**20), ZEN5, 1)


def test_dense_crossover_of_two_loads_a_cycle():
    """bfloat16 at twice the rate of float32: dense wins earlier, in SDDMM later than in SpMM."""
    problem = Problem("spmm", "cpu", torch.bfloat16, 1024, 2048, 2048, 1)
    forward, values = (dense_wins_above(problem._replace(op=o), ZEN5) for o in ("spmm", "sddmm"))
    assert 0.5 < forward < 0.6 < values < 0.75
    no_dots = ZEN5._replace(has_dots=False)
    assert 0.35 < dense_wins_above(problem, no_dots) < 0.45
    assert dense_wins_above(problem._replace(dtype=torch.float32), ZEN5) > values


def test_names_tell_machines_apart_that_get_other_plans():
    names = {machine_name(m) for m in (AVX512, ZEN5, ZEN5._replace(l1_feeds=False))}
    assert len(names) == 3
    assert machine_name(AVX512) == "avx512 49152 2097152 tiles"


def test_description():
    plan = make_plan(Problem("sddmm", "cpu", torch.float32, 1024, 768, 768, 2**17), AVX2, 4)
    text = "avx2, 4 threads, tiles of 64 tokens, blocks of 384 x "
    assert describe(plan, AVX2).startswith(text)
    assert describe(plan, AVX2).endswith("W in 2 x 2 parts")


@pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")
def test_explain_prints_the_plan():
    torch.set_num_threads(1)
    W = sparsekern.SparseTensor.from_dense(torch.randn(64, 96), torch.rand(64, 96) < 0.25)
    lines = sparsekern.explain(torch.randn(100, 96), W).splitlines()
    assert len(lines) == 3
    assert all(f"panel ({panel.machine().isa}, 1 thread, tiles of " in line for line in lines)
