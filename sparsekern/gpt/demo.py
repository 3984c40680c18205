"""The stages of `python -m sparsekern demo`: each measures something and returns plain numbers."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..matmul import linear, matmul
from ..nn import SparseLinear
from ..tensor import SparseTensor
from ..testing import interleaved_times, random_mask, relative_error
from .build import build_model, build_optimizer, load_model
from .checkpoint import CHECKPOINT
from .config import TrainConfig, changed
from .data import default_source
from .generate import generate
from .profile import linear_share, measured_cap, profile_step
from .step import compute_gradients
from .train import METRICS

# The model: large enough that its linears are most of a step, small enough for two cores.
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 3, 768, 12, 128, 8
SPARSITY = 0.75
STEPS, EVAL_EVERY = 100, 20
THREADS = min(2, os.cpu_count() or 1)
STEP_ROUNDS = 9
# The speed-up of sparse linears that the measured cap is stated for.
LINEAR_SPEEDUP = 2.3

# The microbenchmark: the first layer of the MLP, over tokens and sparsities.
KERNEL_N, KERNEL_K = 4 * WIDTH, WIDTH
KERNEL_TOKENS = (16, 256, 1024)
KERNEL_SPARSITIES = (0.5, 0.75, 0.9, 0.95)
KERNEL_ROUNDS = 9

PROMPT = "\n"
SAMPLE_TOKENS = 240


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


def time_kernels() -> list[dict]:
    """Least seconds of the dense and the sparse product, forward alone and with the backward.

    All that share a row are interleaved in one process; of the rounds the fastest is the one that
    other work on the machine disturbed least. Dense is the best of F.linear and torch.mm on
    activations in its own layout (feature-major)."""
    n, k = KERNEL_N, KERNEL_K
    dense_w = torch.randn(n, k, requires_grad=True)
    sparse = {s: random_weight(n, k, s, torch.float32)[1] for s in KERNEL_SPARSITIES}
    for w in sparse.values():
        w.values.requires_grad_()
    rows = []
    for tokens in KERNEL_TOKENS:
        x = torch.randn(tokens, k, requires_grad=True)
        x_fm = x.detach().t().contiguous()
        dy = torch.randn(tokens, n)

        def step(y, x, w, dy=dy):
            return torch.autograd.grad(y, (x, w), dy)

        with torch.no_grad():
            forward = {
                "dense": lambda x=x: F.linear(x, dense_w),
                "dense feature-major": lambda x=x_fm: torch.mm(dense_w, x),
            } | {s: lambda x=x, w=w: linear(x, w) for s, w in sparse.items()}
            forward_s = _each(min, interleaved_times(forward, KERNEL_ROUNDS))
        training = {"dense": lambda x=x: step(F.linear(x, dense_w), x, dense_w)} | {
            s: lambda x=x, w=w: step(linear(x, w), x, w.values) for s, w in sparse.items()
        }
        training_s = _each(min, interleaved_times(training, KERNEL_ROUNDS))
        forward_s["dense"] = min(forward_s["dense"], forward_s.pop("dense feature-major"))
        for name, seconds in (("forward", forward_s), ("forward + backward", training_s)):
            dense_s = seconds.pop("dense")
            rows.append({"pass": name, "tokens": tokens, "dense_s": dense_s, "sparse_s": seconds})
    return rows


def _each(statistic: Callable[[list[float]], float], seconds: dict) -> dict:
    return {name: statistic(values) for name, values in seconds.items()}


def train_config(out: Path, sparsity: float) -> TrainConfig:
    return TrainConfig(
        data=default_source(),
        sparsity=sparsity,
        layers=LAYERS,
        heads=HEADS,
        width=WIDTH,
        context=CONTEXT,
        batch=BATCH,
        steps=STEPS,
        threads=THREADS,
        out=str(out),
        eval_every=EVAL_EVERY,
        checkpoint_every=STEPS,
    )


def train_in_subprocess(config: TrainConfig) -> dict:
    """`python -m sparsekern train` with this config -> its metrics, and wall_s of the process.

    A process of its own, so that the peak memory is of this run alone."""
    out = Path(config.out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed(config).items()]
    began = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", "sparsekern", "train", *flags]).returncode
    wall_s = time.perf_counter() - began
    if code:
        raise ChildProcessError(f"training in {out} ended with exit code {code}")
    return json.loads((out / METRICS).read_text()) | {"wall_s": wall_s}


def time_steps(dense: TrainConfig, sparse: TrainConfig) -> dict:
    """One training step, dense and sparse in turn in one process, and the profile of the dense one.

    Both start untrained and see one random batch: the time of a step depends on neither."""
    torch.set_num_threads(THREADS)
    x, y = torch.randint(256, (2, BATCH, CONTEXT))
    models = {"dense": build_model(dense, 256), "sparse": build_model(sparse, 256)}
    optimizers = {name: build_optimizer(model, 1e-4) for name, model in models.items()}

    def step(name: str) -> None:
        compute_gradients(models[name], x, y)
        optimizers[name].step()

    steps = {name: lambda name=name: step(name) for name in models}
    seconds = _each(statistics.median, interleaved_times(steps, STEP_ROUNDS))
    linears = [
        name
        for name, module in models["sparse"].named_modules()
        if isinstance(module, SparseLinear)
    ]
    parts = profile_step(models["dense"], optimizers["dense"], (x, y), linears)
    return {
        "dense_s": seconds["dense"],
        "sparse_s": seconds["sparse"],
        "parts_s": parts,
        "linear_share": linear_share(parts),
        "linear_speedup": LINEAR_SPEEDUP,
        "cap": measured_cap(parts, LINEAR_SPEEDUP),
        "cap_free": measured_cap(parts, float("inf")),
    }


def sample(out: Path) -> str:
    """A few lines from the trained model in the folder `out`."""
    model, tokenizer = load_model(out / CHECKPOINT)
    prompt = tokenizer.encode(PROMPT)[None].long()
    tokens = generate(model, prompt, SAMPLE_TOKENS)
    return tokenizer.decode(tokens[0].tolist()).strip()
