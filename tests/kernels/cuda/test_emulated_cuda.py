"""The CUDA kernels of packed weights without a GPU, emulated thread by thread, and the emulator."""

import os

import pytest
import torch
from emulated_cuda import SOURCES, emulated_cuda, emulator  # noqa: F401
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from test_cuda_kernels import LAYOUTS, TOLERANCE, packed_as

from sparsekern import SparseTensor
from sparsekern.kernels.cuda import cover, expand, few_tokens
from sparsekern.kernels.cuda.cover import CoverLayout
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.kernels.cuda.gather import Gather, GatherLayout
from sparsekern.kernels.cuda.layout import Gpu
from sparsekern.kernels.cuda.library import source_of
from sparsekern.kernels.cuda.pairs import PairsLayout
from sparsekern.testing import PROBLEMS, exact, relative_error

pytestmark = pytest.mark.usefixtures("emulated_cuda")
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
needs_library = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
layouts = pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=needs_library if name == "cover" else ()) for name in LAYOUTS],
)


TYPE_OF = {3: torch.bfloat16, 132: torch.float16}


@pytest.fixture(params=list(TYPE_OF), ids="sm{}".format, autouse=True)
def multiprocessors(request, monkeypatch):
    """Few, so that a block takes windows of several blocks of rows; many, so that it takes one."""
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: Gpu(request.param, 227 * 1024))
    return request.param


def random_weight(n, k, density, dtype=torch.bfloat16):
    return (torch.randn(n, k) * (torch.rand(n, k) < density)).to(dtype)


def check(packed, w, m, bias=None):
    x = torch.randn(m, w.shape[1]).to(w.dtype)
    want, scale = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
    if bias is not None:
        want, scale = want + bias.double(), scale + bias.double().abs()
    y = spmm_packed(x, packed, bias)
    assert relative_error(y, want, scale) <= TOLERANCE[w.dtype]
    assert not packed.arrived.any()
    return x, y


@DTYPES
@layouts
@pytest.mark.parametrize(
    "case", [c for c in PROBLEMS if c.M <= 64 and c.N <= 700], ids=lambda case: case.name
)
def test_awkward_problems(case, layout, dtype, nan_memory):
    t = case.tensors(dtype)
    W = SparseTensor(t.row_offsets, t.col_indices, t.values, t.mask.shape)
    y = spmm_packed(t.x, packed_as(layout, W))
    want, scale = exact(t)["spmm"]
    # Below its smallest normal number a type rounds to a fixed step.
    scale = torch.where(scale == 0, scale, scale.clamp_min(torch.finfo(dtype).tiny))
    assert relative_error(y, want, scale) <= TOLERANCE[dtype]


@layouts
def test_numbers_of_tokens(layout, multiprocessors, nan_memory, emulated_cuda):  # noqa: F811
    """Each GPU has a type of its own here and below; both meet both above."""
    dtype = TYPE_OF[multiprocessors]
    w = random_weight(300, 1031, 0.3, dtype)
    w[7], w[9] = 1.5, 0
    packed, bias = packed_as(layout, w), torch.randn(300).to(dtype)
    for m in (1, 2, 3, 5, 8, 9, 16, 17, 33, 64):
        x, y = check(packed, w, m, bias)
        emulated_cuda.backward(True)
        assert torch.equal(y, spmm_packed(x, packed, bias))
        emulated_cuda.backward(False)


@DTYPES
def test_pairs_without_warpgroups(dtype, nan_memory, emulated_cuda):  # noqa: F811
    w = random_weight(600, 1300, 0.3, dtype)
    packed = packed_as("pairs", w)
    emulated_cuda.warpgroups(False)
    for m in (5, 30, 64):
        check(packed, w, m)


@layouts
@pytest.mark.parametrize("n, k", [(300, 700), (129, 1031), (5, 64)])
def test_tiles_of_every_fill(n, k, layout):
    w = torch.zeros(n, k, dtype=torch.bfloat16)
    for i in range(0, k, 64):  # from empty to full
        w[:, i : i + 64] = random_weight(n, min(64, k - i), i / max(1, k - 64))
    packed = packed_as(layout, w)
    check(packed, w, 11)
    assert torch.equal(packed.expand(), w)


@layouts
@pytest.mark.parametrize("n, k", [(300, 1031), (40, 64)])
def test_infinities_reach_what_a_stored_value_connects(n, k, layout, multiprocessors, nan_memory):
    """A finite sum is right, others are as the stored values have them; zeros that are stored and
    infinities of W take part."""
    dtype = TYPE_OF[multiprocessors]
    w, mask, bias = weight_with_infinities(n, k, dtype)
    packed = packed_as(layout, SparseTensor.from_dense(w, mask))
    for m in (1, 2, 4, 8, 16, 30, 64, 70):
        x = tokens_with_infinities(m, k, dtype)
        for b in (bias, None):
            check_stored(spmm_packed(x, packed, b), x, w, mask, b)
        assert not packed.arrived.any()


def test_infinities_without_warpgroups(nan_memory, emulated_cuda):  # noqa: F811
    w, mask, bias = weight_with_infinities(300, 1031, torch.bfloat16)
    packed = packed_as("pairs", SparseTensor.from_dense(w, mask))
    emulated_cuda.warpgroups(False)
    for m in (5, 30, 64):
        x = tokens_with_infinities(m, 1031, torch.bfloat16)
        check_stored(spmm_packed(x, packed, bias), x, w, mask, bias)


@layouts
def test_many_tokens_write_w_out(layout):
    w = random_weight(40, 300, 0.2)
    check(packed_as(layout, w), w, 70)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("n, k", [(70, 520), (33, 601), (1, 3), (64, 8)])
def test_written_out(n, k, backward, nan_memory, emulated_cuda):  # noqa: F811
    """Every element once: gathers are cut into pieces that begin and end inside of 8 neighbours."""
    emulated_cuda.backward(backward)
    for density in (0.01, 0.3, 0.9, 1):
        w = random_weight(n, k, density)
        w[n // 2] = 0
        W = SparseTensor.from_dense(w)
        indices = W.row_offsets, W.col_indices, n, k
        made = [GatherLayout(*indices, pieces=p, bits=b) for p in (1, 40, 999) for b in (4, 8)]
        made += [CoverLayout(*indices)] if cover.is_built() else []
        for layout in [*made, PairsLayout(*indices)]:
            assert torch.equal(layout.fill(W.values).expand(), w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, k", [(37, 101), (3, 30000), (1, 1), (20, 7)])
def test_csr_and_dense(n, k, dtype, monkeypatch, nan_memory):
    monkeypatch.setattr(expand.cuda_library, "refusal", lambda: None)
    w = random_weight(n, k, 0.3, dtype)
    w[0] = 0
    W = SparseTensor.from_dense(w)
    assert torch.equal(expand.write_out(W.row_offsets, W.col_indices, W.values, n, k), w)
    other = torch.randn(n, k).to(dtype)
    assert torch.equal(
        expand.collect(W.row_offsets, W.col_indices, other), other[W.to_dense() != 0]
    )


def test_granules_beyond_two_to_the_31_bytes(tmp_path):
    """A piece that begins at granule 2**26: its lanes' shares are counted from 2**31 on. The file
    has holes, which take no room."""
    first, granules = 2**26, 2**26 + 2

    def sparse_file(name, shape, dtype):
        count = torch.Size(shape).numel()
        path = tmp_path / name
        with open(path, "wb") as file:
            os.truncate(file.fileno(), count * dtype.itemsize)
        memory = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        path.unlink()
        return memory.view(shape)

    values = sparse_file("values", (granules, 32, 8), torch.bfloat16)
    deltas = sparse_file("deltas", (granules, 32, 8), torch.uint8)
    values[first, 3, :2] = torch.tensor([2.0, 3.0])
    values[first + 1, 3, 0] = 4
    deltas[first, 3, :2] = torch.tensor([1, 6], dtype=torch.uint8)
    deltas[first + 1, 3, 0] = 9
    int32 = {"dtype": torch.int32}
    packed = Gather(
        32,
        20,
        3,
        8,
        values,
        deltas,
        torch.tensor([first, granules], **int32),
        torch.zeros(1, **int32),
        torch.tensor([0, 1], **int32),
        torch.zeros(1, 32, **int32),
        torch.arange(32, **int32),
        torch.zeros(1, **int32),
    )
    packed.check()
    y = spmm_packed(torch.arange(20).bfloat16()[None], packed)
    assert y[0, 3] == 2 * 1 + 3 * 7 + 4 * 16 and y.count_nonzero() == 1
    w = packed.expand()
    assert w[3, [1, 7, 16]].tolist() == [2, 3, 4] and w.count_nonzero() == 3


# The emulator


@pytest.fixture
def launch(emulated_cuda, multiprocessors):  # noqa: F811
    def run(name, *args, block=64, smem_bytes=256):
        emulated_cuda.launcher(name)((1, 1), block, smem_bytes, 0, *args)

    return run


def test_every_kernel_of_the_sources_is_there(emulated_cuda):  # noqa: F811
    names = [name for name in emulated_cuda.kernels() if not name.startswith("sk_faults")]
    assert len(names) > 30 and all(source_of(name, SOURCES) for name in names)


def test_a_kernel_without_faults(launch):
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    launch("sk_faults_none", x.data_ptr(), y.data_ptr())
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize("fault", ["no_wait", "no_barrier"])
def test_missing_waits_change_the_result(launch, fault):
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    launch(f"sk_faults_{fault}", x.data_ptr(), y.data_ptr())
    assert not torch.equal(y, x.flip(0))


@pytest.mark.parametrize(
    "kernel, argument, error",
    [
        ("barrier", 1, "thread 33: divergence: __syncwarp, thread 32 at a barrier"),
        ("barrier", 2, "thread 33: divergence: __shfl_sync, thread 32 at a barrier"),
        ("warp", 0, "divergence: load_matrices_transposed, thread 5 has exited"),
        ("warp", 1, "thread 5: divergence: __syncwarp, thread 0 in load_matrices_transposed"),
        ("warp", 2, "__shfl_sync: from lane 0, which has exited"),
        ("mma", 0, "mma_sparse: row 0, group 0 has position 0 twice"),
        ("address", 8, "load_shared_v4: 16 bytes at 8 are not aligned"),
        ("address", 248, "load_shared_v4: shared bytes 248 to 264 of 256"),
        ("phase", 0, "deadlock: thread 0 waits in wait_barrier"),
        ("phase", 1, "arrive_at: the last copy of its barrier is under way"),
        ("plain_address", 300, "shared memory beyond the 256 bytes was written"),
    ],
)
def test_faults_are_found(launch, kernel, argument, error):
    with pytest.raises(RuntimeError, match=error):
        launch(f"sk_faults_{kernel}", argument)


def test_a_thread_that_is_done_holds_nobody_up(launch):
    launch("sk_faults_barrier", 0)
