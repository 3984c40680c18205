"""The helpers that every other test and benchmark trusts."""

import math

import pytest
import torch

from sparsekern import testing
from sparsekern.testing import PROBLEMS, Case, interleaved_times, relative_error


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.999, 1.0])
def test_random_mask_has_exactly_the_asked_for_count(sparsity):
    mask = testing.random_mask(37, 101, sparsity, torch.Generator().manual_seed(0))
    assert mask.shape == (37, 101) and mask.dtype == torch.bool
    assert mask.sum() == round((1 - sparsity) * 37 * 101)


def test_random_csr_is_valid_and_repeatable():
    row_offsets, col_indices, values = testing.random_csr(5, 8, 0.5, torch.bfloat16, seed=3)
    assert row_offsets.dtype == col_indices.dtype == torch.int32
    assert values.dtype == torch.bfloat16
    assert row_offsets[0] == 0 and row_offsets[-1] == len(col_indices) == len(values) == 20
    for start, end in zip(row_offsets, row_offsets[1:], strict=False):
        assert (col_indices[start:end].diff() > 0).all()
    again = testing.random_csr(5, 8, 0.5, torch.bfloat16, seed=3)
    assert all(map(torch.equal, again, (row_offsets, col_indices, values)))


def test_problems_cover_the_awkward_cases():
    assert len({case.name for case in PROBLEMS}) == len(PROBLEMS)
    assert {1, 7, 64, 513} <= {case.M for case in PROBLEMS}
    masks = {case.mask_kind: case.tensors().mask for case in PROBLEMS if case.M == 7}
    assert not masks["empty"].any() and masks["full"].all()
    assert (~masks["empty_row"].any(dim=1)).any() and masks["full_row"].all(dim=1).any()
    assert (~masks["empty_column"].any(dim=0)).any()


def test_an_unknown_mask_kind_is_named():
    with pytest.raises(ValueError, match="unknown mask_kind 'diagonal'"):
        Case("c", 1, 2, 3, "diagonal").tensors()


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_tensors_agree_with_torch_sparse(case):
    t = case.tensors(torch.float64)
    rows = torch.arange(case.N).repeat_interleave(t.row_offsets.diff())
    index = torch.stack([rows, t.col_indices.long()])
    coo = torch.sparse_coo_tensor(index, t.values, t.mask.shape, check_invariants=True)
    assert torch.equal(coo.to_dense(), t.weight)
    assert t.x.shape == (case.M, case.K) and t.dy.shape == (case.M, case.N)
    exact = testing.exact(t)
    assert relative_error(t.x @ t.weight.T, *exact["spmm"]) < 1e-15
    assert relative_error(t.dy @ t.weight, *exact["spmm_t"]) < 1e-15
    assert relative_error((t.dy.T @ t.x)[t.mask], *exact["sddmm"]) < 1e-15


def test_every_dtype_has_the_same_numbers():
    case = PROBLEMS[0]
    wide, narrow = case.tensors(torch.float64), case.tensors(torch.float16)
    assert torch.equal(wide.mask, narrow.mask)
    assert torch.equal(wide.x.half(), narrow.x) and torch.equal(wide.values.half(), narrow.values)


def test_relative_error():
    want = torch.tensor([1.0, 0.0], dtype=torch.float64)
    scale = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, 0.0]), want, scale) == 0
    assert relative_error(torch.tensor([1.5, 0.0]), want, scale) == 0.25
    assert relative_error(torch.tensor([1.0, 1e-30]), want, scale) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, 0.0]), want, scale))
    with pytest.raises(ValueError, match="shape of the result"):
        relative_error(torch.zeros(2, 1), want, scale)


def test_interleaved_times_takes_turns():
    now = 0.0
    log = []

    def worker(name, seconds):
        def work():
            nonlocal now
            now += seconds
            log.append(name)

        return work

    times = interleaved_times(
        {"slow": worker("slow", 1.0), "fast": worker("fast", 0.25)},
        rounds=3,
        min_round_s=0.5,
        clock=lambda: now,
    )
    assert times == {"slow": [1.0] * 3, "fast": [0.25] * 3}
    assert log[4:] == ["slow", "fast", "fast"] * 3
