"""The settings of a training run: each field is a command-line flag."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from .. import sparsity as algorithms
from ..sparsity import Algorithm, Group
from .checkpoint import CHECKPOINT, load_checkpoint
from .data import TOKENIZERS
from .distributed import PARALLEL
from .model import GPTConfig

# Of a pattern that changes during training: shares of all steps, as published configs have them.
UPDATE_SHARE = 0.02
STOP_SHARE = 0.75
DROP_FRACTION = 0.3
ROUNDS = 10  # of iterative pruning


def flag(default: object, text: str, **argument: object) -> object:
    """A field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class TrainConfig:
    data: str = flag(
        "stdlib", "shakespeare, stdlib, packages (what is installed), a file or a folder"
    )
    tokenizer: str = flag("bytes", "how text becomes tokens", choices=TOKENIZERS)
    vocab_size: int = flag(2048, "vocabulary of the bpe tokenizer")
    sparsity: float = flag(0.0, "share of zeros in the linear layers of the blocks, 0 = dense")
    algorithm: str = flag(
        "static", "how the zeros are chosen: static, gmp, set, rigl, iterative, magnitude"
    )
    init_method: str = flag(
        "random", "which weights stay at first", choices=("random", "magnitude")
    )
    distribution: str = flag(
        "uniform", "of the zeros over the layers", choices=("uniform", "erk", "global")
    )
    sparsity_config: str = flag("", "YAML or JSON file with a `sparsity` block, for all the rest")
    init_from: str = flag("", "start from the weights of this run (a folder)")
    dense: bool = flag(False, "with --init-from: all weights dense, the absent ones from zero")
    optimizer_state: str = flag("reset", "with --init-from", choices=("reset", "keep"))
    layers: int = flag(4, "number of blocks")
    heads: int = flag(8, "attention heads")
    width: int = flag(512, "size of the residual stream")
    context: int = flag(128, "tokens that the model sees")
    batch: int = flag(8, "sequences per step, of all processes together")
    steps: int = flag(200, "optimizer steps in all")
    lr: float = flag(6e-4, "highest learning rate")
    seed: int = flag(0, "fixes weights, zeros and batches")
    threads: int = flag(0, "CPU threads, 0 = torch's own choice")
    device: str = flag("cpu", "cpu or cuda")
    dtype: str = flag(
        "float32", "of the products; weights are float32", choices=("float32", "bfloat16")
    )
    parallel: str = flag("none", "under torchrun", choices=PARALLEL)
    out: str = flag("out/train", "folder for checkpoint.pt and metrics.json")
    resume: bool = flag(False, "continue from OUT/checkpoint.pt; other flags come from there")
    eval_every: int = flag(50, "steps between evaluations")
    eval_batches: int = flag(4, "batches of an evaluation")
    checkpoint_every: int = flag(50, "steps between checkpoints")

    def __post_init__(self) -> None:
        for name in ("batch", "steps", "eval_every", "eval_batches", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.algorithm not in algorithms.ALGORITHMS:
            known = ", ".join(sorted(algorithms.ALGORITHMS))
            raise ValueError(f"algorithm: expected one of {known}, got {self.algorithm!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if self.dense and (self.sparsity or self.sparsity_config or not self.init_from):
            raise ValueError("dense: expected init_from and no sparsity; without both leave it out")
        if self.sparsity_config and self.sparsity:
            raise ValueError(
                f"sparsity: {self.sparsity_config} gives it, got {self.sparsity} as well"
            )

    def model(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(self.layers, self.heads, self.width, self.context, vocab_size)

    def sparsity_settings(self) -> object:
        """What `sparsity.configure` takes, or None for a dense model."""
        if self.sparsity_config:
            return algorithms.load_config(self.sparsity_config)
        if not self.sparsity:
            return None
        settings: dict = {
            "algorithm": self.algorithm,
            "sparsity": self.sparsity,
            "distribution": self.distribution,
        }
        if self.algorithm == "magnitude" or self.distribution == "global":
            settings["init_method"] = "magnitude"
        else:
            settings["init_method"] = self.init_method
        if self.algorithm in ("gmp", "set", "rigl"):
            freq = max(1, round(UPDATE_SHARE * self.steps))
            stop = max(1, int(STOP_SHARE * self.steps) // freq) * freq
            settings["update"] = {"freq": freq, "stop": stop + 1}  # the last one at `stop`
            if self.algorithm == "gmp":
                cubic = {"type": "cubic", "init": 0.0, "final": self.sparsity, "steps": stop}
                settings["sparsity"] = cubic
            else:
                drop = {"type": "cosine", "init": DROP_FRACTION, "half_period": stop}
                settings["drop_fraction"] = drop
        if self.algorithm == "iterative":
            freq = max(1, int(STOP_SHARE * self.steps) // ROUNDS)
            settings |= {"rounds": ROUNDS, "freq": freq}
        return settings

    def make_algorithm(self, settings: object) -> Algorithm | Group | None:
        """The algorithm of what `sparsity_settings` gave, or None for a dense model. ValueError for
        what `steps` steps would meet only on their way."""
        try:
            algorithm = algorithms.configure(settings, seed=self.seed)
            if algorithm:
                algorithm.check(self.steps)
        except ValueError as error:
            where = f"{self.sparsity_config}: " if self.sparsity_config else ""
            raise ValueError(f"{where}{error}") from error
        return algorithm


# A resumed run may change these; any other change would make it another run.
FREE_ON_RESUME = (
    "out",
    "resume",
    "threads",
    "device",
    "parallel",
    "eval_every",
    "checkpoint_every",
)
# What a run that starts from another one's weights has from there.
FROM_SOURCE = ("layers", "heads", "width", "context", "tokenizer", "vocab_size")


def resumed_config(given: dict) -> TrainConfig:
    """The config of the checkpoint in the folder given["out"], with `given` on top.

    Raises ValueError if `given` would change what the run computes."""
    given = given | {"resume": True}
    path = Path(given.get("out", TrainConfig.out)) / CHECKPOINT
    saved = load_checkpoint(path)["config"]
    for name in given.keys() - set(FREE_ON_RESUME):
        if given[name] != saved[name]:
            raise ValueError(
                f"{name} is {saved[name]} in {path}, got {given[name]}; a resumed run keeps it"
            )
    return TrainConfig(**saved | given)


def config_from(given: dict) -> TrainConfig:
    """The config of these flags; with `init_from` its shape and tokenizer are those of that run."""
    if not given.get("init_from"):
        return TrainConfig(**given)
    path = Path(given["init_from"]) / CHECKPOINT
    saved = load_checkpoint(path)["config"]
    for name in FROM_SOURCE:
        if name in given and given[name] != saved[name]:
            raise ValueError(f"{name} is {saved[name]} in {path}, got {given[name]}")
    return TrainConfig(**given | {name: saved[name] for name in FROM_SOURCE})


def changed(config: TrainConfig) -> dict:
    """The settings that differ from their defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != f.default
    }
