"""pack_, which puts packed layers into a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .checks import check_model, refuse_sharded
from .convert import replace_modules
from .kinds import refuse_made_anew
from .largest import largest_inputs
from .linear import SparseLinear
from .packed import PackedLinear, check_eight_bits, packed_layer, token_range
from .shared import SharedInput, shared_inputs
from .warned import warn_of_hooks


def pack_(
    model: nn.Module,
    tokens: int | Sequence[int] = 1,
    *,
    dense: bool | Callable[[nn.Module, str], bool] = False,
    groups: Sequence[Sequence[str]] = (),
    dtype: torch.dtype | None = None,
    example: Any = None,
    values: torch.dtype | None = None,
) -> nn.Module:
    """Replace every SparseLinear of `model` by a PackedLinear, in place, and return the model; of a
    model that is one SparseLinear itself, which stays so, the PackedLinear.

    For inference where the model is: CSR and values are dropped. TypeError, and an unchanged model,
    unless all their values are bfloat16 or float16, on a CPU float32 or bfloat16; the message names
    the layer. ValueError where there is no SparseLinear. Hooks of layers are not taken over, with a
    warning. Two-way patterns run on sparse tensor cores where that was the fastest for so many
    tokens. On a CPU there is one layout, for up to 4 tokens: `tokens` and `dense` change nothing.
    `sparsekern.explain(tokens, model)` says afterwards what each layer holds and runs.

    Two ways to 8 bits: `values` rounds what is held, for generating, with any pattern; `dtype`
    rounds x too, for prompts, with two-way patterns. One model takes one of them.

    Args:
        tokens: M of the calls, about: the batch, in generation. With (1, 2048), or a range, the
            least and the most: a layer is then held in two layouts where that makes one of the two
            1.1 times as fast or more. As measured on an H200 (kernels/packed_times.json).
        dense: may a layer keep a dense copy of its weight? Where with some of these numbers of
            tokens all that is packed was slower than 0.97 of dense, it does then; most do for the
            tokens of a prompt. dense(module, name) answers for each layer. A dense copy multiplies
            its zeros, as nn.Linear does: an infinity or NaN in x makes NaN of its whole token.
        groups: names of layers side by side that are called with the same x, as
            [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]. They are packed as one
            matrix and run as one product; nn/shared.py says when. ValueError for a group that
            nothing in the model has, or whose layers do not fit together.
        values: torch.int8 or torch.float8_e4m3fn rounds weights, each row with a scale, its largest
            value over 127 or 448; x stays bfloat16, and sums are those of the rounded weights in
            float32. Fewer bytes for any number of tokens; faster than 16 bits with one or two, of
            large layers. Any pattern, on a GPU. ValueError, TypeError or NotImplementedError unless
            weights are finite bfloat16 there, and dense is False.
        dtype: torch.float8_e4m3fn rounds weights and, in each call, x to E4M3, each tensor with one
            scale. For many tokens, on a GPU of compute capability 9.0. ValueError, TypeError or
            NotImplementedError unless all patterns are two-way, values bfloat16, sizes multiples of
            32, and cuSPARSELt is there.
        example: what to call the model with, once, to see how large x gets in E4M3: a tensor, a
            tuple of arguments, a dict of named ones, or a function of the model. What is eight
            times as large later becomes NaN. Without it the scale is found in each call, which
            takes longer.
    """
    check_model(model)
    ends = token_range(tokens)
    check_eight_bits(dtype, values, dense)
    if example is not None and dtype is None:
        raise ValueError("example: it has a meaning with dtype=torch.float8_e4m3fn alone")
    if not (isinstance(dense, bool) or callable(dense)):
        raise ValueError(f"dense: expected True, False or a function, got {dense!r}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not layers:
        is_packed = any(isinstance(module, PackedLinear) for module in model.modules())
        why = "it is packed already" if is_packed else "sparsify_ or accelerate_ make such layers"
        raise ValueError(f"pack_: no SparseLinear in {type(model).__name__}; {why}")
    refuse_sharded("pack_", model, layers)
    refuse_made_anew(layers)
    for name, layer in layers.items():
        if layer.values.is_meta:
            raise NotImplementedError(f"pack_: {name or 'the model'} is on meta, without values")
    grouped = shared_inputs(model, groups)
    largest = {} if example is None else largest_inputs(model, example)

    def may_be_dense(name: str, module: nn.Module) -> bool:
        return dense(module, name) if callable(dense) else dense

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, SparseLinear):
            return None
        try:
            if (group := grouped.get(module)) is None:
                may_be = may_be_dense(name, module)
                given = dtype, largest.get(module), values
                return PackedLinear.from_sparse(module, ends, may_be, *given)
            if group.shared is None:
                weight, bias = group.stacked()
                is_allowed = all(may_be_dense(*item) for item in group.layers.items())
                most = max(largest[m] for m in group.layers.values()) if largest else None
                whole = packed_layer(weight, bias, ends, is_allowed, dtype, most, values)
                group.shared = SharedInput(whole)
            return group.part(module)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{name or 'the model'}: {error}") from None

    warn_of_hooks("pack_", layers)
    return replace_modules(model, replace)
