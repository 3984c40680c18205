"""Packed weights, read back as the CUDA kernels read them (csrc/cuda/{gather,cover,pairs}.cuh)."""

from itertools import pairwise

import pytest
import torch

from sparsekern.kernels.cuda import cover, gather, pairs
from sparsekern.kernels.cuda.choose import choose_layout, like, pack
from sparsekern.kernels.cuda.cover import WINDOW, Cover, CoverLayout
from sparsekern.kernels.cuda.gather import Gather, GatherLayout, choose_pieces, share_out
from sparsekern.kernels.cuda.layout import LANES, Gpu, sort_rows
from sparsekern.kernels.cuda.pairs import HEAD, SLOTS, STEP, Pairs, PairsLayout
from sparsekern.tensor import SparseTensor

needs_library = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")


def gather_of(w, pieces=None, bits=None):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return GatherLayout(W.row_offsets, W.col_indices, *W.shape, pieces, bits).fill(W.values)


def cover_of(w):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return CoverLayout(W.row_offsets, W.col_indices, *W.shape).fill(W.values)


def pairs_of(w):
    W = w if isinstance(w, SparseTensor) else SparseTensor.from_dense(w)
    return PairsLayout(W.row_offsets, W.col_indices, *W.shape).fill(W.values)


def unpack_gather(packed):
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
def test_gathers_hold_exactly_the_matrix(n, k, density, pieces, bits):
    w = random_weight(n, k, density)
    assert torch.equal(unpack_gather(gather_of(w, pieces, bits)), w)


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
def test_gather_of_uneven_patterns(bits):
    w = uneven_weight()
    assert torch.equal(unpack_gather(gather_of(w, 20, bits)), w)


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
    assert torch.equal(unpack_gather(gather_of(W)), w)
    assert torch.equal(unpack_pairs(pairs_of(W)), w)
    if cover.is_built():
        assert torch.equal(unpack_cover(cover_of(W)), w)


def test_other_values_in_the_same_layout():
    w = random_weight(70, 500, 0.3)
    W = SparseTensor.from_dense(w)
    layouts = {GatherLayout: unpack_gather, PairsLayout: unpack_pairs}
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
    assert choose_layout(2, 0.3) is GatherLayout and type(pack(weight)) is Gather
    assert choose_layout(33, 0.01) is PairsLayout and type(pack(weight, 64)) is Pairs
    assert choose_layout(3, 0.6) is choose_layout(17, 0.5) is PairsLayout
    if cover.is_built():
        assert choose_layout(3, 0.5) is choose_layout(32, 0.4) is CoverLayout
        assert type(pack(weight, 16)) is Cover
    fewest = [like(m) for m in (0, 1, 2, 3, 16, 17, 32, 33, 64)]
    assert fewest == [1, 1, 1, 3, 3, 17, 17, 33, 33]


def test_without_the_library_more_tokens_read_pairs(monkeypatch):
    monkeypatch.setattr(cover, "_C", None)
    assert choose_layout(3, 0.3) is PairsLayout and choose_layout(1, 0.3) is GatherLayout


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
        launch = cover.configure(m, slices, windows, "bf16", gpu)
        assert launch.tokens >= min(m, 32)
    else:
        launch = pairs.configure(m, slices, -(-k // STEP), "bf16", gpu)
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
    assert cover.configure(1, 0, 0, "bf16", H200).grid == 1
    assert pairs.configure(1, 0, 0, "bf16", H200).grid == 1


@pytest.mark.parametrize("density, bits", [(0.5, 4), (0.25, 4), (0.05, 8), (0.02, 8)])
def test_the_smaller_format_is_chosen(density, bits):
    packed = gather_of(random_weight(64, 2048, density), 1)
    assert packed.bits == bits


def test_bytes_of_a_random_mask():
    packed = gather_of(random_weight(256, 4096, 0.25), 1)
    assert packed.nbytes < 0.335 * 2 * 256 * 4096


def test_pieces_are_even():
    w = random_weight(1024, 1024, 0.2)
    w[:256] *= random_weight(256, 1024, 0.3)
    packed = gather_of(w, 300)
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
    pieces = choose_pieces(int(slices * k * density), slices, 132)
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
    launch = gather.configure(m, k, 5000, 4, "bf16", H200)
    assert launch.tokens == tokens and launch.kernel.endswith(f"_t{tokens}")
    assert launch.smem_bytes <= H200.smem_bytes
    assert gather.configure(1, 120000, 5000, 4, "bf16", H200) is None


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="weight: expected bfloat16 or float16 values"):
        pack(SparseTensor.from_dense(torch.ones(4, 4)))
