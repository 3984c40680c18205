"""Which linears make a model's output, or choose among a mixture's experts: they stay dense where
nobody says otherwise."""

from collections.abc import Iterator

from torch import nn

from .kinds import is_conv1d
from .linear import SparseLinear

HEAD_NAMES = ("head", "lm_head")
ROUTER_NAMES = ("router", "gate")  # the second only beside experts


def heads(model: nn.Module) -> set[str]:
    """Names of the linears that make a model's output of what its blocks give: what stands last in
    a name is head or lm_head, the model says so itself (get_output_embeddings, as transformers'
    do), or it comes after the last of its blocks. Of a model without blocks, by name."""
    named = dict(model.named_modules())
    found = {name for name in named if name.split(".")[-1] in HEAD_NAMES}
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    found |= {name for name, module in named.items() if module is output}
    last = _last_of_blocks(named)
    if last is not None:
        names = list(named)
        inside = f"{last}." if last else ""
        after = names[names.index(last) + 1 :]
        found |= {n for n in after if not n.startswith(inside) and _is_linear(named[n])}
    return found


def routers(model: nn.Module) -> set[str]:
    """Names of the linears that are called `router`, or `gate` where `experts` stand beside it, or
    are in a module of that name."""
    named = dict(model.named_modules())

    def is_router(name: str) -> bool:
        parts = name.split(".")
        around = [named[".".join(parts[:i])] for i in range(len(parts))]
        return any(
            part == ROUTER_NAMES[0] or part == ROUTER_NAMES[1] and "experts" in parent._modules
            for part, parent in zip(parts, around, strict=True)
        )

    return {name for name, module in named.items() if _is_linear(module) and is_router(name)}


def _last_of_blocks(named: dict[str, nn.Module]) -> str | None:
    """Name of the last list of blocks, or of the last block where none is in a list. What is in a
    block of a list is none (experts)."""
    blocks = _transformer_blocks(named)
    lists = set()
    for name in blocks:
        here = [name, *_around(name)]
        lists.update([up for up in here if isinstance(named[up], nn.ModuleList)][:1])
    repeated = {
        name
        for name, module in named.items()
        if _holds_blocks(module, 2) and lists.isdisjoint(_around(name))
    }
    single = [name for name, module in named.items() if _holds_blocks(module, 1)]
    found = [name for name in named if name in lists | repeated] or blocks or single
    return found[-1] if found else None


def _transformer_blocks(named: dict[str, nn.Module]) -> list[str]:
    """Names of the smallest modules that hold attention and, outside of it, other matrices."""
    with_attention, with_others = set[str](), set[str]()
    for name, module in named.items():
        here = [name, *_around(name)]
        attention = [up for up in here if _is_attention(named[up])]
        if attention:
            with_attention.update(_around(attention[-1]))
        elif _is_dense_or_sparse(module) or any(
            p.ndim > 1 for p in module.parameters(recurse=False)
        ):
            with_others.update(here)
    both = with_attention & with_others
    larger = {up for name in both for up in _around(name)}
    return [name for name in named if name in both - larger]


def _around(name: str) -> Iterator[str]:
    """Names of the modules around it, the smallest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_attention(module: nn.Module) -> bool:
    """By the name of its class: torch has one, and most models one of their own."""
    name = type(module).__name__.rstrip("0123456789").lower()
    return name.endswith(("attention", "attn"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_dense_or_sparse(module: nn.Module) -> bool:
    return isinstance(module, SparseLinear) or _is_linear(module)


def _holds_blocks(module: nn.Module, least: int) -> bool:
    """Whether it is a list of modules of one class, so many or more, that hold linears
    themselves."""
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < least:
        return False
    first = next(iter(module))
    if isinstance(first, nn.Linear | SparseLinear) or {type(m) for m in module} != {type(first)}:
        return False
    return any(_is_dense_or_sparse(m) for m in first.modules())
