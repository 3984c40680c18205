"""Steps of a GPT on several GPUs, as `train --parallel ddp` and `fsdp` take them: one process a
GPU, under torchrun, all with the same cases in turn. bench/scale.py starts them and makes the page.

Captured steps of one model take turns: of this GPU alone; of all GPUs together, the same with its
gradients sent (ddp); the same in shares (fsdp). They are weak scaling, and differ by what
communication costs and by what shares save. Then comes this GPU alone with the sequences of all,
accumulated, which computes what both do: strong scaling.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

from ..gpt import distributed
from ..gpt.buckets import Buckets
from ..gpt.build import build_optimizer
from ..gpt.captured import WARM_UPS, CapturedStep
from ..gpt.distributed import Ranks
from ..gpt.model import GPTConfig
from ..gpt.presets import PRESETS
from ..gpt.shards import ShardedAdamW, Shards
from ..sparsity import check_same_patterns
from .gpt_gpu import DTYPE, FREE, TWO_WAY, compiled_twin, fields_of, flops_of, make_gpt
from .records import DENSE, OTHER, OURS
from .turns import Turn, in_turns, on_gpu

ALONE, TOGETHER, FSDP, ACCUMULATED = "alone", "together", "fsdp", "accumulated"
SENT = TOGETHER, FSDP
WAYS = (ALONE, *SENT, ACCUMULATED)
NO_MASK = "none"
SPARSITY = 0.75
LR = 1e-4
LOSSES = 4  # steps whose losses are compared
LOSS_TOLERANCE = 0.02  # nats: sums of bfloat16 products in another order
ROUNDS = 9
AHEAD_S = 30e-3  # the host queues a step in less
REDUCED = tuple(2**i for i in range(16, 30))  # bytes of an all-reduce
REDUCTIONS = 5  # of each size
LIMIT_S = 110.0  # no case is begun after that


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
Cell = tuple[Model, str]  # a model under a mask
CELLS = {f"{model.name}/{mask}": (model, mask) for model in MODELS for mask in model.masks}


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
    """The steps of one model, each with an optimizer of its own, and captured."""

    def __init__(self, model: Model, mask: str, ranks: Ranks) -> None:
        torch.manual_seed(0)  # all ranks make the same model, and the same tokens
        self.ranks, self._batch, config = ranks, model.batch, model.config
        sparsity = 0.0 if mask == NO_MASK else SPARSITY
        self.gpt = make_gpt(config, ranks.device, "" if mask == NO_MASK else mask, sparsity)
        check_same_patterns(self.gpt)
        shape = ranks.size * model.batch, config.block_size
        whole = torch.randint(config.vocab_size, shape).to(ranks.device)
        mine = whole[ranks.rank * model.batch :][: model.batch]
        self._tokens = dict.fromkeys(WAYS, mine) | {ACCUMULATED: whole}
        self._twin = compiled_twin(self.gpt)
        self._steps: dict[str, CapturedStep] = {}
        self._optimizers: dict[str, list[Optimizer]] = {}
        self.sent_bytes: dict[str, int] = {}
        self._start: list[Tensor] = []

    def take(self, way: str) -> Tensor:
        """One step -> its loss."""
        step, tokens = self._steps[way], self._tokens[way]
        loss, _ = step.compute_gradients(tokens, tokens.roll(-1, dims=1))
        step.update()
        return loss

    def capture(self, way: str) -> None:
        """Make it ready to be taken."""
        optimizer = build_optimizer(self.gpt, LR, ShardedAdamW if way == FSDP else AdamW)
        buckets = None
        if isinstance(optimizer, ShardedAdamW):
            buckets = Shards(self.gpt, self.ranks, optimizer)
        elif way == TOGETHER:
            buckets = Buckets(self.gpt, self.ranks)
        micro_batch = self._batch if way == ACCUMULATED else 0
        parts = self.gpt, self._twin, optimizer, (), DTYPE, micro_batch, buckets
        self._steps[way] = CapturedStep(*parts)
        for _ in range(WARM_UPS + 1):
            self.take(way)
        self._optimizers[way] = buckets.optimizers_of(optimizer) if buckets else [optimizer]
        self.sent_bytes[way] = buckets.sent_bytes if buckets else 0

    def drop(self) -> None:
        """Give the memory of all ways back."""
        for step in self._steps.values():
            step.drop()
        self._steps.clear()
        self._optimizers.clear()
        self.gpt.zero_grad()
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def used(self, way: str) -> int:
        """Most bytes of tensors at a time where it alone is captured, and taken before; 0 on a
        CPU."""
        self.drop()
        is_cuda = self.ranks.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.capture(way)
        return torch.cuda.max_memory_allocated() if is_cuda else 0

    def start(self) -> None:
        """Let all losses begin with the weights of now, which must be the same on all ranks."""
        self._start = [p.detach().clone() for p in self.gpt.parameters()]

    @torch.no_grad()
    def losses(self, way: str) -> list[float]:
        for p, start in zip(self.gpt.parameters(), self._start, strict=True):
            p.copy_(start)
        for optimizer in self._optimizers[way]:
            for state in optimizer.state.values():
                for t in state.values():
                    t.zero_()
        with torch.enable_grad():
            return [self.take(way).item() for _ in range(LOSSES)]


def steps_of(
    model: Model,
    mask: str,
    ranks: Ranks,
    turn: Callable[[Callable[[], object]], Turn] = timed,
    ways: Sequence[str] = WAYS,
) -> dict:
    """The case of a model under a mask. A way's time is that of the slowest GPU, `min_s` that of
    the fastest, each the median of its rounds; `error` the largest difference of a loss from that
    of one GPU, or from that of ddp where one GPU was not asked for."""
    steps = Steps(model, mask, ranks)
    asked = [way for way in WAYS if way in ways and (ranks.size > 1 or way == ALONE)]
    used = {way: steps.used(way) for way in asked if way in SENT}
    steps.start()
    losses: dict[str, list[float]] = {}
    rounds: dict[str, list[float]] = {}
    # Each has the memory of a whole step, and four may not fit.
    for together in ((ALONE, *SENT), (ACCUMULATED,)):
        steps.drop()
        chosen = [way for way in together if way in asked]
        for way in chosen:
            steps.capture(way)
        losses |= {way: steps.losses(way) for way in chosen if way != ALONE}
        turns = {way: turn(lambda way=way: steps.take(way)) for way in chosen}
        rounds |= in_turns(turns, ROUNDS, 1, lambda _: everywhere(0, ranks))
    kind = DENSE if mask == NO_MASK else OURS
    found: dict[str, dict] = {}
    for way, seconds in rounds.items():
        of_ranks = everywhere(median(seconds), ranks)
        found[way] = {"kind": kind, "median_s": max(of_ranks), "min_s": min(of_ranks)}
        found[way]["is_right"] = True
    reference = next((losses[way] for way in (ACCUMULATED, TOGETHER, FSDP) if way in losses), [])
    for way in used:
        error = max(abs(a - b) for a, b in zip(losses[way], reference, strict=True))
        found[way] |= {
            "sent_bytes": steps.sent_bytes[way],
            "peak_bytes": max(everywhere(used[way], ranks)),
            "loss": losses[way][-1],
            "error": error,
            "is_right": error < LOSS_TOLERANCE,
        }
    return case_of(model, mask, ranks) | {"ways": found}


def everywhere(value: float, ranks: Ranks) -> list[float]:
    """That of each rank."""
    found: list[float] = [0] * ranks.size
    dist.all_gather_object(found, value)
    return found


def case_of(model: Model, mask: str, ranks: Ranks) -> dict:
    sparsity = 0.0 if mask == NO_MASK else SPARSITY
    fields = fields_of(model.name, model.config, model.batch, sparsity)
    return {
        **{"op": "scale", "device": ranks.device.type, **fields, "mask": mask},
        **{"dtype": str(DTYPE).removeprefix("torch."), "gpus": ranks.size},
        **flops_of(model.config, fields["M"], sparsity),
    }


def cases(
    ranks: Ranks,
    limit_s: float,
    cells: Iterable[Cell] = (),
    turn: Callable = timed,
    ways: Sequence[str] = WAYS,
) -> Iterator[dict]:
    """Links, then each model under each mask, or the chosen cells alone. What has not begun after
    the limit says so."""
    began = time.monotonic()
    if ranks.size > 1 and not cells:
        yield from all_reduces(ranks, turn)
    for model, mask in cells or CELLS.values():
        if max(everywhere(time.monotonic() - began, ranks)) > limit_s:
            failed = f"not begun within {limit_s:.0f} s"
            why = {"kind": OTHER, "failed": failed, "is_right": True}
            yield case_of(model, mask, ranks) | {"ways": {TOGETHER: why}}
            continue
        yield steps_of(model, mask, ranks, turn, ways)
        # Compiled blocks hold their modules, and would be compiled anew for any shape.
        torch.compiler.reset()
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="begin nothing after that")
    parser.add_argument(
        "--cells", nargs="+", default=[], choices=CELLS, metavar="MODEL/MASK", help="these alone"
    )
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=", ".join(WAYS)
    )


def in_short(case: dict) -> str:
    ways = case["ways"]
    if case["op"] == "all_reduce":
        return f"{case['case']}: {1e6 * ways['all_reduce']['median_s']:.0f} us"
    found = (f"{name} {1e3 * way.get('median_s', 0):.2f} ms" for name, way in ways.items())
    return f"{case['model']} {case['mask']}: {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each case")
    add_flags(parser)
    args = parser.parse_args()
    ranks, began = Ranks("ddp", "cuda"), time.monotonic()
    torch.cuda.set_stream(torch.cuda.Stream())
    cells = [CELLS[name] for name in args.cells]
    for case in cases(ranks, args.limit_s, cells, ways=args.ways):
        if ranks.rank == 0:
            print(f"{time.monotonic() - began:4.0f} s {in_short(case)}", flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(case) + "\n")
    distributed.finish()


if __name__ == "__main__":
    main()
