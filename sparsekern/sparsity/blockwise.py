"""The inputs of each layer as the pruned layers before it make them, block by block.

A model that repeats a block (a list of modules of one class, each fed with what the one before
returned, and none of which writes into what it is given) runs as a whole once, with one batch, to
show how it works. Then the inputs of the first block are kept for all batches, and block after
block:

    one pass for each stage, which are the layers that are given the same tensor (q, k, v | out |
        gate, up | down): it ends where that tensor is seen
    one pass to make the inputs of the next block

So in memory are the inputs of one block and what belongs to one stage, whatever the depth. Layers
outside of such blocks (all, where a model has none) are fed from the model's beginning each time.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .calibration import call, call_for_order, counted, masks_of

Add = Callable[[int, Tensor], None]
Prune = Callable[[list[list[str]], Callable[[Add], None]], None]
Masks = Mapping[str, Tensor]


class _Seen(BaseException):
    """Ends a forward pass whose rest nobody needs."""


class Parallel(nn.ModuleList):
    """Linear layers none of which sees what another one gives, as those of a mixture's experts:
    one stage, each with its own inputs."""


def walk(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: list, prune: Prune
) -> list[str]:
    """Calls prune(groups, run) for each stage, in the order in which the model runs the layers.

    groups: names of layers that share their input; more than one group for parallel layers.
    run(add) calls add(i, x) with each input x [M, K] of group i, padding left out, for each batch
    that comes to it. Returns what the caller should know, in sentences.
    """
    probe = _Probe(model, layers)
    probe.run(batches[0])
    masks: list[Masks] = [masks_of(model, batch) for batch in batches]
    parts = probe.parts()
    for part in parts:
        if part.blocks:
            _walk_blocks(model, part, layers, batches, masks, prune)
            continue
        passes = [functools.partial(call, model, batch) for batch in batches]
        for stage in part.stages[0]:
            prune(stage.groups, functools.partial(_run, stage, layers, passes, masks))
    alone = sum(len(part.stages[0]) for part in parts if not part.blocks)
    if alone < 3:
        return []
    return [
        f"For the inputs of {alone} groups of layers the model ran from its beginning, since they "
        "are in no list of modules of one class of which each is fed with what the one before it "
        "returned, and writes into nothing that it is given."
    ]


def _walk_blocks(
    model: nn.Module,
    part: "_Part",
    layers: Mapping[str, nn.Module],
    batches: list,
    masks: list[Masks],
    prune: Prune,
) -> None:
    blocks = part.blocks
    assert blocks is not None
    inputs = [_Inputs(blocks, model, batch) for batch in batches]
    reached = [i.is_complete for i in inputs]
    inputs = [i for i, is_there in zip(inputs, reached, strict=True) if is_there]
    masks = [mask for mask, is_there in zip(masks, reached, strict=True) if is_there]
    for index, stages in enumerate(part.stages):
        passes = [i.forward(index) for i in inputs]
        for stage in stages:
            prune(stage.groups, functools.partial(_run, stage, layers, passes, masks))
        for i in inputs:
            i.advance(index, passes.pop(0))


@dataclass
class _Stage:
    """Layers that are given the same tensor, in one group; or parallel ones, in several."""

    groups: list[list[str]]
    is_single: bool = True  # there is one group, and in a pass its first layer is called once


def _run(
    stage: _Stage,
    layers: Mapping[str, nn.Module],
    passes: Sequence[Callable[[], Any]],
    masks: Sequence[Masks],
    add: Add,
) -> None:
    is_decoder = "decoder" in stage.groups[0][0].split(".")
    now: Masks = {}

    def see(group: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        add(group, counted(_input(args, kwargs), now, is_decoder))
        if stage.is_single:
            raise _Seen

    with _hooks() as hook:
        for i, names in enumerate(stage.groups):
            see_group = functools.partial(see, i)
            hook(layers[names[0]].register_forward_pre_hook(see_group, with_kwargs=True))
        for forward, now in zip(passes, masks, strict=True):  # noqa: B007  see() reads it
            try:
                forward()
            except _Seen:
                pass


@contextmanager
def _hooks() -> Iterator[Callable]:
    """A function to give handles of hooks to, which are removed in the end."""
    with ExitStack() as stack:
        yield lambda handle: stack.callback(handle.remove)


def _input(args: tuple, kwargs: dict) -> Tensor:
    x = args[0] if args else kwargs[next(iter(kwargs))]
    return x.detach()


@dataclass
class _Blocks:
    """A list of modules of one class: how each is fed, as the first batch shows."""

    name: str
    modules: list[nn.Module]
    # For each block, which of its inputs is which output of the block before it.
    links: list[dict[int, int]] = field(default_factory=list)
    is_chain: bool = True  # each runs once, in order, and is fed by the one before it
    is_uniform: bool = True  # all other inputs are those of the first block
    first: tuple[list, Any] = ([], None)
    given: tuple[list, Any, list[int]] = ([], None, [])  # to the block that runs
    output: list = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the output, when it was returned

    def enter(self, index: int, args: tuple, kwargs: dict) -> None:
        leaves, spec = _flat(args, kwargs)
        self.given = leaves, spec, _versions(leaves)
        links = {
            i: j
            for i, leaf in enumerate(leaves)
            for j, out in enumerate(self.output)
            if isinstance(leaf, Tensor) and leaf is out
        }
        if any(self.given[2][i] != self.versions[j] for i, j in links.items()):
            self.is_chain = False  # somebody wrote into it between the blocks
        if index == 0:
            self.first, links = (leaves, spec), {}
        if index != len(self.links) or bool(index) != bool(links):
            self.is_chain = False
        elif index:
            others = (i for i in range(len(leaves)) if i not in links)
            self.is_uniform &= spec == self.first[1] and all(
                _is_same(leaves[i], self.first[0][i]) for i in others
            )
            self.is_uniform &= index == 1 or links == self.links[1]
        self.links.append(links)

    def leave(self, args: tuple, kwargs: dict, output: Any) -> None:
        (before, spec, versions), (leaves, now) = self.given, _flat(args, kwargs)
        is_as_before = spec == now and versions == _versions(leaves)
        if not is_as_before or any(a is not b for a, b in zip(before, leaves, strict=True)):
            self.is_chain = False  # the block wrote into what it was given: it runs once with it
        self.output = tree_flatten(output)[0]
        self.versions = _versions(self.output)

    @property
    def is_walkable(self) -> bool:
        return self.is_chain and len(self.links) == len(self.modules)

    def index_of(self, layer: str) -> int | None:
        """The block that the layer of this name is in."""
        rest = layer.removeprefix(f"{self.name}." if self.name else "")
        number = rest.partition(".")[0]
        is_inside = not self.name or rest != layer
        return int(number) if is_inside and number.isdigit() else None


def _flat(args: tuple, kwargs: dict) -> tuple[list, Any]:
    """The tensors and other things in the arguments of a block; no cache of keys and values."""
    leaves, spec = tree_flatten((args, kwargs))
    return [None if type(leaf).__name__.endswith("Cache") else leaf for leaf in leaves], spec


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [_version(leaf) if isinstance(leaf, Tensor) else 0 for leaf in leaves]


def _version(x: Tensor) -> int:
    """Grows with each write into it; of tensors of inference mode nobody can tell."""
    return 0 if x.is_inference() else x._version


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, (bool, int, float, str)) and type(a) is type(b) and a == b)


class _Inputs:
    """What the blocks of a list are given for one batch: the outputs of the block that ran last,
    and all that comes from elsewhere."""

    def __init__(self, blocks: _Blocks, model: nn.Module, batch: Any) -> None:
        self.blocks = blocks
        self.others: list[tuple[list, Any]] = []  # of each block, or of the first for all
        self.output: dict[int, Any] = {}

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            leaves, spec = _flat(args, kwargs)
            for i in blocks.links[len(self.others)]:
                leaves[i] = None
            self.others.append((leaves, spec))
            if self.is_complete:
                raise _Seen

        with _hooks() as hook:
            for module in blocks.modules[: 1 if blocks.is_uniform else None]:
                hook(module.register_forward_pre_hook(see, with_kwargs=True))
            try:
                call(model, batch)
            except _Seen:
                pass

    @property
    def is_complete(self) -> bool:
        return len(self.others) == (1 if self.blocks.is_uniform else len(self.blocks.modules))

    def forward(self, index: int) -> Callable[[], Any]:
        leaves, spec = self.others[0 if self.blocks.is_uniform else index]
        links = self.blocks.links[index]
        mine = [self.output[links[i]] if i in links else leaf for i, leaf in enumerate(leaves)]
        args, kwargs = tree_unflatten(mine, spec)
        return functools.partial(self.blocks.modules[index], *args, **kwargs)

    def advance(self, index: int, forward: Callable[[], Any]) -> None:
        """Run the block, and keep what the next one needs of its output."""
        self.output = {}
        if index + 1 == len(self.blocks.modules):
            return
        output, links = tree_flatten(forward())[0], self.blocks.links[index + 1]
        self.output = {j: output[j] for j in links.values()}
        if index == 0 and self.blocks.is_uniform:
            for i in links:
                self.others[0][0][i] = None


@dataclass
class _Part:
    """Layers that are fed in one way: the stages of each block, or of the model as a whole."""

    blocks: _Blocks | None
    stages: list[list[_Stage]]


class _Probe:
    """One pass through the model that shows in which order layers and blocks run, and what they
    are given."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.stages: list[_Stage] = []
        self._calls: Counter[str] = Counter()
        self._last: tuple[Any, int] = (None, 0)  # the tensor that was seen last, and its version
        self.lists = [
            _Blocks(name, list(module))
            for name, module in model.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            and len(module) > 1
            and len({type(child) for child in module}) == 1
        ]

    def run(self, batch: Any) -> None:
        with _hooks() as hook:
            for name, layer in self.layers.items():
                see = functools.partial(self._see, name)
                hook(layer.register_forward_pre_hook(see, with_kwargs=True))
            for blocks in self.lists:
                for index, module in enumerate(blocks.modules):
                    enter, leave = functools.partial(_enter, blocks, index), _leaving(blocks)
                    hook(module.register_forward_pre_hook(enter, with_kwargs=True))
                    hook(module.register_forward_hook(leave, with_kwargs=True))
            call_for_order(self.model, batch)
        self._last = None, 0
        for blocks in self.lists:
            blocks.first, blocks.given, blocks.output = ([], None), ([], None, []), []

    def _see(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        self._calls[name] += 1
        if self._calls[name] > 1:
            return
        x = _input_as_it_is(args, kwargs)
        version = _version(x)
        last, last_version = self._last
        if x is last and version == last_version and self._are_together(name):
            self.stages[-1].groups[0].append(name)
        else:
            self.stages.append(_Stage([[name]]))
        self._last = x, version

    def _are_together(self, name: str) -> bool:
        """Whether the layer is in the same blocks as those of the stage before it."""
        other = self.stages[-1].groups[0][0]
        return all(b.index_of(name) == b.index_of(other) for b in self.lists)

    def parts(self) -> list[_Part]:
        """All layers, those that the batch did not come to in stages of their own."""
        known = {name for stage in self.stages for name in stage.groups[0]}
        others = [_Stage([[name]]) for name in self.layers if name not in known]
        walkable = [b for b in self.lists if b.is_walkable]
        outer = [b for b in walkable if not any(_is_inside(b, other) for other in walkable)]
        parts: list[_Part] = []
        for stage in self._joined(self.stages + others):
            name = stage.groups[0][0]
            stage.is_single = len(stage.groups) == 1 and self._calls[name] == 1
            blocks = next((b for b in outer if b.index_of(name) is not None), None)
            index = blocks.index_of(name) if blocks else 0
            assert index is not None
            part = next((p for p in parts if p.blocks is blocks and blocks), None)
            if blocks is None and parts and parts[-1].blocks is None:
                part = parts[-1]
            if part is None:
                part = _Part(blocks, [[] for _ in (blocks.modules if blocks else [None])])
                parts.append(part)
            part.stages[index].append(stage)
        return parts

    def _joined(self, stages: list[_Stage]) -> list[_Stage]:
        """Those of parallel layers in one, where the first of them is."""
        parallel = {n: m for n, m in self.model.named_modules() if isinstance(m, Parallel)}
        joined: dict[str, _Stage] = {}
        for stage in stages:
            name = stage.groups[0][0]
            parent = name.rpartition(".")[0]
            first = joined.setdefault(parent if parent in parallel else name, stage)
            if first is not stage:
                first.groups += stage.groups
        return list(joined.values())


def _enter(blocks: _Blocks, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
    blocks.enter(index, args, kwargs)


def _leaving(blocks: _Blocks) -> Callable[[nn.Module, tuple, dict, Any], None]:
    return lambda module, args, kwargs, output: blocks.leave(args, kwargs, output)


def _input_as_it_is(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs[next(iter(kwargs))]


def _is_inside(blocks: _Blocks, other: _Blocks) -> bool:
    return blocks is not other and other.index_of(blocks.name) is not None
