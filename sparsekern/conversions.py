"""Other libraries' matrices to CSR and back, as plain tensors. SparseTensor's methods call these.

`Parts` are row_offsets [N+1], col_indices [nnz], values [nnz] and the shape (N, K), as the
constructor of SparseTensor takes them.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from .extras import require
from .indices import check_limit, check_values, count_rows, counted, expand_rows, has_nan, kind

PART = 2**18  # places of a dense matrix that are looked at together


class Parts(NamedTuple):
    row_offsets: Tensor
    col_indices: Tensor
    values: Tensor
    shape: tuple[int, int]


def dense_parts(w: Tensor, mask: Tensor | None) -> Parts:
    """The entries of w [N, K] where the bool mask [N, K] is True; without one, where w != 0."""
    check_values("w", w, ndim=2)
    if w.is_meta:
        raise ValueError(
            "w: expected a tensor with data, got one on the meta device, where no zeros are to be "
            "seen; SparseTensor(row_offsets, col_indices, values, shape) takes meta tensors"
        )
    if mask is None:
        mask = w != 0
        # In a graph of torch.compile nothing can be looked at.
        if not torch.compiler.is_compiling() and has_nan(w):
            raise ValueError(
                f"w: {w.isnan().sum().item()} of its entries are NaN, which are stored: where NaN "
                "marks a pruned weight give mask=~w.isnan(), to keep them give mask=w != 0"
            )
    elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a tensor of dtype torch.bool, got {kind(mask)}")
    elif mask.shape != w.shape or mask.device != w.device:
        raise ValueError(
            f"mask: expected shape {tuple(w.shape)} on {w.device}, "
            f"got shape {tuple(mask.shape)} on {mask.device}"
        )
    if w.numel() > PART and not w.requires_grad and not torch.compiler.is_compiling():
        return _parts_of_rows(w, mask)
    rows, cols = mask.nonzero(as_tuple=True)
    row_offsets = count_rows(rows, w.shape[0])
    # nonzero's columns are a strided view, and row-major like w: the order is that of CSR.
    col_indices = cols.int().contiguous()
    return Parts(counted(row_offsets), counted(col_indices), w[rows, cols], tuple(w.shape))


def _parts_of_rows(w: Tensor, mask: Tensor) -> Parts:
    """The same some rows at a time: coordinates are int64, four times what is kept of them."""
    n, k = w.shape
    counts = mask.sum(1, dtype=torch.int32)
    nnz = int(counts.sum())
    check_limit("nnz", nnz)
    row_offsets = torch.zeros(n + 1, dtype=torch.int32, device=w.device)
    row_offsets[1:] = counts.cumsum(0)
    col_indices = torch.empty(nnz, dtype=torch.int32, device=w.device)
    values = w.new_empty(nnz)
    first, step = 0, max(1, PART // k)
    for some, kept in zip(w.split(step), mask.split(step), strict=True):
        places = _places(kept)
        last = first + places.shape[0]
        col_indices[first:last] = places.int().remainder_(k)
        values[first:last] = some.reshape(-1)[places]
        first = last
    return Parts(counted(row_offsets), counted(col_indices), values, (n, k))


def _places(mask: Tensor) -> Tensor:
    """Where a bool mask is True, in the order of its rows. On a CPU NumPy is much faster."""
    if mask.device.type != "cpu":
        return mask.flatten().nonzero().view(-1)
    return torch.from_numpy(numpy.flatnonzero(mask.numpy()))


def torch_parts(t: Tensor) -> Parts:
    """From a 2-D torch COO, CSR, CSC or BSR tensor."""
    if not isinstance(t, Tensor) or t.layout not in _COORDINATES:
        raise TypeError(f"t: expected a torch COO, CSR, CSC or BSR tensor, got {kind(t)}")
    if t.ndim != 2 or t.dense_dim() != 0:
        raise ValueError(
            f"t: expected 2 sparse dimensions, got shape {tuple(t.shape)} with "
            f"{t.dense_dim()} dense dimensions; make a SparseTensor of each matrix of a batch"
        )
    stored = t._values() if t.layout == torch.sparse_coo else t.values()
    check_values("values", stored, ndim=3 if t.layout == torch.sparse_bsr else 1)
    if t.layout == torch.sparse_csr:
        return Parts(t.crow_indices(), t.col_indices(), t.values(), tuple(t.shape))
    n, k = t.shape
    check_limit("N", n)
    check_limit("K", k)
    rows, cols, values = _COORDINATES[t.layout](t)
    if rows.numel() and not 0 <= rows.min() <= rows.max() < n:
        got = f"{rows.min().item()} to {rows.max().item()}"
        raise ValueError(f"t: expected its rows to lie in [0, {n}), got {got}")
    order = (rows.long() * k + cols).argsort()
    return Parts(count_rows(rows, n), cols[order], values[order], (n, k))


def scipy_parts(a) -> Parts:
    """From any 2-D scipy.sparse matrix or array; duplicates are summed, zeros kept."""
    _check_foreign("scipy.sparse", a)
    csr = a.tocsr(copy=True)
    csr.sum_duplicates()  # and sorts the columns
    return Parts(
        *(torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data)), csr.shape
    )


def cupy_parts(a) -> Parts:
    """From any 2-D cupyx.scipy.sparse matrix or array; a CSR one shares its memory."""
    _check_foreign("cupyx.scipy.sparse", a)
    # cupy computes on its current device; scipy's matrices, which are taken too, need none.
    device = getattr(getattr(a, "data", None), "device", None)
    with device if isinstance(device, AbstractContextManager) else nullcontext():
        csr = a.tocsr()
        if csr is not a:
            csr.sum_duplicates()
        return Parts(*map(torch.from_dlpack, (csr.indptr, csr.indices, csr.data)), csr.shape)


def _check_foreign(library: str, a: object) -> None:
    if not hasattr(a, "tocsr"):
        raise TypeError(f"a: expected a matrix or an array of {library}, got {kind(a)}")


def _coo_coordinates(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    t = t.coalesce()
    rows, cols = t.indices()
    return rows, cols, t.values()


def _csc_coordinates(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return t.row_indices(), expand_rows(t.ccol_indices(), t.row_indices().shape[0]), t.values()


def _bsr_coordinates(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = t.values()  # [nnz_blocks, height, width]
    height, width = blocks.shape[1:]
    rows = expand_rows(t.crow_indices(), blocks.shape[0])[:, None, None] * height
    cols = t.col_indices().long()[:, None, None] * width
    rows = rows + torch.arange(height, device=t.device)[:, None]
    cols = cols + torch.arange(width, device=t.device)
    rows, cols = torch.broadcast_tensors(rows, cols)
    return rows.flatten(), cols.flatten(), blocks.flatten()


_COORDINATES = {
    torch.sparse_csr: None,  # has no need of them
    torch.sparse_coo: _coo_coordinates,
    torch.sparse_csc: _csc_coordinates,
    torch.sparse_bsr: _bsr_coordinates,
}


# The way back. `n` and `k` are rows and columns of the stored W.


def to_torch(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape, is_transposed: bool
) -> Tensor:
    """A torch CSR tensor of `shape`, from the CSR or, where transposed, the CSC form."""
    make = torch.sparse_csc_tensor if is_transposed else torch.sparse_csr_tensor
    csr = row_offsets, col_indices, values, shape
    return make(*csr, device=values.device, check_invariants=False).to_sparse_csr()


def to_scipy(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int, is_transposed: bool
):
    """A scipy.sparse CSR array. 16-bit values become float32: scipy has no 16-bit floats."""
    import scipy.sparse  # optional dependency

    values = values.detach()
    if values.itemsize == 2:
        values = values.float()
    parts = (t.cpu().numpy() for t in (values, col_indices, row_offsets))
    csr = scipy.sparse.csr_array(tuple(parts), shape=(n, k))
    return csr.T.tocsr() if is_transposed else csr


def to_cupy(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, n: int, k: int, is_transposed: bool
):
    """A cupyx.scipy.sparse CSR matrix, which shares memory unless it is a transpose."""
    if values.itemsize == 2:
        raise TypeError(
            "to_cupy: expected float32 or float64, the floats that cupyx.scipy.sparse has, "
            f"got {values.dtype}"
        )
    if values.device.type != "cuda":
        raise ValueError(f"to_cupy: expected a tensor on a GPU, got one on {values.device}")
    cupy, sparse = require("cupy", "cupy"), require("cupyx.scipy.sparse", "cupy")
    parts = (values.detach(), col_indices, row_offsets)
    with torch.cuda.device(values.device):
        csr = sparse.csr_matrix(tuple(cupy.from_dlpack(part) for part in parts), shape=(n, k))
        return csr.T.tocsr() if is_transposed else csr
