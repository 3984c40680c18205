"""All that `bench --device cuda` measures, in order, and its sizes."""

from collections.abc import Callable, Iterator

import torch

from . import gpt_gpu
from .measure_gpu import Grid, cells
from .peers_gpu import torch_csr
from .products import PASSES, kernels
from .products_gpu import dispatch, gradients, training_steps
from .rates import case_name
from .records import OURS
from .replay_gpu import CudaClock

GRID = Grid(((6144, 2048), (4096, 11008), (12288, 12288)), (1, 8, 32, 512), masks=("random",))
# Of the gradients and of the training step that they are parts of.
STEP_GRID = Grid(((6144, 2048), (12288, 12288)), (1024, 4096), (0.5, 0.8, 0.95), ("random",))
QUICK = Grid(((512, 1024),), (1, 16), (0.5, 0.9), ("random",))
QUICK_STEP = Grid(((512, 1024),), (256,), (0.9,), ("random",))


def work(quick: bool) -> list[Callable[[], dict]]:
    """Each makes the next case."""
    forward, steps, gpt = (
        (QUICK, QUICK_STEP, gpt_gpu.QUICK) if quick else (GRID, STEP_GRID, gpt_gpu.STEP)
    )
    # A cell of the second grid is two gradients and a step.
    count = _size(forward) + 3 * _size(steps) + len(gpt.sparsities)
    found = _in_turn(forward, steps, gpt)
    return [lambda: next(found)] * count


def _size(grid: Grid) -> int:
    return len(grid.shapes) * len(grid.sparsities) * len(grid.tokens)


def _in_turn(forward: Grid, steps: Grid, gpt: gpt_gpu.Step) -> Iterator[dict]:
    clock, generator = CudaClock(), torch.Generator("cuda")
    # Graphs cannot be captured on the default stream.
    stream = torch.cuda.Stream()
    for made in (
        cells(forward, [dispatch(), torch_csr()], clock, generator),
        gradients(steps, clock, generator),
        training_steps(steps, clock, generator),
        gpt_gpu.training_steps(gpt, clock, torch.device("cuda")),
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
    if "N" in case:
        sizes = tuple(case[name] for name in ("M", "N", "K", "nnz"))
        named = kernels(PASSES[case["op"]], "cuda", getattr(torch, case["dtype"]), sizes)
        own[0] |= {"kernel": named}
        own[0].pop("bytes", None)  # of CSR, which is not what is read
    return case
