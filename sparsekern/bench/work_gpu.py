"""All that `bench --device cuda` measures, in order, and its sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import gpt_gpu, memory_gpu, train_products_gpu
from .measure_gpu import QUICK, Grid, cells
from .peers_gpu import torch_csr
from .products import PASSES, kernels
from .products_gpu import dispatch, gradients, training_steps
from .rates import case_name
from .records import OURS
from .replay_gpu import CudaClock

GRID = Grid(((6144, 2048), (4096, 11008), (12288, 12288)), (1, 8, 32, 512), masks=("random",))
# Of the gradients and of the training step that they are parts of.
STEP_GRID = Grid(((6144, 2048), (12288, 12288)), (1024, 4096), (0.5, 0.8, 0.95), ("random",))
QUICK_STEP = Grid(((512, 1024),), (256,), (0.9,), ("random",))


# About what a case of each kind takes on an H200, compilation and checks included.
FORWARD_S, GRADIENT_S, PRODUCT_S, STEP_S = 0.8, 1.0, 0.5, 18.0


@dataclass(frozen=True)
class Work:
    """What there is to measure, in order."""

    forward: Grid
    gradients: Grid
    products: train_products_gpu.Sizes
    steps: tuple[gpt_gpu.Step, ...]

    def _counts(self) -> list[tuple[float, int]]:
        """The seconds that a case of each kind takes, and how many there are."""
        return [
            (FORWARD_S, _size(self.forward)),
            (GRADIENT_S, 3 * _size(self.gradients)),  # two gradients and a step of the linear
            (PRODUCT_S, self.products.count),
            (STEP_S, sum(len(step.masks()) for step in self.steps)),
        ]

    @property
    def count(self) -> int:
        return sum(count for _, count in self._counts())

    @property
    def expected_s(self) -> float:
        return sum(seconds * count for seconds, count in self._counts())

    def within(self, memory_bytes: int) -> tuple["Work", dict[str, str]]:
        """Without the models that do not fit, and why not, by their names."""
        needs = {step.model: _bytes_of(step) for step in self.steps}
        left = {
            model: f"its race takes {need / 1e9:.0f} GB, the GPU has {memory_bytes / 1e9:.0f}"
            for model, need in needs.items()
            if need > memory_bytes
        }
        return replace(self, steps=tuple(s for s in self.steps if s.model not in left)), left


# In `run_gpu.py train-products` alone: what is written out has no dense twin.
PRODUCTS = replace(train_products_gpu.SIZES, write_outs=())
QUICK_PRODUCTS = replace(train_products_gpu.QUICK, write_outs=())
WHOLE = Work(GRID, STEP_GRID, PRODUCTS, gpt_gpu.STEPS)
BRIEF = Work(QUICK, QUICK_STEP, QUICK_PRODUCTS, (gpt_gpu.QUICK,))


def cases(work: Work) -> list[Callable[[], dict]]:
    """Each makes the next case."""
    found = _in_turn(work)
    return [lambda: next(found)] * work.count


def _size(grid: Grid) -> int:
    return len(grid.shapes) * len(grid.sparsities) * len(grid.tokens)


def _bytes_of(step: gpt_gpu.Step) -> int:
    """Of a race: dense and ours with their graphs, the exact gradients, and what these take."""
    dense = memory_gpu.predict(step.config, step.batch)
    ours = [memory_gpu.predict(step.config, step.batch, s, mask) for mask, s in step.masks()]
    fp64_bytes = 2 * dense["weights"]
    accumulates = step.accumulated > 1
    peaks = [memory_gpu.peak_bytes(parts, accumulates) for parts in (dense, *ours)]
    return peaks[0] + max(peaks[1:]) + 3 * fp64_bytes


def _in_turn(work: Work) -> Iterator[dict]:
    clock, generator = CudaClock(frees_cache=True), torch.Generator("cuda")
    # Graphs cannot be captured on the default stream.
    stream = torch.cuda.Stream()
    quick = CudaClock()
    for made in (
        cells(work.forward, [dispatch(), torch_csr()], quick, generator),
        gradients(work.gradients, quick, generator),
        training_steps(work.gradients, quick, generator),
        train_products_gpu.cases(work.products, quick, generator),
        *(gpt_gpu.training_steps(step, clock, torch.device("cuda")) for step in work.steps),
    ):
        while True:
            with torch.no_grad(), torch.cuda.stream(stream):
                cell = next(made, None)
            if cell is None:
                break
            yield checked(cell)


def checked(case: dict) -> dict:
    """The case with our kernels' names. ArithmeticError where nothing of ours is right."""
    own = [way for way in case["ways"].values() if way["kind"] == OURS]
    if not any(way["is_right"] for way in own):
        reason = own[0].get("failed") or f"error {own[0]['error']:.1e} against fp64"
        raise ArithmeticError(f"{case_name(case)}: {reason}")
    if "N" in case and "kernel" not in own[0]:
        sizes = tuple(case[name] for name in ("M", "N", "K", "nnz"))
        named = kernels(PASSES[case["op"]], "cuda", getattr(torch, case["dtype"]), sizes)
        own[0] |= {"kernel": named}
        own[0].pop("bytes", None)  # of CSR, which is not what is read
    return case
