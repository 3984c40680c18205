"""Packs of table rows: one for each thread, and streams in turn."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from test_packed import random_weight

from sparsekern import SparseLinear, SparseTensor
from sparsekern.kernels import derived
from sparsekern.kernels.cuda import packs
from sparsekern.kernels.cuda.gather import GatherLayout
from sparsekern.kernels.cuda.packs import pack_of

N, K = 70, 500
on_gpu = pytest.mark.gpu


def in_a_thread(function, *arguments):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)))
    thread.start()
    thread.join()
    return results[0]


def test_each_thread_has_its_own_and_takes_over_that_of_one_that_is_gone():
    W = SparseTensor.from_dense(random_weight(N, K, 0.3))
    twice = 2 * W.values

    def pack(values):
        make = lambda *indices: GatherLayout(*indices, N, K)  # noqa: E731
        return pack_of("row", 1, make, W.row_offsets, W.col_indices, values, N, K)

    mine = pack(W.values)
    others = in_a_thread(pack, twice)
    assert others is not mine and others.layout is mine.layout
    assert others.refreshed(twice) is NotImplemented and others.emptied(twice) is NotImplemented
    assert mine.refreshed(W.values) is mine is pack(W.values)
    assert in_a_thread(pack, W.values) is others
    assert in_a_thread(mine.refreshed, W.values) is NotImplemented
    assert torch.equal(mine.packed.floats, others.packed.floats)
    assert mine.packed.arrived.data_ptr() != others.packed.arrived.data_ptr()
    twin = W.clone()
    packs.share_packs(W, twin)
    (pattern,) = [
        thing
        for (kind, *_), (thing, _, cols) in derived._store.items()
        if cols() is twin.col_indices
    ]
    copied = pattern.thing.mine(twin.values)
    assert copied is not mine and copied.packed.floats.data_ptr() != mine.packed.floats.data_ptr()
    assert torch.equal(copied.packed.floats, mine.packed.floats)


def test_another_stream_waits_for_the_one_before(monkeypatch):
    waited = []

    class Stream:
        def __init__(self, raw=None, device=None):
            self.raw = raw

        def wait_stream(self, other):
            waited.append(other.raw)

    now, is_capturing = [5], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    monkeypatch.setattr(packs, "_raw_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "ExternalStream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    W = SparseTensor.from_dense(random_weight(N, K, 0.3))
    pack = packs.Pack(GatherLayout(W.row_offsets, W.col_indices, N, K), W.values)
    pack.refresh(W.values)
    now[0] = 7
    pack.refresh(W.values), pack.refresh(W.values)
    assert waited == [5]
    now[0], is_capturing[0] = 5, True
    pack.refresh(W.values)
    assert waited == [5] and pack.stream == 7


def test_what_is_kept_is_made_aside_and_waited_for(monkeypatch):
    """In a thread whose memory is no graph's, and before another stream may read it."""
    done = []

    class Stream:
        def synchronize(self):
            done.append("waited")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    thread = derived.to_keep(
        torch.device("cuda"), lambda: done.append("made") or threading.current_thread()
    )
    assert done == ["made", "waited"] and thread is not threading.current_thread()


@pytest.mark.parametrize("tokens", [pytest.param(m, marks=on_gpu) for m in (1, 16, 64)])
def test_values_of_one_pattern_in_several_threads_and_streams(tokens):
    layer = SparseLinear.from_linear(
        torch.nn.Linear(1024, 512, False, "cuda", torch.bfloat16),
        torch.rand(512, 1024, device="cuda") < 0.3,
    ).requires_grad_(False)
    layers = [layer]
    for i in range(1, 4):
        layers.append(copy.copy(layer))
        values = torch.nn.Parameter(layer.values * (i + 1), False)
        layers[i]._parameters = layer._parameters | {"values": values}
    assert layers[3].col_indices is layer.col_indices
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    want = [layer(x) for layer in layers]
    wrong = []

    def run(i):
        streams = [torch.cuda.Stream() for _ in range(2)]
        for turn in range(60):
            with torch.cuda.stream(streams[turn % 2]):
                mine = (layers[i], layers[(i + 1) % 4])
                got = [each(x) for each in mine]
                if not torch.equal(got[0], want[i]) or not torch.equal(got[1], want[(i + 1) % 4]):
                    wrong.append((i, turn))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
