"""The models that generate_gpu.py holds against each other: a GPT, dense and sparse in many forms.

All blocks of a model are copies of one, in memory of their own, so each is read as cold as if it
were another: to draw, to sort and to pack 32 of them takes minutes, and the time of a step depends
on none of it. Dense weights have no zeros, as those of a dense user.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from sparsekern import densify_, sparsify_
from sparsekern.bench.records import DENSE, OTHER, OURS
from sparsekern.bench.two_way_mask import TWO_WAY, TwoWayMask
from sparsekern.gpt.llama import make
from sparsekern.gpt.model import GPT, Block, GPTConfig
from sparsekern.gpt.presets import UniformMask, random_gpt
from sparsekern.kernels.cuda import compressed, e4m3
from sparsekern.kernels.cuda.choose import choose_forms, lay_out, pack_for, packed_names
from sparsekern.nn import PackedLinear, SparseLinear, replace_modules
from sparsekern.nn.largest import largest_inputs

RANDOM = "random"
MASKS = {RANDOM: UniformMask, TWO_WAY: TwoWayMask}
EXAMPLE = 1, 256  # texts and tokens that show how large inputs get in E4M3


@dataclass(frozen=True)
class Arm:
    """A model that reads prompts, and the one that takes steps, where that is another."""

    name: str
    kind: str
    model: GPT
    stepper: GPT | None = None
    mask: str | None = None
    fuses: bool = True
    is_rounded: bool = False  # to 8 bits


class KNLinear(nn.Module):
    """A dense layer whose weight is stored as [K, N], which cuBLAS reads faster in many cases."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], -1)


class E4m3Linear(nn.Module):
    """A dense layer in E4M3 with one scale for W and one, known beforehand, for x."""

    def __init__(self, linear: nn.Linear, largest: float):
        super().__init__()
        w8, exponent = e4m3.quantise_weight(linear.weight.detach())
        self._x_exponent = e4m3.exponent_of(largest, e4m3.HEADROOM)
        self.weight, self.bias = nn.Parameter(w8, requires_grad=False), linear.bias
        for name, power in (("x_scale", self._x_exponent), ("w_scale", exponent)):
            self.register_buffer(name, torch.tensor(2.0**-power, device=w8.device))

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply_e4m3(e4m3.quantise(x, self._x_exponent)[0])[: len(x)]

    def _multiply_e4m3(self, x8: Tensor) -> Tensor:
        how = {"out_dtype": torch.bfloat16, "use_fast_accum": True, "bias": self.bias}
        return torch._scaled_mm(x8, self.weight.t(), self.x_scale, self.w_scale, **how)


class Arms:
    """Of one shape and sparsity. What batches have in common is made once."""

    def __init__(self, config: GPTConfig, sparsity: float, device: torch.device | str):
        self.config, self.sparsity, self.device = config, sparsity, device
        one = replace(config, n_layer=1)
        self.dense = random_gpt(one, 0.0, device, torch.bfloat16)
        self.sparse: dict[str, GPT] = {}
        for mask, draw in MASKS.items():
            block = sparsify_(copy.deepcopy(self.dense.blocks[0]), draw(sparsity))
            self.sparse[mask] = self.of(block, 1)
        self._made: dict[tuple[str, str, str], object] = {}

    def of(self, block: nn.Module, layers: int | None = None) -> GPT:
        """A model of copies of this block. Embeddings and head are those of all."""
        config = replace(self.config, n_layer=layers or self.config.n_layer)
        with torch.device("meta"):
            model = make(config).requires_grad_(False)
        for name, part in self.dense.named_children():
            setattr(model, name, part)
        copies = (copy.deepcopy(block) for _ in range(config.n_layer - 1))
        model.blocks = nn.ModuleList([block, *copies])
        return model.eval()

    def exact(self, mask: str | None) -> GPT:
        """One block in float64."""
        if mask is None:
            return copy.deepcopy(self.dense).double()
        return densify_(copy.deepcopy(self.sparse[mask])).double()

    @cached_property
    def largest(self) -> dict[str, float]:
        """Of the inputs of each layer, by its name."""
        model = self.sparse[TWO_WAY]
        idx = torch.randint(self.config.vocab_size, EXAMPLE, device=self.device)
        names = {layer: name for name, layer in model.blocks[0].named_modules()}
        return {names[layer]: found for layer, found in largest_inputs(model, idx).items()}

    def all(self, batch: int, longest: int, eager: bool = False) -> Iterator[Arm]:
        """The arms for batches of texts and their prompts of up to so many tokens."""
        of_steps, of_prompts = (batch, batch), (batch, batch * longest)
        yield Arm("dense", DENSE, self.of(self.dense.blocks[0]))
        yield Arm("dense, W [K, N]", DENSE, self._dense(lambda name, linear: KNLinear(linear)))
        packed = self._packed(of_steps)
        if eager:
            yield Arm("dense, not fused", DENSE, self.of(self.dense.blocks[0]), fuses=False)
            yield Arm("packed, not fused", OURS, packed, mask=RANDOM, fuses=False)
        yield Arm("packed", OURS, packed, mask=RANDOM)
        if layouts(longer := self._packed(of_prompts)) != layouts(packed):
            yield Arm("packed, for prompts too", OURS, longer, mask=RANDOM)
        yield Arm("packed, dense copies", OURS, self._packed(of_prompts, True), mask=RANDOM)
        int8 = self._every(RANDOM, lambda _, W: pack_for(W, of_steps, values=torch.int8))
        yield Arm("packed int8", OTHER, int8, mask=RANDOM, is_rounded=True)
        if compressed.refuse_gpu():
            return
        both = self._every(TWO_WAY, partial(self._both, of_steps))
        yield Arm("two-way", OTHER, both, mask=TWO_WAY)
        steps = self._every(TWO_WAY, lambda _, W: pack_for(W, of_steps, values=e4m3.DTYPE))
        many = self._every(TWO_WAY, self._e4m3)
        yield Arm("two-way E4M3", OTHER, many, steps, mask=TWO_WAY, is_rounded=True)
        dense = self._dense(lambda name, linear: E4m3Linear(linear, self.largest[name]))
        yield Arm("dense E4M3", OTHER, dense, is_rounded=True)

    def _dense(self, made: Callable[[str, nn.Linear], nn.Module]) -> GPT:
        def replacement(name: str, module: nn.Module) -> nn.Module | None:
            return made(name, module) if isinstance(module, nn.Linear) else None

        return self.of(replace_modules(shallow(self.dense.blocks[0]), replacement))

    def _every(self, mask: str, forms: Callable[[str, object], list]) -> GPT:
        """With every sparse layer in the forms that forms(name, W) makes."""

        def replacement(name: str, module: nn.Module) -> nn.Module | None:
            if not isinstance(module, SparseLinear):
                return None
            return PackedLinear(forms(name, module.weight.detach()), module.bias)

        return self.of(replace_modules(shallow(self.sparse[mask].blocks[0]), replacement))

    def _packed(self, tokens: tuple[int, int], dense: bool = False) -> GPT:
        return self._every(RANDOM, partial(self._forms, RANDOM, tokens, dense=dense))

    def _forms(self, mask: str, tokens: tuple[int, int], name: str, W, dense: bool = False) -> list:
        """As pack_ chooses them for a mask that is not two-way; each is made once."""
        names = [*packed_names(), *["dense"] * dense]
        found = []
        for layout in choose_forms(tokens, W.n, W.k, W.nnz, names):
            key = mask, name, layout
            if key not in self._made:
                self._made[key] = lay_out(W, layout)
            found.append(self._made[key])
        return found

    def _both(self, tokens: tuple[int, int], name: str, W) -> list:
        """As pack_ does it for a two-way mask, for steps of so many tokens and long prompts."""
        many = compressed.pack_two_of_four(W, W.values.dtype)
        return [*self._forms(TWO_WAY, tokens, name, W), many]

    def _e4m3(self, name: str, W) -> list:
        return [compressed.pack_two_of_four(W, e4m3.DTYPE, self.largest[name])]


def shallow(block: Block) -> Block:
    """The same layers in another block, whose layers may be replaced."""
    twin = copy.copy(block)
    twin._modules = {
        name: shallow(part) if part._modules else part for name, part in block._modules.items()
    }
    return twin


def layouts(model: GPT) -> list[str]:
    return [m.layout for m in model.blocks[0].modules() if isinstance(m, PackedLinear)]
