"""Products of a large W that is nearly empty, on a GPU: the table rows `csr`.

To write such a W out takes N x K elements of memory, however few are stored. torch's product of CSR
(cuSPARSE) takes those that are. 16-bit types are multiplied and summed in float32 and rounded once.
Indices are checked copies (derived.py). A place that is not stored takes no part, so an infinity or
NaN reaches what a stored value connects it to, and nothing else. cuSPARSE does not promise the same
bits in each run.
"""

import torch
from torch import Tensor

from ...indices import expand_rows, let_torch_warn
from ..derived import derived
from ..problem import Kernel, Problem
from ..reference import mm

LEAST_PLACES = 2**30  # of W: below, it is written out in a millisecond
MOST_DENSITY = 1e-3


def is_nearly_empty(p: Problem) -> bool:
    return p.N * p.K >= LEAST_PLACES and p.density <= MOST_DENSITY


def _spmm(row_offsets, col_indices, values, n, k, x, bias=None):
    indices = derived("copies", row_offsets, col_indices, n, k, lambda *copies: copies)
    return _product(*indices, values, (n, k), x, bias)


def _spmm_t(row_offsets, col_indices, values, n, k, dy, bias=None):
    def make(row_offsets: Tensor, col_indices: Tensor) -> tuple[Tensor, ...]:
        """W^T: row_offsets, col_indices, and where each of its values is in those of W."""
        order = col_indices.argsort(stable=True)
        offsets = row_offsets.new_zeros(k + 1)
        offsets[1:] = col_indices.bincount(minlength=k).cumsum(0)
        return offsets, expand_rows(row_offsets, len(order))[order].int(), order

    *indices, order = derived("transposed", row_offsets, col_indices, n, k, make)
    return _product(*indices, values[order], (k, n), dy, bias)


def _sddmm(row_offsets, col_indices, n, k, dy, x):
    indices = derived("copies", row_offsets, col_indices, n, k, lambda *copies: copies)
    dtype = _sum_dtype(x)
    zeros = x.new_zeros(col_indices.shape[0], dtype=dtype)
    if x.shape[0] == 0 or len(zeros) == 0:
        return zeros.to(x.dtype)
    w = _csr(*indices, zeros, (n, k))
    dw = torch.sparse.sampled_addmm(w, dy.t().to(dtype), x.to(dtype), beta=0.0)
    return dw.values().to(x.dtype)


def _product(row_offsets, col_indices, values, shape, x, bias):
    """x W^T + bias."""
    dtype = _sum_dtype(x)
    w = _csr(row_offsets, col_indices, values.to(dtype), shape)
    y = mm(w, x.to(dtype).t()).t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).contiguous()


def _csr(row_offsets: Tensor, col_indices: Tensor, values: Tensor, shape) -> Tensor:
    let_torch_warn()
    parts = row_offsets, col_indices, values.detach(), shape
    return torch.sparse_csr_tensor(*parts, device=values.device, check_invariants=False)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.itemsize == 2 else x.dtype


def _refuse(p: Problem) -> str | None:
    if not is_nearly_empty(p):
        return (
            f"it is for W of {LEAST_PLACES} places or more, at most {MOST_DENSITY} of them stored"
        )
    return None


KERNELS = (
    Kernel("csr", "spmm", "cuda", _refuse, _spmm),
    Kernel("csr", "spmm_t", "cuda", _refuse, _spmm_t),
    Kernel("csr", "sddmm", "cuda", _refuse, _sddmm),
)
