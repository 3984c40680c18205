"""The rest of a tensor's methods: shapes, copies, casts, sums, and rows by index.

A reduction counts the places that are not stored as the zeros they are. A row or a column is a
dense vector, several rows are a SparseTensor.
"""

import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from ..indices import count_rows, counted
from ..tensor import ALTERNATIVES, TORCH_FUNCTIONS, SparseTensor, name_what_is_missing, register
from .contractions import sum_over

# Shapes


def _dims(*dims: int) -> list[int]:
    for d in map(operator.index, dims):
        if not -2 <= d < 2:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [-2, 1], but got {d})"
            )
    return [d % 2 for d in dims]


def _transpose(input: SparseTensor, dim0: int, dim1: int) -> SparseTensor:
    a, b = _dims(dim0, dim1)
    return input if a == b else input.T


def _permute(input: SparseTensor, *dims) -> SparseTensor:
    dims = _dims(*(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims))
    if sorted(dims) != [0, 1]:
        raise RuntimeError(f"permute: expected a permutation of (0, 1), got {tuple(dims)}")
    return input if dims == [0, 1] else input.T


def _t(input: SparseTensor) -> SparseTensor:
    return input.T


def _numel(input: SparseTensor) -> int:
    return input.n * input.k


def _size(input: SparseTensor, dim: int | None = None):
    return input.shape if dim is None else input.shape[_dims(dim)[0]]


def _item(input: SparseTensor):
    if _numel(input) != 1:
        raise RuntimeError(f"a Tensor with {_numel(input)} elements cannot be converted to Scalar")
    return input.to_dense().item()


def _bool(input: SparseTensor) -> bool:
    if _numel(input) != 1:
        raise RuntimeError("Boolean value of a SparseTensor with other than one value is ambiguous")
    return bool(_item(input))


# Copies and casts


def _clone(input: SparseTensor, *, memory_format=torch.preserve_format) -> SparseTensor:
    indices = (counted(t.clone()) for t in (input.row_offsets, input.col_indices))
    return SparseTensor._trusted(
        *indices, input.values.clone(), input.n, input.k, input.is_transposed
    )


def _copy_(input: SparseTensor, src: SparseTensor, non_blocking: bool = False) -> SparseTensor:
    """Pattern and values of src, which has as many."""
    if not isinstance(src, SparseTensor):
        raise TypeError(f"copy_: expected a SparseTensor, got {type(src).__name__}")
    if not isinstance(input, SparseTensor):
        raise TypeError("copy_: a dense tensor takes no SparseTensor: use x.copy_(W.to_dense())")
    if (src.shape, src.nnz) != (input.shape, input.nnz):
        raise ValueError(
            f"copy_: expected shape {tuple(input.shape)} with {input.nnz} stored values, got "
            f"{tuple(src.shape)} with {src.nnz}"
        )
    if src.is_transposed != input.is_transposed:
        src = _in_csr(src.T).T if input.is_transposed else _in_csr(src)
    input.values.copy_(src.values, non_blocking)
    input.row_offsets.copy_(src.row_offsets, non_blocking)
    input.col_indices.copy_(src.col_indices, non_blocking)
    return input


def _in_csr(W: SparseTensor) -> SparseTensor:
    """The same matrix, not as a transpose."""
    if not W.is_transposed:
        return W
    W._checked()
    rows, cols = W._coordinates()
    order = rows.argsort(stable=True)
    parts = count_rows(rows, W.k), cols[order].int(), W.values[order]
    return SparseTensor._trusted(*parts, W.k, W.n)


def _zero_(input: SparseTensor) -> SparseTensor:
    input.values.zero_()
    return input


def _requires_grad_(input: SparseTensor, requires_grad: bool = True) -> SparseTensor:
    input.values.requires_grad_(requires_grad)
    return input


def _type(input: SparseTensor, dtype=None, non_blocking: bool = False):
    if dtype is None:
        return input.values.type()
    return input._follow(input.values.type(dtype, non_blocking))


def _type_as(input: SparseTensor, other) -> SparseTensor:
    return input.to(device=other.device, dtype=other.dtype)


def _cast(name: str):
    """A cast of the values; the pattern follows."""

    def run(input: SparseTensor, *args, **kwargs) -> SparseTensor:
        return input._follow(getattr(input.values, name)(*args, **kwargs))

    return run


def _like(name: str):
    """The same pattern with new values at the stored places."""
    func = getattr(torch, name)

    def run(input: SparseTensor, *args, **kwargs) -> SparseTensor:
        return input._follow(func(input.values, *args, **kwargs))

    return run


def _to_sparse(name: str):
    def run(input: SparseTensor, *args, **kwargs) -> Tensor:
        return getattr(input.to_torch(), name)(*args, **kwargs)

    return run


# Reductions


def _sum(input: SparseTensor, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    values = input.values if dtype is None else input.values.to(dtype)
    dims = _dims(*([] if dim is None else dim if isinstance(dim, (tuple, list)) else [dim]))
    if len(set(dims)) < len(dims):
        raise RuntimeError(f"dim {dims[0]} appears multiple times in the list of dims")
    if len(dims) != 1:  # all, as for dim=()
        total = values.sum()
        return total.view(1, 1) if keepdim else total
    total = sum_over(input._with_values(values, input.is_transposed), dims[0])
    return total.unsqueeze(dims[0]) if keepdim else total


def _mean(input: SparseTensor, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    dtype = dtype or input.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        input.values.mean(dtype=dtype)  # torch's error
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = _sum(input, dim, keepdim, dtype=wide)
    return (total / (_numel(input) / max(1, total.numel()))).to(dtype)


def _extremum(name: str):
    def run(input: SparseTensor, dim=None, keepdim: bool = False) -> Tensor:
        if dim is not None and dim != () or keepdim:
            raise TypeError(f"{name}: only of all of a SparseTensor: use W.to_dense()")
        values, missing = input.values, _numel(input) - input.nnz
        if not missing:
            return getattr(values, name)()
        found = getattr(torch.cat([values, values.new_zeros(1)]), name)()
        # All equal elements share the gradient, and the missing zeros are as many, not one.
        zeros = (values.detach() == 0).sum(dtype=torch.float64)
        share = ((zeros + 1) / (zeros + missing)).to(found.dtype)
        return torch.where(found == 0, found * share, found)

    return run


def _norm(
    input: SparseTensor, p="fro", dim=None, keepdim: bool = False, out=None, dtype=None
) -> Tensor:
    p = 2.0 if p in ("fro", None) else p
    if out is not None or dim is not None or keepdim or not isinstance(p, (int, float)) or p < 0:
        raise TypeError(
            "norm: only of all of a SparseTensor, 'fro' or p >= 0, no out=: use W.to_dense()"
        )
    values = input.values
    if not input.nnz:  # torch has no infinite norm of nothing
        values = torch.cat([values, values.new_zeros(min(1, _numel(input)))])
    return torch.linalg.vector_norm(values, p, dtype=dtype)


def _vector_norm(x, ord=2, dim=None, keepdim: bool = False, *, dtype=None, out=None) -> Tensor:
    return _norm(x, ord, dim, keepdim, out, dtype)


def _linalg_norm(A, ord=None, dim=None, keepdim: bool = False, *, out=None, dtype=None) -> Tensor:
    """With an order torch takes the norm of A as a matrix, without one that of all its elements."""
    return _matrix_norm(A, ord, dim, keepdim, dtype=dtype, out=out)


def _matrix_norm(A, ord=None, dim=None, keepdim: bool = False, *, dtype=None, out=None) -> Tensor:
    if ord not in (None, "fro"):
        raise TypeError(f"norm: of a SparseTensor as a matrix only 'fro', got {ord!r}")
    return _vector_norm(A, 2, dim, keepdim, dtype=dtype, out=out)


def _count_nonzero(input: SparseTensor, dim=None) -> Tensor:
    if dim is not None:
        raise TypeError("count_nonzero: only of all of a SparseTensor: use W.to_dense()")
    return input.values.count_nonzero()


# Rows by index


def _row(W: SparseTensor, i) -> Tensor:
    n, k = W.shape
    i = operator.index(i)
    if not -n <= i < n:
        raise IndexError(f"index {i} is out of bounds for dimension 0 with size {n}")
    i %= n
    if W.is_transposed:
        at = (W.col_indices == i).nonzero().flatten()
        columns = torch.searchsorted(W.row_offsets, at, right=True) - 1
    else:
        at = slice(*W.row_offsets[i : i + 2].tolist())
        columns = W.col_indices[at].long()
    return W.values.new_zeros(k).index_put((columns,), W.values[at])


def _rows(W: SparseTensor, rows: slice) -> SparseTensor:
    first, last, step = rows.indices(W.shape[0])
    if step != 1:
        raise TypeError(f"W[a:b]: expected a step of 1 for a SparseTensor, got {step}")
    if (first, last) == (0, W.shape[0]):
        return W
    W, last = _in_csr(W), max(first, last)
    offsets = W.row_offsets[first : last + 1]
    start, end = offsets[[0, -1]].tolist()
    indices = map(counted, (offsets - start, W.col_indices[start:end].clone()))
    return SparseTensor._trusted(*indices, W.values[start:end], last - first, W.k)


def _getitem(self: SparseTensor, index) -> Tensor | SparseTensor:
    i, j = index if isinstance(index, tuple) and len(index) == 2 else (index, slice(None))
    if not all(isinstance(s, slice) or _is_index(s) for s in (i, j)):
        raise TypeError(
            "a SparseTensor takes W[i], W[i, j], W[:, j], W[a:b] and W[a:b, c:d]: for other "
            "indices use W.to_dense()"
        )
    if not isinstance(i, slice):
        return _row(self, i)[j]
    if not isinstance(j, slice):
        return _row(self.T, j)[i]
    return _rows(_rows(self, i).T, j).T


def _is_index(i) -> bool:
    if isinstance(i, Tensor):
        return i.ndim == 0 and not i.is_floating_point() and i.dtype != torch.bool
    return hasattr(i, "__index__") and not isinstance(i, bool)


def _select(input: SparseTensor, dim: int, index: int) -> Tensor:
    return _row(input if _dims(dim) == [0] else input.T, index)


def _iter(self: SparseTensor) -> Iterator[Tensor]:
    if self.requires_grad:
        # clip_grad_norm_(W, 1) and SGD(W) would take the rows for parameters, and do nothing.
        raise TypeError(
            "a SparseTensor that requires grad is no list of rows: give optimizers and "
            "clip_grad_norm_ [W.values], and for rows use W[i]"
        )
    return (_row(self, i) for i in range(self.shape[0]))


def _grad(W: SparseTensor) -> SparseTensor | None:
    grad = W.values.grad
    return None if grad is None else W._with_values(grad, W.is_transposed)


for _name, _implementation in {
    **dict.fromkeys(("t", "adjoint"), _t),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "permute": _permute,
    **dict.fromkeys(("numel", "nelement"), _numel),
    "size": _size,
    **dict.fromkeys(("dim", "ndimension"), lambda input: 2),
    "element_size": lambda input: input.values.element_size(),
    "get_device": lambda input: input.values.get_device(),
    "is_floating_point": lambda input: True,
    "is_complex": lambda input: False,
    "item": _item,
    "clone": _clone,
    "copy_": _copy_,
    "zero_": _zero_,
    "requires_grad_": _requires_grad_,
    "detach": SparseTensor.detach,
    "type": _type,
    "type_as": _type_as,
    **{name: _cast(name) for name in ("float", "half", "bfloat16", "double", "cpu", "cuda")},
    **{name: _to_sparse(name) for name in ("to_sparse", "to_sparse_coo", "to_sparse_csc")},
    "to_sparse_csr": SparseTensor.to_torch,
    "crow_indices": lambda input: SparseTensor.to_torch(input).crow_indices(),
    "_nnz": lambda input: input.nnz,
    "sum": _sum,
    "mean": _mean,
    **{name: _extremum(name) for name in ("max", "min", "amax", "amin")},
    "norm": _norm,
    "count_nonzero": _count_nonzero,
    "select": _select,
}.items():
    register(_name, _implementation)
TORCH_FUNCTIONS |= {
    torch.linalg.norm: _linalg_norm,
    torch.linalg.vector_norm: _vector_norm,
    torch.linalg.matrix_norm: _matrix_norm,
}
for _name in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
    register(_name, _like(_name), method=False)
for _name, _get in {
    "mT": _t,
    "mH": _t,
    "H": _t,
    "nbytes": lambda W: sum(t.nbytes for t in (W.row_offsets, W.col_indices, W.values)),
    "itemsize": lambda W: W.values.itemsize,
    "layout": lambda W: torch.sparse_csc if W.is_transposed else torch.sparse_csr,
    "is_sparse_csr": lambda W: not W.is_transposed,
    "is_sparse": lambda W: False,
    "is_cuda": lambda W: W.values.is_cuda,
    "is_cpu": lambda W: W.values.is_cpu,
    "is_meta": lambda W: W.values.is_meta,
    "is_leaf": lambda W: W.values.is_leaf,
    "grad": _grad,
    "grad_fn": lambda W: W.values.grad_fn,
    "data": lambda W: W._with_values(W.values.data, W.is_transposed),
}.items():
    setattr(SparseTensor, _name, property(_get))
SparseTensor.__len__ = lambda self: self.shape[0]
SparseTensor.__bool__ = _bool
SparseTensor.__float__ = lambda self: float(_item(self))
SparseTensor.__int__ = lambda self: int(_item(self))
SparseTensor.__getitem__ = _getitem
SparseTensor.__iter__ = _iter
ALTERNATIVES |= {
    "grad": "take the gradient of W.values",
    "backward": "of a SparseTensor there is none: W.sum().backward(), or gradients of W.values",
    **dict.fromkeys(("numpy", "tolist"), "use W.to_dense() or W.to_scipy()"),
    **dict.fromkeys(("stride", "storage", "data_ptr"), "it consists of three tensors"),
    **dict.fromkeys(
        ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "constant_", "fill_"),
        "fill W.values, as with torch.nn.init.normal_(W.values)",
    ),
}
name_what_is_missing()
