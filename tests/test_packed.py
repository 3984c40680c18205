"""Delta streams, read back the way the CUDA kernels read them (csrc/cuda/stream.cuh)."""

import pytest
import torch

from sparsekern.kernels.packed import GRANULE, LANES, PANEL, RING, WINDOW, choose_parts, pack
from sparsekern.tensor import SparseTensor


def unpack(packed):
    """W [N, K], and a check that a ring of four windows is enough."""
    panels = -(-packed.k // PANEL)
    w = torch.zeros(packed.n, packed.k, dtype=packed.values.dtype)
    filled = torch.zeros(packed.n, packed.k, dtype=torch.bool)
    for s in range(packed.slices):
        for p in range(packed.parts):
            first = p * panels // packed.parts * (PANEL // WINDOW)
            last = (p + 1) * panels // packed.parts * (PANEL // WINDOW)
            begin = int(packed.offsets[s * packed.parts + p])
            end = int(packed.offsets[s * packed.parts + p + 1])
            complete = packed.counts[s, first:last].long().cumsum(0).tolist()
            assert (complete[-1] if complete else 0) == end - begin
            for lane in range(LANES):
                row = int(packed.row_order[s * LANES + lane])
                values = packed.values[begin:end, lane].flatten()
                codes = packed.deltas[begin:end, lane].int()
                if packed.bits == 4:
                    codes = torch.cat([codes & 15, codes >> 4], dim=1)
                    lines = (codes.flatten() & 7).cumsum(0) + first * WINDOW // 2
                    columns = 2 * lines + (codes.flatten() >> 3)
                else:
                    columns = codes.flatten().cumsum(0) + first * WINDOW
                real = values != 0
                slots = torch.arange(len(values))[real]
                columns = columns[real]
                if row < 0:
                    assert not len(columns)
                    continue
                assert not filled[row, columns].any() and (columns.diff() > 0).all()
                filled[row, columns] = True
                w[row, columns] = values[real]
                for slot, column in zip(slots.tolist(), columns.tolist(), strict=True):
                    window = column // WINDOW - first
                    assert 0 <= window < last - first
                    assert slot < complete[window] * GRANULE
                    assert window < RING or slot >= complete[window - RING] * GRANULE
    return w


def random_weight(n, k, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).bfloat16()
    w[w == 0] = 1
    return w * (torch.rand(n, k, generator=generator) < density)


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("parts", [1, 3, None])
@pytest.mark.parametrize(
    "n, k, density",
    [(64, 512, 0.5), (70, 700, 0.25), (33, 129, 0.05), (1, 1, 1.0), (40, 600, 1.0), (5, 2000, 0.0)],
)
def test_streams_hold_exactly_the_matrix(n, k, density, parts, bits):
    w = random_weight(n, k, density)
    packed = pack(SparseTensor.from_dense(w), parts, bits)
    assert torch.equal(unpack(packed), w)


@pytest.mark.parametrize("bits", [4, 8])
def test_uneven_patterns(bits):
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
    packed = pack(SparseTensor.from_dense(w), 2, bits)
    assert torch.equal(unpack(packed), w)


def test_stored_zeros_are_steps():
    w = random_weight(32, 256, 0.3)
    mask = w != 0
    w[mask] *= torch.arange(int(mask.sum())) % 3 > 0
    assert torch.equal(unpack(pack(SparseTensor.from_dense(w, mask))), w)


@pytest.mark.parametrize("density, bits", [(0.5, 4), (0.25, 4), (0.05, 8), (0.02, 8)])
def test_the_smaller_format_is_chosen(density, bits):
    packed = pack(SparseTensor.from_dense(random_weight(64, 2048, density)), 1)
    assert packed.bits == bits


def test_bytes_of_a_random_mask():
    packed = pack(SparseTensor.from_dense(random_weight(256, 4096, 0.25)), 1)
    assert packed.nbytes < 0.345 * 2 * 256 * 4096


@pytest.mark.parametrize(
    "n, k, parts", [(28672, 8192, 2), (12288, 12288, 4), (2048, 8192, 16), (64, 64, 1), (0, 0, 1)]
)
def test_parts_fill_the_gpu(n, k, parts):
    assert choose_parts(n, k, 132) == parts


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="weight: expected bfloat16 or float16 values"):
        pack(SparseTensor.from_dense(torch.ones(4, 4)))
