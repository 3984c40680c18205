"""Constants that stand in C++ or Triton and in Python alike have one value."""

import re
from functools import cache
from pathlib import Path

import pytest

import sparsekern
from sparsekern.kernels.cuda import (
    bitmap,
    cover,
    e4m3,
    expand,
    float8,
    gather,
    layout,
    library,
    ordered,
    pairs,
    pairs_ring,
    runs,
)

CSRC = Path(__file__).parents[3] / "csrc"
TRITON = Path(sparsekern.__file__).parent / "kernels" / "triton"

# What Python has, the source, what that has.
TIED = [
    ("layout.LANES", "numbers.cuh", "kWarp"),
    ("layout.EXPAND_WARPS", "expand.cu", "kExpandWarps"),
    ("layout.TILE_PAD", "expand.cu", "kTilePad"),
    ("gather.EXPAND_BYTES", "expand.cu", "kExpandGatherBytes"),
    ("cover.EXPAND_BYTES", "expand.cu", "kExpandCoverBytes"),
    ("pairs.EXPAND_BYTES", "expand.cu", "kExpandPairsBytes"),
    ("expand.THREADS", "mend.cuh", "kMendThreads"),
    ("expand.WARPS", "mend.cuh", "kMendWarps"),
    ("expand.MOST_TOKENS", "mend.cuh", "kMostMendTokens"),
    ("expand.COLUMNS", "mend.cu", "kMendColumns"),
    ("e4m3.THREADS", "e4m3.cu", "kE4m3Threads"),
    ("e4m3.SMEM_BYTES", "e4m3.cu", "4 * kE4m3Warps"),
    ("bitmap.COLUMNS", "bitmap.cuh", "kWordColumns"),
    ("bitmap.THREADS", "bitmap.cuh", "kBitmapThreads"),
    ("bitmap.BLOCK_WORDS", "bitmap.cuh", "kTurns * kBlockWords"),
    ("bitmap.TILE_ROWS", "bitmap.cuh", "kTileRows"),
    (
        "bitmap.TILE_BYTES",
        "bitmap.cuh",
        "4 * kTileWords + kTileRows * kOctets + kWordColumns * kTileOctets",
    ),
    ("bitmap.THREADS", "float8.cu", "kFloat8Threads"),
    ("float8.TURN_TILE", "float8.cu", "kTurnTile"),
    ("float8.TURN_BYTES", "float8.cu", "kTurnBytes"),
    ("ordered.THREADS", "order.cu", "kOrderThreads"),
    ("ordered.PERMUTE_TOKENS", "order.cu", "kPermuteTokens"),
    ("ordered.TILE_PAD", "order.cu", "kFillPad"),
    ("gather.GRANULE_BYTES", "gather.cuh", "kGranuleBytes"),
    ("gather.BLOCK_PIECES", "spmm_gather.cu", "kGatherWarps"),
    ("gather.DEPTH", "spmm_gather.cu", "kGatherDepth"),
    ("runs.RUN_WARPS", "runs.cuh", "kRunWarps"),
    ("runs.TILE_COLUMNS", "cover.cuh", "kCoverColumns"),
    ("cover.WINDOW", "cover.cuh", "kCoverColumns"),
    ("cover.RECORD_VALUES", "cover.cuh", "kRecordValues"),
    ("cover.RECORD_INDEX_BYTES", "cover.cuh", "kRecordIndexBytes"),
    ("cover.DEPTHS[2]", "spmm_cover.cu", "kDepth"),
    ("cover.DEPTHS[1]", "spmm_cover.cu", "kDepth8"),
    ("pairs.STEP", "pairs.cuh", "kStepColumns"),
    ("pairs.SLOTS", "pairs.cuh", "kSlots"),
    ("pairs.HEAD", "pairs.cuh", "kHeadWords"),
    ("pairs.WINDOW", "spmm_pairs.cu", "kWindow"),
    ("2 * (pairs.BUFFER_BYTES + 8)", "spmm_pairs.cu", "2 * kBufferBytes + kBarrierBytes"),
    ("pairs_ring.PRODUCERS", "spmm_pairs_ring.cu", "kRingProducers"),
    ("pairs_ring.WORDS_BYTES", "spmm_pairs_ring.cu", "kRingWordsBytes"),
    ("pairs_ring.MOST_STAGES", "spmm_pairs_ring.cu", "kMostStages"),
    ("pairs_ring.BARRIER_BYTES", "spmm_pairs_ring.cu", "kRingBarrierBytes"),
    ("pairs_ring.STEP", "pairs.cuh", "kStepColumns"),
    ("library.EVERY_KERNEL_SMEM_BYTES", "launch.cu", "kEveryKernelSmemBytes"),
    # What makes a cover, on a CPU.
    ("layout.LANES", "cover.h", "kCoverRows"),
    ("cover.WINDOW", "cover.h", "kCoverWindow"),
    ("cover.RECORD_VALUES", "cover.h", "kCoverValues"),
    ("cover.RECORD_INDEX_BYTES", "cover.h", "kCoverIndexBytes"),
]
_MODULES = (
    *(bitmap, cover, e4m3, expand, float8, gather, layout, library, ordered),
    *(pairs, pairs_ring, runs),
)
MODULES = {module.__name__.split(".")[-1]: module for module in _MODULES}


@cache
def numbers(file: str) -> dict[str, int]:
    """The constexpr numbers of a source and of the .cuh that it includes; of a name that stands
    twice, the first. Those that a template's argument is in are left out."""
    (path,) = CSRC.rglob(file)
    text = re.sub(r"//.*", "", path.read_text())
    found: dict[str, int] = {}
    for name in re.findall(r'#include "(\w+\.cuh)"', text):
        found |= numbers(name)
    here = set()
    for line in re.findall(r"constexpr (?:int|unsigned) ([^;()]*=[^;]*);", text):
        for name, value in re.findall(r"(\w+) = ([^,]+)", line):
            try:
                value = eval(re.sub(r"\w+::", "", value).replace("/", "//"), {}, found)
            except (NameError, SyntaxError):
                continue
            if name not in here:
                found[name] = value
                here.add(name)
    return found


@pytest.mark.parametrize("ours, file, theirs", TIED)
def test_python_and_the_sources_agree(ours, file, theirs):
    assert eval(ours, MODULES) == eval(theirs, {}, numbers(file))


@pytest.mark.parametrize(
    "file, most",
    [("spmm_gather.cu", gather.MOST_TOKENS), ("spmm_cover.cu", cover.MOST_TOKENS)],
)
def test_the_largest_kernels_take_as_many_tokens(file, most):
    (path,) = CSRC.rglob(file)
    assert max(map(int, re.findall(r"_t(\d+), type", path.read_text()))) == most


def test_the_record_of_triton_is_that_of_the_cover():
    text = (TRITON / "cover_kernel.py").read_text()
    assert int(re.search(r"WORDS = tl.constexpr\((\d+)\)", text)[1]) * 4 == cover.RECORD_BYTES
