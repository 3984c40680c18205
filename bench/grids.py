"""The grids of the CPU benchmarks."""

import os

# Read when NumPy is loaded: OpenBLAS's threads would spin for 26 ms after their work, on the cores
# of whoever is next.
os.environ["OPENBLAS_THREAD_TIMEOUT"] = "4"

import itertools
from collections.abc import Iterable

from sparsekern.bench.products import Workload
from sparsekern.bench.race import CORES, PEER_ROUNDS, ROUNDS

SHAPES = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (8192, 2048))  # N x K
TWO_THREAD_SHAPES = ((3072, 768), (2048, 2048))
# Of GPT-3 6.7B, LLaMA 7B and 70B, and 12k x 12k.
LARGE_SHAPES = ((4096, 4096), (16384, 4096), (4096, 11008), (28672, 8192), (12288, 12288))
SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)
LARGE_SPARSITIES = (0.75, 0.9)


def workloads(
    quick: bool, *, tokens: Iterable[int], two_threads: Iterable[int] = (), **options
) -> list[Workload]:
    """The grid: all shapes with one thread, then the subset of shapes with two. Where there are
    more than two cores, all shapes with all of them too, if the grid has 1024 tokens.

    With quick one small shape, one sparsity and few tokens.
    """
    shapes, sparsities = (SHAPES[:1], (0.9,)) if quick else (SHAPES, SPARSITIES)
    parts = [(1, shapes, tokens)]
    if two_threads and len(CORES) > 1:
        parts.append((2, shapes if quick else TWO_THREAD_SHAPES, two_threads))
    if 1024 in tokens and len(CORES) > 2:
        parts.append((len(CORES), shapes, (1024,)))
    return [
        Workload(M, N, K, sparsity, threads, **options)
        for threads, shapes, tokens in parts
        for (N, K), sparsity, M in itertools.product(shapes, sparsities, tokens)
        if not quick or M <= 256
    ]


def large_workloads(quick: bool, *, tokens: Iterable[int], **options) -> list[Workload]:
    """Shapes whose W is larger than L2, with one thread. Nothing with quick."""
    grid = itertools.product(LARGE_SHAPES, LARGE_SPARSITIES, tokens)
    return [] if quick else [Workload(M, N, K, s, 1, **options) for (N, K), s, M in grid]


def most_rounds(quick: bool) -> int:
    return PEER_ROUNDS if quick else ROUNDS[1]
