"""W in lanes: the layout, and the product against float64 on every instruction set."""

import pytest
import torch
from infinities import check_stored, tokens_with_infinities, weight_with_infinities

from sparsekern.kernels.cpu import lanes
from sparsekern.tensor import SparseTensor
from sparsekern.testing import Case, exact, relative_error

pytestmark = pytest.mark.skipif(lanes._C is None, reason="the C++ library is not built")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
# Rows off groups of 16 and parts of 512, columns off blocks of 63 and, with 3001, of 32 blocks.
SHAPES = [
    Case("odd", 0, 37, 101),
    Case("empty-row", 0, 37, 101, "empty_row"),
    Case("full-row", 0, 37, 101, "full_row", 0.9),
    Case("full", 0, 17, 127, "full"),
    Case("empty", 0, 37, 101, "empty"),
    Case("one-by-one", 0, 1, 1, "full"),
    Case("block", 0, 16, 63, sparsity=0.5),
    Case("parts", 0, 1030, 70, sparsity=0.5),
    Case("long-rows", 0, 20, 3001, sparsity=0.5),
]


def weight_of(t):
    return SparseTensor(t.row_offsets, t.col_indices, t.values, t.mask.shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_products(case, dtype, nan_memory):
    for M in (0, 1, 2, 3, 4, 7, 9, 200):
        t = Case(case.name, M, case.N, case.K, case.mask_kind, case.sparsity).tensors(dtype)
        packed = lanes.pack(weight_of(t))
        packed.check()
        got = lanes.spmm_lanes(t.x, packed)
        assert got.dtype == dtype and got.shape == (M, case.N)
        assert relative_error(got, *exact(t)["spmm"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("M", [1, 2, 4, 11, 300])
def test_what_is_not_stored_takes_no_part(M, dtype):
    w, mask, bias = weight_with_infinities(70, 200, dtype)
    x = tokens_with_infinities(M, 200, dtype)
    packed = lanes.pack(SparseTensor.from_dense(w, mask))
    assert lanes.writes_out(M, packed) == (M == 300)
    check_stored(lanes.spmm_lanes(x, packed, bias), x, w, mask, bias)


def test_same_bits_whatever_the_threads():
    t = Case("bits", 3, 1500, 600, sparsity=0.5).tensors()
    packed, results = lanes.pack(weight_of(t)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(lanes.spmm_lanes(t.x, packed))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_each_value_has_a_place_of_its_own():
    t = Case("places", 1, 600, 130, sparsity=0.7).tensors()
    packed = lanes.pack(weight_of(t))
    assert torch.equal(lanes._to_dense(packed), t.weight)
    assert (packed.values != 0).sum() == (t.values != 0).sum()
    steps = packed.heads[:, 1].long().sum()
    assert packed.part_steps.tolist()[-1] == steps == len(packed.cols) == len(packed.values)


def test_what_cannot_be_packed():
    W = weight_of(Case("wrong", 1, 20, 30).tensors())
    with pytest.raises(TypeError, match="weight: expected float32 or bfloat16 values, got .*64"):
        lanes.pack(SparseTensor(W.row_offsets, W.col_indices, W.values.double(), W.shape))
    with pytest.raises(ValueError, match="weight: expected W .* got a transpose"):
        lanes.pack(W.T)
    W.col_indices[3] = 30
    with pytest.raises(ValueError, match="col_indices: expected"):
        lanes.pack(W)


def test_other_defaults_of_torch():
    t = Case("defaults", 3, 37, 101).tensors()
    want = lanes.spmm_lanes(t.x, lanes.pack(weight_of(t)))
    with torch.device("meta"):
        assert torch.equal(lanes.spmm_lanes(t.x, lanes.pack(weight_of(t))), want)


def test_contents_that_packing_did_not_make():
    """They lead nowhere out of bounds: any byte is a column, and heads are checked by each call."""
    t = Case("contents", 3, 1030, 70, sparsity=0.5).tensors()
    whole = lanes.pack(weight_of(t))

    def changed(name, change):
        packed = whole._replace(**{name: getattr(whole, name).clone()})
        change(getattr(packed, name))
        return packed

    lanes.spmm_lanes(t.x, changed("cols", lambda cols: cols.random_(0, 256)))
    for packed in (
        changed("heads", lambda heads: heads.random_(0, 256)),
        changed("heads", lambda heads: heads[0].fill_(32)),
        changed("heads", lambda heads: heads[-1, 1].add_(1)),
        changed("part_steps", lambda steps: steps[0].sub_(1)),
        changed("part_steps", lambda steps: steps.add_(2**62)),
    ):
        for x in (t.x, t.x[:1].expand(200, -1).contiguous()):
            with pytest.raises(ValueError, match="part_steps, heads: expected what packing made"):
                lanes.spmm_lanes(x, packed)
