"""Changing the pattern of a SparseLinear in place, its optimizer state with it.

A place is row * K + column: the pattern of a layer is its ascending places, int64 [nnz].
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..indices import expand_rows
from ..nn import SparseLinear, resize_


def places_of(layer: SparseLinear) -> Tensor:
    rows = expand_rows(layer.row_offsets, layer.col_indices.shape[0])
    return rows * layer.in_features + layer.col_indices


@torch.no_grad()
def set_pattern(
    layer: SparseLinear, places: Tensor, optimizers: Sequence[Optimizer] = ()
) -> Callable[[Tensor], Tensor]:
    """Give the layer another pattern. Stored weights that stay keep their value and optimizer
    state; new ones start at zero in both. The Parameter remains the same object.

    Returns the map of any [nnz] tensor from the old pattern to the new one.
    """
    old = places_of(layer)
    at = torch.searchsorted(old, places).clamp_(max=max(0, old.shape[0] - 1))
    stays = old[at] == places if old.shape[0] else torch.zeros_like(places, dtype=torch.bool)

    def follow(t: Tensor) -> Tensor:
        moved = t.new_zeros(places.shape[0])
        moved[stays] = t[at[stays]]
        return moved

    values, shape = layer.values, layer.values.shape
    for optimizer in optimizers:
        state = optimizer.state.get(values, {})
        for key, t in state.items():
            if isinstance(t, Tensor) and t.shape == shape:
                state[key] = _replaced(t, follow)
    moved = _replaced(values.detach(), follow)
    if moved.shape != shape:
        resize_(values, moved)
    else:
        values.copy_(moved)
        values.grad = None
    # New tensors: kernels remember what they packed by the old ones.
    ends = torch.arange(layer.out_features + 1, device=places.device) * layer.in_features
    layer.row_offsets = torch.searchsorted(places, ends).int()
    layer.col_indices = (places % layer.in_features).int()
    return follow


def whole(t: Tensor) -> Tensor:
    """All of a tensor that FSDP2 may have cut into shards."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _replaced(t: Tensor, follow: Callable[[Tensor], Tensor]) -> Tensor:
    """follow(t), cut into the same shards as t."""
    if not hasattr(t, "full_tensor"):
        return follow(t)
    from torch.distributed.tensor import distribute_tensor

    moved = follow(t.full_tensor())
    if moved.shape != t.shape:
        raise NotImplementedError(
            f"sparsity: FSDP2 keeps the size of its shards, but nnz goes from {t.shape[0]} to "
            f"{moved.shape[0]}; use DDP with algorithms that change the number of weights"
        )
    shard = distribute_tensor(moved, t.device_mesh, t.placements, src_data_rank=None)
    t.to_local().copy_(shard.to_local())
    return t


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_on_all_ranks(layers: Mapping[str, SparseLinear]) -> None:
    """RuntimeError on every rank if the ranks' patterns are not the same."""
    if not is_distributed() or not layers:
        return
    device = next(iter(layers.values())).col_indices.device
    hashes = torch.tensor([_crc(layer) for layer in layers.values()], device=device)
    of_ranks = [torch.empty_like(hashes) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, hashes)
    differ = (torch.stack(of_ranks) != hashes).any(0).tolist()
    if any(differ):
        names = ", ".join(name for name, wrong in zip(layers, differ, strict=True) if wrong)
        raise RuntimeError(f"sparsity: the ranks have different patterns in {names}")


def _crc(layer: SparseLinear) -> int:
    crc = 0
    for t in (layer.row_offsets, layer.col_indices):
        crc = zlib.crc32(t.cpu().numpy(), crc)
    return crc
