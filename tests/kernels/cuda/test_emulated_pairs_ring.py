"""The kernel of specialised warps, which reads `pairs` for 33 tokens and more on Hopper, without a
GPU: emulated thread by thread."""

from dataclasses import replace

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from test_cuda_kernels import TOLERANCE
from test_emulated_cuda import random_weight

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import few_tokens, pairs_ring
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.kernels.cuda.layout import TYPES, Gpu
from sparsekern.kernels.cuda.pairs import PairsLayout
from sparsekern.kernels.cuda.pairs_ring import WAYS, Way, launch_as
from sparsekern.testing import relative_error

pytestmark = pytest.mark.usefixtures("emulated_cuda")
H200 = Gpu(132, 227 * 1024, has_warpgroups=True)
FEW = H200._replace(multiprocessors=3)  # a block takes steps of several blocks of rows


def packed_pairs(w, mask=None):
    W = SparseTensor.from_dense(w, mask)
    return PairsLayout(W.row_offsets, W.col_indices, *W.shape).fill(W.values)


def multiply(x, packed, bias, gpu, way):
    sizes = packed.slices, packed.row_steps, TYPES[x.dtype]
    launch, _ = launch_as(way, len(x), *sizes, gpu)
    y = torch.full((len(x), packed.n), torch.nan).to(x.dtype)
    packed.run(launch, x, bias, y)
    assert not packed.arrived.any()
    return y


@pytest.mark.parametrize(
    "m, n, k, way, gpu, dtype",
    [
        (5, 300, 700, Way(4, 4), FEW, torch.bfloat16),
        (64, 300, 1031, Way(4, 1), FEW, torch.float16),
        (65, 40, 64, Way(2, 2), H200, torch.bfloat16),
        (200, 300, 515, Way(4, 2), FEW, torch.float16),
        (300, 129, 640, Way(3, 3), H200, torch.bfloat16),
        (128, 250, 700, Way(3, 1), H200, torch.bfloat16),
    ],
)
def test_products(m, n, k, way, gpu, dtype, nan_memory, emulated_cuda):  # noqa: F811
    w = random_weight(n, k, 0.3, dtype)
    for i in range(0, k, 64):  # from empty to full
        w[n // 2 :, i : i + 64] = random_weight(n - n // 2, min(64, k - i), i / max(1, k - 64))
    w[7], w[9] = 1.5, 0
    packed, bias = packed_pairs(w), torch.randn(n).to(dtype)
    odd = torch.randn(1 + m * k).to(dtype)[1:].view(m, k)  # at an odd address
    for x in (odd, odd.clone()):
        y = multiply(x, packed, bias, gpu, way)
        want = x.double() @ w.double().T + bias.double()
        scale = x.double().abs() @ w.double().abs().T + bias.double().abs()
        assert relative_error(y, want, scale) <= TOLERANCE[dtype]
    emulated_cuda.backward(True)
    assert torch.equal(y, multiply(x, packed, bias, gpu, way))


@pytest.mark.parametrize("way, dtype", [(Way(4, 1), torch.float16), (Way(2, 2), torch.bfloat16)])
def test_infinities_reach_what_a_stored_value_connects(way, dtype, nan_memory):
    w, mask, bias = weight_with_infinities(150, 521, dtype)
    packed = packed_pairs(w, mask)
    x = tokens_with_infinities(70, 521, dtype)
    for b in (bias, None):
        check_stored(multiply(x, packed, b, FEW, way), x, w, mask, b)


def test_it_runs_where_it_is_fast(monkeypatch):
    started = []
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: H200)
    monkeypatch.setattr("sparsekern.kernels.cuda.layout.start", lambda *a: started.append(a[0]))
    packed = packed_pairs(random_weight(40, 64, 0.3))
    for m in (16, 17, 64, 65, 256):
        spmm_packed(torch.randn(m, 64).bfloat16(), packed)
    ring = "sk_spmm_pairs_ring_bf16_t"
    assert started == ["sk_spmm_pairs_bf16_t16", *(f"{ring}{m}" for m in (32, 64, 96, 128))]
    large = replace(packed, n=2**20).launch(32, H200)
    assert large is not None and large.kernel == "sk_spmm_pairs_bf16_t32"
    assert packed.launch(65, H200._replace(has_warpgroups=False)) is None


@pytest.mark.parametrize("m", [33, 64, 96, 128, 256])
@pytest.mark.parametrize("n, k", [(12288, 12288), (28672, 8192), (6144, 2048), (2048, 8192)])
def test_runs_fill_the_gpu(n, k, m):
    steps = k // 64
    ways = [(way, launch_as(way, m, n // 32, steps, "bf16", H200)) for way in WAYS]
    assert len([launch for _, launch in ways if launch]) > 4
    best = pairs_ring.configure(m, n // 32, steps, "bf16", H200)
    for way, launch in [(way, found[0]) for way, found in ways if found]:
        tiles, rows = launch.ring[2], 64 * way.warpgroups // way.groups
        blocks, runs = -(-n // rows), launch.grid // tiles
        assert launch.tokens >= m and launch.smem_bytes <= H200.smem_bytes
        assert launch.grid <= H200.multiprocessors
        assert launch != best or launch.grid >= 0.7 * H200.multiprocessors
        assert tiles * blocks <= n // 32  # counters
        first = [run * blocks * steps // runs for run in range(runs + 1)]
        shared = [
            set(range(a // steps, -(-b // steps))) for a, b in zip(first, first[1:], strict=False)
        ]
        assert max(sum(block in run for run in shared) for block in range(blocks)) <= launch.shares
        # Sums take the place of rings and words, not of barriers.
        sums = way.groups * (launch.tokens // tiles) * (rows + 4) * 4
        assert sums <= launch.smem_bytes - 2048
