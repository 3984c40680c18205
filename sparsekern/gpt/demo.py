"""The stages of `python -m sparsekern demo`: each measures something and returns plain numbers."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..matmul import linear, matmul
from ..nn import SparseLinear
from ..tensor import SparseTensor
from ..terminal import Progress
from ..testing import interleaved_times, random_mask, relative_error
from .build import build_model, build_optimizer
from .checkpoint import CHECKPOINT, WEIGHTS, load_checkpoint, refuse_weights
from .config import TrainConfig, changed
from .data import default_source
from .dense import (
    LIBRARIES,
    NUMPY,
    ONEDNN,
    PACKED,
    TORCH,
    Linear,
    libraries,
    openblas,
    packed,
    use_,
)
from .profile import linear_share, measured_cap, profile_step
from .step import compute_gradients
from .train import METRICS

# The model: large enough that its linears are most of a step, small enough for two cores.
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 768, 12, 128, 8
SPARSITY = 0.75
STEPS = 60, 12  # at most and at least: as many as both runs take in TRAINING_S
TRAINING_S = 30.0
EVALUATIONS = 6
THREADS = min(2, os.cpu_count() or 1)
STEP_ROUNDS = 7, 3  # at most and at least: as many as take ROUNDS_S
ROUNDS_S = 15.0
SAY_S = 4.0  # between two lines

# The microbenchmark: the first layer of the MLP, over tokens and sparsities. One thread: each
# library has a pool, whose threads spin after their work on the cores of whoever comes next.
KERNEL_N, KERNEL_K = 4 * WIDTH, WIDTH
KERNEL_TOKENS = (16, 256, 1024)
KERNEL_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
KERNEL_ROUNDS = 7
KERNEL_THREADS = 1


def random_weight(n: int, k: int, sparsity: float, dtype: torch.dtype) -> tuple:
    """A random dense W [n, k] with zeros, and the same W as a SparseTensor."""
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(n, k, sparsity, generator)
    w = torch.randn(n, k, generator=generator).mul(mask).to(dtype)
    return w, SparseTensor.from_dense(w, mask)


def check() -> list[dict]:
    """Relative error against fp64, at the worst element, of torch.matmul and of sparsekern.matmul
    on the same numbers.

    Raises ArithmeticError where ours is more than twice torch's plus one rounding."""
    n, k = KERNEL_N, KERNEL_K
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        w, sparse_w = random_weight(n, k, SPARSITY, dtype)
        for shape in ((k,), (7, k), (BATCH, CONTEXT, k)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            exact = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
            errors = {
                "torch": relative_error(torch.matmul(x, w.T), *exact),
                "sparsekern": relative_error(matmul(x, sparse_w.T), *exact),
            }
            if not errors["sparsekern"] <= 2 * errors["torch"] + torch.finfo(dtype).eps:
                raise ArithmeticError(f"matmul of x {list(shape)} {dtype} is wrong: {errors}")
            rows.append({"dtype": str(dtype), "x": list(shape), "w": [n, k], **errors})
    return rows


def dense_calls() -> tuple[dict[str, Linear], dict[str, str]]:
    """The dense libraries that are right here, by their names in words; and why not the others."""
    found, missing = libraries()
    if NUMPY in found:
        found[f"{NUMPY}, {openblas(KERNEL_THREADS)}"] = found.pop(NUMPY)
    return found, missing


def time_kernels(dense: dict[str, Linear], say: Callable[[str], None]) -> list[dict]:
    """Median seconds of the sparse product and of every dense one, forward alone and with the
    backward. What shares a row is interleaved in one process, on one thread.

    Dense forward is also torch.mm of transposes, and oneDNN on a W that it laid out beforehand. Of
    the three products of training each library does all, without autograd."""
    torch.set_num_threads(KERNEL_THREADS)
    n, k = KERNEL_N, KERNEL_K
    dense_w = torch.randn(n, k)
    sparse = {s: random_weight(n, k, s, torch.float32)[1] for s in KERNEL_SPARSITIES}
    for w in sparse.values():
        w.values.requires_grad_()
    whole = {name: library for name, library in dense.items() if name != PACKED}
    rows = []
    for tokens in KERNEL_TOKENS:
        x = torch.randn(tokens, k, requires_grad=True)
        x_plain, dy = x.detach(), torch.randn(tokens, n)

        def step(w, x=x, dy=dy):
            return torch.autograd.grad(linear(x, w), (x, w.values), dy)

        forward = {name: partial(library, x_plain, dense_w) for name, library in whole.items()}
        forward["torch.mm"] = partial(torch.mm, dense_w, x_plain.t())
        if PACKED in dense:
            forward[PACKED] = partial(packed(dense_w, tokens), x_plain)
        training = {
            name: partial(_dense_linear, library, x_plain, dense_w, dy)
            for name, library in whole.items()
        }
        say(f"timing forward, {tokens} tokens")
        with torch.no_grad():
            ours = {s: partial(linear, x, w) for s, w in sparse.items()}
            timed = interleaved_times(forward | ours, KERNEL_ROUNDS)
        rows.append(_row("forward", tokens, timed))
        say(f"timing forward + backward, {tokens} tokens")
        ours = {s: partial(step, w) for s, w in sparse.items()}
        timed = interleaved_times(training | ours, KERNEL_ROUNDS)
        rows.append(_row("forward + backward", tokens, timed))
    return rows


def _row(name: str, tokens: int, seconds: dict) -> dict:
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    dense_s = {who: s for who, s in medians.items() if isinstance(who, str)}
    best = min(dense_s, key=dense_s.get)
    return {
        "pass": name,
        "tokens": tokens,
        "dense_s": dense_s[best],
        "best_dense": best,
        "sparse_s": {who: s for who, s in medians.items() if who not in dense_s},
    }


def steps_in_time(step_s: float) -> int:
    """Training steps of each run where a step of both takes so long, by EVALUATIONS."""
    most, least = STEPS
    wanted = min(most, max(least, int(TRAINING_S / step_s)))
    return max(EVALUATIONS, wanted - wanted % EVALUATIONS)


def train_config(out: Path, sparsity: float, steps: int = STEPS[0]) -> TrainConfig:
    return TrainConfig(
        data=default_source(),
        sparsity=sparsity,
        layers=LAYERS,
        heads=HEADS,
        width=WIDTH,
        context=CONTEXT,
        batch=BATCH,
        steps=steps,
        threads=THREADS,
        out=str(out),
        eval_every=steps // EVALUATIONS,
        checkpoint_every=steps,
    )


def refuse_other_runs(out: Path, sparsity: float) -> None:
    """ValueError where `out` holds a checkpoint of another run than the demo's own, which comes in
    the place of what is there."""
    path = out / CHECKPOINT
    refuse_weights(path)
    if not path.exists():
        return
    saved = load_checkpoint(path)["config"]
    own = asdict(train_config(out, sparsity, saved["steps"]))
    if any(saved.get(name) != own[name] for name in own.keys() - {"data", "out", "threads"}):
        raise ValueError(
            f"out: {path} is not as the demo leaves it, and would be lost: choose another folder"
        )


def train_in_subprocess(config: TrainConfig, library: str = TORCH) -> dict:
    """`python -m sparsekern train` with this config -> its metrics, and wall_s of the process.

    A process of its own, so that the peak memory is of this run alone. `library` does all dense
    linears."""
    out = Path(config.out)
    for name in (WEIGHTS, CHECKPOINT):  # weights without a checkpoint would be another's
        (out / name).unlink(missing_ok=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed(config).items()]
    module = ["sparsekern"] if library == TORCH else ["sparsekern.gpt.dense", library]
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *module, "train", *flags]).returncode
    wall_s = time.perf_counter() - began
    if code:
        raise ChildProcessError(f"training in {out} ended with exit code {code}")
    return json.loads((out / METRICS).read_text()) | {"wall_s": wall_s}


def time_steps(
    dense: TrainConfig, sparse: TrainConfig, found: Iterable[str], say: Callable[[str], None]
) -> dict:
    """One training step, dense and sparse in turn in one process, and what bounds the sparse one.

    Dense is F.linear and, where `found` has it, oneDNN; NumPy's pool of threads would disturb
    torch's. All start untrained and see one random batch: the time of a step depends on neither."""
    torch.set_num_threads(THREADS)
    batch = torch.randint(256, (2, BATCH, CONTEXT))
    names = [name for name in (TORCH, ONEDNN) if name in found]
    models = {name: build_model(dense, 256) for name in names}
    for name in names[1:]:
        use_(models[name], LIBRARIES[name])
    models["sparse"] = build_model(sparse, 256)
    optimizers = {name: build_optimizer(model, 1e-4) for name, model in models.items()}

    def step(name: str) -> None:
        compute_gradients(models[name], *batch)
        optimizers[name].step()

    say(f"timing a training step, {', '.join(models)} in turn")
    seconds = _in_turn({name: partial(step, name) for name in models})
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(names, key=medians.get)
    layers = {n: m for n, m in models["sparse"].named_modules() if isinstance(m, SparseLinear)}
    rounds = len(seconds["sparse"])
    say(f"timing the parts of the step by {best}")
    work = models[best], optimizers[best], batch, list(layers)
    parts = profile_step(*work, library=LIBRARIES[best], rounds=rounds)
    say("timing the linears, dense and sparse in turn")
    linears = time_linears(layers.values(), LIBRARIES[best])
    return {
        "dense": {name: medians[name] for name in names},
        "best_dense": best,
        "rounds": rounds,
        "dense_s": medians[best],
        "sparse_s": medians["sparse"],
        "spread": max(_spread(seconds[name]) for name in (best, "sparse")),
        "parts_s": parts,
        "linear_share": linear_share(parts),
        "linears_s": linears,
        "predicted_s": predicted(parts, linears, 1 - SPARSITY),
        "cap": measured_cap(parts, float("inf")),
    }


def time_linears(layers: Iterable[SparseLinear], library: Linear) -> dict[str, float]:
    """Median seconds of forward and backward of all these layers, dense and sparse in turn."""
    tokens, steps = BATCH * CONTEXT, {"dense": [], "sparse": []}
    for layer in layers:
        n, k = layer.out_features, layer.in_features
        x, dy = torch.randn(tokens, k, requires_grad=True), torch.randn(tokens, n)
        w = torch.randn(n, k)
        steps["dense"].append(partial(_dense_linear, library, x.detach(), w, dy, layer.bias))
        steps["sparse"].append(partial(_sparse_linear, layer, x, dy))

    def run(side: str) -> None:
        for each in steps[side]:
            each()

    seconds = _in_turn({side: partial(run, side) for side in steps})
    return {side: statistics.median(values) for side, values in seconds.items()}


@torch.no_grad()
def _dense_linear(
    library: Linear, x: Tensor, w: Tensor, dy: Tensor, bias: Tensor | None = None
) -> None:
    library(x, w, bias), library(dy, w.t()), library(dy.t(), x.t())
    if bias is not None:
        dy.sum(0)


def _sparse_linear(layer: SparseLinear, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(layer(x), (x, layer.values, layer.bias), dy)


def predicted(parts: dict[str, float], linears: dict[str, float], density: float) -> float:
    """Seconds of a sparse step: the linears as they were measured alone, AdamW on the stored
    weights, all else as in the dense step."""
    both = parts["linear forward"] + parts["linear backward"]
    update = parts["linear AdamW"]
    rest = sum(parts.values()) - both - update
    return rest + both * linears["sparse"] / linears["dense"] + update * density


def _in_turn(fns: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each in rounds of all, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    most, least = STEP_ROUNDS
    progress = Progress(most + 1, 0, unit="round")
    started = said = time.perf_counter()
    for i in range(most + 1):
        for name, fn in fns.items():
            began = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - began)
        progress.advance()
        now = time.perf_counter()
        if i and now - said > SAY_S:
            progress.line(f"round {i} of {most}")
            said = now
        if i >= least and now - started > ROUNDS_S:
            break
    progress.close()
    return {name: values[1:] for name, values in seconds.items()}


def _spread(seconds: list[float]) -> float:
    """How far the middle half of the rounds is apart, of their median."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return (high - low) / statistics.median(seconds)


def next_steps(out: Path, steps: int) -> dict[str, str]:
    """Command -> what it does: what the reader can type now, after a run of so many steps."""
    is_near = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if is_near else "python"
    run = out / "sparse"
    return {
        f"{python} -m sparsekern generate --checkpoint {run}": (
            "Text from the sparse model; after so few steps it is hardly one"
        ),
        f"{python} -m sparsekern train --resume --out {run} --steps {10 * steps}": (
            "Ten times as many steps, from where it stands"
        ),
        f"{python} -m sparsekern bench --quick": "More products on this machine",
    }
