"""What the layouts of packed weights have in common."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

LANES = 32  # rows of a slice: one warp


@dataclass(frozen=True)
class Packed:
    """One frozen W [N, K] with `nnz` stored values. Layouts add numbers, then tensors."""

    n: int
    k: int
    nnz: int

    def tensors(self) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    def numbers(self) -> list[int]:
        """Those of the layout."""
        parts = [getattr(self, field.name) for field in fields(self)[3:]]
        return [part for part in parts if not isinstance(part, Tensor)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return next(iter(self.tensors().values())).dtype

    @property
    def slices(self) -> int:
        return -(-self.n // LANES)

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.n * self.k)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight holds."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def clone(self) -> "Packed":
        """A copy with memory of its own."""
        return replace(self, **{name: part.clone() for name, part in self.tensors().items()})


def sort_rows(row_offsets: Tensor, n: int, block: int) -> Tensor:
    """int32 [slices * 32]: the row of each lane, -1 for none. Rows of like nnz share a slice,
    inside of blocks of `block` rows, whose results are written together."""
    device = row_offsets.device
    lengths = (row_offsets[1:] - row_offsets[:-1]).long()
    widest = int(lengths.max()) + 1 if n else 1
    key = torch.arange(n, device=device) // block * widest + (widest - 1 - lengths)
    order = torch.full((-(-n // LANES) * LANES,), -1, dtype=torch.int32, device=device)
    order[:n] = key.argsort(stable=True).int()
    return order


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 132 where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
