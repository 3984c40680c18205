"""Iterative pruning of a trained GPT: prune, train on, and note what it costs, round by round."""

import copy
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import alone_beside, atomic_write
from ..nn import SparseLinear, densify_
from ..sparsity import Magnitude, SparseGPT, Wanda
from ..sparsity.families import TwoWay
from ..sparsity.gradual import round_sparsity
from ..sparsity.pattern import places_of
from ..terminal import Progress
from ..weights.digests import digest_of_json, digests
from .checkpoint import (
    CHECKPOINT,
    checkpoint_file,
    load_checkpoint,
    refuse_anothers,
    save_checkpoint,
)
from .config import FROM_SOURCE, TrainConfig, saved_config
from .flags import FAMILIES, PRUNE_METHODS, PruneFlags, percents
from .flops import flop_ratio
from .run import Run
from .start import begin

LEAST_TWO_WAY = 1 - TwoWay.densest
METHODS = dict(zip(PRUNE_METHODS, (Magnitude, Wanda, SparseGPT), strict=True))
TABLE = "prune.json"
FROM_RUN = ("data", "batch", "micro_batch", "threads", "device", "dtype", "eval_batches")
LATENCY_ROUNDS = 9
PRUNE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PruneConfig(PruneFlags):
    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            hint = percents(self.target)
            raise ValueError(
                f"target: expected a sparsity above 0 and below 1, got {self.target}{hint}"
            )
        if isinstance(self.calibration, str):
            raise ValueError(
                "calibration: a training run expected a number of batches of its text, "
                f"got {self.calibration!r}"
            )
        for name in ("rounds", "calibration"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.distribution == "global" and self.method != "magnitude":
            raise ValueError(f"distribution: {self.method} expected uniform or erk, got global")
        if self.rewind and self.method == "sparsegpt":
            raise ValueError("rewind: sparsegpt corrects the weights that stay, got both")
        bounds = [0.0, *self.sparsities(), 1.0]
        if not all(a < b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(f"targets: expected to rise between 0 and 1, got {self.targets}")
        if self.family != FAMILIES[0] and bounds[1] < LEAST_TWO_WAY:
            raise ValueError(
                f"family: {self.family} masks have {LEAST_TWO_WAY} zeros or more, got a round to "
                f"{bounds[1]:.3g}: give fewer rounds, or targets"
            )

    def sparsities(self) -> list[float]:
        """After each round."""
        if self.targets:
            try:
                return [float(part) for part in self.targets.split(",")]
            except ValueError:
                raise ValueError(
                    f"targets: expected numbers as in 0.5,0.75, got {self.targets!r}"
                ) from None
        return [round_sparsity(self.target, i, self.rounds) for i in range(1, self.rounds + 1)]


def prune(config: PruneConfig) -> list[dict]:
    """One row for the model as it came, and one for each round; also in OUT/prune.json.

    A run that was stopped continues after its last whole round. Raises ValueError where the model
    is sparser than the first round already."""
    path = Path(config.out) / CHECKPOINT
    with alone_beside("out", path):
        return _all_rounds(config, path)


def _all_rounds(config: PruneConfig, path: Path) -> list[dict]:
    settings = asdict(config)
    source, trained = _load_source(config)
    early = _load_early(config.rewind, trained) if config.rewind else {}
    kept = {"prune": settings, "early": digest_of_json(digests(early))}
    state = _load_own(path, settings) if path.exists() else source | {"rows": []}
    rows: list[dict] = state["rows"]
    targets = config.sparsities()
    # Of the source in any case: what a pruning took does not depend on where it was stopped.
    with Progress(None, unit="part") as progress:
        run = begin(_recovery(config, trained, 0), source, progress.about)
    if rows and not run.text.is_of(state):
        raise ValueError(f"data: {run.config.data} changed since {path} was written")
    spent = run.history.source
    if rows and not _is_in(spent, state["source"]):
        raise ValueError(
            f"source: {config.source} was trained anew or on since {path} was written; choose "
            "another folder"
        )
    if rows and state.get("early", kept["early"]) != kept["early"]:  # versions before wrote none
        raise ValueError(
            f"rewind: {config.rewind} was trained anew or on since {path} was written; choose "
            "another folder"
        )
    done = sum(row["steps"] for row in rows)
    with Progress(config.steps, done) as progress, _telling_what_is_kept(rows):
        run.tell = progress.line
        if len(rows) > len(targets):
            progress.line(f"done   all rounds were made before, in {config.out}")
        for index in range(len(rows), len(targets) + 1):
            steps = config.steps * index // len(targets) - sum(row["steps"] for row in rows)
            run.history.source = _with_rounds(spent, rows)
            run.restart(_recovery(config, trained, index, steps), state)
            if index:
                progress.about(f"round {index}: pruning to {targets[index - 1]:.1%}")
                _prune(run, config, targets[index - 1], early)
            elif run.sparsity >= targets[0]:
                in_one = ", or --rounds 1" if targets[-1] > run.sparsity else ""
                raise ValueError(
                    f"target: the first round wants sparsity {targets[0]:.4g}, but the model has "
                    f"{run.sparsity:.4g} already: give --targets above it{in_one}"
                )
            run.evaluate()
            _recover(run, steps, progress)
            if not rows:
                refuse_anothers(path)
            rows.append(_row(run, index))
            state = run.state()
            # What `generate` and `train --init-from` take.
            save_checkpoint(path, state | kept | {"rows": rows})
            _write_table(path, settings, rows)
            progress.line(line(rows[-1]))
    # Again where nothing was left to do: a kill may have come before the last two files.
    _write_table(path, settings, rows)
    run.restart(saved_config(path, state["config"]), state)
    run.history.losses = state["losses"]
    run.export()
    return rows


def _with_rounds(spent: dict | None, rows: list[dict]) -> dict | None:
    """What it took to make the weights after these rows: `spent` on the source, and each round."""
    for row in rows:
        if row["steps"]:
            cost = {"flops": row["train_flops"], "seconds": row["train_s"], "steps": row["steps"]}
            spent = cost | {"before": spent}
    return spent


def _is_in(spent: dict | None, found: dict | None) -> bool:
    """Whether that is where `found` begins."""
    while isinstance(found, dict) and found != spent:
        found = found.get("before")
    return found == spent


def _load_source(config: PruneConfig) -> tuple[dict, TrainConfig]:
    """What the checkpoint of the run to prune holds, and its settings."""
    if not config.source:
        raise ValueError(
            "source: expected a run of `sparsekern train` or a model of transformers, got none"
        )
    if not Path(config.source).exists():
        raise FileNotFoundError(f"source: {config.source} does not exist")
    path = checkpoint_file(config.source)
    if not path.exists():
        raise FileNotFoundError(
            f"source: expected a run of `sparsekern train` ({CHECKPOINT}) or a model of "
            f"transformers (config.json), {config.source} has neither"
        )
    source = load_checkpoint(path)
    trained = saved_config(path, source["config"])
    if (config.dtype or trained.dtype) not in PRUNE_DTYPES:
        given = f"got {config.dtype}" if config.dtype else f"{config.source} was trained in float8"
        raise ValueError(f"dtype: prune expected {' or '.join(PRUNE_DTYPES)}, {given}")
    return source, trained


def _load_own(path: Path, settings: dict) -> dict:
    """The checkpoint of a pruning that was stopped, which had the same settings."""
    state = load_checkpoint(path)
    if not {"prune", "rows"} <= state.keys():
        raise ValueError(f"out: {path} was not written by prune; choose another folder")
    for name in settings.keys() - {"out", "device"}:
        old = state["prune"].get(name, getattr(PruneConfig, name))
        if old != settings[name]:
            was, got = ("not given" if v == "" else v for v in (old, settings[name]))
            raise ValueError(f"{name} is {was} in {path}, got {got}")
    return state


@contextmanager
def _telling_what_is_kept(rows: list[dict]) -> Iterator[None]:
    """Where Ctrl-C ends it."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        kept = "the same command goes on after the last whole round"
        text = f"in round {len(rows)}; {kept}" if rows else "before the first row was written"
        raise KeyboardInterrupt(text) from stopped


def _write_table(path: Path, settings: dict, rows: list[dict]) -> None:
    with atomic_write(path.with_name(TABLE)) as file:
        file.write(json.dumps({"config": settings, "rows": rows}, indent=1).encode())


def _row(run: Run, index: int) -> dict:
    latency_s, dense_latency_s = latencies(run)
    history = run.history
    return {
        "round": index,
        "sparsity": run.sparsity,
        "loss_before": history.evaluations[0]["loss"],
        "loss": history.evaluations[-1]["loss"],
        "steps": run.step,
        "flop_ratio": flop_ratio(run.model.config, run.sparsity),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "latency_s": latency_s,
        "dense_latency_s": dense_latency_s,
        "train_flops": history.flops,
        "train_s": sum(history.seconds),
    }


def line(row: dict) -> str:
    return (
        f"round {row['round']:>2}   sparsity {row['sparsity']:6.1%}   "
        f"loss {row['loss_before']:.4f} -> {row['loss']:.4f} in {row['steps']} steps   "
        f"{row['flop_ratio']:.2f}x fewer FLOPs   {row['parameters']:,} parameters   "
        f"{1e3 * row['latency_s']:.2f} ms ({row['dense_latency_s'] / row['latency_s']:.2f}x dense)"
    )


def _recovery(config: PruneConfig, source: TrainConfig, index: int, steps: int = 1) -> TrainConfig:
    """The settings of the training after round `index`."""
    given = {name: getattr(source, name) for name in (*FROM_SOURCE, *FROM_RUN)}
    given |= {name: getattr(config, name) for name in FROM_RUN if getattr(config, name)}
    seed, never = config.seed + index, 10**9
    return TrainConfig(
        **given,
        steps=max(1, steps),
        lr=config.lr,
        seed=seed,
        # Its checkpoint is written here, round by round, and not by the run.
        out=config.out,
        eval_every=never,
        checkpoint_every=never,
    )


def _prune(run: Run, config: PruneConfig, target: float, early: dict[str, Tensor]) -> None:
    settings: dict = {"distribution": config.distribution, "family": config.family}
    if config.method != "magnitude":
        # Training text, of steps that no round comes to.
        batches = (run.training.get(2**30 + i)[0] for i in range(int(config.calibration)))
        settings["calibration"] = [x.to(run.ranks.device) for x in batches]
    model = METHODS[config.method](target, **settings).apply(run.model)
    if early:
        _rewind(model, early)
    run.restart(run.config, {"model": model.state_dict()})


def _load_early(path: str, source: TrainConfig) -> dict[str, Tensor]:
    """The weights of a dense run of the same shape."""
    state = load_checkpoint(path, "rewind")
    early = saved_config(checkpoint_file(path), state["config"])
    for name in FROM_SOURCE:
        mine, got = getattr(source, name), getattr(early, name)
        if mine != got:
            raise ValueError(f"rewind: {name} is {mine} in {source.out}, {got} in {path}")
    if sparse := [name for name in state["model"] if name.endswith(".values")]:
        layer = sparse[0].removesuffix(".values")
        raise ValueError(f"rewind: expected a dense run in {path}, {layer} is sparse")
    return state["model"]


@torch.no_grad()
def _rewind(model: nn.Module, early: dict[str, Tensor]) -> None:
    """The stored weights of `model` and all the rest as they are in `early`."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            places = places_of(module).cpu()
            module.values.copy_(early[f"{name}.weight"].flatten()[places])
    for name, parameter in model.named_parameters():
        if not name.endswith(".values"):
            parameter.copy_(early[name])


def _recover(run: Run, steps: int, progress: Progress) -> None:
    for _ in range(steps):
        run.compute_gradients()
        run.update()
        progress.advance()
    if steps:
        run.evaluate()


@torch.no_grad()
def latencies(run: Run) -> tuple[float, float]:
    """Median seconds of one forward pass of one sequence: as it is, and densified, in turn."""
    model, dense = run.model.eval(), densify_(copy.deepcopy(run.model)).eval()
    x = run.validation.get(0)[0][:1].to(run.ranks.device)
    seconds: dict[str, list[float]] = {"sparse": [], "dense": []}
    for _ in range(LATENCY_ROUNDS):
        for name, m in (("sparse", model), ("dense", dense)):
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.autocast(x.device.type, run.dtype, enabled=run.dtype != torch.float32):
                m(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    run.model.train()
    return statistics.median(seconds["sparse"]), statistics.median(seconds["dense"])
