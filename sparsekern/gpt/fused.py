"""A GPT's pass through its cache on a GPU, with few launches beside those of its products.

A step of one token reads every weight once, in some microseconds a layer, and as long again is lost
where a norm, an activation or a copy is a launch of its own. Here a block is its four products and
four or five launches of Triton's (fused_kernels.py): norm with what is added before it, rotary
positions, cache and attention in one, activation. Dense and sparse models take the same way.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.cuda import e4m3
from ..nn.kinds import has_hooks
from . import llama
from .model import GPT, MLP, Attention, Block, Cache

STARTS_EARLY = 9  # compute capability whose kernels may start before the last one has ended
WIDEST = 16384  # of a norm's row, which a program holds
HEADS = (16, 32, 64, 128, 256)  # widths of a head
MOST_SHARED = 8192  # of such a width times the heads that share a key, which a program holds
POSITIONS = 64  # that a program of attention looks at, or more
TILE, SHARED_TILE = 16, 32  # of these, together, for one head and for those that share a key
PROGRAMS, SHARED_PROGRAMS = 924, 396  # that 132 multiprocessors hold: 7 and 3 each
FEW_POSITIONS = 192  # that it looks at alone
MOST_PARTS = 64
ROWS, ELEMENTS = 16, 512  # of a program of remember_kernel and activate_kernel

KINDS = {
    Block: (Attention, MLP, nn.LayerNorm),
    llama.LlamaBlock: (llama.Attention, llama.MLP, nn.RMSNorm),
}


def fits(model: GPT) -> bool:
    """Whether Fused can take its place, here and now: what it passes by is as it was made."""
    weight, c = model.wte.weight, model.config
    width, shared = c.n_embd // c.n_head, c.n_head // c.kv_heads
    known = type(model) in (GPT, llama.Llama) and all(map(_is_known, model.blocks))
    return (
        known
        and _is_plain(model)
        and _is_norm(model.norm, type(model.blocks[0].norm2))
        and model.norm.weight.dtype == weight.dtype
        and not model.training
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and width in HEADS
        and width * _block_of(shared) <= MOST_SHARED
        and c.n_embd <= WIDEST
        and not torch.is_autocast_enabled("cuda")
        and find_spec("triton") is not None
        and _runs(weight.device)
    )


@cache
def _runs(device: torch.device) -> bool:
    """Whether Triton can launch there: it wants a C compiler. A warning where not."""
    u = torch.zeros(1, ELEMENTS, dtype=torch.bfloat16, device=device)
    how = {"factor": 1.0, "GATED": False, "IN_E4M3": False, "EARLY": False, "BLOCK": ELEMENTS}
    try:
        with torch.cuda.device(device):
            _kernels().activate_kernel[(1,)](u, u, ELEMENTS, ELEMENTS, **how)
    except Exception as error:
        warnings.warn(f"generate: slower, since Triton does not run: {error}", stacklevel=4)
        return False
    return True


def _is_known(block: nn.Module) -> bool:
    parts = [getattr(block, name, None) for name in ("attention", "mlp", "norm1", "norm2")]
    wanted = KINDS.get(type(block))
    return (
        wanted is not None
        and tuple(map(type, parts[:2])) == wanted[:2]
        and all(map(_is_plain, [block, *parts[:2]]))
        and all(_is_norm(norm, wanted[-1]) for norm in parts[2:])
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of it runs the forward of its class and nothing more."""
    return not has_hooks(module) and "forward" not in vars(module)


def _is_norm(norm: nn.Module, kind: type) -> bool:
    """Whether add_norm_kernel computes it."""
    if type(norm) is not kind or norm.weight is None or norm.eps is None:
        return False
    return _is_plain(norm)


class Fused:
    """The pass of a model that fits(). It has the model's weights, not copies.

    `starts_early`: launches may begin before what is ahead of them has ended; by default where the
    GPU can."""

    def __init__(self, model: GPT, starts_early: bool | None = None) -> None:
        self.model, self.config = model, model.config
        weight = model.wte.weight
        if starts_early is None:
            starts_early = torch.cuda.get_device_capability(weight.device)[0] >= STARTS_EARLY
        self._early = {"EARLY": starts_early} | ({"launch_pdl": True} if starts_early else {})
        along = model.along(torch.arange(self.config.block_size, device=weight.device))
        self._turns = bool(along)
        self._angles = along or (weight, weight)  # cos and sin, or anything

    @torch.no_grad()
    def __call__(self, idx: Tensor, cache: Cache, position: Tensor | None = None) -> Tensor:
        """Logits [B, 1, V] of the last of the tokens idx int64 [B, T].

        Without a position they are the first ones, at 0 to T - 1; with one, int64 [1], T is 1.
        ValueError for more, and for a cache that has no place for them: kernels check nothing."""
        B, T = idx.shape
        if T > (self.config.block_size if position is None else 1):
            raise ValueError(
                f"idx has {T} positions, expected {self.config.block_size} or fewer, 1 after others"
            )
        cache.check(self.model, B, T)
        with torch.cuda.device_of(idx):
            return self._logits(idx, cache, position)

    def _logits(self, idx: Tensor, cache: Cache, position: Tensor | None) -> Tensor:
        B, T = idx.shape
        places = torch.arange(T, device=idx.device) if position is None else position
        x = self.model.embed(idx, places).view(B * T, -1)
        added = None
        for block, past in zip(self.model.blocks, cache.layers, strict=True):
            attention, mlp = block.attention, block.mlp
            qkv = self._norm(x, added, block.norm1, attention.qkv)
            y = self._read(qkv, *past, B) if position is None else self._step(qkv, *past, position)
            u = self._norm(x, _product(attention.proj, y), block.norm2, mlp.up)
            added = self._activate(u, mlp.down)
        if T > 1:
            x, added = (t.view(B, T, -1)[:, -1].contiguous() for t in (x, added))
        return self._norm(x, added, self.model.norm, self.model.lm_head).view(B, 1, -1)

    def _norm(self, x: Tensor, added: Tensor | None, norm: nn.Module, linear: nn.Module) -> Tensor:
        """linear(norm(x + added)), and x += added."""
        rows, C = x.shape
        y, rounding = _input_of(linear, x, C)
        bias, block = getattr(norm, "bias", None), _power_of_two(C)
        _kernels().add_norm_kernel[(rows,)](
            *(x, x if added is None else added, norm.weight, x if bias is None else bias, y),
            *(C, norm.eps),
            **rounding,
            HAS_ADDED=added is not None,
            HAS_BIAS=bias is not None,
            HAS_MEAN=isinstance(norm, nn.LayerNorm),
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
            **self._early,
        )
        return _product(linear, y)

    def _activate(self, u: Tensor, linear: nn.Module) -> Tensor:
        """linear(activation(u))."""
        y, rounding = _input_of(linear, u, self.config.mlp_width)
        _kernels().activate_kernel[(-(-y.numel() // ELEMENTS),)](
            *(u, y, self.config.mlp_width, y.numel()),
            **rounding,
            GATED=self._turns,
            BLOCK=ELEMENTS,
            **self._early,
        )
        return _product(linear, y)

    def _heads(self) -> tuple[int, int, int]:
        """Heads of q, of keys, and their width."""
        c = self.config
        return c.n_head, c.kv_heads, c.n_embd // c.n_head

    def _read(self, qkv: Tensor, keys: Tensor, values: Tensor, B: int) -> Tensor:
        """Attention of positions 0 to T - 1 to each other, which go into the cache: [B T, C]."""
        (H, G, D), rows = self._heads(), len(qkv)
        T, first = rows // B, 0 if self._turns else H
        _kernels().remember_kernel[(-(-rows // ROWS), H + 2 * G - first)](
            *(qkv, keys, values, *self._angles, rows, T, keys.shape[2], H, G, first),
            TURNS=self._turns,
            ROWS=ROWS,
            D=D,
            **self._early,
        )
        q = qkv.view(B, T, H + 2 * G, D)[:, :, :H].transpose(1, 2)
        k, v = keys[:, :, :T], values[:, :, :T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H > G)
        return y.transpose(1, 2).reshape(rows, H * D)

    def _step(self, qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """Attention of a new position, which goes into the cache: [B, C]."""
        (H, G, D), (B, S) = self._heads(), (len(qkv), keys.shape[2])
        R = H // G
        parts = parts_of(B * G, S, PROGRAMS if R == 1 else SHARED_PROGRAMS)
        y = qkv.new_empty(B, H * D)
        sums = weights = y
        if parts > 1:
            sums = y.new_empty(B * H * parts * D, dtype=torch.float32)
            weights = y.new_empty(B * H * parts * 2, dtype=torch.float32)
        _kernels().attend_kernel[(B * G, parts)](
            *(qkv, keys, values, position, *self._angles, y, sums, weights),
            *(S, G, parts, D**-0.5 * _kernels().LOG2_E.value),
            R=R,
            TURNS=self._turns,
            IS_WHOLE=parts == 1,
            BLOCK_R=_block_of(R),
            BLOCK_S=TILE if R == 1 else SHARED_TILE,
            D=D,
            **self._early,
        )
        if parts > 1:
            _kernels().combine_kernel[(B * H,)](
                *(sums, weights, y, parts), R=R, PARTS=_power_of_two(parts), D=D, **self._early
            )
        return y


def _input_of(linear: nn.Module, like: Tensor, width: int) -> tuple[Tensor, dict]:
    """Memory [rows, width] for what it multiplies, and how that is rounded."""
    exponent = getattr(linear, "_x_exponent", None)
    dtype = like.dtype if exponent is None else e4m3.DTYPE
    y = like.new_empty(len(like), width, dtype=dtype)
    return y, {"factor": 2.0 ** (exponent or 0), "IN_E4M3": exponent is not None}


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    y = linear._multiply_e4m3(x) if x.dtype is e4m3.DTYPE else linear(x)
    return y.contiguous()


def parts_of(groups: int, length: int, programs: int) -> int:
    """Into how many parts the positions of each of so many heads of keys are cut, so that no more
    programs run than so many."""
    if length <= FEW_POSITIONS:
        return 1
    return max(1, min(MOST_PARTS, programs // groups, -(-length // POSITIONS)))


def _block_of(shared: int) -> int:
    """Rows of a program's q, of so many heads that share a key: tensor cores take 16."""
    return 1 if shared == 1 else max(16, _power_of_two(shared))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@cache
def _kernels():
    from . import fused_kernels  # imports triton, which is optional

    return fused_kernels
