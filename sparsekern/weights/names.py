"""Names of weights: those that wrappers change, and those that a model uses for one tensor."""

from collections.abc import Iterable

from torch import nn

from ..nn import SparseLinear
from ..nn.kinds import memory_of
from .layouts import BUFFERS, Weights, join

# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap, and
# DDP before all of them.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OF_DDP = "module"


def as_in(own: Iterable[str], weights: Weights) -> Weights:
    """The weights under the names of the model, `own`, where wrappers or a prefix common to all
    names are the difference. Where nothing makes them fit they keep theirs."""
    own = set(own)
    own |= {
        name.removesuffix("weight") + part
        for name in own
        if name.rpartition(".")[2] == "weight"
        for part in BUFFERS
    }
    if weights.keys() <= own:
        return weights
    target = _plain(own)
    by_plain = {plain: name for name, plain in target.items()}
    best, most = weights, len(weights.keys() & own)
    names = _plain(weights)
    while len(set(names.values())) == len(names):
        found = {name: by_plain.get(plain, plain) for name, plain in names.items()}
        if (count := sum(name in own for name in found.values())) > most:
            best, most = {found[name]: t for name, t in weights.items()}, count
        firsts = {plain.partition(".")[0] for plain in names.values()}
        if len(firsts) != 1 or not all("." in plain for plain in names.values()):
            break
        names = {name: plain.partition(".")[2] for name, plain in names.items()}
    return best


def _plain(names: Iterable[str]) -> dict[str, str]:
    """name -> the name without what wrappers add to it."""
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names
    }
    while plain and all(name.startswith(f"{OF_DDP}.") for name in plain.values()):
        plain = {name: short.partition(".")[2] for name, short in plain.items()}
    return plain


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each weight that has more than one."""
    names: dict[object, list[str]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                is_sparse = isinstance(module, SparseLinear) and name == "values"
                name = join(module_name, "weight" if is_sparse else name)
                names.setdefault(memory_of(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
