"""Packed weights, read back as the CUDA kernels read them (csrc/cuda/{stream,cover,pairs}.cuh)."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sparsekern import ops
from sparsekern.kernels import cover, derived, packs, torch_csr
from sparsekern.kernels.cover import WINDOW, Cover, CoverLayout
from sparsekern.kernels.cuda_launch import (
    Gpu,
    configure_cover,
    configure_gather,
    configure_pairs,
)
from sparsekern.kernels.layout import LANES, sort_rows
from sparsekern.kernels.packed import assemble, choose_layout, like, name_of, pack
from sparsekern.kernels.pairs import HEAD, SLOTS, STEP, Pairs, PairsLayout
from sparsekern.kernels.streams import GRANULE, Streams, StreamsLayout, choose_pieces, share_out
from sparsekern.nn import PackedLinear
from sparsekern.tensor import SparseTensor

needs_library = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")


def streams_of(w, pieces=None, bits=None):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return StreamsLayout(W.row_offsets, W.col_indices, *W.shape, pieces, bits).fill(W.values)


def cover_of(w):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return CoverLayout(W.row_offsets, W.col_indices, *W.shape).fill(W.values)


def pairs_of(w):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return PairsLayout(W.row_offsets, W.col_indices, *W.shape).fill(W.values)


def unpack_streams(packed):
    """W [N, K], piece by piece."""
    w = torch.zeros(packed.n, packed.k, dtype=packed.values.dtype)
    filled = torch.zeros(packed.n, packed.k, dtype=torch.bool)
    assert packed.bounds[0] == 0 and packed.bounds[-1] == len(packed.values)
    for s in range(packed.slices):
        pieces = range(*packed.first_piece[s : s + 2].tolist())
        assert len(pieces) > 0 and (packed.slice_of[pieces.start : pieces.stop] == s).all()
        for p in pieces:
            begin, end = packed.bounds[p : p + 2].tolist()
            for lane in range(LANES):
                row = int(packed.row_order[s * LANES + lane])
                values = packed.values[begin:end, lane].flatten()
                codes = packed.deltas[begin:end, lane].int()
                start = int(packed.starts[p, lane])
                if packed.bits == 4:
                    codes = torch.cat([codes & 15, codes >> 4], dim=1)
                    columns = 2 * (codes.flatten() & 7).cumsum(0) + (codes.flatten() >> 3) + start
                else:
                    columns = codes.flatten().cumsum(0) + start
                columns = columns[values != 0]
                if row < 0:
                    assert not len(columns)
                    continue
                assert not filled[row, columns].any() and (columns.diff() > 0).all()
                filled[row, columns] = True
                w[row, columns] = values[values != 0]
    return w


def unpack_cover(packed):
    """W [N, K], slot by slot; every value has a place of its own."""
    steps = packed.steps.long()
    values = packed.records[:, :256]  # [steps, lanes * 8]
    positions = packed.records.view(torch.int16)[:, 256:288]
    columns = packed.records.view(torch.uint8)[:, -32:].long()
    tile = torch.arange(len(steps) - 1).repeat_interleave(steps.diff())  # of each step
    w = torch.zeros(packed.n, packed.windows * WINDOW, dtype=packed.dtype)
    filled = torch.zeros_like(w, dtype=torch.bool)
    for lane in range(LANES):
        g, t = lane // 4, lane % 4
        for reg in range(8):  # a0 .. a3 of rows 0-15, of rows 16-31
            b, half, upper = reg // 4, reg % 2, reg // 2 % 2
            rows = packed.row_order[tile // packed.windows * LANES + b * 16 + half * 8 + g].long()
            word = positions[:, g * 4 + 2 * b + upper].long()
            value = values[:, lane * 8 + reg]
            slot = (upper * 4 + t) * 4 + (word >> t * 4 + half * 2 & 3)
            column = columns.gather(1, slot[:, None])[:, 0] + tile % packed.windows * WINDOW
            real = (value != 0) & (rows >= 0)
            assert ((value != 0) == real).all() and not filled[rows[real], column[real]].any()
            filled[rows[real], column[real]] = True
            w[rows[real], column[real]] = value[real]
    assert not w[:, packed.k :].any()
    return w[:, : packed.k]


def unpack_pairs(packed):
    """W [N, K], pair by pair; every word of a step is that of a slot."""
    bounds, row_steps = packed.steps.tolist(), packed.row_steps
    w = torch.zeros(packed.slices * LANES, row_steps * STEP, dtype=packed.dtype)
    for step, (begin, end) in enumerate(pairwise(bounds)):
        words = packed.words[begin:end]
        masks = words.view(torch.int32)[:LANES, 0].tolist()
        starts = words.view(torch.int16)[LANES:HEAD].flatten().tolist()
        assert starts[0] * 4 == end - begin and begin % 4 == 0
        at = HEAD
        for lane, mask in enumerate(masks):
            assert lane == 0 or starts[lane] == 4 * (at - HEAD)
            for slot in range(SLOTS):
                if not mask >> (slot % 4 * 8 + slot // 4 + 2) % 32 & 1:
                    continue
                row = step // row_steps * LANES + slot // 4 % 2 * 16 + slot % 2 * 8 + lane // 4
                column = step % row_steps * STEP + slot // 8 * 16 + slot % 4 // 2 * 8 + lane % 4 * 2
                w[row, column : column + 2] = words[at]
                at += 1
        assert end - begin == -(-at // 4) * 4
    assert not w[packed.n :].any() and not w[:, packed.k :].any()
    return w[: packed.n, : packed.k]


def random_weight(n, k, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).bfloat16()
    w[w == 0] = 1
    return w * (torch.rand(n, k, generator=generator) < density)


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("pieces", [1, 5, 300, None])
@pytest.mark.parametrize(
    "n, k, density",
    [(64, 512, 0.5), (70, 700, 0.25), (33, 129, 0.05), (1, 1, 1.0), (40, 600, 1.0), (5, 2000, 0.0)],
)
def test_streams_hold_exactly_the_matrix(n, k, density, pieces, bits):
    w = random_weight(n, k, density)
    assert torch.equal(unpack_streams(streams_of(w, pieces, bits)), w)


SMALL = pytest.mark.parametrize(
    "n, k, density",
    [
        (64, 512, 0.5),
        (70, 700, 0.25),
        (300, 129, 0.05),
        (1, 1, 1.0),
        (40, 600, 1.0),
        (5, 2000, 0.0),
    ],
)


@needs_library
@SMALL
def test_covers_hold_exactly_the_matrix(n, k, density):
    w = random_weight(n, k, density)
    assert torch.equal(unpack_cover(cover_of(w)), w)


@SMALL
def test_pairs_hold_exactly_the_matrix(n, k, density):
    w = random_weight(n, k, density)
    assert torch.equal(unpack_pairs(pairs_of(w)), w)


def uneven_weight():
    n, k = 96, 1300
    w = random_weight(n, k, 0.02)
    w[3] = 1.5  # a full row
    w[10:20] = 0  # empty rows
    w[:, 256:400] = 2.5  # a full tile
    w[:, 512:900] = 0  # an empty one
    w[40:60, 900:1028] = random_weight(20, 128, 0.6, seed=1)
    w[7] = 0
    w[7, 1299] = 3.5  # a gap as long as the row
    w[8] = 0
    w[8, 128] = 4.5
    return w


@pytest.mark.parametrize("bits", [4, 8])
def test_streams_of_uneven_patterns(bits):
    w = uneven_weight()
    assert torch.equal(unpack_streams(streams_of(w, 20, bits)), w)


@needs_library
def test_covers_of_uneven_patterns():
    w = uneven_weight()
    assert torch.equal(unpack_cover(cover_of(w)), w)


def test_pairs_of_uneven_patterns():
    w = uneven_weight()
    assert torch.equal(unpack_pairs(pairs_of(w)), w)


def test_stored_zeros_count_as_missing():
    w = random_weight(32, 256, 0.3)
    mask = w != 0
    w[mask] *= torch.arange(int(mask.sum())) % 3 > 0
    W = SparseTensor.from_dense(w, mask)
    assert torch.equal(unpack_streams(streams_of(W)), w)
    assert torch.equal(unpack_pairs(pairs_of(W)), w)
    if cover.is_built():
        assert torch.equal(unpack_cover(cover_of(W)), w)


def test_other_values_in_the_same_layout():
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    layouts = {StreamsLayout: unpack_streams, PairsLayout: unpack_pairs}
    if cover.is_built():
        layouts[CoverLayout] = unpack_cover
    for kind, unpack in layouts.items():
        layout = kind(W.row_offsets, W.col_indices, *W.shape)
        packed = layout.fill(W.values)
        layout.refill_(packed, -W.values)
        assert torch.equal(unpack(packed), -w)


@needs_library
@pytest.mark.parametrize("density, slots", [(0.5, 2.5), (0.25, 1.5), (0.1, 1.02), (0.02, 0.6)])
def test_slots_of_a_random_mask(density, slots):
    packed = cover_of(random_weight(256, 2048, density))
    assert packed.records.shape[0] * 32 * 32 <= slots * 256 * 2048


@needs_library
def test_few_banks_are_met_twice():
    packed = cover_of(random_weight(256, 2048, 0.1))
    columns = packed.records.view(torch.uint8)[:, -32:].long()
    banks = torch.nn.functional.one_hot(columns.view(-1, 8) % 8, 8).sum(1).amax(1)
    assert banks.float().mean() < 1.2


@pytest.mark.parametrize("density", [0.5, 0.2, 0.05])
def test_bytes_of_pairs(density):
    packed = pairs_of(random_weight(512, 2048, density))
    expected = 3 / 32 + 2 * (1 - (1 - density) ** 2)
    assert packed.nbytes == pytest.approx(expected * 512 * 2048, rel=0.03)


def test_rows_of_like_length_share_a_slice():
    order = sort_rows(torch.tensor([0, 1, 5, 5, 7]), 4, 2)
    assert order.tolist() == [1, 0, 3, 2] + [-1] * 28


def test_the_layout_for_a_number_of_tokens():
    weight = SparseTensor.from_dense(random_weight(64, 512, 0.3))
    assert choose_layout(2, 0.3) == "streams" and type(pack(weight)) is Streams
    assert choose_layout(33, 0.01) == "pairs" and type(pack(weight, 64)) is Pairs
    assert choose_layout(3, 0.6) == choose_layout(17, 0.5) == "pairs"
    if cover.is_built():
        assert choose_layout(3, 0.5) == choose_layout(32, 0.4) == "cover"
        assert type(pack(weight, 16)) is Cover
    fewest = [like(m) for m in (0, 1, 2, 3, 16, 17, 32, 33, 64)]
    assert fewest == [1, 1, 1, 3, 3, 17, 17, 33, 33]


def test_without_the_library_more_tokens_read_pairs(monkeypatch):
    monkeypatch.setattr(cover, "_C", None)
    assert choose_layout(3, 0.3) == "pairs" and choose_layout(1, 0.3) == "streams"


H200, A100 = Gpu(132, 227 * 1024), Gpu(108, 163 * 1024)


@pytest.mark.parametrize("gpu", [H200, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("m", [1, 16, 17, 64])
@pytest.mark.parametrize(
    "n, k", [(12288, 12288), (28672, 8192), (6144, 2048), (2048, 8192), (1, 1)]
)
@pytest.mark.parametrize("layout", ["cover", "pairs"])
def test_runs_fill_the_gpu(n, k, m, layout, gpu):
    slices = -(-n // LANES)
    if layout == "cover":
        windows = -(-k // WINDOW)
        launch = configure_cover(m, slices, windows, "bf16", gpu)
        assert launch.tokens >= min(m, 32)
    else:
        launch = configure_pairs(m, slices, -(-k // STEP), "bf16", gpu)
        windows = -(-k // (STEP * 64 // launch.tokens))
        assert launch.tokens >= m
    blocks = -(-slices // launch.group_warps)
    units = blocks * windows
    assert 0.7 * min(gpu.multiprocessors, units) <= launch.grid <= gpu.multiprocessors
    first = [run * units // launch.grid for run in range(launch.grid + 1)]
    runs = [
        set(range(a // windows, -(-b // windows))) for a, b in zip(first, first[1:], strict=False)
    ]
    assert max(sum(block in run for run in runs) for block in range(blocks)) <= launch.shares
    assert launch.smem_bytes <= gpu.smem_bytes


def test_a_launch_for_no_rows():
    assert configure_cover(1, 0, 0, "bf16", H200).grid == 1
    assert configure_pairs(1, 0, 0, "bf16", H200).grid == 1


@pytest.mark.parametrize("density, bits", [(0.5, 4), (0.25, 4), (0.05, 8), (0.02, 8)])
def test_the_smaller_format_is_chosen(density, bits):
    packed = streams_of(random_weight(64, 2048, density), 1)
    assert packed.bits == bits


def test_bytes_of_a_random_mask():
    packed = streams_of(random_weight(256, 4096, 0.25), 1)
    assert packed.nbytes < 0.335 * 2 * 256 * 4096


def test_pieces_are_even():
    w = random_weight(1024, 1024, 0.2)
    w[:256] *= random_weight(256, 1024, 0.3)
    packed = streams_of(w, 300)
    lengths, slices = packed.bounds.diff(), packed.slices
    assert 300 <= len(lengths) <= 300 + slices
    mean = len(packed.values) / 300
    assert lengths.max() <= mean * 1.5 + 1
    assert packed.nbytes < 1.06 * 3 * int((w != 0).sum()) + 128 * len(lengths)


@pytest.mark.parametrize(
    "n, k, density, blocks", [(28672, 8192, 0.25, 2), (2048, 8192, 0.25, 1), (10**6, 64, 0.1, 15)]
)
def test_pieces_fill_the_gpu(n, k, density, blocks):
    slices = n // LANES
    pieces = choose_pieces(int(slices * k * density / GRANULE), slices, 132)
    assert -(-max(pieces, slices) // (16 * 132)) == blocks


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("slices, pieces", [(896, 2112), (192, 2112), (300, 200), (1, 64)])
def test_slices_share_pieces(slices, pieces, spread):
    generator = torch.Generator().manual_seed(slices)
    lengths = 50 * torch.exp(spread * torch.randn(slices, generator=generator))
    longest = lengths.round().long().sort(descending=True).values
    counts = share_out(longest, pieces)
    assert counts.min() >= 1 and counts.sum() <= max(pieces, slices)
    if slices >= pieces:
        assert (counts == 1).all()
        return
    length = next(n for n in range(1, 10**4) if (-(-longest // n)).sum() <= pieces)
    assert (-(-longest // counts)).max() <= length + length // 16


def test_pieces_of_nothing():
    assert share_out(torch.tensor([0, 0]), 10).tolist() == [1, 1]
    assert share_out(torch.tensor([3, 0, 1]), 100).tolist() == [3, 1, 1]


@pytest.mark.parametrize("m, k, tokens", [(1, 8192, 1), (7, 8192, 8), (8, 20000, 4), (2, 70000, 1)])
def test_tokens_of_a_gather(m, k, tokens):
    launch = configure_gather(m, k, 5000, 4, "bf16", H200)
    assert launch.tokens == tokens and launch.kernel.endswith(f"_t{tokens}")
    assert launch.smem_bytes <= H200.smem_bytes
    assert configure_gather(1, 120000, 5000, 4, "bf16", H200) is None


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="weight: expected bfloat16 or float16 values"):
        pack(SparseTensor.from_dense(torch.ones(4, 4)))


# What must not get through: see also test_emulated_cuda.py and test_gpu_safety.py.

KINDS = {"streams": streams_of, "cover": cover_of, "pairs": pairs_of}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_library if k == "cover" else ()) for k in KINDS]
)


@kinds
def test_values_of_another_length_or_type(kind):
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    layouts = {"streams": StreamsLayout, "cover": CoverLayout, "pairs": PairsLayout}
    layout = layouts[kind](W.row_offsets, W.col_indices, *W.shape)
    packed = layout.fill(W.values)
    before = packed.clone()
    for values in (W.values[:-1], W.values[:1], torch.cat([W.values, W.values[:1]])):
        with pytest.raises(ValueError, match=rf"values: expected shape \({W.nnz},\)"):
            layout.refill_(packed, values)
        with pytest.raises(ValueError, match=rf"values: expected shape \({W.nnz},\)"):
            layout.fill(values)
    for values in (W.values.half(), W.values.float(), W.values.to("meta")):
        with pytest.raises(TypeError, match="values: expected"):
            layout.refill_(packed, values)
    for name, tensor in packed.tensors().items():
        bits = tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor
        assert torch.equal(bits, before.tensors()[name].view(bits.dtype)), name


@kinds
def test_parts_that_do_not_fit(kind):
    """Each tensor cut short, of another type, elsewhere; other sizes."""
    packed = KINDS[kind](random_weight(70, 500, 0.3))
    names = list(packed.tensors())
    parts = [packed.n, packed.k, packed.nnz, packed.numbers(), list(packed.tensors().values())]
    assemble(kind, *parts)
    free = {"streams": "values", "cover": "records", "pairs": "words"}[kind]  # its length is free
    for i, name in enumerate(names):
        tensor = parts[4][i]
        bad = [tensor.to("meta"), tensor.double(), tensor[..., None], tensor[..., :-1]]
        bad += [tensor[:-1]] if name != free or kind == "streams" else []
        for part in bad:
            with pytest.raises((TypeError, ValueError), match="expected"):
                assemble(kind, *parts[:4], [*parts[4][:i], part, *parts[4][i + 1 :]])
    for sizes in ((71 + 32, 500), (70, 500 + 256), (-1, 500), (2**31, 500)):
        if kind == "streams" and sizes == (70, 756):
            continue  # nothing in it depends on K
        with pytest.raises(ValueError, match="expected"):
            assemble(kind, *sizes, *parts[2:])
    for wrong in ((1, 2), None):
        with pytest.raises(ValueError, match=f"{kind}: expected . numbers and"):
            numbers = parts[3] if wrong is None else list(wrong)
            assemble(kind, *parts[:3], numbers, parts[4][: 1 if wrong is None else None])
    with pytest.raises(ValueError, match="layout: expected one of streams, cover, pairs, got 'x'"):
        assemble("x", *parts)
    if kind == "streams":
        with pytest.raises(ValueError, match="bits: expected 4 or 8, got 5"):
            assemble(kind, *parts[:3], [5], parts[4])


@kinds
def test_the_op_checks_its_operands(kind):
    packed = KINDS[kind](random_weight(70, 500, 0.3))
    parts = [packed.n, packed.k, packed.nnz, packed.numbers(), list(packed.tensors().values())]
    x, bias = torch.randn(3, 500).bfloat16(), torch.zeros(70).bfloat16()
    for bad, name in (
        ((x[:, 1:], None), "x"),
        ((x[0], None), "x"),
        ((x.half(), None), "x"),
        ((x.to("meta"), None), "x"),
        ((x, bias[1:]), "bias"),
        ((x, bias.float()), "bias"),
        ((x, bias[None]), "bias"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            ops._run_spmm_packed(bad[0], name_of(packed), *parts, bad[1])


@kinds
def test_no_cast_changes_a_packed_layer(kind):
    """Indices lie in the bits of 16-bit floats: NaNs of many kinds, and others."""
    layer = PackedLinear(KINDS[kind](random_weight(70, 500, 0.3)), torch.randn(70).bfloat16())
    before = {name: t.clone() for name, t in layer.named_buffers()}
    for cast in (layer.half, layer.float, layer.double, layer.bfloat16):
        cast()
        for name, t in layer.named_buffers():
            assert t.dtype == before[name].dtype, name
            assert torch.equal(t.view(torch.uint8), before[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match=r"bias: expected shape \(70,\), got \(69,\)"):
        PackedLinear(KINDS[kind](random_weight(70, 500, 0.3)), torch.zeros(69).bfloat16())


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_packing_looks_at_the_indices(tokens):
    def weight():
        return SparseTensor.from_dense(random_weight(70, 500, 0.3))

    for name, at, value in (
        ("col_indices", 5, -(10**8)),
        ("col_indices", 5, 10**9),
        ("col_indices", -1, 503),
        ("row_offsets", 3, 2**31 - 1),
    ):
        W = weight()
        getattr(W, name).data[at] = value  # torch does not count it
        with pytest.raises(ValueError, match=name):
            pack(W, tokens)
    W = weight()
    want = pack(W, tokens)
    W.col_indices, W.row_offsets = W.col_indices.long(), W.row_offsets.long()
    wide = torch.stack([W.row_offsets, W.row_offsets], 1)
    W.row_offsets = wide[:, 0]
    for name, part in pack(W, tokens).tensors().items():
        assert torch.equal(part.view(torch.uint8), want.tensors()[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="weight: .* got a transpose"):
        pack(weight().T, tokens)
    W = weight()
    W.values = W.values[:-1]
    with pytest.raises(ValueError, match="values"):
        pack(W, tokens)


@needs_library
def test_the_cover_of_the_library_is_safe_by_itself():
    W = SparseTensor.from_dense(random_weight(70, 500, 0.3))
    order = sort_rows(W.row_offsets, 70, 128)

    def make(row_offsets=W.row_offsets, col_indices=W.col_indices, order=order):
        parts = row_offsets.data_ptr(), col_indices.data_ptr(), 70, 500, W.nnz, order.data_ptr()
        return cover._C.Cover(*parts, 3, 2)

    def changed(t, at, value):
        t = t.clone()
        t[at] = value
        return t

    make()
    for at, value in ((5, 10**9), (5, -(10**8)), (-1, 500), (0, int(W.col_indices[1]))):
        with pytest.raises(ValueError, match="col_indices"):
            make(col_indices=changed(W.col_indices, at, value))
    for at, value in ((3, 2**31 - 1), (0, 1), (70, 5), (4, -7)):
        with pytest.raises(ValueError, match="row_offsets"):
            make(row_offsets=changed(W.row_offsets, at, value))
    for at, value in ((0, 70), (0, -2), (0, 10**9), (0, int(order[1])), (0, -1)):
        with pytest.raises(ValueError, match="row_order"):
            make(order=changed(order, at, value))
    # What it has read is its own: a change before write() changes nothing.
    own = W.col_indices.clone()
    made = make(col_indices=own)
    own.fill_(10**9)
    places = torch.full((W.nnz,), -1)
    steps, records = torch.zeros(7, dtype=torch.int32), torch.zeros(made.steps, 304).short()
    made.write(steps.data_ptr(), records.data_ptr(), places.data_ptr())
    assert torch.equal(places, CoverLayout(W.row_offsets, W.col_indices, 70, 500).places)


@pytest.mark.parametrize("layout", [StreamsLayout, CoverLayout, PairsLayout])
def test_layouts_take_int32_alone(layout):
    W = SparseTensor.from_dense(random_weight(70, 500, 0.3))
    with pytest.raises(TypeError, match="col_indices: expected a contiguous int32 vector"):
        layout(W.row_offsets, W.col_indices.long(), 70, 500)
    with pytest.raises(ValueError, match="row_offsets: expected 71 elements, got 70"):
        layout(W.row_offsets[:-1], W.col_indices, 70, 500)


def test_packs_tell_tensors_from_addresses():
    """Values that are gone leave their address to others, of the same version."""
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    memory = np.zeros(W.nnz, np.int16)

    def packed():
        values = torch.from_numpy(memory).view(torch.bfloat16)
        pattern = W.row_offsets, W.col_indices
        return packs.pack_of(
            "row", 1, lambda *p: StreamsLayout(*p, 70, 500), *pattern, values, 70, 500
        )

    memory[:] = W.values.view(torch.int16).numpy()
    assert torch.equal(unpack_streams(packed().packed), w)
    memory[:] = (-W.values).view(torch.int16).numpy()
    assert torch.equal(unpack_streams(packed().packed), -w)


def test_derived_things_tell_offsets_from_addresses():
    memory = np.array([0, 2, 2], np.int32)
    col_indices = torch.tensor([0, 3], dtype=torch.int32)

    def derived_offsets():
        offsets = torch.from_numpy(memory)
        return derived.derived("test", offsets, col_indices, 2, 5, lambda o, _: o).tolist()

    assert derived_offsets() == [0, 2, 2]
    memory[1] = 1
    assert derived_offsets() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half])
def test_products_of_a_nearly_empty_weight(dtype):
    """The rows `csr`, on a CPU; an infinity where nothing is stored reaches nothing."""
    mask = torch.rand(60, 90) < 0.05
    mask[:, 7] = mask[11] = False
    W = SparseTensor.from_dense(torch.randn(60, 90, dtype=dtype), mask)
    w, args = W.to_dense().double(), (W.row_offsets, W.col_indices, W.values, 60, 90)
    x, dy = torch.randn(5, 90, dtype=dtype), torch.randn(5, 60, dtype=dtype)
    bias, bias_t = torch.randn(60, dtype=dtype), torch.randn(90, dtype=dtype)
    tolerance = {"rtol": 0, "atol": {torch.half: 2e-2, torch.float32: 1e-5}.get(dtype, 1e-12)}
    y = torch_csr._spmm(*args, x, bias).double()
    torch.testing.assert_close(y, x.double() @ w.t() + bias, **tolerance)
    dx = torch_csr._spmm_t(*args, dy, bias_t).double()
    torch.testing.assert_close(dx, dy.double() @ w + bias_t, **tolerance)
    dv = torch_csr._sddmm(*args[:2], 60, 90, dy, x).double()
    torch.testing.assert_close(dv, (dy.double().t() @ x.double())[mask], **tolerance)
    x[2, 7] = torch.inf
    dy[3, 11] = torch.nan
    assert torch.equal(torch_csr._spmm(*args, x, bias).double(), y)
    assert torch.equal(torch_csr._spmm_t(*args, dy, bias_t).double(), dx)
    W.col_indices[0] = 90
    with pytest.raises(ValueError, match="col_indices"):
        torch_csr._spmm(*args, x)
