"""SparseTensor: a sparsity pattern and its values, conversions to and from it. No arithmetic.

W [N, K] is held as CSR: row_offsets int32 [N+1], col_indices int32 [nnz] (strictly increasing in
each row) and values [nnz]. An entry is stored because the pattern says so and not because its value
is non-zero: explicit zeros and NaN are kept.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .extras import require

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
INDEX_LIMIT = 2**31  # indices are int32

# torch function -> its implementation for a SparseTensor argument. Filled by matmul.py, which this
# module may not import.
TORCH_FUNCTIONS: dict[Callable, Callable] = {}


class SparseTensor:
    """A sparse matrix W [N, K], or its transpose sharing the same tensors (`W.T`).

    Args:
        row_offsets: int32 or int64 [N+1]; row i holds the entries row_offsets[i]:row_offsets[i+1].
        col_indices: int32 or int64 [nnz], strictly increasing in each row, in [0, K).
        values: [nnz], float32, bfloat16, float16 or float64; may require grad.
        shape: (N, K).

    The arguments are checked here, once; ValueError or TypeError names the one that is wrong.
    """

    __slots__ = ("row_offsets", "col_indices", "values", "n", "k", "is_transposed")

    def __init__(
        self, row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int]
    ):
        n, k = _check_sizes(row_offsets, col_indices, values, shape)
        check_pattern(row_offsets, col_indices, n, k)
        indices = (t.int().contiguous() for t in (row_offsets, col_indices))
        self._set(*indices, values, n, k, False)

    @classmethod
    def _trusted(
        cls,
        row_offsets: Tensor,
        col_indices: Tensor,
        values: Tensor,
        n: int,
        k: int,
        is_transposed: bool = False,
    ) -> "SparseTensor":
        """Without checks: for tensors that were checked before."""
        tensor = cls.__new__(cls)
        tensor._set(row_offsets, col_indices, values, n, k, is_transposed)
        return tensor

    def _set(self, row_offsets, col_indices, values, n, k, is_transposed) -> None:
        self.row_offsets = row_offsets
        self.col_indices = col_indices
        self.values = values
        self.n = n  # rows and columns of the stored W, whatever is_transposed says
        self.k = k
        self.is_transposed = is_transposed

    # Conversions

    @classmethod
    def from_dense(cls, w: Tensor, mask: Tensor | None = None) -> "SparseTensor":
        """The entries of w [N, K] where the bool mask [N, K] is True; without one, where w != 0.

        Gradients flow from the values back to w.
        """
        _check_values("w", w, ndim=2)
        if mask is None:
            mask = w != 0
        elif not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a tensor of dtype torch.bool, got {_kind(mask)}")
        elif mask.shape != w.shape or mask.device != w.device:
            raise ValueError(
                f"mask: expected shape {tuple(w.shape)} on {w.device}, "
                f"got shape {tuple(mask.shape)} on {mask.device}"
            )
        n, k = w.shape
        rows, cols = mask.nonzero(as_tuple=True)
        _check_limit("nnz", rows.shape[0])
        values = w[rows, cols]
        return cls._trusted(_count_rows(rows, n), cols.int().contiguous(), values, n, k)

    @classmethod
    def from_torch(cls, t: Tensor) -> "SparseTensor":
        """From a 2-D torch COO, CSR, CSC or BSR tensor.

        Every stored entry stays: also explicit zeros, and all entries of a BSR block. Duplicate
        entries of a COO tensor are summed.
        """
        if not isinstance(t, Tensor) or t.layout not in _COORDINATES:
            raise TypeError(f"t: expected a torch COO, CSR, CSC or BSR tensor, got {_kind(t)}")
        if t.ndim != 2 or t.dense_dim() != 0:
            raise ValueError(
                f"t: expected 2 sparse dimensions, got shape {tuple(t.shape)} with "
                f"{t.dense_dim()} dense dimensions"
            )
        if t.layout == torch.sparse_csr:
            return cls(t.crow_indices(), t.col_indices(), t.values(), t.shape)
        rows, cols, values = _COORDINATES[t.layout](t)
        n, k = t.shape
        order = (rows * k + cols).argsort()
        return cls(_count_rows(rows, n), cols[order], values[order], (n, k))

    @classmethod
    def from_scipy(cls, a) -> "SparseTensor":
        """From any 2-D scipy.sparse matrix or array; duplicates are summed, zeros kept."""
        csr = a.tocsr(copy=True)
        csr.sum_duplicates()  # and sorts the columns
        parts = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        return cls(*parts, csr.shape)

    @classmethod
    def from_cupy(cls, a) -> "SparseTensor":
        """From any 2-D cupyx.scipy.sparse matrix or array.

        A CSR one shares its memory (its indices do where they are int32). Nothing in it is sorted
        or summed, so the columns of each row must increase: `a.sum_duplicates()` sees to that.
        """
        csr = a.tocsr()
        if csr is not a:
            csr.sum_duplicates()  # and sorts the columns
        return cls(*map(torch.from_dlpack, (csr.indptr, csr.indices, csr.data)), csr.shape)

    def to_dense(self) -> Tensor:
        """The dense matrix, zeros where nothing is stored. Gradients flow back to the values."""
        rows = expand_rows(self.row_offsets, self.nnz)
        places = (rows, self.col_indices.long())
        if self.is_transposed:
            places = places[::-1]
        return self.values.new_zeros(self.shape).index_put(places, self.values)

    def to_torch(self) -> Tensor:
        """A torch CSR tensor; it shares memory with this one unless this is a transpose."""
        make = torch.sparse_csc_tensor if self.is_transposed else torch.sparse_csr_tensor
        t = make(
            self.row_offsets, self.col_indices, self.values, self.shape, check_invariants=False
        )
        return t.to_sparse_csr()

    def to_scipy(self):
        """A scipy.sparse CSR array. 16-bit values become float32: scipy has no 16-bit floats."""
        import scipy.sparse  # optional dependency

        values = self.values.detach()
        if values.itemsize == 2:
            values = values.float()
        parts = (t.cpu().numpy() for t in (values, self.col_indices, self.row_offsets))
        csr = scipy.sparse.csr_array(tuple(parts), shape=(self.n, self.k))
        return csr.T.tocsr() if self.is_transposed else csr

    def to_cupy(self):
        """A cupyx.scipy.sparse CSR matrix; it shares memory with this one unless this is a
        transpose."""
        if self.dtype.itemsize == 2:
            raise TypeError(
                "to_cupy: expected float32 or float64, the floats that cupyx.scipy.sparse has, "
                f"got {self.dtype}"
            )
        if self.device.type != "cuda":
            raise ValueError(f"to_cupy: expected a tensor on a GPU, got one on {self.device}")
        cupy, sparse = require("cupy", "cupy"), require("cupyx.scipy.sparse", "cupy")
        parts = (self.values.detach(), self.col_indices, self.row_offsets)
        with torch.cuda.device(self.device):
            csr = sparse.csr_matrix(
                tuple(cupy.from_dlpack(part) for part in parts), shape=(self.n, self.k)
            )
            return csr.T.tocsr() if self.is_transposed else csr

    def to(self, *args, **kwargs) -> "SparseTensor":
        """Move or cast the values with the arguments of Tensor.to; the pattern follows."""
        values = self.values.to(*args, **kwargs)
        _check_values("dtype", values, ndim=1)
        return self._trusted(
            self.row_offsets.to(values.device),
            self.col_indices.to(values.device),
            values,
            self.n,
            self.k,
            self.is_transposed,
        )

    def detach(self) -> "SparseTensor":
        """The same tensor with values cut from the autograd graph."""
        return self._with_values(self.values.detach(), self.is_transposed)

    @property
    def T(self) -> "SparseTensor":
        """The transpose; shares all tensors."""
        return self._with_values(self.values, not self.is_transposed)

    def _with_values(self, values: Tensor, is_transposed: bool) -> "SparseTensor":
        return self._trusted(
            self.row_offsets, self.col_indices, values, self.n, self.k, is_transposed
        )

    # Properties

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.k, self.n) if self.is_transposed else (self.n, self.k))

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.col_indices.shape[0]

    @property
    def density(self) -> float:
        """nnz / (N * K); 0 for an empty matrix."""
        return self.nnz / max(1, self.n * self.k)

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1 - self.density

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return (
            f"SparseTensor(shape={tuple(self.shape)}, nnz={self.nnz}, "
            f"sparsity={self.sparsity:.4g}, dtype={self.dtype}, device={self.device}{grad})"
        )

    # Products: torch's dispatch to matmul.py

    __array_ufunc__ = None  # numpy_array @ W comes to __rmatmul__, which raises torch's error

    def __matmul__(self, other: Tensor) -> Tensor:
        return TORCH_FUNCTIONS[torch.matmul](self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return TORCH_FUNCTIONS[torch.matmul](other, self)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        implementation = TORCH_FUNCTIONS.get(func)
        if implementation is None:
            return NotImplemented
        return implementation(*args, **(kwargs or {}))


def expand_rows(row_offsets: Tensor, nnz: int) -> Tensor:
    """The row of each stored entry: int64 [nnz]."""
    rows = torch.arange(row_offsets.shape[0] - 1, device=row_offsets.device)
    return rows.repeat_interleave(row_offsets.diff(), output_size=nnz)


def _count_rows(rows: Tensor, n: int) -> Tensor:
    """row_offsets int32 [N+1] of entries whose rows are given."""
    row_offsets = torch.zeros(n + 1, dtype=torch.int32, device=rows.device)
    row_offsets[1:] = rows.bincount(minlength=n).cumsum(0)
    return row_offsets


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


def _check_sizes(
    row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape: Sequence[int]
) -> tuple[int, int]:
    """Everything that can be checked without reading an index."""
    if len(shape) != 2:
        raise ValueError(f"shape: expected (N, K), got {tuple(shape)}")
    n, k = shape
    for name, size in (("N", n), ("K", k)):
        _check_limit(name, size)
    for name, t in (("row_offsets", row_offsets), ("col_indices", col_indices)):
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name}: expected an int32 or int64 tensor, got {_kind(t)}")
        if t.ndim != 1:
            raise ValueError(f"{name}: expected a 1-D tensor, got shape {tuple(t.shape)}")
    _check_values("values", values, ndim=1)
    nnz = col_indices.shape[0]
    _check_limit("nnz", nnz)
    for name, t, size in (("row_offsets", row_offsets, n + 1), ("values", values, nnz)):
        if t.shape[0] != size:
            raise ValueError(f"{name}: expected {size} elements, got {t.shape[0]}")
        if t.device != col_indices.device:
            raise ValueError(f"{name}: expected device {col_indices.device}, got {t.device}")
    return n, k


def check_pattern(row_offsets: Tensor, col_indices: Tensor, n: int, k: int) -> None:
    nnz = col_indices.shape[0]
    first, last = row_offsets[0].item(), row_offsets[-1].item()
    if (first, last) != (0, nnz):
        raise ValueError(
            f"row_offsets: expected to start at 0 and end at nnz = {nnz}, got {first} and {last}"
        )
    falls = row_offsets[1:] < row_offsets[:-1]  # a difference may pass 2^31
    if falls.any():
        row = falls.nonzero()[0].item()
        raise ValueError(
            f"row_offsets: expected not to decrease, got {row_offsets[row].item()} before "
            f"{row_offsets[row + 1].item()} at row {row}"
        )
    if nnz == 0:
        return
    low, high = (bound.item() for bound in col_indices.aminmax())
    if low < 0 or high >= k:
        raise ValueError(f"col_indices: expected to lie in [0, {k}), got {low} to {high}")
    steps = col_indices.diff()
    starts = row_offsets[1:-1]
    starts = starts[(starts > 0) & (starts < nnz)].long()
    steps[starts - 1] = 1  # from one row to the next any step will do
    for wrong, what in ((steps < 0, "not sorted"), (steps == 0, "a duplicate")):
        if wrong.any():
            at = wrong.nonzero()[0].item()
            row = torch.searchsorted(row_offsets, at, right=True).item() - 1
            raise ValueError(
                "col_indices: expected to increase strictly in each row, got "
                f"{col_indices[at].item()} before {col_indices[at + 1].item()} in row {row}: {what}"
            )


def _check_values(name: str, values: Tensor, ndim: int) -> None:
    if not isinstance(values, Tensor) or values.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {_kind(values)}")
    if values.dtype not in VALUE_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {values.dtype}"
        )
    if values.ndim != ndim:
        raise ValueError(f"{name}: expected a {ndim}-D tensor, got shape {tuple(values.shape)}")


def _check_limit(name: str, size: int) -> None:
    if not 0 <= size < INDEX_LIMIT:
        raise ValueError(f"{name}: expected 0 <= {name} < 2**31 (int32 indices), got {size}")


def _kind(value) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor of dtype {value.dtype}"
    return type(value).__name__
