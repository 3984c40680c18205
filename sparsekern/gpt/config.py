"""The settings of a training run: each field is a command-line flag."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .. import sparsity as algorithms
from ..sparsity import Algorithm, Group
from ..sparsity.checks import nearest
from .checkpoint import CHECKPOINT, about, checkpoint_file, load_checkpoint
from .distributed import check_device
from .flags import FAMILIES, TrainFlags, check_sparsity
from .model import GPTConfig

# Of a pattern that changes during training: shares of all steps, as published configs have them.
UPDATE_SHARE = 0.02
STOP_SHARE = 0.75
DROP_FRACTION = 0.3
ROUNDS = 10  # of iterative pruning
NEED_TEXT = ("wanda", "sparsegpt")  # to choose by: train has none to give, prune has
AT_LEAST_ONE = (
    "layers",
    "heads",
    "width",
    "context",
    "batch",
    "steps",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
)
MOST_SEED = 2**63 - 1
MOST_THREADS = 1024  # of many more a process dies without a word
OF_SPARSITY = ("algorithm", "init_method", "distribution", "family")  # nothing without a sparsity


def check_method(algorithm: object) -> None:
    if isinstance(algorithm, str) and algorithm.lower() in NEED_TEXT:
        raise ValueError(
            f"algorithm: {algorithm} chooses by what a trained model makes of text: train without, "
            f"then sparsekern prune --method {algorithm.lower()}"
        )


def check_methods(settings: object) -> None:
    """The same for the blocks of a config file."""
    for block in settings if isinstance(settings, list) else [settings]:
        if isinstance(block, Mapping):
            check_method(block.get("algorithm", block.get("type")))


def check_float8(config: TrainFlags) -> None:
    if config.dtype != "float8":
        return
    if not config.device.startswith("cuda"):
        raise ValueError(f"dtype: float8 needs device cuda, got {config.device}")
    if config.parallel != "none":
        raise ValueError(f"dtype: float8 trains in one process, got parallel {config.parallel}")
    if (tokens := (config.micro_batch or config.batch) * config.context) % 16:
        raise ValueError(
            "dtype: float8 needs tokens of a micro-batch (micro_batch or batch, times context) in "
            f"multiples of 16, got {tokens}"
        )


@dataclass(frozen=True)
class TrainConfig(TrainFlags):
    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, most in (("seed", MOST_SEED), ("threads", MOST_THREADS)):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
            if getattr(self, name) > most:
                raise ValueError(f"{name}: expected at most {most}, got {getattr(self, name)}")
        if self.micro_batch < 0 or (self.micro_batch and self.batch % self.micro_batch):
            raise ValueError(
                f"micro_batch: expected 0 or a divisor of batch {self.batch}, "
                f"got {self.micro_batch}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width: expected a multiple of heads, got width {self.width}, heads {self.heads}"
            )
        for part in fields(self):
            choices, value = part.metadata.get("choices"), getattr(self, part.name)
            if choices and value not in choices:
                raise ValueError(
                    f"{part.name}: expected one of {', '.join(choices)}, got {value!r}"
                )
        check_method(self.algorithm)
        if self.algorithm not in algorithms.ALGORITHMS:
            known = sorted(algorithms.ALGORITHMS.keys() - set(NEED_TEXT))
            raise ValueError(
                f"algorithm: expected one of {', '.join(known)}, got {self.algorithm!r}"
                f"{nearest(self.algorithm, known)}"
            )
        check_sparsity(self.sparsity)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive, finite number, got {self.lr}")
        check_device(self.device)
        check_float8(self)
        if self.dense and (self.sparsity or self.sparsity_config or not self.init_from):
            raise ValueError("dense: expected init_from and no sparsity; without both leave it out")
        if self.sparsity_config and self.sparsity:
            raise ValueError(
                f"sparsity: {self.sparsity_config} gives it, got {self.sparsity} as well"
            )
        if self.optimizer_state == "keep" and not self.init_from:
            raise ValueError("optimizer_state: expected init_from beside keep")
        self.check_use(changed(self))

    def check_use(self, given: Iterable[str]) -> None:
        """ValueError for a setting that was given and would do nothing."""
        if "vocab_size" in given and self.tokenizer == "bytes":
            raise ValueError(
                "vocab_size: expected tokenizer bpe beside it, bytes has 256, "
                f"got {self.vocab_size} alone"
            )
        for name in OF_SPARSITY:
            if name not in given:
                continue
            value = getattr(self, name)
            if self.sparsity_config:
                raise ValueError(f"{name}: {self.sparsity_config} gives it, got {value} as well")
            if not self.sparsity:
                raise ValueError(
                    f"{name}: expected a sparsity above 0 beside it, got {value} alone"
                )

    @property
    def autocast_dtype(self) -> torch.dtype:
        """Of what autocast casts; float32 for none."""
        return torch.bfloat16 if self.dtype == "float8" else getattr(torch, self.dtype)

    def model(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(self.layers, self.heads, self.width, self.context, vocab_size)

    def sparsity_settings(self) -> object:
        """The argument for `sparsity.configure`, or None for a dense model."""
        if self.sparsity_config:
            return algorithms.load_config(self.sparsity_config)
        if not self.sparsity:
            return None
        settings: dict = {
            "algorithm": self.algorithm,
            "sparsity": self.sparsity,
            "distribution": self.distribution,
        }
        if self.family != FAMILIES[0]:
            settings["family"] = self.family
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
            stop = max(1, int(STOP_SHARE * self.steps))
            rounds = min(ROUNDS, stop)  # a short run has fewer, and the sparsity at its end too
            settings |= {"rounds": rounds, "freq": stop // rounds}
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
    "data",  # where it is: what it holds is compared
    "out",
    "resume",
    "threads",
    "device",
    "parallel",
    "micro_batch",
    "eval_every",
    "checkpoint_every",
)
# What a run that starts from another one's weights has from there.
FROM_SOURCE = ("layers", "heads", "width", "context", "tokenizer", "vocab_size")


def saved_config(path: Path, saved: dict, **changes: object) -> TrainConfig:
    """The settings in a checkpoint, with changes. ValueError names the file and what is wrong."""
    with about(path):
        known = {f.name: f.type for f in fields(TrainConfig)}
        for name, value in saved.items():
            if name not in known:
                raise ValueError(f"config: expected settings of this sparsekern, got {name!r}")
            kinds = (int, float) if known[name] is float else (known[name],)
            if type(value) not in kinds:
                kind = known[name].__name__
                raise ValueError(f"config: {name}: expected {kind}, got {str(value)[:80]!r}")
        # Versions before took these where they did nothing.
        idle = [] if saved.get("init_from") else ["optimizer_state"]
        if saved.get("sparsity_config") or not saved.get("sparsity"):
            idle += OF_SPARSITY
        if saved.get("tokenizer") == "bytes":
            idle.append("vocab_size")
        return TrainConfig(**{k: v for k, v in saved.items() if k not in idle} | changes)


def resumed_config(given: dict) -> TrainConfig:
    """The config of the checkpoint in the folder given["out"], with `given` on top. A run that is
    finished may be given more steps.

    Raises ValueError if `given` would change what the run computes."""
    given = given | {"resume": True}
    out = Path(given.get("out", TrainConfig.out))
    if out.is_file():
        raise ValueError(f"out: expected a folder, {out} is none")
    path = out / CHECKPOINT
    state = load_checkpoint(path, "resume")
    if "prune" in state:
        raise ValueError(
            f"resume: {path} was written by prune, which continues by itself; to train its weights "
            f"on: --init-from {path.parent}"
        )
    saved = saved_config(path, state["config"])
    is_finished = len(state["losses"]) == saved.steps
    for name in given.keys() - set(FREE_ON_RESUME):
        old, new = getattr(saved, name), given[name]
        if new == old or (name == "steps" and is_finished and new > old):
            continue
        hint = ""
        if name == "steps" and new > old:
            hint = (
                "; to train longer, resume it to its end first, or begin anew with "
                f"--init-from {path.parent} --optimizer-state keep"
            )
        was = "not given" if old == "" else old
        raise ValueError(f"{name} is {was} in {path}, got {new}; a resumed run keeps it{hint}")
    return saved_config(path, state["config"], **given)


def config_from(given: dict) -> TrainConfig:
    """The config of these flags; with `init_from` its shape and tokenizer are those of that run."""
    if given.get("init_from"):
        path = checkpoint_file(given["init_from"])
        saved = saved_config(path, load_checkpoint(path, "init_from")["config"])
        for name in FROM_SOURCE:
            if name in given and given[name] != getattr(saved, name):
                raise ValueError(f"{name} is {getattr(saved, name)} in {path}, got {given[name]}")
        given = given | {name: getattr(saved, name) for name in FROM_SOURCE}
    return TrainConfig(**given)


def changed(config: TrainConfig) -> dict:
    """The settings that differ from their defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if getattr(config, f.name) != f.default
    }
