"""Steps of a GPT on several GPUs, as `train --parallel ddp` takes them: one process a GPU, under
torchrun, all with the same cases in turn. bench/scale.py starts them and makes the page.

Three captured steps of one model take turns: of this GPU alone; of all GPUs together, the same with
its gradients sent; and of this GPU alone with the sequences of all, accumulated. The first two are
weak scaling, and differ by what communication costs; the last two are strong scaling, and compute
the same.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from ..gpt import distributed
from ..gpt.buckets import Buckets
from ..gpt.build import build_optimizer
from ..gpt.captured import WARM_UPS, CapturedStep
from ..gpt.distributed import Ranks
from ..gpt.flops import train_flops_per_token
from ..gpt.model import GPTConfig
from ..gpt.presets import PRESETS
from ..sparsity import check_same_patterns
from .gpt_gpu import DTYPE, FREE, TWO_WAY, compiled_twin, make_gpt
from .records import DENSE, OTHER, OURS
from .turns import Turn, in_turns, on_gpu

ALONE, TOGETHER, ACCUMULATED = "alone", "together", "accumulated"
NO_MASK = "none"
SPARSITY = 0.75
LR = 1e-4
LOSSES = 4  # steps whose losses are compared
LOSS_TOLERANCE = 0.02  # nats: sums of bfloat16 products in another order
ROUNDS = 9
AHEAD_S = 30e-3  # the host queues a step in less
REDUCED = tuple(2**i for i in range(16, 30))  # bytes of an all-reduce
REDUCTIONS = 5  # of each size


@dataclass(frozen=True)
class Model:
    """`batch`: sequences of each GPU."""

    name: str
    config: GPTConfig
    batch: int
    masks: tuple[str, ...] = (TWO_WAY, NO_MASK, FREE)


# What takes longest first.
MODELS = (
    Model("gpt3-xl", PRESETS["gpt3-xl"], 4),
    Model("gpt2-small", PRESETS["gpt2-small"], 8),
)


def timed(run: Callable[[], object]) -> Turn:
    return on_gpu(run, AHEAD_S)


def all_reduces(ranks: Ranks, turn: Callable[[Callable[[], object]], Turn] = timed) -> list[dict]:
    """A record for each size of one gradient: seconds of its mean over the GPUs."""
    found = []
    for nbytes in REDUCED:
        t = torch.zeros(nbytes // 4, device=ranks.device)

        def reduce(t: Tensor = t) -> None:
            dist.all_reduce(t)

        seconds = in_turns({"": turn(reduce)}, REDUCTIONS, 2, lambda _: everywhere(0, ranks))[""]
        way = {"kind": OTHER, "median_s": median(seconds), "min_s": min(seconds), "bytes": nbytes}
        way["is_right"] = True
        case = {"op": "all_reduce", "device": ranks.device.type, "gpus": ranks.size}
        found.append(case | {"case": f"{nbytes} bytes", "ways": {"all_reduce": way}})
    return found


class Steps:
    """The steps of one model, each captured."""

    def __init__(self, model: Model, mask: str, ranks: Ranks) -> None:
        torch.manual_seed(0)  # all ranks make the same model, and the same tokens
        self.ranks, config = ranks, model.config
        sparsity = 0.0 if mask == NO_MASK else SPARSITY
        self.gpt = make_gpt(config, ranks.device, "" if mask == NO_MASK else mask, sparsity)
        check_same_patterns(self.gpt)
        self._optimizer = build_optimizer(self.gpt, LR)
        self.buckets = Buckets(self.gpt, ranks)
        shape = ranks.size * model.batch, config.block_size
        whole = torch.randint(config.vocab_size, shape).to(ranks.device)
        mine = whole[ranks.rank * model.batch :][: model.batch]
        self.tokens = {TOGETHER: mine, ALONE: mine, ACCUMULATED: whole}
        if ranks.size == 1:
            self.tokens = {ALONE: mine}
        parts = self.gpt, compiled_twin(self.gpt), self._optimizer, (), DTYPE
        of_all = {TOGETHER: (0, self.buckets), ALONE: (), ACCUMULATED: (model.batch,)}
        self._steps = {name: CapturedStep(*parts, *of_all[name]) for name in self.tokens}
        self._start = [p.detach().clone() for p in self.gpt.parameters()]

    def take(self, name: str) -> Tensor:
        """One step -> its loss."""
        step, tokens = self._steps[name], self.tokens[name]
        loss, _ = step.compute_gradients(tokens, tokens.roll(-1, dims=1))
        step.update()
        return loss

    def capture(self) -> int:
        """All of them -> bytes that the first of them makes a GPU use, NCCL's and CUDA's too."""
        used = 0
        for name in self.tokens:
            for _ in range(WARM_UPS + 1):
                self.take(name)
            if not used and self.ranks.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                free, total = torch.cuda.mem_get_info()
                used = total - free
        return used

    @torch.no_grad()
    def losses(self, name: str) -> list[float]:
        """From the first weights on."""
        for p, start in zip(self.gpt.parameters(), self._start, strict=True):
            p.copy_(start)
            for t in self._optimizer.state[p].values():
                t.zero_()
        with torch.enable_grad():
            return [self.take(name).item() for _ in range(LOSSES)]


def steps_of(
    model: Model,
    mask: str,
    ranks: Ranks,
    turn: Callable[[Callable[[], object]], Turn] = timed,
) -> dict:
    """The case of a model under a mask. A way's time is that of the slowest GPU, `min_s` that of
    the fastest, each the median of its rounds; `error` the largest difference of a loss from that
    of one GPU."""
    steps = Steps(model, mask, ranks)
    used = steps.capture()
    losses = {name: steps.losses(name) for name in steps.tokens if name != ALONE}
    turns = {name: turn(lambda name=name: steps.take(name)) for name in steps.tokens}
    rounds = in_turns(turns, ROUNDS, 1, lambda _: everywhere(0, ranks))
    kind = DENSE if mask == NO_MASK else OURS
    ways: dict[str, dict] = {}
    for name, seconds in rounds.items():
        of_ranks = everywhere(median(seconds), ranks)
        ways[name] = {"kind": kind, "median_s": max(of_ranks), "min_s": min(of_ranks)}
        ways[name]["is_right"] = True
    if TOGETHER in ways:
        pairs = zip(losses[TOGETHER], losses[ACCUMULATED], strict=True)
        error = max(abs(a - b) for a, b in pairs)
        ways[TOGETHER] |= {
            "sent_bytes": steps.buckets.sent_bytes,
            "peak_bytes": min(everywhere(used, ranks)),  # another process may use the first GPU
            "loss": losses[TOGETHER][-1],
            "error": error,
            "is_right": error < LOSS_TOLERANCE,
        }
    return case_of(model, mask, ranks) | {"ways": ways}


def everywhere(value: float, ranks: Ranks) -> list[float]:
    """That of each rank."""
    found: list[float] = [0] * ranks.size
    dist.all_gather_object(found, value)
    return found


def case_of(model: Model, mask: str, ranks: Ranks) -> dict:
    config, sparsity = model.config, 0.0 if mask == NO_MASK else SPARSITY
    M = model.batch * config.block_size
    return {
        **{"op": "scale", "device": ranks.device.type, "model": model.name},
        **{"layers": config.n_layer, "width": config.n_embd, "vocabulary": config.vocab_size},
        **{"context": config.block_size, "batch": model.batch, "M": M, "sparsity": sparsity},
        **{"mask": mask, "dtype": str(DTYPE).removeprefix("torch."), "gpus": ranks.size},
        "useful_flop": M * train_flops_per_token(config, sparsity),
        "dense_flop": M * train_flops_per_token(config),
    }


def cases(
    ranks: Ranks, limit_s: float, models: tuple[Model, ...] = MODELS, turn: Callable = timed
) -> Iterator[dict]:
    """Links, then each model under each mask. What has not begun after the limit says so."""
    began = time.monotonic()
    if ranks.size > 1:
        yield from all_reduces(ranks, turn)
    for model in models:
        for mask in model.masks:
            if max(everywhere(time.monotonic() - began, ranks)) > limit_s:
                failed = f"not begun within {limit_s:.0f} s"
                why = {"kind": OTHER, "failed": failed, "is_right": True}
                yield case_of(model, mask, ranks) | {"ways": {TOGETHER: why}}
                continue
            yield steps_of(model, mask, ranks, turn)
            # Compiled blocks hold their modules, and would be compiled anew for any shape.
            torch.compiler.reset()
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()


def in_short(case: dict) -> str:
    ways = case["ways"]
    if case["op"] == "all_reduce":
        return f"{case['case']}: {1e6 * ways['all_reduce']['median_s']:.0f} us"
    found = (f"{name} {1e3 * way.get('median_s', 0):.2f} ms" for name, way in ways.items())
    return f"{case['model']} {case['mask']}: {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each case")
    parser.add_argument("--limit-s", type=float, default=100.0, help="begin nothing after that")
    args = parser.parse_args()
    ranks, began = Ranks("ddp", "cuda"), time.monotonic()
    torch.cuda.set_stream(torch.cuda.Stream())
    for case in cases(ranks, args.limit_s):
        if ranks.rank == 0:
            print(f"{time.monotonic() - began:4.0f} s {in_short(case)}", flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(case) + "\n")
    distributed.finish()


if __name__ == "__main__":
    main()
