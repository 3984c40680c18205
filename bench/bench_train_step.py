"""One training step of the demo's GPT (forward, backward, AdamW): sparse linears against dense."""

import copy
from dataclasses import dataclass, replace

import measure
import torch
from measure import Rival

from sparsekern import SparseLinear, densify_
from sparsekern.gpt import demo
from sparsekern.gpt.train import TrainConfig, build_model, build_optimizer, compute_gradients
from sparsekern.tensor import expand_rows

VOCABULARY = 256  # bytes
GRADIENT_TOLERANCE = 1e-4  # relative to the largest gradient of the layer


@dataclass(frozen=True)
class Step:
    """The demo's model and batch at one sparsity."""

    width: int
    layers: int
    sparsity: float
    threads: int

    def __str__(self) -> str:
        return f"gpt-{self.layers}x{self.width}-{self.sparsity:.0%}-{self.threads}T"

    def config(self) -> TrainConfig:
        return TrainConfig(
            sparsity=self.sparsity,
            layers=self.layers,
            width=self.width,
            heads=demo.HEADS,
            context=demo.CONTEXT,
            batch=demo.BATCH,
        )


def workloads(quick: bool) -> list[Step]:
    if quick:
        return [Step(width=16 * demo.HEADS, layers=1, sparsity=0.75, threads=1)]
    return [
        Step(demo.WIDTH, demo.LAYERS, sparsity, threads)
        for threads in measure.thread_counts()
        for sparsity in measure.SPARSITIES
    ]


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


def test_train_step(race, workload):
    config = workload.config()
    tokens = torch.randint(
        VOCABULARY, (config.batch, config.context), generator=torch.Generator().manual_seed(0)
    )
    x, y = tokens, tokens.roll(-1, dims=1)
    model = build_model(config, VOCABULARY)
    check_gradients(model, x, y)

    def step_of(model):
        optimizer = build_optimizer(model, config.lr)

        def step() -> None:
            compute_gradients(model, x, y)
            optimizer.step()

        return step

    dense = Rival("dense", True, step_of(build_model(replace(config, sparsity=0.0), VOCABULARY)))
    ours = step_of(model)
    ours()
    dense.run()
    race("train_step", ours, [dense], {"M": config.batch * config.context})
