"""Generation on a CPU: tokens per second with sparse linears against dense ones, of GPT-2 small.
generate_gpu.py does so on a GPU."""

import copy
from dataclasses import asdict, dataclass

import grids
import pytest
import torch
from torch import Tensor

from sparsekern import densify_
from sparsekern.bench.race import Rival, ours, race
from sparsekern.bench.records import DENSE
from sparsekern.gpt.generate import Decoder
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.presets import PRESETS, random_gpt


@dataclass(frozen=True)
class Generation:
    """A model, and so many tokens after a prompt of `context` for each text of the batch."""

    model: str
    sparsity: float
    batch: int
    context: int
    tokens: int
    threads: int

    def __str__(self) -> str:
        return f"{self.model}-B{self.batch}-{self.sparsity:.0%}-{self.threads}T"


TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=256)


def workloads(quick: bool) -> list[Generation]:
    if quick:
        return [Generation("tiny", 0.75, 2, 4, 8, 1)]
    return [Generation("gpt2-small", 0.75, batch, 16, 32, 1) for batch in (1, 16)]


def random_prompt(config: GPTConfig, batch: int, context: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, context), generator=generator)


@pytest.mark.runs_on(workloads=workloads)
def test_generate(keep_race, is_quick, workload):
    config = PRESETS.get(workload.model, TINY)
    sparse = random_gpt(config, workload.sparsity)
    dense = densify_(copy.deepcopy(sparse))
    prompt = random_prompt(config, workload.batch, workload.context)
    decoders = [Decoder(m, prompt, workload.tokens, temperature=0) for m in (sparse, dense)]

    def run(decoder: Decoder) -> Tensor:
        decoder.start()
        for _ in range(workload.tokens - 1):
            decoder.step()
        return decoder.tokens

    assert torch.equal(*map(run, decoders))
    ways = race(
        ours(lambda: run(decoders[0])),
        [Rival("dense", DENSE, lambda: run(decoders[1]))],
        workload.threads,
        most_rounds=grids.most_rounds(is_quick),
    )
    info = {"op": "generate", "device": "cpu", **asdict(workload), "M": workload.batch}
    keep_race(info | {"ways": ways})
