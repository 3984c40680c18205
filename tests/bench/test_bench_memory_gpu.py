"""Memory of a training step: the prediction against real tensors of a small GPT, on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from sparsekern.bench import gpt_gpu, memory_gpu, train_memory_gpu
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.step import compute_gradients
from sparsekern.kernels.cuda import bitmap as bitmaps
from sparsekern.nn import SparseLinear

CPU = torch.device("cpu")
BATCH = 3
MASKS = [("", 0.0), (gpt_gpu.FREE, 0.75), (gpt_gpu.TWO_WAY, 0.75)]
CONFIGS = {
    "plain": GPTConfig(2, 4, 64, 32, 128),
    "no bias": GPTConfig(1, 2, 32, 16, 96, bias=False, n_inner=80),
}


def predicted(config, mask, sparsity):
    return memory_gpu.predict(config, BATCH, sparsity, mask or memory_gpu.DENSE)


@pytest.mark.parametrize("mask, sparsity", MASKS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_state_is_the_sum_of_all_tensors(config, mask, sparsity):
    model = gpt_gpu.make_gpt(config, CPU, mask, sparsity)
    optimizer = gpt_gpu.capturable_optimizer(model, CPU)
    x = torch.randint(config.vocab_size, (BATCH, config.block_size))
    compute_gradients(model, x, x)
    optimizer.step()
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    maps = [
        bitmaps.make_bitmap(w.row_offsets, w.col_indices, *w.shape) for w in map(weight, layers)
    ]
    want = {
        "weights": nbytes(model.parameters()),
        "gradients": nbytes(p.grad for p in model.parameters()),
        "AdamW": nbytes(t for state in optimizer.state.values() for t in state.values()),
        "indices": nbytes(t for each in layers for t in (each.row_offsets, each.col_indices)),
        "bitmaps": nbytes(t for each in maps for t in each.tensors),
    }
    parts = predicted(config, mask, sparsity)
    assert {name: parts[name] for name in want} == want
    tails = sum(w.n * w.k // 4 for w in map(weight, layers)) if mask == gpt_gpu.TWO_WAY else 0
    assert parts["2:4 tails"] == tails
    assert memory_gpu.state_bytes(parts) == sum(want.values()) + tails


@pytest.mark.parametrize("mask, sparsity", MASKS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_a_step_keeps_is_what_autograd_saves(config, mask, sparsity):
    model = gpt_gpu.make_gpt(config, CPU, mask, sparsity)
    x = torch.randint(config.vocab_size, (BATCH, config.block_size))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        _ = model(x, x)[1]
    # Not counted: places of tokens, and the weight of all losses together.
    found = [t for at, t in saved.items() if at not in known and t.is_floating_point() and t.ndim]
    parts = predicted(config, mask, sparsity)
    assert sum(t.untyped_storage().nbytes() for t in found) == (
        parts["casts"] + parts["activations"] + parts["loss"] // 3  # the log-softmax of the three
    )


def test_the_peak_is_where_a_backward_pass_begins_or_ends():
    few, many = (memory_gpu.predict(CONFIGS["plain"], batch) for batch in (1, 1000))
    kept = few["casts"] + few["activations"] + few["loss"]
    assert memory_gpu.peak_bytes(few) == memory_gpu.state_bytes(few) + max(
        kept - few["gradients"], few["embedding"]
    )
    assert memory_gpu.peak_bytes(many, accumulates=True) == (
        memory_gpu.peak_bytes(many) + many["gradients"]
    )
    without = memory_gpu.state_bytes(many) - many["gradients"]
    assert memory_gpu.peak_bytes(many) == without + (
        many["casts"] + many["activations"] + many["loss"]
    )


def test_three_quarters_of_zeros_leave_two_fifths_of_the_state():
    config = train_memory_gpu.PRESETS["gpt3-xl"]
    dense, free, two_way = (
        memory_gpu.state_bytes(memory_gpu.predict(config, 4, s, mask or memory_gpu.DENSE))
        for mask, s in train_memory_gpu.ARMS
    )
    assert 0.37 < free / dense < two_way / dense < 0.4


class FakeGpu:
    """torch.cuda's counters: what is allocated is set by hand."""

    def __init__(self, monkeypatch):
        self.now = self.most = 0
        for name, value in (("memory_allocated", "now"), ("max_memory_allocated", "most")):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: getattr(self, value))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self):
        self.most = self.now

    def take(self, nbytes):
        self.now += nbytes
        self.most = max(self.most, self.now)


def test_the_meter_counts_one_model_beside_others(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    gpu.take(1000)  # of others
    meter, model = memory_gpu.Meter(SimpleNamespace(type="cuda")), torch.nn.Linear(4, 5)
    gpu.take(100)
    meter.built(model)
    gpu.take(7)  # others, between
    info: dict = {}

    def step():
        model.zero_grad()
        with meter.step(info):
            gpu.take(400)
            model(torch.ones(1, 4)).sum().backward()
            gpu.take(100 - 400)  # gradients stay

    with meter.step(info):
        model(torch.ones(1, 4)).sum().backward()
        gpu.take(100 + 30)  # gradients of 25 numbers, and an optimizer
    assert info == {}
    gpu.take(-100)
    step()
    assert info == {"built_bytes": 100, "state_bytes": 230, "peak_bytes": 230 - 100 + 400}


def weight(layer):
    return layer.weight


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("most", [0, 1, 5, 9, 12])
def test_the_largest_batch_is_found_from_wherever_the_guess_begins(monkeypatch, most):
    fractions: list[float] = []
    total = SimpleNamespace(total_memory=100 * train_memory_gpu.GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    arm = train_memory_gpu.Arm.__new__(train_memory_gpu.Arm)
    arm._peaks = {batch: (20 + 4 * batch) * train_memory_gpu.GIB for batch in (2, 4)}
    arm._try = lambda batch: {"batch": batch} if batch <= most else None
    found = arm.within(56)  # the guess is 9
    assert found == ((most, {"batch": most}) if most else None)
    assert fractions == [0.56, 1.0]
