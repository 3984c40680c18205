"""Steps in CUDA graphs: what they do on a CPU with a stand-in for the graphs, and on a GPU."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import final, interrupt, tiny_config

from sparsekern.gpt import captured, lines, parts, train
from sparsekern.gpt.captured import WARM_UPS
from sparsekern.gpt.checkpoint import CHECKPOINT, load_checkpoint
from sparsekern.gpt.config import TrainConfig, resumed_config
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.start import begin
from sparsekern.gpt.step import compute_gradients, evaluate
from sparsekern.nn import SparseLinear
from sparsekern.sparsity.pattern import places_of, set_pattern

STEPS = 20
KINDS: dict[str, dict] = {
    "dense": {},
    "static": {"sparsity": 0.75},
    "two-way": {"sparsity": 0.75, "family": "two-way"},
    "gmp": {"sparsity": 0.75, "algorithm": "gmp"},
    "set": {"sparsity": 0.75, "algorithm": "set"},
    "rigl": {"sparsity": 0.75, "algorithm": "rigl"},
}


class Replayed:
    """A CUDA graph that calls its function anew at each replay."""

    made: list["Replayed"] = []

    def __init__(self, launch, aside, first):
        self._launch, self.replays = launch, 0
        Replayed.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self._launch()


def captures() -> int:
    """How often a step was captured: each time of forward and backward, clipping and AdamW."""
    return len(Replayed.made) // 3


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured on the CPU, by the stand-in."""
    monkeypatch.setattr(Replayed, "made", [])
    monkeypatch.setattr(captured, "CudaGraph", Replayed)
    monkeypatch.setattr(captured, "Aside", lambda device: nullcontext)
    monkeypatch.setattr(parts, "why_eager", lambda ranks: None)


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    return tiny_config(
        tmp_path, layers=2, batch=4, steps=STEPS, eval_every=5, checkpoint_every=4, lr=1e-2
    )


def config_of(kind: str, tiny: TrainConfig, folder: Path) -> TrainConfig:
    """With a pattern that changes after every sixth step, where it does."""
    given = dict(KINDS[kind])
    if "algorithm" in given:
        path = folder / f"{kind}.yaml"
        sparsity = "0.75"
        if kind == "gmp":
            sparsity = "{type: cubic, init: 0.0, final: 0.75, steps: 13}"
        path.write_text(
            f"sparsity: {{algorithm: {kind}, sparsity: {sparsity}, update: {{freq: 6, stop: 13}}}}"
        )
        given = {"sparsity_config": str(path)}
    return replace(tiny, **given, out=str(folder / kind))


def eager(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(parts, "why_eager", lambda ranks: "a test compares")
        return train.train(replace(config, out=config.out + "-eager"))


# On a CPU


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_losses_are_the_eager_ones(kind, micro_batch, tiny, tmp_path, monkeypatch, on_cpu):
    config = config_of(kind, replace(tiny, micro_batch=micro_batch), tmp_path)
    expected, found = eager(config, monkeypatch), train.train(config)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert len(found["seconds"]) == STEPS and min(found["seconds"]) > 0
    for a, b in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["step"] == b["step"]
    changes, graphs = (2 if config.sparsity_config else 0), (4 if micro_batch else 3)
    assert len(Replayed.made) == (changes + 1) * graphs
    # Each change takes a step without a graph, and one more after it.
    updates = sum(graph.replays for graph in Replayed.made[graphs - 1 :: graphs])
    assert updates == STEPS - WARM_UPS - 2 * changes


def test_gradients_of_micro_batches_add_up(tiny):
    state = begin(tiny)
    x, y = state.training.get(0)
    found = []
    for micro_batch in (0, 1, 2):
        loss, norm = compute_gradients(state.model, x, y, micro_batch=micro_batch)
        gradients = [p.grad.clone() for p in state.model.parameters()]
        found.append((loss, norm, *gradients))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    losses = [evaluate(state.model, state.validation, 2, micro_batch=size) for size in (0, 1, 2)]
    assert losses[1:] == pytest.approx([losses[0]] * 2)


@pytest.mark.parametrize("kind", ["dense", "rigl"])
@pytest.mark.parametrize("first", ["captured", "eager"])
def test_a_run_goes_on_in_the_other_way(kind, first, tiny, tmp_path, monkeypatch, on_cpu):
    config = config_of(kind, tiny, tmp_path)
    expected = eager(config, monkeypatch)
    for way in (first, "eager" if first == "captured" else "captured"):
        with monkeypatch.context() as patch:
            if way == "eager":
                patch.setattr(parts, "why_eager", lambda ranks: "a test compares")
            if way == first:
                interrupt(monkeypatch, config, 10)
                assert len(final(config)["losses"]) == 8
            else:
                found = train.train(resumed_config({"out": config.out}))
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for group in final(config)["optimizer"]["param_groups"]:
        assert type(group["lr"]) is float


def test_nan_is_found_a_step_later_and_never_saved(tiny, monkeypatch, on_cpu):
    add, calls = captured.add_gradients, []

    def nan_at_nine(*args):
        calls.append(args)
        return add(*args) * (math.nan if len(calls) == 9 - WARM_UPS else 1)

    monkeypatch.setattr(captured, "add_gradients", nan_at_nine)
    # Step 8 would be saved: its weights have just shown a NaN.
    with pytest.raises(FloatingPointError, match="loss is nan at step 8; .*checkpoint.pt is the"):
        train.train(tiny)
    assert len(load_checkpoint(Path(tiny.out) / CHECKPOINT)["losses"]) == 4
    calls.clear()
    with pytest.raises(FloatingPointError, match="loss is nan at step 8; "):
        train.train(replace(tiny, out=tiny.out + "-again", checkpoint_every=100))
    assert len(calls) == 10 - WARM_UPS


def test_a_failed_capture_is_told_and_the_run_is_the_eager_one(tiny, monkeypatch, on_cpu, capsys):
    def full(launch, aside, first):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(captured, "CudaGraph", full)
    expected, found = eager(tiny, monkeypatch), train.train(tiny)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    told = [line for line in capsys.readouterr().out.splitlines() if "no CUDA graph" in line]
    assert told == [
        "steps  eager from here on, no CUDA graph: OutOfMemoryError: CUDA out of memory. Tried to "
        "allocate 2 GiB"
    ]


def test_a_step_that_fails_after_rigl_has_seen_it_counts_once(tiny, tmp_path, monkeypatch, on_cpu):
    config, calls = config_of("rigl", tiny, tmp_path), []

    def fails_when_due(model, x, y, *args):
        calls.append(args)
        if len(calls) > WARM_UPS:
            compute_gradients(model, y, x, *args)  # what it has seen is not of the step
            raise torch.OutOfMemoryError
        return compute_gradients(model, x, y, *args)

    monkeypatch.setattr(captured, "compute_gradients", fails_when_due)
    expected, found = eager(config, monkeypatch), train.train(config)
    assert captures() == 1 and len(calls) == WARM_UPS + 1
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    a, b = (final(replace(config, out=out))["model"] for out in (config.out, config.out + "-eager"))
    assert all(torch.equal(a[name], b[name]) for name in a if name.endswith("col_indices"))


def test_a_pruned_model_recovers_in_graphs(tiny, tmp_path, monkeypatch, on_cpu):
    train.train(replace(tiny, steps=4))
    rows = {}
    for way in ("captured", "eager"):
        if way == "eager":
            monkeypatch.setattr(parts, "why_eager", lambda ranks: "a test compares")
        config = PruneConfig(tiny.out, rounds=2, steps=10, micro_batch=2, out=str(tmp_path / way))
        rows[way] = [row["loss"] for row in prune(config)]
    assert captures() > 2 and rows["captured"] == pytest.approx(rows["eager"], rel=1e-4)


def test_a_pattern_that_somebody_changes_is_captured_anew(tiny, on_cpu):
    state = begin(replace(tiny, sparsity=0.75))
    for _ in range(WARM_UPS + 1):
        state.compute_gradients()
        state.update()
    assert captures() == 1 and state.parts.is_replayed
    layer = next(m for m in state.model.modules() if isinstance(m, SparseLinear))
    places = places_of(layer)
    others = places.flip(0).sub(layer.in_features * layer.out_features - 1).neg()
    set_pattern(layer, others, [state.parts.optimizer])
    replayed = []
    for _ in range(3):
        state.compute_gradients()
        state.update()
        replayed.append(state.parts.is_replayed)
    assert replayed == [False, True, True] and captures() == 2


def test_micro_batch_errors(tiny):
    with pytest.raises(ValueError, match="micro_batch: expected 0 or a divisor of batch 4, got 3"):
        replace(tiny, micro_batch=3)
    with pytest.raises(ValueError, match="divisor of batch 4, got -1"):
        replace(tiny, micro_batch=-1)


def test_the_reason_for_eager_steps_is_printed():
    ranks = type("Ranks", (), {"device": torch.device("cpu")})()
    assert captured.why_eager(ranks) == "CUDA graphs need a GPU"
    ranks.device = torch.device("cuda")
    assert captured.why_eager(ranks) is None


# On a GPU


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops a capture fails the test."""

    def fail(error: Exception) -> str:
        raise error

    monkeypatch.setattr(lines, "eager", fail)


def gpu_config(tiny: TrainConfig, micro_batches: int = 1, **settings) -> TrainConfig:
    return replace(
        tiny,
        layers=1,
        width=64,
        batch=2 * micro_batches,
        micro_batch=2 if micro_batches > 1 else 0,
        lr=3e-3,
        device="cuda",
        dtype="bfloat16",
        eval_every=10,
        **settings,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "static", "two-way", "gmp", "rigl"])
def test_replays_compute_what_launches_do(kind, micro_batches, tiny, tmp_path, monkeypatch):
    config = config_of(kind, gpu_config(tiny, micro_batches), tmp_path)
    found, plain = train.train(config), eager(config, monkeypatch)
    # The same kernels; but the learning rate is rounded, and a rounding may decide what grows.
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.1 if kind == "rigl" else 0.01)
    assert found["losses"][-1] < found["losses"][0] - 0.5


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
def test_compiled_blocks_are_captured(tiny, tmp_path, monkeypatch):
    config = config_of("rigl", gpu_config(tiny, 4), tmp_path)
    plain = eager(config, monkeypatch)
    monkeypatch.setattr(parts, "COMPILED_STEPS", 1)
    found = train.train(config)
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.2)


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
def test_replays_on_sparse_tensor_cores(tiny, monkeypatch):
    wide = gpu_config(tiny, 2, sparsity=0.75, family="two-way")
    config = replace(wide, width=1024, context=512, layers=1, steps=8, lr=3e-4)
    config = replace(config, data="stdlib")
    found, plain = train.train(config), eager(config, monkeypatch)
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.03)


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
def test_a_captured_run_resumes(tiny, tmp_path, monkeypatch):
    config = config_of("rigl", gpu_config(tiny), tmp_path)
    whole = train.train(config)
    for way in ("captured", "eager"):
        broken = replace(config, out=f"{config.out}-{way}")
        interrupt(monkeypatch, broken, 10)
        with monkeypatch.context() as patch:
            if way == "eager":
                patch.setattr(parts, "why_eager", lambda ranks: "a test compares")
            resumed = train.train(resumed_config({"out": broken.out}))
        assert resumed["losses"] == pytest.approx(whole["losses"], abs=0.1)


@pytest.mark.gpu
def test_a_capture_without_memory_leaves_the_run_as_it_was(tiny, monkeypatch, capsys):
    add = captured.add_gradients

    def full(*args):
        add(*args)
        torch.empty(2**46, device="cuda")

    config = gpu_config(tiny, sparsity=0.75)
    monkeypatch.setattr(captured, "add_gradients", full)
    found, plain = train.train(config), eager(config, monkeypatch)
    assert found["losses"] == pytest.approx(plain["losses"], abs=0.05)
    assert "no CUDA graph: OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
def test_a_pattern_under_a_graph_cannot_change(tiny):
    state = begin(gpu_config(tiny, sparsity=0.75))
    for _ in range(WARM_UPS + 1):
        state.compute_gradients()
        state.update()
    assert state.parts.is_replayed
    layer = next(m for m in state.model.modules() if isinstance(m, SparseLinear))
    with pytest.raises(RuntimeError, match="a captured CUDA graph reads the pattern"):
        set_pattern(layer, places_of(layer)[1:], [state.parts.optimizer])
    state.parts.stop_capturing()
    set_pattern(layer, places_of(layer)[1:], [state.parts.optimizer])
    state.compute_gradients()
    state.update()


@pytest.mark.gpu
@pytest.mark.usefixtures("no_fallback")
def test_nan_is_found_a_step_later(tiny):
    state = begin(gpu_config(tiny))
    for _ in range(WARM_UPS + 1):
        state.compute_gradients()
        state.update()
    with torch.no_grad():
        state.model.wte.weight.fill_(math.nan)
    state.compute_gradients()
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {WARM_UPS + 1}"):
        state.save()
    state.update()
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {WARM_UPS + 1}"):
        state.compute_gradients()
