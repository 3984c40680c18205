"""The base class of the layouts of packed weights, and what they share."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

LANES = 32  # rows of a slice: one warp
FLOATS = (torch.bfloat16, torch.float16)


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
        """The integers that describe the layout, in a fixed order."""
        parts = [getattr(self, field.name) for field in fields(self)[3:]]
        return [part for part in parts if not isinstance(part, Tensor)]

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type and shape of each tensor, by the numbers and by the lengths of the first dimensions
        that these leave free; None: a 16-bit float."""
        raise NotImplementedError

    def check(self) -> None:
        """TypeError or ValueError that names what the kernels cannot count on: types, shapes,
        devices. What stands in the tensors is not read: it is as the layouts here wrote it."""
        n, k, nnz = self.n, self.k, self.nnz
        if not (0 <= n < 2**31 and 0 <= k < 2**31 and 0 <= nnz < 2**31 and nnz <= n * k):
            raise ValueError(f"n, k, nnz: expected 0 <= nnz <= n * k < 2**62, got {n}, {k}, {nnz}")
        like = self.arrived
        gpu = like.get_device()  # below 0 where it is none
        for name, (dtype, shape) in self.parts().items():
            t = getattr(self, name)
            if not (
                (t.dtype is dtype or (dtype is None and t.dtype in FLOATS))
                and t.shape == shape
                and t.get_device() == gpu
                and (gpu >= 0 or t.device == like.device)
                and t.is_contiguous()
                and t.data_ptr() % 16 == 0
                and shape[0] < 2**31  # kernels count it in 32 bits
            ):
                raise (TypeError if t.shape == shape else ValueError)(
                    f"{name}: expected {dtype or 'a 16-bit float'} of shape {shape} on "
                    f"{like.device}, contiguous and aligned, got {t.dtype} of shape "
                    f"{tuple(t.shape)} on {t.device}"
                )

    def check_values(self, values: Tensor) -> None:
        """Check the values of a refill: TypeError or ValueError names what is wrong."""
        if values.shape != (self.nnz,):
            raise ValueError(
                f"values: expected shape ({self.nnz},), that of the pattern, "
                f"got {tuple(values.shape)}"
            )
        if values.dtype != self.dtype or values.device != self.arrived.device:
            raise TypeError(
                f"values: expected {self.dtype} on {self.arrived.device}, "
                f"got {values.dtype} on {values.device}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values, which lie in the first tensor."""
        return next(part.dtype for part in vars(self).values() if isinstance(part, Tensor))

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


def as_stored(values: Tensor) -> Tensor:
    """`values` as layouts hold them: a stored zero is -0, since +0 is a place that is not stored.
    No product shows the sign: its sum begins at +0."""
    values = values.detach()
    return values.masked_fill(values == 0, -0.0)


def check_fill(values: Tensor, nnz: int) -> None:
    """Check the values that a layout is filled with."""
    if values.dtype not in FLOATS:
        raise TypeError(f"values: expected bfloat16 or float16, got {values.dtype}")
    if values.shape != (nnz,):
        raise ValueError(
            f"values: expected shape ({nnz},), that of the pattern, got {tuple(values.shape)}"
        )


def check_indices(row_offsets: Tensor, col_indices: Tensor, n: int) -> None:
    """Their types and lengths, which those who make a layout count on."""
    for name, t in (("row_offsets", row_offsets), ("col_indices", col_indices)):
        if t.dtype != torch.int32 or not t.is_contiguous() or t.ndim != 1:
            raise TypeError(
                f"{name}: expected a contiguous int32 vector, got {t.dtype} of shape "
                f"{tuple(t.shape)}"
            )
    if row_offsets.shape[0] != n + 1:
        raise ValueError(f"row_offsets: expected {n + 1} elements, got {row_offsets.shape[0]}")


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
    """Number of multiprocessors; 132 (an H200) if `device` is not a GPU."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
