"""Which modules hold a matrix that a sparse one can stand in for, and why others do not."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..indices import VALUE_DTYPES

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
STACKS = ("gate_up_proj", "down_proj")  # of a mixture's experts
UNGATED_STACKS = ("up_proj", "down_proj")  # of those without a gate (Nemotron-H)
# Subclasses of nn.Linear, by name, whose own forward computes the same.
LIKE_LINEAR = ("FalconLinear",)
# Experts, by name, each of which gets its share of the rows of x: W is stored as [E, K, N].
OF_SORTED_ROWS = ("Llama4TextExperts",)


def uses_of_parameters(model: nn.Module) -> Counter:
    """How many modules hold each Parameter, or another one of the same memory, by its id."""
    held = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    uses = Counter(map(memory_of, held))
    return Counter({id(p): uses[memory_of(p)] for p in held})


def memory_of(parameter: Tensor) -> object:
    """Equal for Parameters that are one weight: the same one, or two of the same memory, as after
    `a.weight.data = b.weight.data`."""
    is_plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
    if is_plain and not parameter.is_meta and parameter.numel():
        return parameter.device, parameter.data_ptr()
    return id(parameter)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, by its form: weight [in, out], and nf = out."""
    weight = module._parameters.get("weight")
    if type(module).__name__ != "Conv1D" or weight is None or weight.ndim != 2:
        return False
    return getattr(module, "nf", None) == weight.shape[1]


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, or a subclass that is known to compute the same."""
    return type(module) is nn.Linear or (
        isinstance(module, nn.Linear) and type(module).__name__ in LIKE_LINEAR
    )


def is_experts(module: nn.Module) -> bool:
    """Whether it has the 3-D Parameters of a mixture's experts in transformers."""
    return bool(stacks_of(module))


def stacks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the 3-D Parameters, if these are of the experts of a mixture."""
    held = module._parameters.keys()
    if set(STACKS) <= held:
        return STACKS
    if set(UNGATED_STACKS) <= held and getattr(module, "has_gate", True) is False:
        return UNGATED_STACKS
    return ()


def takes_sorted_rows(experts: nn.Module) -> bool:
    """Whether its input has as many rows for each expert, one after the other (Llama 4)."""
    return type(experts).__name__ in OF_SORTED_ROWS


def is_transposed(experts: nn.Module) -> bool:
    """Whether its stacks are [E, K, N] (gpt-oss, Llama 4)."""
    return getattr(experts, "is_transposed", takes_sorted_rows(experts))


def matrices(experts: Any, name: str) -> list[Tensor]:
    """W [N, K] of each expert: views of a stack, which may be stored as [E, K, N]."""
    stack = experts._parameters[name].detach()
    return list(stack.mT if is_transposed(experts) else stack)


def biases(experts: Any, name: str) -> list[nn.Parameter | None]:
    """A new bias [N] of each expert, or None for each, beside a stack."""
    stack = experts._parameters.get(f"{name}_bias")
    if stack is None:
        return [None] * len(experts._parameters[name])
    return [nn.Parameter(b.clone(), stack.requires_grad) for b in stack.detach()]


def pruning_masks(module: nn.Module) -> dict[str, Tensor]:
    """What torch.nn.utils.prune masks of the module, by name."""
    hooks = module._forward_pre_hooks.values()
    names = [hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)]
    masks = {name: module._buffers.get(f"{name}_mask") for name in names}
    return {name: mask for name, mask in masks.items() if mask is not None}


def parameter_of(module: nn.Module) -> Any:
    """The Parameter behind its weight: that itself, or what hooks and parametrizations make the
    weight from in each call."""
    if parametrize.is_parametrized(module, "weight"):
        return next(module.parametrizations["weight"].parameters())  # type: ignore[union-attr, index]
    held = (module._parameters.get(name) for name in ("weight", "weight_orig", "weight_v"))
    return next((p for p in held if p is not None), module.weight)


def renew_weight(module: nn.Module) -> None:
    """Make the weight that hooks make in each call, of Parameters that may have been loaded or
    stepped since the last one."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod | WeightNorm):
            hook(module, None)
        elif isinstance(hook, SpectralNorm):
            setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody gave this one module another forward than its class has. Accelerate does so
    too, to run hooks."""
    return "forward" in module.__dict__ and not hasattr(module, "_hf_hook")


def refuse_made_anew(modules: Mapping[str, nn.Module]) -> None:
    """ValueError where hooks make a weight anew in each forward pass: what stands there is of the
    last one, and the parameters that it is made from would be forgotten."""
    for name, module in modules.items():
        of = name or "the model"
        if pruning_masks(module):
            raise ValueError(
                f"weights: torch.nn.utils.prune masks those of {of}: call its remove() first"
            )
        # As a plain attribute, in the place of a Parameter.
        is_sparse = "col_indices" in module._buffers
        weight = "values" if is_sparse else "weight"
        if (is_sparse or isinstance(module, nn.Linear)) and weight in vars(module):
            made_from = ", ".join(n for n in module._parameters if n.startswith(f"{weight}_"))
            raise ValueError(
                f"weights: those of {of} are made anew in each forward pass, from {made_from}: "
                "call remove_weight_norm() or remove_spectral_norm() of torch.nn.utils first"
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks, beside those that mask its weights, or a forward that runs some."""
    count = sum(len(getattr(module, name)) for name in _HOOKS)
    return count > len(pruning_masks(module)) or "forward" in module.__dict__


def why_not(module: nn.Module) -> str | None:
    """The reason why no sparse module can take the place of this one; None where one can."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "rows are looked up, nothing is multiplied"
    masks = pruning_masks(module).keys()
    if masks and not (isinstance(module, nn.Linear) and masks == {"weight"}):
        return f"torch.nn.utils.prune masks its {', '.join(masks)}: call its remove() first"
    if parametrize.is_parametrized(module):
        return "it is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, nn.Linear):
        forward = type(module).forward if is_linear(module) else nn.Linear.forward
        return _changed(module, forward, {"weight", "bias"})
    if is_conv1d(module):
        return _changed(module, type(module).forward, {"weight", "bias"})
    if type(module) in CONVOLUTIONS:
        return _convolution(module) or _changed(module, type(module).forward, {"weight", "bias"})
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    if is_experts(module):
        return _experts(module)
    if any(p is not None and p.ndim == 3 and len(p) > 1 for p in module._parameters.values()):
        return f"a {type(module).__name__} uses its stack of matrices in a way not known here"
    return f"a {type(module).__name__} does more than multiply by it"


def _changed(module: nn.Module, forward, parameters: set[str]) -> str | None:
    """What the module does beside its class's product, or holds beside its weight."""
    if "forward" in module.__dict__ or type(module).forward is not forward:
        return "it has a forward of its own"
    masks = pruning_masks(module)
    own = {f"{n}_orig" if n in masks else n for n in parameters} | {f"{n}_mask" for n in masks}
    held = module._parameters.keys() | module._buffers.keys()
    if more := sorted(held - own):
        return f"it also holds {', '.join(more)}"
    children = module._modules.keys() - ({"out_proj"} if "in_proj_bias" in parameters else set())
    if children:
        return f"it also holds {', '.join(sorted(children))}"
    if has_hooks(module):
        return "it has hooks, which another module would not have"
    return None


def _convolution(conv: Any) -> str | None:
    return None if conv.groups == 1 else f"its channels are in {conv.groups} groups"


def _attention(attention: nn.MultiheadAttention) -> str | None:
    if attention._parameters.get("in_proj_weight") is None:
        return "query, key and value have different sizes"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds a key and a value of its own"
    if pruning_masks(attention.out_proj):
        return "torch.nn.utils.prune masks its out_proj: call its remove() first"
    names = {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
    names |= {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    return _changed(attention, nn.MultiheadAttention.forward, names) or why_not(attention.out_proj)


def _experts(experts: Any) -> str | None:
    if "forward" in experts.__dict__:
        return "it has a forward of its own"
    if (reason := why_not_experts(experts)) is not None:
        return reason
    stacks = stacks_of(experts)
    own = {*stacks, *(f"{name}_bias" for name in stacks)}
    if more := sorted((experts._parameters.keys() | experts._buffers.keys()) - own):
        return f"it also holds {', '.join(more)}"
    if len(experts._forward_pre_hooks) + len(experts._forward_hooks):
        return "it has hooks, which another module would not have"
    return None


def why_not_experts(experts: Any) -> str | None:
    """The reason why its stacks are no matrices of the experts of a mixture."""
    if getattr(experts, "_is_expert_parallel", False):
        return "experts that are shared out to several devices are not served"
    names = stacks_of(experts)
    is_known = hasattr(type(experts), "_apply_gate") or takes_sorted_rows(experts)
    if names == STACKS and not is_known:
        return "experts whose class has no _apply_gate are not served"
    factor = 2 if names == STACKS else 1  # gate and up together
    expected = (
        f"expected {names[0]} [E, {'2 I' if factor == 2 else 'I'}, H] and down_proj [E, H, I]"
    )
    stacks = [experts._parameters[name] for name in names]
    if any(stack is None or stack.ndim != 3 for stack in stacks):
        return expected
    (n, k), (h, i) = (stack.shape[1:] for stack in stacks)
    if is_transposed(experts):
        n, k, h, i = k, n, i, h
    if len(stacks[0]) != len(stacks[1]) or (n, k) != (factor * i, h):
        return expected
    shapes = [None if b is None else b.shape[0] for b in (biases(experts, x)[0] for x in names)]
    if shapes not in ([None, None], [n, h]):
        return "expected a bias for each row of both stacks, or none"
    return None


def why_not_weight(weight: Tensor, uses: int) -> str | None:
    """The same of its weight."""
    if uses > 1:
        return "tied: another module has the same weight"
    if getattr(weight, "requires_dense", False):
        return "its weight says requires_dense"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in VALUE_DTYPES or weight.layout != torch.strided:
        kind = weight.dtype if weight.layout == torch.strided else weight.layout
        return f"weights of {kind} are not served"
    if weight.device.type not in ("cpu", "cuda"):
        return f"weights on {weight.device.type} are not served"
    return None
