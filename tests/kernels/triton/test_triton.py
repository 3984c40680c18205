"""The Triton kernels without a GPU: run by the interpreter, and compiled for two generations."""

import gc
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsekern.kernels import derived, table
from sparsekern.kernels.cuda import cover
from sparsekern.kernels.cuda.packs import pack_of
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.triton import bitmap as bitmaps
from sparsekern.kernels.triton import rows as triton_rows
from sparsekern.testing import PROBLEMS, random_csr

covers = pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
installed = pytest.mark.skipif(not triton_rows._is_installed(), reason="Triton is not installed")
PROBLEM = Problem("spmm", "cuda", torch.bfloat16, M=16, N=12288, K=12288, nnz=30_000_000)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("part", ["cover", "not cover"])
def test_interpreted(part):
    """triton_interpreted.py, in processes of their own."""
    file = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    command += ["-k", part]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


# What a kernel of each op is compiled for: the tokens that lead to different configurations.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
TOKENS = {"spmm": (16, 64, 2048), "spmm_t": (16, 2048), "sddmm": (2048,)}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    **dict.fromkeys(("lanes", "starts"), "*i64"),
    **dict.fromkeys(("records", "bases", "steps", "row_order", "arrived"), "*i32"),
    **dict.fromkeys(("row_offsets", "col_indices"), "*i32"),
    "parts": "*fp32",
}
INTEGERS = ("M", "N", "K", "nnz", "tiles", "windows", "one", "size")


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("op,tokens", [(op, m) for op in TOKENS for m in TOKENS[op]])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles(capability, op, tokens, dtype):
    """Ahead of time, down to machine code. Fits into shared memory, and a value that a thread has
    read leaves it only once, as part of a tile: no layout is converted for each place of W."""
    size = TYPES[dtype].itemsize
    config, flags = {
        "spmm": lambda: (triton_rows.spmm_config(tokens, 12288, 12288, size), {"AHEAD": False}),
        "spmm_t": lambda: (triton_rows.spmm_t_config(tokens, size), {}),
        "sddmm": lambda: (triton_rows.sddmm_config(size), None),
    }[op]()
    constants = triton_rows._constants(config, TYPES[dtype])
    if flags is not None:
        constants |= {"HAS_BIAS": True, **flags}
    kernel = getattr(triton_rows._device(), f"{op}_kernel")
    compiled = compile_kernel(kernel, capability, dtype, constants, aligned=("N", "K"))
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert conversions(compiled) <= 8


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles_cover(capability, block_m, dtype):
    """Only x passes through shared memory, and the sums once."""
    constants = {"HAS_BIAS": True, "BLOCK_M": block_m, "UPCAST": False, **triton_rows.COVER_OPTIONS}
    kernel = triton_rows._device_cover().spmm_cover_kernel
    compiled = compile_kernel(kernel, capability, dtype, constants)
    assert compiled.metadata.shared <= 64 * block_m * 2
    assert conversions(compiled) <= 9


@installed
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles_what_mends(capability, dtype):
    mend = triton_rows._device_mend()
    constants = {"HAS_BIAS": True, "ROWS": mend.ROWS, "num_warps": 1}
    compile_kernel(mend.mend_kernel, capability, dtype, constants, least_bytes=5_000)
    compile_kernel(mend.mend_t_kernel, capability, dtype, {"HAS_BIAS": True}, least_bytes=5_000)


def compile_kernel(kernel, capability, dtype, constants, aligned=(), least_bytes=10_000):
    """`constants` has what the kernel takes, and options in small letters."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {k: v for k, v in constants.items() if k.islower()}
    constants = {k: v for k, v in constants.items() if k.isupper()}
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if name in INTEGERS
        else POINTERS.get(name, f"*{dtype}")
        for name in kernel.arg_names
    }
    indices = [i for i, t in enumerate(signature.values()) if t.startswith("*")]
    indices += [kernel.arg_names.index(name) for name in aligned]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in indices},
    )
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > least_bytes
    return compiled


def conversions(compiled):
    """From one layout to another, each through shared memory or shuffles."""
    return len(re.findall(r"= ttg\.convert_layout ", compiled.asm["ttgir"]))


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_bitmap(case):
    """Decoded as a kernel does: every stored place, and where its value lies."""
    t = case.tensors()
    n, k = t.mask.shape
    bitmap = bitmaps.make_bitmap(t.row_offsets, t.col_indices, n, k)
    units = bitmap.lanes.shape[0]
    assert units * 4 >= n and units * 4 % 128 == 0 and bitmap.tiles * 256 >= k

    def unpack(halves):  # int64 [units, tiles, i] -> low and high 32 bits
        return torch.stack([halves & 0xFFFFFFFF, halves >> 32 & 0xFFFFFFFF], -1)

    words, offsets = unpack(bitmap.lanes).unbind(-1)  # [units, tiles, 32]
    places = words[..., None] >> torch.arange(32) & 1
    mask = places.view(units, bitmap.tiles, 32, 4, 8).permute(0, 3, 1, 2, 4)
    mask = mask.reshape(units * 4, bitmap.tiles * 256).bool()
    assert torch.equal(mask[:n, :k], t.mask)
    assert not mask[n:].any() and not mask[:, k:].any()

    starts = unpack(bitmap.starts).flatten(2)[:, :, None]  # [units, tiles, 1, rows]
    first = (starts + (offsets[..., None] >> torch.arange(0, 32, 8) & 255)).permute(0, 3, 1, 2)
    first = first.reshape(units * 4, -1)[..., None]  # [rows, lanes of all tiles, 1]
    bits = mask.view(units * 4, -1, 8).long()
    where = (first + bits.cumsum(2) - bits).view(mask.shape)
    assert torch.equal(where[mask], torch.arange(len(t.values)))


def test_bitmaps_are_kept_and_go_with_their_patterns():
    row_offsets, col_indices, _ = random_csr(60, 80, 0.5)
    gc.collect()
    kept = len(derived._store)
    bitmap = bitmaps.bitmap_of(row_offsets, col_indices, 60, 80)
    assert bitmaps.bitmap_of(row_offsets, col_indices, 60, 80) is bitmap
    col_indices[0] += 0  # a write
    assert bitmaps.bitmap_of(row_offsets, col_indices, 60, 80) is not bitmap
    assert len(derived._store) == kept + 1
    del col_indices
    assert len(derived._store) == kept


def test_bitmap_of_inference_tensors():
    with torch.inference_mode():
        row_offsets, col_indices, _ = random_csr(60, 80, 0.5)
    bitmap = bitmaps.bitmap_of(row_offsets, col_indices, 60, 80)
    # Nobody counts writes to these: where it costs no wait for a GPU they are read anew.
    again = bitmaps.bitmap_of(row_offsets, col_indices, 60, 80)
    assert torch.equal(again.lanes, bitmap.lanes) and torch.equal(again.starts, bitmap.starts)
    with torch.inference_mode():
        col_indices[row_offsets[1] - 1] = 79
    want = bitmaps.make_bitmap(row_offsets, col_indices, 60, 80)
    got = bitmaps.bitmap_of(row_offsets, col_indices, 60, 80)
    assert torch.equal(got.lanes, want.lanes) and not torch.equal(got.lanes, bitmap.lanes)


def test_refusals(monkeypatch):
    def reason(problem):
        return dict(table.refusals(problem)).get("triton")

    assert reason(PROBLEM._replace(device="cpu")) is None  # it is not asked
    monkeypatch.setattr(triton_rows, "_is_installed", lambda: True)
    text = "it takes bfloat16, float16 and float32, not float64"
    assert reason(PROBLEM._replace(dtype=torch.float64)) == text
    assert reason(PROBLEM) is None
    assert "it serves up to 4194240 tokens, not 5000000" == reason(PROBLEM._replace(M=5_000_000))
    assert "that of W has 1000256012288" in reason(PROBLEM._replace(N=10**6, K=10**6))
    # A bitmap has 128 rows at least.
    assert "that of W has 274877906944" in reason(PROBLEM._replace(N=1, K=2**31 - 1))
    wide = PROBLEM._replace(N=64, K=2**24)
    assert reason(wide) is None
    assert reason(wide._replace(op="sddmm")) == "it takes up to 16776960 columns, not 16777216"
    monkeypatch.setattr(triton_rows, "_is_installed", lambda: False)
    assert reason(PROBLEM) == "Triton is not installed"


def test_without_triton():
    """The package imports, and the row says why it does not run."""
    probe = (
        "import sys; sys.modules['triton'] = None\n"
        "import sparsekern; from sparsekern.kernels.triton import rows\n"
        "assert not rows._is_installed(); sparsekern.explain"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_configurations():
    """Every program has work, and blocks of rows divide what the bitmap is padded to."""
    for n, k in ((1, 1), (37, 101), (6144, 2048), (12288, 12288), (28672, 8192)):
        for m in (1, 16, 17, 64, 65, 8192):
            for size in (2, 4):
                config = triton_rows.spmm_config(m, n, k, size)
                assert 128 % config.block_n == 0
                assert config.split == 1 or config.split <= k / 256
    assert triton_rows.spmm_config(16, 12288, 12288, 2).split == 4
    text = "64 x 256 of W and 16 tokens a block, K in 4 parts"
    assert triton_rows._describe(PROBLEM._replace(dtype=torch.float32)) == text


@pytest.mark.parametrize("n, k, splits", [(64, 256, False), (64, 4096, True)])
def test_tensors_have_the_types_that_kernels_are_compiled_for(n, k, splits, monkeypatch):
    config = triton_rows.spmm_config(2, n, k, 2)
    recorder = Recorder((-(-n // config.block_n), 1, config.split))
    monkeypatch.setattr(triton_rows, "_device", lambda: recorder)
    monkeypatch.setattr(triton_rows, "mend", lambda *_: None)
    row_offsets, col_indices, values = random_csr(n, k, 0.5)
    x = torch.ones(2, k).bfloat16()
    triton_rows._spmm(row_offsets, col_indices, values.bfloat16(), n, k, x, config=config)
    assert (config.split > 1) == splits
    types = [torch.int64] * 2 + [torch.bfloat16] * 4 + [torch.float32, torch.int32]
    assert [arg.dtype for arg in recorder.calls[0][:8]] == types


@covers
@pytest.mark.parametrize("split", [1, 2])
def test_tensors_of_a_cover(split, monkeypatch):
    recorder = Recorder((2, split))
    monkeypatch.setattr(triton_rows, "_device", lambda: recorder)
    monkeypatch.setattr(triton_rows, "_device_cover", lambda: recorder)
    monkeypatch.setattr(triton_rows, "mend", lambda *_: None)
    row_offsets, col_indices, values = random_csr(64, 600, 0.5)
    x = torch.ones(2, 600).bfloat16()
    triton_rows._spmm_cover(row_offsets, col_indices, values.bfloat16(), 64, 600, x, split=split)
    types = [torch.int32] * 4 + [torch.bfloat16] * 3 + [torch.float32, torch.int32]
    assert [arg.dtype for arg in recorder.calls[0][:9]] == types
    assert recorder.calls[0][0].shape[1] * 4 == cover.RECORD_BYTES


class Recorder:
    """Takes the place of a module of kernels, on one grid."""

    INTERPRETED = False

    def __init__(self, grid):
        self.calls = []
        self._kernel = {grid: lambda *args, **_: self.calls.append(args)}

    def __getattr__(self, name):
        return self._kernel


def test_parts_of_a_cover():
    """Each part has a window at least, and none waits for another if W has not too many rows."""
    for n, k in ((1, 1), (37, 101), (8192, 2048), (12288, 12288), (28672, 8192), (64, 10**6)):
        for m in (1, 16, 17, 64):
            split = triton_rows.cover_split(m, n, k)
            assert 1 <= split <= -(-k // 256)
            assert split * -(-n // 32) <= triton_rows.COVER_PROGRAMS[triton_rows.cover_block(m)]
    assert triton_rows.cover_split(16, 28672, 8192) == 3
    assert triton_rows.cover_split(16, 10**6, 8192) == 1


@covers
def test_up_to_64_tokens_in_16_bits_take_a_cover():
    assert triton_rows._describe(PROBLEM) == "cover, 32 rows a block, K in 7 parts"
    assert triton_rows.takes_cover(64, torch.float16)
    assert not triton_rows.takes_cover(65, torch.float16)
    assert not triton_rows.takes_cover(16, torch.float32)


@covers
def test_packs_see_changes():
    row_offsets, col_indices, values = random_csr(60, 80, 0.5, torch.float16)
    pattern = row_offsets, col_indices

    def get():
        layout = partial(cover.CoverLayout, n=60, k=80)
        return pack_of("row", "kind", layout, *pattern, values, 60, 80)

    pack = get()
    before = pack.packed.records.clone()
    assert get() is pack and torch.equal(pack.packed.records, before)
    values.mul_(-2)
    assert get() is pack
    assert torch.equal(pack.packed.records.view(-1)[pack.layout.places], values)
    col_indices[0] += 0  # a write
    assert get() is not pack


@covers
def test_packs_go_with_their_patterns():
    row_offsets, col_indices, values = random_csr(60, 80, 0.5, torch.float16)
    layout = partial(cover.CoverLayout, n=60, k=80)
    gc.collect()
    kept = len(derived._store)
    pack_of("row", "kind", layout, row_offsets, col_indices, values, 60, 80)
    assert len(derived._store) == kept + 1
    del col_indices
    assert len(derived._store) == kept


def test_no_stored_value():
    row_offsets, col_indices, values = random_csr(5, 7, 1.0)
    assert len(values) == 0
    x, bias = torch.randn(3, 7), torch.randn(5)
    pattern = row_offsets, col_indices, values, 5, 7
    assert torch.equal(triton_rows._spmm(*pattern, x, bias), bias.expand(3, 5))
    assert torch.equal(triton_rows._spmm_cover(*pattern, x, bias), bias.expand(3, 5))
    assert torch.equal(triton_rows._spmm_t(*pattern, torch.randn(3, 5)), torch.zeros(3, 7))
    assert triton_rows._sddmm(*pattern[:2], 5, 7, torch.randn(3, 5), x).shape == (0,)
