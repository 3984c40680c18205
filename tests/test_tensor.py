"""SparseTensor: conversions, what it keeps, what it refuses."""

import copy
import re
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
import torch
from conftest import random_dense
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekern import SparseLinear, SparseTensor, indices
from sparsekern.kernels import derived, reference
from sparsekern.kernels.cpu import panel
from sparsekern.sparsity.pattern import places_of, set_pattern
from sparsekern.tensor import check_pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {
    "coo": lambda w: w.to_sparse_coo(),
    "csr": lambda w: w.to_sparse_csr(),
    "csc": lambda w: w.to_sparse_csc(),
    "bsr": lambda w: w.to_sparse_bsr((2, 3)),
}


def csr(row_offsets=(0, 2, 3), col_indices=(0, 2, 1), values=(1.0, 2.0, 3.0), shape=(2, 3)):
    """Keyword by keyword, a small valid tensor or a wrong one."""
    return SparseTensor(
        torch.as_tensor(row_offsets), torch.as_tensor(col_indices), torch.as_tensor(values), shape
    )


def assert_same(a: SparseTensor, b: SparseTensor):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.equal(a.row_offsets, b.row_offsets)
    assert torch.equal(a.col_indices, b.col_indices)
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=0, equal_nan=True)


@st.composite
def matrices(draw):
    """Dense matrices of any small shape with zeros, -0.0, NaN and infinities in them."""
    n, k = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    number = st.sampled_from([0.0, 0.0, -0.0, 1.0, -2.5, float("inf"), float("nan")])
    numbers = draw(st.lists(number, min_size=n * k, max_size=n * k))
    return torch.tensor(numbers, dtype=draw(st.sampled_from(DTYPES))).view(n, k)


@settings(deadline=None)
@given(matrices())
def test_dense_round_trip(w):
    W = SparseTensor.from_dense(w, w != 0)
    assert W.nnz == (w != 0).sum() and W.shape == w.shape
    torch.testing.assert_close(W.to_dense(), w, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(W.T.to_dense(), w.T, rtol=0, atol=0, equal_nan=True)
    # What from_dense makes passes the checks of the constructor.
    assert_same(SparseTensor(W.row_offsets, W.col_indices, W.values, w.shape), W)


@settings(deadline=None)
@given(matrices(), st.integers(0, 2**49 - 1))
def test_mask_round_trip_keeps_explicit_zeros(w, bits):
    flat = [bool(bits >> i & 1) for i in range(w.numel())]
    mask = torch.tensor(flat, dtype=torch.bool).view(w.shape)
    W = SparseTensor.from_dense(w, mask)
    assert W.nnz == mask.sum()
    want = torch.where(mask, w, 0)
    torch.testing.assert_close(W.to_dense(), want, rtol=0, atol=0, equal_nan=True)
    assert_same(SparseTensor.from_torch(W.to_torch()), W)
    assert torch.equal(SparseTensor.from_dense(mask.float()).col_indices, W.col_indices)


@settings(deadline=None)
@given(matrices().filter(lambda w: w.numel() > 0))
def test_torch_and_scipy_round_trips(w):
    W = SparseTensor.from_dense(w, w != 0)
    for layout in ("coo", "csr", "csc"):
        assert_same(SparseTensor.from_torch(LAYOUTS[layout](w)), W)
    assert_same(SparseTensor.from_scipy(W.to_scipy()).to(w.dtype), W)
    transposed = SparseTensor.from_dense(w.T, w.T != 0)
    assert_same(SparseTensor.from_torch(W.T.to_torch()), transposed)
    assert_same(SparseTensor.from_scipy(W.T.to_scipy()).to(w.dtype), transposed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_torch(layout, dtype):
    w = random_dense(4, 6, dtype=dtype)
    W = SparseTensor.from_torch(LAYOUTS[layout](w))
    assert torch.equal(W.to_dense(), w) and W.dtype == dtype


def test_from_torch_keeps_what_is_stored():
    block = torch.zeros(4, 6)
    block[0, 0] = 1
    W = SparseTensor.from_torch(block.to_sparse_bsr((2, 3)))
    assert W.nnz == 6 and torch.equal(W.to_dense(), block)
    coo = torch.sparse_coo_tensor([[1, 0, 1], [2, 0, 2]], [1.0, 0.0, 2.0], (2, 3))
    W = SparseTensor.from_torch(coo)  # duplicates are summed, the zero stays
    assert W.nnz == 2 and W.to_dense()[1, 2] == 3


def test_from_scipy_formats():
    w = random_dense(5, 7)
    for name in ("coo", "csr", "csc", "bsr", "lil", "dok"):
        W = SparseTensor.from_scipy(scipy.sparse.csr_matrix(w.numpy()).asformat(name))
        assert torch.equal(W.to_dense(), w)
    unsorted = scipy.sparse.csr_matrix(
        (np.array([1.0, 2.0]), np.array([2, 0]), np.array([0, 2])), shape=(1, 3)
    )
    assert SparseTensor.from_scipy(unsorted).col_indices.tolist() == [0, 2]
    assert unsorted.indices.tolist() == [2, 0]  # the user's matrix is as it was


def test_to_scipy_widens_16_bit_values():
    assert SparseTensor.from_dense(torch.ones(2, 2).bfloat16()).to_scipy().dtype == np.float32


def test_from_cupy_shares_memory():
    """scipy's matrices stand for cupyx's: the same attributes, and arrays that speak DLPack."""
    a = scipy.sparse.csr_matrix(random_dense(5, 7).numpy())
    W = SparseTensor.from_cupy(a)
    assert_same(W, SparseTensor.from_scipy(a))
    assert W.values.data_ptr() == a.data.ctypes.data
    assert W.col_indices.data_ptr() == a.indices.ctypes.data
    assert W.row_offsets.data_ptr() == a.indptr.ctypes.data
    for name in ("coo", "csc"):
        assert_same(SparseTensor.from_cupy(a.asformat(name)), W)
    long = scipy.sparse.csr_matrix(a)
    long.indices, long.indptr = a.indices.astype(np.int64), a.indptr.astype(np.int64)
    assert_same(SparseTensor.from_cupy(long), W)

    def one_row(columns):
        parts = np.array([1.0, 2.0]), np.array(columns), np.array([0, 2])
        return scipy.sparse.csr_matrix(parts, shape=(1, 3))

    assert SparseTensor.from_cupy(one_row([2, 0])).to_dense().tolist() == [[2, 0, 1]]
    with pytest.raises(ValueError, match="col_indices: .* in row 0: a duplicate"):
        SparseTensor.from_cupy(one_row([2, 2]))
    with pytest.raises(TypeError, match="values: expected float32, .*, got torch.complex64"):
        SparseTensor.from_cupy(scipy.sparse.csr_matrix(np.eye(3, dtype=np.complex64)))


def test_from_cupy_converts_where_the_matrix_is():
    """cupy computes on its current device, whatever the device of the arrays."""
    csr, current = scipy.sparse.csr_matrix(random_dense(5, 7).numpy()), [0]

    @contextmanager
    def second():
        current.append(1)
        yield
        current.pop()

    def tocsr():
        assert current[-1] == 1
        return csr

    coo = SimpleNamespace(data=SimpleNamespace(device=second()), tocsr=tocsr)
    assert_same(SparseTensor.from_cupy(coo), SparseTensor.from_scipy(csr))
    assert current == [0]


def test_what_to_cupy_refuses():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"to_cupy: expected float32 or .*, got {dtype}"):
            SparseTensor.from_dense(torch.eye(2, dtype=dtype)).to_cupy()
    with pytest.raises(ValueError, match="to_cupy: expected a tensor on a GPU, got one on cpu"):
        SparseTensor.from_dense(torch.eye(2)).to_cupy()


def test_nan_is_kept_where_asked():
    w = torch.tensor([[0.0, torch.nan], [1.0, 0.0]])
    with pytest.raises(ValueError, match="w: 1 of its entries are NaN.* mask=~w.isnan"):
        SparseTensor.from_dense(w)
    marked = SparseTensor.from_dense(w, ~w.isnan())  # what a file with NaN for pruned means
    assert marked.nnz == 3 and torch.equal(marked.to_dense(), w.nan_to_num())
    W = SparseTensor.from_dense(w, w != 0)
    assert W.nnz == 2 and W.to_dense().isnan().sum() == 1
    assert SparseTensor.from_torch(w.to_sparse_csr()).values.isnan().sum() == 1


def test_properties():
    W = csr()
    assert W.shape == (2, 3) and W.ndim == 2 and W.nnz == 3
    assert W.density == W.sparsity == 0.5
    assert W.dtype == torch.float32 and W.device.type == "cpu" and not W.requires_grad
    assert repr(W) == (
        "SparseTensor(shape=(2, 3), nnz=3, sparsity=0.5, dtype=torch.float32, device=cpu)"
    )
    assert W.T.shape == (3, 2) and W.T.values is W.values and W.T.T.shape == W.shape
    assert "(3, 2)" in repr(W.T)
    W.values.requires_grad_()
    assert W.requires_grad and "requires_grad=True" in repr(W) and not W.detach().requires_grad
    assert csr((0,), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (0, 0)).density == 0


def test_int64_indices_are_narrowed():
    W = csr()
    assert torch.as_tensor((0, 2, 3)).dtype == torch.int64
    assert W.row_offsets.dtype == W.col_indices.dtype == torch.int32


def test_to():
    W = csr()
    assert W.to(torch.float64).values.dtype == torch.float64
    assert W.T.to("cpu", torch.bfloat16).shape == (3, 2)
    assert W.to("meta").row_offsets.device.type == "meta"
    assert W.to(W.device).values is W.values
    with pytest.raises(TypeError, match="dtype: expected float32, .* got torch.int32"):
        W.to(torch.int32)


def test_deepcopy():
    W = csr()
    other = copy.deepcopy(W.T)
    assert_same(other.T, W)
    assert other.values is not W.values


def test_gradients_flow_through_conversions():
    w = random_dense(4, 5).requires_grad_()
    W = SparseTensor.from_dense(w)
    assert W.requires_grad
    (W.to_dense().cos().sum() + W.T.to_dense().sin().sum()).backward()
    assert torch.equal(w.grad != 0, w != 0)
    values = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: csr(values=v).to_dense(), values)
    assert torch.autograd.gradcheck(lambda v: csr(values=v).T.to_dense(), values)


WRONG = {
    "shape rank": (dict(shape=(2, 3, 1)), ValueError, r"shape: expected (N, K), got (2, 3, 1)"),
    "shape is a number": (dict(shape=2), TypeError, "shape: expected (N, K), got 2"),
    "shape is none": (dict(shape=None), TypeError, "shape: expected (N, K), got None"),
    "shape is a text": (dict(shape="23"), TypeError, "shape: expected (N, K), got '23'"),
    "shape has no order": (dict(shape={2, 3}), TypeError, "shape: expected (N, K), got {2, 3}"),
    "size is no integer": (dict(shape=(2.0, 3)), TypeError, "N: expected a whole number, got 2.0"),
    "size is a bool": (dict(shape=(2, True)), TypeError, "K: expected a whole number, got True"),
    "negative size": (dict(shape=(2, -1)), ValueError, "K: expected 0 <= K < 2**31"),
    "large size": (dict(shape=(2, 2**31)), ValueError, "(int32 indices), got 2147483648"),
    "offsets dtype": (
        dict(row_offsets=(0.0, 2.0, 3.0)),
        TypeError,
        "row_offsets: expected an int32 or int64 tensor, got a torch.strided tensor of dtype "
        "torch.float32",
    ),
    "offsets rank": (dict(row_offsets=((0, 2, 3),)), ValueError, "row_offsets: expected a 1-D"),
    "offsets length": (
        dict(row_offsets=(0, 3)),
        ValueError,
        "row_offsets: expected 3 elements, got 2",
    ),
    "offsets start": (
        dict(row_offsets=(1, 2, 3)),
        ValueError,
        "row_offsets: expected to start at 0 and end at nnz = 3, got 1 and 3",
    ),
    "offsets end": (dict(row_offsets=(0, 2, 4)), ValueError, "got 0 and 4"),
    "offsets fall": (
        dict(row_offsets=(0, 2, 1, 3), shape=(3, 3)),
        ValueError,
        "row_offsets: expected not to decrease, got 2 before 1 at row 1",
    ),
    "columns dtype": (
        dict(col_indices=(True, True, True)),
        TypeError,
        "col_indices: expected an int32 or int64 tensor",
    ),
    "columns rank": (dict(col_indices=((0, 2, 1),)), ValueError, "col_indices: expected a 1-D"),
    "columns high": (
        dict(col_indices=(0, 3, 1)),
        ValueError,
        "col_indices: expected to lie in [0, 3), got 0 to 3",
    ),
    "columns low": (dict(col_indices=(-1, 2, 1)), ValueError, "got -1 to 2"),
    "columns beyond int32": (dict(col_indices=(0, 2**32, 1)), ValueError, "0 to 4294967296"),
    "columns duplicate": (
        dict(row_offsets=(0, 1, 3), col_indices=(0, 1, 1)),
        ValueError,
        "got 1 before 1 in row 1: a duplicate",
    ),
    "columns duplicate, unsorted": (
        dict(row_offsets=(0, 0, 3), col_indices=(2, 0, 2)),
        ValueError,
        "got 2 before 2 in row 1: a duplicate",
    ),
    "offsets wrap": (
        dict(
            row_offsets=torch.tensor([0, 2**31 - 1, -(2**31), 3], dtype=torch.int32), shape=(3, 3)
        ),
        ValueError,
        "row_offsets: expected not to decrease, got 2147483647 before -2147483648 at row 1",
    ),
    "values dtype": (
        dict(values=(1, 2, 3)),
        TypeError,
        "values: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "values complex": (dict(values=(1j, 2, 3)), TypeError, "got torch.complex64"),
    "values rank": (dict(values=((1.0, 2.0, 3.0),)), ValueError, "values: expected a 1-D tensor"),
    "values length": (dict(values=(1.0,)), ValueError, "values: expected 3 elements, got 1"),
}


@pytest.mark.parametrize("arguments, error, text", WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        csr(**arguments)


def test_wrong_device():
    with pytest.raises(ValueError, match="values: expected device cpu, got meta"):
        csr(values=torch.empty(3, device="meta"))


def test_not_a_tensor():
    with pytest.raises(TypeError, match="values: expected a strided tensor, got list"):
        SparseTensor(torch.tensor([0, 1]), torch.tensor([0]), [1.0], (1, 1))


def test_too_many_values():
    # Views of one element: nothing of that size is allocated, and nothing may be read before the
    # sizes are checked.
    nnz = 2**31
    col_indices = torch.zeros((), dtype=torch.int64).expand(nnz)
    with pytest.raises(ValueError, match=r"nnz: expected 0 <= nnz < 2\*\*31 .*, got 2147483648"):
        csr((0, 0, nnz), col_indices, torch.zeros(()).expand(nnz))


def test_rows_with_empty_neighbours():
    # Columns may fall from one row to the next, also past empty rows at either end.
    W = csr((0, 0, 1, 1, 2, 2), (2, 0), (1.0, 2.0), (5, 3))
    assert W.to_dense()[1, 2] == 1 and W.to_dense()[3, 0] == 2


W34 = torch.ones(3, 4)


@pytest.mark.parametrize(
    "w, mask, error, text",
    [
        ([1.0], None, TypeError, "w: expected a strided tensor, got list"),
        (W34.to_sparse(), None, TypeError, "w: expected a strided tensor, got a torch.sparse_coo"),
        (
            W34.int(),
            None,
            TypeError,
            "w: expected float32, bfloat16, float16 or float64, got torch",
        ),
        (W34.to(torch.complex64), None, TypeError, "got torch.complex64"),
        (W34[0], None, ValueError, "w: expected a 2-D tensor, got shape (4,)"),
        (W34, W34, TypeError, "mask: expected a tensor of dtype torch.bool, got a torch.strided"),
        (W34, [True], TypeError, "mask: expected a tensor of dtype torch.bool, got list"),
        (
            W34,
            W34[:, :3] != 0,
            ValueError,
            "mask: expected shape (3, 4) on cpu, got shape (3, 3) on cpu",
        ),
        (W34, (W34 != 0).to("meta"), ValueError, "got shape (3, 4) on meta"),
    ],
)
def test_from_dense_refuses(w, mask, error, text):
    with pytest.raises(error, match=re.escape(text)):
        SparseTensor.from_dense(w, mask)


def test_from_torch_refuses():
    for wrong, text in (
        (W34, "expected a torch COO, CSR, CSC or BSR tensor, got a torch.strided tensor"),
        (W34.to_sparse_bsc((1, 2)), "got a torch.sparse_bsc tensor"),
        ("W", "got str"),
    ):
        with pytest.raises(TypeError, match=text):
            SparseTensor.from_torch(wrong)
    for wrong in (torch.ones(2, 3, 4).to_sparse_csr(), W34.to_sparse(1)):
        with pytest.raises(ValueError, match="t: expected 2 sparse dimensions, got shape"):
            SparseTensor.from_torch(wrong)
    two, unchecked = torch.ones(2), {"check_invariants": False}
    for rows, shape, text in (
        ([0, 5], (3, 4), "t: expected its rows to lie in [0, 3), got 0 to 5"),
        ([-1, 0], (3, 4), "t: expected its rows to lie in [0, 3), got -1 to 0"),
        ([0, 2**33], (2**33 + 1, 4), "N: expected 0 <= N < 2**31"),
    ):
        coo = torch.sparse_coo_tensor(torch.tensor([rows, [0, 1]]), two, shape, **unchecked)
        csc = torch.tensor([0, 1, 2, 2, 2]), torch.tensor(rows), two, shape
        for wrong in (coo, torch.sparse_csc_tensor(*csc, **unchecked)):
            with pytest.raises(ValueError, match=re.escape(text)):
                SparseTensor.from_torch(wrong)


def test_strided_indices_are_made_contiguous():
    """The kernels take pointers: every tensor of the pattern must lie in one piece."""
    W = SparseTensor.from_dense(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]))
    spread = [torch.stack([t, t], dim=1)[:, 0] for t in (W.row_offsets, W.col_indices)]
    again = SparseTensor(*spread, W.values, W.shape)
    assert again.row_offsets.is_contiguous() and again.col_indices.is_contiguous()
    assert torch.equal(again.to_dense(), W.to_dense())
    assert W.col_indices.is_contiguous()


@settings(max_examples=60)
@given(
    st.integers(0, 5), st.integers(0, 6), st.sampled_from(("int32", "int64")), st.integers(0, 999)
)
def test_unsorted_columns_are_sorted(n, k, index_dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    w = torch.rand(n, k, generator=rng)
    w *= w < 0.6
    W = SparseTensor.from_dense(w)
    ends = W.row_offsets.tolist()
    orders = [torch.arange(0)]
    for a, b in zip(ends, ends[1:], strict=False):
        orders.append(a + torch.randperm(b - a, generator=rng))
    order, dtype = torch.cat(orders), getattr(torch, index_dtype)
    parts = W.row_offsets.to(dtype), W.col_indices[order].to(dtype), W.values[order]
    assert_same(SparseTensor(*parts, w.shape), W)
    if w.numel():
        unsorted = torch.sparse_csr_tensor(*parts, w.shape, check_invariants=False)
        assert_same(SparseTensor.from_torch(unsorted), W)


def test_values_are_sorted_with_their_columns():
    parts = (0, 2, 3), (2, 0, 1)
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    want = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    W = csr(*parts, values)
    assert torch.equal(W.to_dense(), want)
    (W.to_dense() * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad.tolist() == [2, 0, 4]
    for given_values in (values, nn.Parameter(values.detach(), requires_grad=False)):
        tensors = (torch.tensor(part) for part in parts)
        layer = SparseLinear(3, 2, *tensors, given_values)
        assert torch.equal(layer.weight.to_dense(), want)
        assert layer.values.is_leaf and layer.values.requires_grad == given_values.requires_grad
    layer = SparseLinear.from_linear(nn.Linear(3, 2))
    tensors = {"col_indices": torch.tensor(parts[1]), "values": values.detach()}
    layer.load_state_dict({"row_offsets": torch.tensor(parts[0]), **tensors}, strict=False)
    assert torch.equal(layer.weight.to_dense(), want)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_places_beyond_32_bits(index_dtype):
    """A diagonal and some entries beside it, N * K = 4.3e9, in each layout of torch."""
    n = 65_537
    rows = torch.arange(n).repeat(2)
    cols = torch.cat([torch.arange(n), (torch.arange(n) * 7 + 3) % n])
    places = (rows * n + cols).unique()
    rows, cols, values = places // n, places % n, torch.arange(1.0, len(places) + 1)
    W = SparseTensor(torch.searchsorted(rows, torch.arange(n + 1)), cols, values, (n, n))
    assert torch.equal(W.values, values)

    x = torch.randn(2, n, dtype=torch.float64)
    want = torch.zeros(2, n, dtype=torch.float64).index_add(1, rows, values.double() * x[:, cols])
    csr = W.to_torch()
    forms = {
        "csr": csr,
        "coo": torch.sparse_coo_tensor(torch.stack([rows, cols]), values, (n, n)),
        "csc": W.T.to_torch().t(),
        "bsr": torch.sparse_bsr_tensor(
            W.row_offsets, W.col_indices, values[:, None, None], (n, n), check_invariants=False
        ),
    }
    for t in forms.values():
        if t.layout != torch.sparse_coo:
            name = "ccol_indices" if t.layout == torch.sparse_csc else "crow_indices"
            plain = "row_indices" if t.layout == torch.sparse_csc else "col_indices"
            outer, inner = (getattr(t, part)().to(index_dtype) for part in (name, plain))
            make = torch.sparse_compressed_tensor
            t = make(outer, inner, t.values(), t.shape, layout=t.layout, check_invariants=False)
        assert_same(SparseTensor.from_torch(t), W)
    assert_same(SparseTensor.from_scipy(W.to_scipy()), W)
    assert torch.equal(SparseTensor.from_torch(W.T.to_torch()), W.T)
    reverse = torch.cat([torch.arange(a, b).flip(0) for a, b in W.row_offsets[-9:].unfold(0, 2, 1)])
    order = torch.cat([torch.arange(int(reverse.min())), reverse])
    parts = W.row_offsets.to(index_dtype), W.col_indices[order].to(index_dtype), values[order]
    assert_same(SparseTensor(*parts, (n, n)), W)
    if panel._C is not None:  # without the library W is written out
        got = torch.mv(W, x[0].float())
        torch.testing.assert_close(got.double(), want[0], rtol=1e-4, atol=1.0)


def test_places_beyond_32_bits_elsewhere():
    """The dense rows' flat places and those that dynamic sparsity moves, N * K = 3.6e9."""
    n = 60_000
    rows, cols = torch.tensor([0, 40_000, n - 1]), torch.tensor([n - 1, 5, n - 1])
    offsets = torch.searchsorted(rows, torch.arange(n + 1))
    layer = SparseLinear(n, n, offsets, cols, nn.Parameter(torch.tensor([1.0, 2.0, 3.0])))
    places = rows * n + cols
    pattern = layer.row_offsets, layer.col_indices
    assert places.max() > 2**31 and torch.equal(reference.places_of(*pattern, n, n), places)
    assert torch.equal(places_of(layer), places)
    set_pattern(layer, places + torch.tensor([0, 1, 0]))
    assert layer.col_indices.tolist() == [n - 1, 6, n - 1]
    assert layer.values.tolist() == [1, 0, 3]
    check_pattern(layer.row_offsets, layer.col_indices, n, n)


def test_what_torch_has_and_this_has_not_is_said():
    for wrong, error, text in (
        (torch.ones(2, 3, 4).to_sparse(), ValueError, "make a SparseTensor of each matrix"),
        (torch.ones(2, 3, 4).to_sparse_csr(), ValueError, "make a SparseTensor of each matrix"),
        (
            torch.ones(2, 3).to_sparse_csr().to(torch.complex64),
            TypeError,
            "torch.sparse has complex",
        ),
        (torch.ones(2, 3).to_sparse_csr().int(), TypeError, "got torch.int32; convert it first"),
        (torch.ones(2, 3, dtype=torch.int64).to_sparse(), TypeError, "int64; convert it first"),
    ):
        with pytest.raises(error, match=text):
            SparseTensor.from_torch(wrong)
    with pytest.raises(TypeError, match="values: .* got torch.int64; convert it first"):
        SparseTensor.from_scipy(scipy.sparse.eye_array(3, dtype=np.int64))
    for make, library in ((SparseTensor.from_scipy, "scipy"), (SparseTensor.from_cupy, "cupyx")):
        with pytest.raises(TypeError, match=f"a: expected .* {library}.*, got ndarray"):
            make(np.eye(3))


def test_sizes_become_integers():
    W = csr(shape=(np.int64(2), torch.tensor(3)))
    assert type(W.n) is type(W.k) is int


def test_indices_of_inference_mode_are_copied():
    """Such tensors have no version counter, and every product would look at all of them."""
    w = random_dense(4, 5)
    with torch.inference_mode():
        made = SparseTensor.from_dense(w)
        parts = (t.clone() for t in (made.row_offsets, made.col_indices, made.values))
        tensors = [
            made,
            SparseTensor(*parts, w.shape),
            SparseTensor(made.row_offsets.long(), made.col_indices.long(), made.values, w.shape),
            SparseTensor.from_torch(w.to_sparse_csr()),
            SparseTensor.from_torch(w.to_sparse()),
            SparseTensor.from_scipy(made.to_scipy()),
            made.clone(),
            made.to("meta"),
            copy.deepcopy(made),
        ]
    for W in tensors:
        assert not W.row_offsets.is_inference() and not W.col_indices.is_inference()


@pytest.mark.parametrize("offset", [5000, -5000])
def test_offsets_that_fall_are_an_error_before_anything_is_written(offset):
    """torch's repeat_interleave would find out when it has written beyond its result."""
    W = SparseTensor.from_dense(torch.ones(6, 8))
    W.row_offsets[2] = offset
    uses = [
        W.to_dense,
        lambda: W.sum(1),
        lambda: W.T.sum(1),
        lambda: W + W.clone(),
        lambda: W @ W.T,
    ]
    parts = W.row_offsets, W.col_indices, W.values, (8, 6)
    csc = torch.sparse_csc_tensor(*parts, check_invariants=False)
    blocks = W.values[:, None, None], (6, 8)
    bsr = torch.sparse_bsr_tensor(*parts[:2], *blocks, check_invariants=False)
    uses += [lambda t=t: SparseTensor.from_torch(t) for t in (csc, bsr)]
    for use in uses:
        with pytest.raises(ValueError, match="row_offsets: expected not to decrease, got"):
            use()


@pytest.mark.parametrize("column", [-1, 0, 8])
def test_what_is_made_of_two_checks_columns_that_were_written(column):
    W, V = (SparseTensor.from_dense(torch.ones(6, 8)) for _ in range(2))
    W.col_indices[1] = column
    for make in (lambda: W @ V.T, lambda: V.T @ W, lambda: W + V, lambda: V * W):
        with pytest.raises(ValueError, match="col_indices: expected to"):
            make()


def test_sums_of_two_check_a_pattern_once(monkeypatch):
    checked = []
    check = derived.check_pattern
    monkeypatch.setattr(derived, "check_pattern", lambda *of: [checked.append(of), check(*of)])
    W, V = (SparseTensor.from_dense(torch.ones(6, 8)) for _ in range(2))
    for _ in range(3):
        W + V
    assert len(checked) == 2
    V.col_indices[0] = 0
    V * W
    assert len(checked) == 3


def test_indices_changed():
    """Writes that torch does not count are seen after a word about them."""
    w = random_dense(64, 64, density=0.2, dtype=torch.float32)
    W, x = SparseTensor.from_dense(w), torch.randn(8, 64)
    torch.testing.assert_close(x @ W.T, x @ w.T)
    versions = W.row_offsets._version, W.col_indices._version
    row = next(i for i in range(64) if W.col_indices[W.row_offsets[i + 1] - 1] < 63)
    W.col_indices.numpy()[W.row_offsets[row + 1] - 1] += 1
    assert W.indices_changed_() is W
    assert (W.row_offsets._version, W.col_indices._version) > versions
    torch.testing.assert_close(x @ W.T, x @ W.to_dense().T)
    with torch.inference_mode():
        frozen = SparseTensor._trusted(
            W.row_offsets.clone(), W.col_indices.clone(), W.values, 64, 64
        )
    frozen.indices_changed_()


def test_what_leaves_is_checked():
    """Others trust the CSR that they are given, and read out of bounds."""
    for export in (lambda W: W.to_torch(), lambda W: W.T.to_torch(), lambda W: W.T.to_scipy()):
        for name, change in (
            ("row_offsets", lambda t: t * 1000),
            ("col_indices", lambda t: t + 10**9),
            ("values", lambda t: t[:1]),
        ):
            W = csr()
            setattr(W, name, change(getattr(W, name)))
            with pytest.raises(ValueError, match=f"{name}: expected"):
                export(W)


def test_rows_of_entries():
    for n, k in ((0, 3), (1, 5), (6, 7), (50, 3)):
        W = SparseTensor.from_dense(random_dense(n, k, density=0.3))
        rows = W.to_dense().nonzero()[:, 0]
        assert torch.equal(indices.expand_rows(W.row_offsets, W.nnz), rows)
        assert torch.equal(indices._search_rows(W.row_offsets, W.nnz), rows)


def test_the_check_in_a_graph():
    W = SparseTensor.from_dense(random_dense(4, 5))
    for row_offsets, col_indices in (
        (W.row_offsets, W.col_indices),
        (W.row_offsets.long(), W.col_indices.long()),
    ):
        torch.library.opcheck(indices.checked_pattern, (row_offsets, col_indices, 4, 5))
