"""What the layouts of packed weights share: the two base classes.

A layout is a form of W that a CUDA kernel reads. Its `Layout` is made from a pattern and fills it
with values; its `Packed` is W in that form, and owns the launches that read it. choose.py has the
list of layouts and the choice among them.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..operands import check_pattern_arrays
from ..problem import Problem
from .library import refusal, start

# tests/kernels/cuda/test_constants.py holds constants of this folder to those of csrc/cuda.
LANES = 32  # rows of a slice: one warp
EXPAND_WARPS = 4
REFILL_THREADS = 256  # of a block
TILE_PAD = 8  # elements of shared memory beside a row of what is written out
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Gpu(NamedTuple):
    """The properties of a GPU that a launch is fitted to."""

    multiprocessors: int
    smem_bytes: int  # the most of a block
    has_warpgroups: bool = False  # whether their kernels run: those of sm_90a


class Launch(NamedTuple):
    """How a kernel is launched for one problem."""

    kernel: str
    grid: int
    block: int
    smem_bytes: int
    partial: int  # float32 elements of workspace
    tokens: int  # the most of the kernel
    group_warps: int = 0  # of runs: warps that share x
    shares: int = 0  # of runs: most that share rows
    ring: tuple[int, ...] = ()  # of rings (pairs_ring.py): groups, stages, tiles of tokens


class Expansion(NamedTuple):
    """The kernel that writes W out."""

    kernel: str
    warps: int
    warp_bytes: int  # of shared memory
    weight: tuple[Tensor, ...]
    sizes: tuple[int, ...]  # beside K


@cache
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    smem_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    is_hopper = (properties.major, properties.minor) == (9, 0)
    return Gpu(properties.multi_processor_count, smem_bytes, is_hopper)


@dataclass(frozen=True)
class Packed:
    """One frozen W [N, K] with `nnz` stored values. Layouts add numbers, then tensors: the first
    has the values, the last, `arrived`, counts blocks."""

    n: int
    k: int
    nnz: int

    name: ClassVar[str]
    most_tokens: ClassVar[int] = 64  # of a product; for more W is written out

    if TYPE_CHECKING:

        @property
        def arrived(self) -> Tensor: ...

    def parts(self) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
        """Type and shape of each tensor, by the numbers and by the lengths of the first dimensions
        that these leave free; None: a 16-bit float."""
        raise NotImplementedError

    def launch(self, m: int, gpu: Gpu) -> Launch | None:
        """The launch for as many of m tokens as its kernel takes; None if the GPU has too little
        shared memory for one."""
        raise NotImplementedError

    def operands(self, launch: Launch) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """What the kernel reads of W, and the sizes that it is told beside tokens, N and K."""
        raise NotImplementedError

    def expansion(self) -> "Expansion":
        """How W is written out."""
        raise NotImplementedError

    def run(self, launch: Launch, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y [M, N] = x [M, K] @ W.T + bias [N], all contiguous and not empty."""
        m = x.shape[0]
        partial = x.new_empty(launch.partial, dtype=torch.float32)
        for first in range(0, m, launch.tokens):
            here = (x[first:], y[first:]) if first else (x, y)
            tokens = min(launch.tokens, m - first)
            start(*self.started(launch, tokens, here[0], bias, here[1], partial))

    def started(self, launch: Launch, tokens: int, x, bias, y, partial) -> tuple:
        """The arguments of start() for so many tokens. Tensors may be slots (steps.py)."""
        weight, sizes = self.operands(launch)
        tensors = *weight, self.row_scales, x, bias, y, partial, self.arrived
        how = launch.kernel, launch.grid, launch.block, launch.smem_bytes
        return *how, tensors, tokens, self.n, self.k, *sizes

    def expand(self) -> Tensor:
        """W [N, K], dense, without the scales of its rows: a missing entry is +0, a stored zero of
        16 bits -0."""
        w = torch.empty(self.n, self.k, dtype=self.dtype, device=self.arrived.device)
        if w.numel() == 0 or self.nnz == 0:
            return w.zero_()
        kernel, warps, warp_bytes, weight, sizes = self.expansion()
        grid, block = -(-warps // EXPAND_WARPS), EXPAND_WARPS * LANES
        smem = EXPAND_WARPS * warp_bytes
        if self.row_scales is not None:
            kernel += f"_{self.type_name}"
        start(f"sk_expand_{kernel}", grid, block, smem, (*weight, w), self.k, *sizes)
        return w

    def tensors(self) -> dict[str, Tensor]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor)}

    def numbers(self) -> list[int]:
        """The integers that describe the layout, in a fixed order."""
        parts = [getattr(self, field.name) for field in fields(self)[3:]]
        return [part for part in parts if not isinstance(part, Tensor)]

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
                (t.dtype is dtype or (dtype is None and t.dtype in TYPES))
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
        check_length(values, self.nnz)
        if values.dtype != self.floats.dtype or values.device != self.arrived.device:
            raise TypeError(
                f"values: expected {self.floats.dtype} on {self.arrived.device}, "
                f"got {values.dtype} on {values.device}"
            )

    @property
    def floats(self) -> Tensor:
        """The tensor in which the values lie."""
        return next(part for part in vars(self).values() if isinstance(part, Tensor))

    @property
    def dtype(self) -> torch.dtype:
        """That of x and of the result."""
        return self.floats.dtype

    @property
    def values_dtype(self) -> torch.dtype:
        """That in which the values are held."""
        return self.floats.dtype

    @property
    def type_name(self) -> str:
        """What kernels call the type of the values."""
        return TYPES[self.floats.dtype]

    @property
    def row_scales(self) -> Tensor | None:
        """What each row of the values is multiplied by, float32 [N], if they are of 8 bits."""
        return None

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
        parts: dict[str, Any] = {name: part.clone() for name, part in self.tensors().items()}
        return replace(self, **parts)


class Layout:
    """The index part of a packed weight: made from a pattern, for values of so many bytes, it is
    filled with values."""

    kind: ClassVar[type[Packed]]
    kinds_of_8_bits: ClassVar[dict[torch.dtype, type[Packed]]]
    n: int
    k: int
    places: Tensor  # where each value of W lies in Packed.floats

    def __init__(
        self, row_offsets: Tensor, col_indices: Tensor, n: int, k: int, value_bytes: int = 2
    ):
        check_pattern_arrays(row_offsets, col_indices, n, col_indices.device)
        self.n, self.k, self.value_bytes = n, k, value_bytes

    @classmethod
    def least_smem(cls, tokens: int, k: int) -> int:
        """Bytes of shared memory without which no launch for so many tokens is possible."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        """Why W cannot, or should not, be laid out for this problem; None where it can."""
        return None

    def empty(self, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of a packed weight without its values, which have this type."""
        raise NotImplementedError

    def fill(self, values: Tensor) -> Packed:
        """A packed weight with these values, in the order of the CSR indices."""
        if values.dtype not in TYPES:
            raise TypeError(f"values: expected bfloat16 or float16, got {values.dtype}")
        check_length(values, self.places.shape[0])
        packed = self.kind(self.n, self.k, len(values), **self.empty(values.dtype))
        packed.check()
        self.refill_(packed, values)
        return packed

    def refill_(self, packed: Packed, values: Tensor) -> None:
        """Other values in a packed weight of this layout."""
        packed.check_values(values)
        # A stored zero is -0, since +0 is a place that is not stored. No product shows the sign:
        # its sum begins at +0.
        values = values.detach()
        if values.is_cuda and values.numel() and not refusal():
            start(*self.refill_launch(packed, values.contiguous()))
        else:
            packed.floats.view(-1)[self.places] = values.masked_fill(values == 0, -0.0)

    def refill_launch(self, packed: Packed, values) -> tuple:
        """The arguments of start() that bring values in: a tensor, or a slot (steps.py)."""
        count = len(self.places)
        tensors = values, self.places, packed.floats
        return "sk_refill_2", -(-count // REFILL_THREADS), REFILL_THREADS, 0, tensors, count

    def fill_rounded(self, values: Tensor, scales: Tensor) -> Packed:
        """A packed weight with these values of 8 bits, in the order of the CSR indices, times these
        scales of the rows (row_scales.py). A zero counts as not stored."""
        check_length(values, self.places.shape[0])
        kind = self.kinds_of_8_bits[values.dtype]
        fields = self.empty(torch.uint8) | {"scales": scales}
        packed = kind(self.n, self.k, len(values), **fields)
        packed.check()
        codes = values.view(torch.uint8).masked_fill(values.float() == 0, 0)
        packed.floats.view(-1)[self.places] = codes
        return packed


def check_length(values: Tensor, nnz: int) -> None:
    if values.shape != (nnz,):
        raise ValueError(
            f"values: expected shape ({nnz},), that of the pattern, got {tuple(values.shape)}"
        )


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
