"""Products of few tokens on a GPU: the table row `few_tokens`, and those of packed weights.

W is read once, in the layout that choose.py names: `gather` by CUDA cores, `cover` by sparse tensor
cores, `pairs` by dense ones. Values are bfloat16 or float16, sums float32, rounded once. Results do
not depend on timing: sums of parts are added in a fixed order. A place that is not stored takes no
part: an infinite or NaN x reaches the outputs that a stored value connects it to, and no others.
Where W is written out (expand.py: a packed weight and many tokens) another kernel sees to that.

A packed weight holds the counters by which blocks find out who is last, so it must not be used on
two streams at the same time (packs.py sees to that for those of table rows).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..crossover import density_limit
from ..problem import Kernel, Problem, bound_kernel
from ..steps import VALUES, Asked, Slot, Steps
from . import library as cuda_library
from .choose import choose_layout
from .compressed import TwoOfFour, TwoOfFourE4m3
from .expand import spmm_expanded
from .kept import Dense
from .layout import TYPES, Launch, Packed, gpu_of
from .packs import pack_of

MOST_TOKENS = 64
MOST_COLUMNS = 2**25  # the kernels count 64 rows of x in 32 bits
MOST_ROWS = 2**30  # and W's, with those that fill a block up


def spmm_packed(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [M, N] = x [M, K] @ W.T + bias [N], all on the GPU and in the dtype of the weight.

    Above 64 tokens (`pairs` on Hopper: 256) W is written out and torch multiplies; so it is where a
    kernel would need more shared memory than the GPU has (gather: for one token of about 100,000
    columns). No checks: the op has them (choose.py).
    """
    if isinstance(packed, Dense | TwoOfFour | TwoOfFourE4m3):
        return packed.multiply(x, bias)
    launch = launch_of(packed, x.shape[0], x.device)
    if launch is None:
        return spmm_expanded(x, packed, bias)
    y = x.new_empty(x.shape[0], packed.n)
    if y.numel() == 0:
        return y
    if packed.k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    packed.run(launch, x.contiguous(), None if bias is None else bias.contiguous(), y)
    return y


def launch_of(packed: Packed, m: int, device: torch.device) -> Launch | None:
    """The launch for m tokens; None where W is written out."""
    if m > packed.most_tokens or packed.k >= MOST_COLUMNS or packed.n >= MOST_ROWS:
        return None
    return packed.launch(m, gpu_of(device))


def _bind(problem: Problem) -> Callable[..., Tensor]:
    layout = choose_layout(problem.M, problem.density)
    name, make_layout = layout.kind.name, partial(layout, n=problem.N, k=problem.K)

    def run(row_offsets, col_indices, values, n, k, x, bias=None):
        pack = pack_of("few_tokens", name, make_layout, row_offsets, col_indices, values, n, k)
        return spmm_packed(x, pack.packed, bias)

    return run


def _prepare(steps: Steps, asked: Asked, a: Slot, b: Slot | None) -> Slot | None:
    p, values = asked.problem, asked.values
    assert values is not None
    layout = choose_layout(p.M, p.density)
    make_layout = partial(layout, n=p.N, k=p.K)
    indices = asked.row_offsets, asked.col_indices
    pack = pack_of("few_tokens", layout.kind.name, make_layout, *indices, values, p.N, p.K)
    if values.requires_grad:  # in each of these calls (packs.py)
        steps.call(pack.emptied, VALUES)
        steps.start(*pack.layout.refill_launch(pack.packed, VALUES))
    else:
        steps.call(pack.refreshed, VALUES)
    return prepare_packed(steps, asked.a, pack.packed, a, b if asked.has_bias else None)


def prepare_packed(
    steps: Steps, x: Tensor, packed: Packed, a: Slot, bias: Slot | Tensor | None
) -> Slot:
    """The steps of spmm_packed(a, packed, bias) for all a of the shape of x [.., K]."""
    tokens, m = tuple(x.shape[:-1]), x.shape[:-1].numel()
    launch = None
    if m and packed.k and not isinstance(packed, Dense | TwoOfFour | TwoOfFourE4m3):
        launch = launch_of(packed, m, x.device)
    if launch is None or m > launch.tokens:
        y = steps.call(spmm_packed, steps.rows(a, tokens, packed.k), packed, bias)
        return steps.unfolded(y, tokens, packed.n)
    y, partial_sums = steps.empty(a, *tokens, packed.n), None
    if launch.partial:
        partial_sums = steps.empty(a, launch.partial, dtype=torch.float32)
    steps.start(*packed.started(launch, m, a, bias, y, partial_sums))
    return y


def _refuse(p: Problem) -> str | None:
    if p.M > MOST_TOKENS:
        return f"it serves up to {MOST_TOKENS} tokens, not {p.M}"
    if p.dtype not in TYPES:
        return f"it takes bfloat16 and float16, not {str(p.dtype).removeprefix('torch.')}"
    if p.K >= MOST_COLUMNS or p.N >= MOST_ROWS:
        return f"it takes fewer than {MOST_ROWS} rows and {MOST_COLUMNS} columns"
    if reason := cuda_library.refusal():
        return reason
    if not torch.cuda.is_available():
        return "there is no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"it needs compute capability 8.0, not {major}.{minor}"
    layout = choose_layout(p.M, p.density)
    needed, most = layout.least_smem(p.M, p.K), gpu_of(torch.device("cuda")).smem_bytes
    if needed > most:
        return f"it needs {needed} bytes of shared memory, the GPU has {most} for a block"
    if reason := layout.refuse(p):
        return reason
    limit = density_limit(f"sm_{major}{minor}", p.dtype, p.M, "few_tokens", "expand")
    if limit is not None and p.density > limit:
        return f"writing W out is faster above density {limit:.2f} at {p.M} tokens"
    return None


def _describe(p: Problem) -> str:
    name = choose_layout(p.M, p.density).kind.name
    return f"{name} kernel, packed on the first call; values that require grad on every call"


KERNELS: tuple[Kernel, ...] = (
    bound_kernel("few_tokens", "spmm", "cuda", _refuse, _bind, _describe, _prepare),
)
