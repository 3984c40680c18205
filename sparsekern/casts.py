"""Casts of parameters under autocast, made once for each outermost context, as torch makes its own.

torch keeps the cast of a leaf that requires grad until the outermost context ends, and tells nobody
when that is. So we have it keep one for us: that of a sentinel, a parameter without elements. Our
casts hang on this cast and go with it. Inside a context nn.Linear does not see a write to its
weight; here a write that torch counts makes a new cast.
"""

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .ops import in_functorch

# Private in torch, so their absence must not break the import.
is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_modes = torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_is_cache_enabled = torch.is_autocast_cache_enabled
_CAST = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_CONVERT = {torch.bfloat16: Tensor.bfloat16, torch.float16: Tensor.half}  # 0.5 us less than to()


class _Casts(dict):
    """Casts of one context: by the id of a parameter, what was cast and its cast."""


# By the number of the device and the dtype. torch gives the cast that it keeps to contexts of
# another dtype too, of another thread or nested, so each dtype has a sentinel of its own.
_stores: dict[tuple[int, torch.dtype], weakref.ref] = {}
_sentinels: dict[tuple[int, torch.dtype], Tensor] = {}


def autocast(*tensors):
    """The operands as torch's autocast hands them to matmul: float64 is exempt. The second one says
    on which device; others may be None. A small layer pays for every line."""
    device = "cpu" if tensors[1].is_cpu else tensors[1].device.type
    # torch knows no autocast on the meta device, and raises.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    if dtype not in _CONVERT or _is_observed(device):
        return [_convert(t, dtype) for t in tensors]
    store = _stores.get((tensors[1].get_device(), dtype))
    casts = None if store is None else store()
    results = []
    for t in tensors:
        kept = casts.get(id(t)) if casts else None
        if kept is not None:
            original, version, address, cast = kept
            if (
                original() is t
                and t.dtype is not dtype
                and t._version == version
                and t.data_ptr() == address
                and t.requires_grad
            ):
                results.append(cast)
                continue
        results.append(_cast(t, dtype, casts))
    return results


def without_autocast(t: Tensor) -> AbstractContextManager:
    """What writes to t, in place or as out=, torch's autocast leaves alone."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def wanted_dtype(x: Tensor) -> torch.dtype | None:
    """That of a product with x under autocast; None where there is none, or x is exempt."""
    device = x.device.type
    if x.dtype not in _CAST or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _is_observed(device: str) -> bool:
    """Whether a cast belongs to whoever looks on, or torch would not keep one."""
    return (
        _is_compiling()
        or _modes() > 0
        or forward_ad._current_level >= 0
        or not _is_cache_enabled()
        or (device == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _cast(t, dtype: torch.dtype, casts: _Casts | None):
    """A new cast, kept where t is a parameter."""
    if (
        type(t) not in _PLAIN
        or not t.requires_grad
        or t.dtype not in _CAST
        or t.dtype is dtype
        or not t.is_leaf
        or t._is_view()
        or t.is_inference()  # no counter
        or in_functorch()
    ):
        return _convert(t, dtype)
    if casts is None:
        casts = _begin((t.get_device(), dtype), t.device)
        if casts is None:
            return _convert(t, dtype)
    version, address = t._version, t.data_ptr()
    with torch.inference_mode(False), torch.enable_grad():  # a cast outlives these modes
        held = _Held.apply(t) if threading.active_count() > 1 else None
        cast = _convert(t, dtype)
        del held
    casts[id(t)] = weakref.ref(t), version, address, cast
    return cast


class _Held(Function):
    """Makes the node that gathers the gradient of a leaf, and keeps it while its result lives.

    A Function makes it with Python's lock held. An operation of torch does not hold that, but wants
    it while it holds the leaf's: where threads do both, each would wait for the other."""

    @staticmethod
    def forward(ctx, leaf):
        return leaf.new_empty(0)


def _convert(t, dtype: torch.dtype):
    if not isinstance(t, Tensor) or t.dtype not in _CAST or t.dtype is dtype:
        return t
    return _CONVERT[dtype](t) if dtype in _CONVERT else t.to(dtype)


def _begin(key: tuple[int, torch.dtype], device: torch.device) -> _Casts | None:
    """An empty store that dies with the outermost context; None where autograd would show the
    sentinel to somebody, or torch does not cast it."""
    if _hooks(False) is not None:
        return None
    with torch.inference_mode(False), torch.enable_grad():
        if key not in _sentinels:
            _sentinels[key] = torch.zeros(0, 0, device=device, requires_grad=True)
        other = torch.zeros(0, 0, device=device, requires_grad=True)  # else autograd saves nothing
        kept = getattr(torch.mm(_sentinels[key], other).grad_fn, "_saved_self", None)
    if kept is None or kept is _sentinels[key]:
        return None
    if not hasattr(kept, "sparsekern_casts"):
        kept.sparsekern_casts = _Casts()
    _stores[key] = weakref.ref(kept.sparsekern_casts)
    return kept.sparsekern_casts
