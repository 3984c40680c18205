"""One training step of a GPT (forward, backward, AdamW): sparse linears against dense, by torch's
own products and by its oneDNN, and sparse with all that is dense in it by oneDNN, too."""

import copy
from dataclasses import asdict, dataclass, replace
from functools import partial

import grids
import pytest
import torch

from sparsekern import SparseLinear, densify_
from sparsekern.bench.race import CORES, Rival, ours, race
from sparsekern.bench.records import DENSE, OTHER
from sparsekern.gpt import demo
from sparsekern.gpt.build import build_model, build_optimizer
from sparsekern.gpt.config import TrainConfig
from sparsekern.gpt.dense import LIBRARIES, ONEDNN, libraries, use_
from sparsekern.gpt.profile import linear_share, measured_cap, profile_step
from sparsekern.gpt.step import compute_gradients
from sparsekern.tensor import expand_rows

GRADIENT_TOLERANCE = 1e-4  # relative to the largest gradient of the layer
BYTES, GPT2_VOCABULARY = 256, 50257


@dataclass(frozen=True)
class Step:
    """A model, its batch and the sparsity of its linears."""

    model: str
    layers: int
    width: int
    vocabulary: int
    context: int
    batch: int
    sparsity: float
    threads: int

    def __str__(self) -> str:
        return f"{self.model}-{self.layers}x{self.width}-{self.sparsity:.0%}-{self.threads}T"

    def config(self) -> TrainConfig:
        return TrainConfig(
            sparsity=self.sparsity,
            layers=self.layers,
            width=self.width,
            heads=demo.HEADS,
            context=self.context,
            batch=self.batch,
        )


def workloads(quick: bool) -> list[Step]:
    if quick:
        return [Step("tiny", 1, 16 * demo.HEADS, BYTES, demo.CONTEXT, demo.BATCH, 0.75, 1)]
    steps = [
        Step("demo", demo.LAYERS, demo.WIDTH, BYTES, demo.CONTEXT, demo.BATCH, sparsity, threads)
        for threads in (1, 2)
        for sparsity in grids.SPARSITIES
    ]
    # GPT-2 small, with its own head and with one that leaves the linears nearly alone.
    steps += [
        Step("gpt2-small", 12, 768, GPT2_VOCABULARY, 256, 4, 0.75, 2),
        Step("gpt2-small-bytes", 12, 768, BYTES, 256, 4, 0.75, 2),
    ]
    return [step for step in steps if step.threads <= len(CORES)]


def check_gradients(model, x, y) -> None:
    """The sparse model's loss and values' gradients are those of its dense twin in fp64."""
    twin = densify_(copy.deepcopy(model).double())
    loss, want = model(x, y)[1], twin(x, y)[1]
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            rows = expand_rows(layer.row_offsets, layer.values.shape[0])
            exact = twin.get_submodule(name).weight.grad[rows, layer.col_indices]
            error = (layer.values.grad - exact).abs().max() / exact.abs().max()
            assert error < GRADIENT_TOLERANCE, f"{name}: gradient off by {error:.1e}"


@pytest.mark.runs_on(workloads=workloads)
def test_train_step(keep_race, is_quick, workload):
    config = workload.config()
    tokens = torch.randint(
        workload.vocabulary,
        (config.batch, config.context),
        generator=torch.Generator().manual_seed(0),
    )
    x, y = tokens, tokens.roll(-1, dims=1)
    model = build_model(config, workload.vocabulary)
    check_gradients(model, x, y)
    dense = build_model(replace(config, sparsity=0.0), workload.vocabulary)
    models = {"sparsekern": model, "dense": dense}
    if ONEDNN in libraries()[0]:
        for name, each in (("dense oneDNN", dense), ("sparsekern oneDNN", model)):
            models[name] = copy.deepcopy(each)
            use_(models[name], LIBRARIES[ONEDNN])
    optimizers = {m: build_optimizer(m, config.lr) for m in models.values()}

    def step(model) -> None:
        compute_gradients(model, x, y)
        optimizers[model].step()

    for each in optimizers:
        step(each)
    linears = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    parts = profile_step(dense, optimizers[dense], (x, y), linears)
    rivals = [
        Rival(name, DENSE if name.startswith("dense") else OTHER, partial(step, each))
        for name, each in models.items()
        if each is not model
    ]
    ways = race(
        ours(lambda: step(model)),
        rivals,
        workload.threads,
        most_rounds=grids.most_rounds(is_quick),
    )
    info = {
        "op": "train_step",
        "device": "cpu",
        **asdict(workload),
        "M": config.batch * config.context,
        "linear_share": linear_share(parts),
        "cap": measured_cap(parts, float("inf")),
    }
    keep_race(info | {"ways": ways})
