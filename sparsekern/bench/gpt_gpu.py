"""A GPT's training step on a GPU: forward, backward, clipping, AdamW; sparse linears against dense.

The trainer's own step, products in bfloat16 by autocast, each side as it is, with blocks compiled
by torch.compile, and compiled and captured whole in a CUDA graph. Its learning rate is 0: all the
work is done, and as the weights stay, so does the exact gradient that every step is held against.
"""

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..gpt.build import build_optimizer
from ..gpt.flops import train_flops_per_token
from ..gpt.model import GPT, GPTConfig
from ..gpt.presets import PRESETS, UniformMask
from ..gpt.speed import compiled_blocks
from ..gpt.step import GRADIENT_CLIP, compute_gradients
from ..indices import expand_rows
from ..nn import SparseLinear, densify_, sparsify_
from .measure_gpu import ROUNDS, attempt
from .products import PASSES, kernels_of
from .products_gpu import NAME
from .records import DENSE, OURS
from .replay_gpu import Clock, Contender, Runner, race
from .two_way_mask import TWO_WAY, TwoWayMask

DTYPE = torch.bfloat16
# Of a gradient's error: how many times that of the dense model's, both against fp64.
TOLERANCE = 2.0


# Forms of a step, and what their contenders are called beside "dense" or ours.
EAGER, COMPILED, CAPTURED = "", ", compiled", ", captured"
FREE = "random"  # a mask


@dataclass(frozen=True)
class Step:
    """A model, its batch, the sparsities of its linears under each kind of mask, and the forms.

    accumulated: how many such batches an optimizer step has, all of the same tokens."""

    model: str
    config: GPTConfig
    batch: int
    sparsities: tuple[float, ...]
    two_way: tuple[float, ...] = ()
    forms: tuple[str, ...] = (EAGER, COMPILED)
    accumulated: int = 1

    def masks(self) -> list[tuple[str, float]]:
        return [(FREE, s) for s in self.sparsities] + [(TWO_WAY, s) for s in self.two_way]


STEP = Step("gpt2-small", PRESETS["gpt2-small"], 8, (0.5, 0.75, 0.9))
QUICK = Step("tiny", GPTConfig(2, 4, 128, 64, 256), 4, (0.75,))
# Whole models, for run_gpu.py: the largest ones as a GPU is at its best, captured.
STEPS = (
    replace(STEP, sparsities=(0.75, 0.9, 0.95), two_way=(0.75,), forms=(EAGER, COMPILED, CAPTURED)),
    Step("gpt3-xl", PRESETS["gpt3-xl"], 4, (0.75, 0.9), (0.75,), (CAPTURED,)),
    Step("4096-wide", GPTConfig(3, 32, 4096, 2048, 50304), 4, (0.75, 0.9), (0.75,), (CAPTURED,)),
    Step(
        "gpt3-xl-accumulated",
        PRESETS["gpt3-xl"],
        4,
        sparsities=(0.75,),
        two_way=(0.75,),
        forms=(CAPTURED,),
        accumulated=4,
    ),
)


def training_steps(step: Step, clock: Clock, device: torch.device) -> Iterator[dict]:
    """A record for each mask; its ways are both models in each form."""
    config = step.config
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab_size, (step.batch, config.block_size), device=device)
    batch = tokens, tokens.roll(-1, dims=1)

    failed: dict[str, dict] = {}
    model = make_gpt(config, device)
    dense = _runners("dense", DENSE, model, batch, step, clock, failed)
    exact, tolerance = dense[0].contender.exact, TOLERANCE * dense[0].error
    for mask, sparsity in step.masks():
        model = make_gpt(config, device, mask, sparsity)
        failed_here = dict(failed)
        found = dense + _runners(NAME, OURS, model, batch, step, clock, failed_here)
        ways = race(found, exact, tolerance, clock, ROUNDS) | failed_here
        cell = _cell(step, mask, sparsity, model, ways)
        del model, found  # and with them the memory of a graph, before the next one is made
        gc.collect()
        torch.cuda.empty_cache()
        yield cell


def make_gpt(config: GPTConfig, device: torch.device, mask: str = "", sparsity: float = 0.0) -> GPT:
    """Of random weights; dense without a mask."""
    with torch.device(device):
        model = GPT(config)
    if not mask:
        return model
    return sparsify_(model, UniformMask(sparsity) if mask == FREE else TwoWayMask(sparsity))


def capturable_optimizer(model: GPT, device: torch.device) -> torch.optim.AdamW:
    """The trainer's own, with a learning rate of 0."""
    optimizer = build_optimizer(model, lr=0.0)
    for group in optimizer.param_groups:
        group["capturable"] = device.type == "cuda"
    return optimizer


def _runners(
    name: str,
    kind: str,
    model: GPT,
    batch: tuple[Tensor, Tensor],
    of: Step,
    clock: Clock,
    failed: dict[str, dict],
) -> list[Runner]:
    """The model in each form. All have the same weights and optimizer."""
    optimizer = capturable_optimizer(model, batch[0].device)
    exact = _exact_gradient(model, *batch)  # the same of as many batches as there are
    x, y = (t.repeat(of.accumulated, 1) for t in batch)
    micro_batch = of.batch if of.accumulated > 1 else 0

    def step(stepper: GPT) -> list[Tensor]:
        with torch.enable_grad():
            compute_gradients(stepper, x, y, DTYPE, micro_batch)
        optimizer.step()
        return [parameter.grad for parameter in model.blocks.parameters()]

    found = []
    compiled = compiled_twin(model)
    for form in of.forms:
        call = partial(step, model if form == EAGER else compiled)
        each = Contender(name + form, kind, [call], _flat, form == CAPTURED, exact=exact)
        found += attempt(failed, each, partial(Runner, each, 1, exact, clock))
    return found


def compiled_twin(model: GPT) -> GPT:
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            for tensor in (layer.values, layer.col_indices):
                torch._dynamo.mark_dynamic(tensor, 0)  # one compilation for all sparsities
    return compiled_blocks(model)


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def _exact_gradient(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """In fp64 of the blocks' parameters, of sparse weights at their patterns; clipped as the
    trainer clips, by the norm of all. The embeddings' would hide a layer's error.

    Sequence by sequence and block by block: attention in fp64 has all its scores in memory."""
    twin = densify_(copy.deepcopy(model).double())
    for block in twin.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with torch.enable_grad():
        for i in range(len(x)):
            (twin(x[i : i + 1], y[i : i + 1])[1] / len(x)).backward()

    def gradient(name: str) -> Tensor:
        owner, _, last = name.rpartition(".")
        layer = model.get_submodule(owner)
        if last != "values":
            return twin.get_parameter(name).grad
        rows = expand_rows(layer.row_offsets, layer.values.shape[0])
        return twin.get_submodule(owner).weight.grad[rows, layer.col_indices]

    gradients = {name: gradient(name) for name, _ in model.named_parameters()}
    norm = _flat(list(gradients.values())).norm()
    of_blocks = [g for name, g in gradients.items() if name.startswith("blocks.")]
    return _flat(of_blocks) * (GRADIENT_CLIP / norm).clamp(max=1)


def _cell(step: Step, mask: str, sparsity: float, model: GPT, ways: dict[str, dict]) -> dict:
    fields = fields_of(step.model, step.config, step.batch * step.accumulated, sparsity)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, SparseLinear)]
    for way in ways.values():
        if way["kind"] == OURS and "median_s" in way:
            way["kernel"] = kernels_of(PASSES["train_step"], DTYPE, fields["M"], weights)
    return {
        **{"op": "train_step", "device": "cuda", **fields, "mask": mask},
        **{"dtype": str(DTYPE).removeprefix("torch."), "threads": 0, "is_cold": False},
        **({"micro_batch": step.batch} if step.accumulated > 1 else {}),
        **flops_of(step.config, fields["M"], sparsity),
        "ways": ways,
    }


def fields_of(model: str, config: GPTConfig, batch: int, sparsity: float) -> dict[str, Any]:
    """Of a record about a model and so many sequences."""
    return {
        **{"model": model, "layers": config.n_layer, "width": config.n_embd},
        **{"vocabulary": config.vocab_size, "context": config.block_size, "batch": batch},
        **{"M": batch * config.block_size, "sparsity": sparsity},
    }


def flops_of(config: GPTConfig, M: int, sparsity: float) -> dict[str, float]:
    """The same of its training step."""
    return {
        "useful_flop": M * train_flops_per_token(config, sparsity),
        "dense_flop": M * train_flops_per_token(config),
    }
