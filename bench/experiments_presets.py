"""The runs of experiments.py: models, data, lengths."""

from dataclasses import dataclass
from pathlib import Path

from sparsekern.gpt.config import TrainConfig
from sparsekern.gpt.flops import amdahl_cap, multiply_adds

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Preset:
    pretrain_data: str
    finetune_data: str
    tokenizer: str
    model: dict
    batch: int
    steps: int  # of pre-training
    sweep_steps: int
    finetune_steps: int
    finetune_batch: int
    prune_steps: int  # of recovery, each round
    learning_rates: tuple[float, ...]
    finetune_rates: tuple[float, ...]
    prune_rate: float
    arms: tuple[float, ...] = (0.0, 0.75, 0.5, 0.9)
    prune_to: tuple[float, ...] = (0.5, 0.75, 0.838, 0.9)
    seeds: tuple[int, ...] = (0, 1, 2)
    seed_arms: tuple[float, ...] = (0.0, 0.75)
    eval_batches: int = 16
    dtype: str = "bfloat16"
    vocab_size: int = 8192

    def cap(self) -> float:
        """How much training FLOPs would fall with the linear layers free."""
        vocab_size = 256 if self.tokenizer == "bytes" else self.vocab_size
        macs = multiply_adds(TrainConfig(**self.model).model(vocab_size))
        return amdahl_cap(macs.linear / macs.total)


PRESETS = {
    # 29.7M parameters, 25.2M of them in the blocks' linear layers; 29.5M tokens of pre-training.
    # Two GPUs take about 280 s if a step takes 33 ms, 350 s if 41, by a simulation of what they
    # share: text and start 26, times 25, sweeps to 120, pre-training to 200, fine-tuning and
    # pruning to 250, the other seeds to the end.
    "h200": Preset(
        "packages",
        "shakespeare",
        "bpe",
        {"layers": 8, "heads": 8, "width": 512, "context": 512},
        batch=64,
        steps=900,
        sweep_steps=120,
        finetune_steps=200,
        finetune_batch=16,
        prune_steps=75,
        learning_rates=(6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3, 1.92e-2),
        finetune_rates=(3e-4, 1e-3, 3e-3),
        prune_rate=3e-4,
    ),
    # Half a minute on two cores: that everything runs, not that anything is learned.
    "smoke": Preset(
        str(REPOSITORY / "sparsekern"),
        str(REPOSITORY / "tests"),
        "bytes",
        {"layers": 1, "heads": 2, "width": 32, "context": 16},
        batch=4,
        steps=8,
        sweep_steps=4,
        finetune_steps=4,
        finetune_batch=4,
        prune_steps=2,
        learning_rates=(1e-3, 3e-3),
        finetune_rates=(1e-3,),
        prune_rate=1e-3,
        arms=(0.0, 0.75),
        prune_to=(0.5, 0.9),
        seeds=(0, 1),
        eval_batches=1,
        dtype="float32",
    ),
}
