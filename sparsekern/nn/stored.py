"""The weight of a layer as the dense module in whose place it stands stores it: [N, K], and [K, N]
for the Conv1D of transformers. So it has the same name and shape in every file."""

from typing import TYPE_CHECKING

import torch

from ..indices import let_torch_warn
from ..tensor import SparseTensor

if TYPE_CHECKING:
    from .linear import SparseLinear


def stored_weight(layer: "SparseLinear") -> SparseTensor:
    """The layer's weight in that form; shares its tensors where it can."""
    w = layer.weight.detach()
    return transposed(w) if layer.stores_transpose else w


def own_weight(layer: "SparseLinear", stored: SparseTensor) -> SparseTensor:
    """W [N, K] of the layer from that form."""
    return transposed(stored) if layer.stores_transpose else stored


def stored_shape(layer: "SparseLinear") -> tuple[int, int]:
    n, k = layer.out_features, layer.in_features
    return (k, n) if layer.stores_transpose else (n, k)


def transposed(w: SparseTensor) -> SparseTensor:
    """The transpose of W [N, K] with tensors of its own: CSR [K, N]."""
    if w.values.is_meta:
        offsets = w.row_offsets.new_empty(w.k + 1)
        return SparseTensor._trusted(offsets, w.col_indices, w.values, w.k, w.n)
    let_torch_warn()
    order = torch.arange(w.nnz, device=w.device)
    csc = w.row_offsets, w.col_indices, order, (w.k, w.n)
    csr = torch.sparse_csc_tensor(*csc, device=w.device, check_invariants=False).to_sparse_csr()
    values = w.values[csr.values()]
    return SparseTensor(csr.crow_indices(), csr.col_indices(), values, (w.k, w.n))
