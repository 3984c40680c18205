"""Exact, reproducible choices of k among n: ties go to the first, on every machine."""

import hashlib

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # random numbers drawn at a time


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of scores [n], ascending: int64 [count].

    NaN counts as infinite. Of equal scores the first are taken.
    """
    if count >= scores.shape[0]:
        return torch.arange(scores.shape[0], device=scores.device)
    if count <= 0:
        return torch.arange(0, device=scores.device)
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    threshold = scores.topk(count, sorted=False).values.min()
    is_chosen = scores > threshold
    equal = (scores == threshold).nonzero().flatten()[: count - int(is_chosen.sum())]
    is_chosen[equal] = True
    return is_chosen.nonzero().flatten()


def merged(a: Tensor, b: Tensor) -> Tensor:
    """Two runs of ascending places as one."""
    if a.is_cpu:
        return torch.from_numpy(_merged(a.numpy(), b.numpy()))
    return torch.cat([a, b]).sort().values


def largest_of_each(scores: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The places of the `count` largest of all scores together, by name."""
    chosen = largest(torch.cat([score.flatten() for score in scores.values()]), count)
    result, start = {}, 0
    for name, score in scores.items():
        first, last = torch.searchsorted(
            chosen, torch.tensor([start, start + score.numel()], device=chosen.device)
        ).tolist()
        result[name] = chosen[first:last] - start
        start += score.numel()
    return result


def largest_of_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts` [rows] largest of the scores [rows, n] of each row: bool [rows, n]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(ranked).scatter_(1, order, ranked)


def even_shares(rooms: Tensor, count: int) -> Tensor:
    """Shares of `count` as even as the rooms int64 [rows] allow, the first with one more where they
    must: int64 [rows]. All of the rooms if they are too small together."""
    low, high = 0, int(rooms.max()) if rooms.numel() else 0  # the largest share
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(rooms.clamp(max=middle).sum()) <= count
        low, high = (middle, high) if fits else (low, middle - 1)
    shares = rooms.clamp(max=low)
    shares[(rooms > low).nonzero().flatten()[: count - int(shares.sum())]] += 1
    return shares


def generator(*key: object) -> np.random.PCG64:
    """A stream of random bits that depends on the key alone: numpy promises the same one on every
    machine and in every release."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return np.random.PCG64(int.from_bytes(digest, "little"))


def random_places(size: int, count: int, rng: np.random.PCG64) -> Tensor:
    """`count` different places of range(size), uniformly, ascending: int64 [count].

    In O(count) memory. As many are drawn as are missing, until none is: no round treats one place
    otherwise than another, so neither does the result.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count: expected 0 to {size}, got {count}")
    if 2 * count > size:
        is_chosen = np.ones(size, dtype=bool)
        is_chosen[random_places(size, size - count, rng).numpy()] = False
        return torch.from_numpy(np.flatnonzero(is_chosen))
    # A byte for each place is less than int64 [count], then.
    dense = 8 * count > size
    return torch.from_numpy((_mark if dense else _sort)(size, count, rng))


def _mark(size: int, count: int, rng: np.random.PCG64) -> np.ndarray:
    is_chosen, missing = np.zeros(size, dtype=bool), count
    while missing:
        is_chosen[draw(size, missing, rng)] = True
        missing = count - int(np.count_nonzero(is_chosen))
    return np.flatnonzero(is_chosen)


def _sort(size: int, count: int, rng: np.random.PCG64) -> np.ndarray:
    chosen = _unique(draw(size, count, rng))
    more = chosen[:0]
    while missing := count - len(chosen) - len(more):
        new = _unique(draw(size, missing, rng))
        more = _merged(more, _others(_others(new, chosen), more))
    return _merged(chosen, more)


def draw(size: int, count: int, rng: np.random.PCG64) -> np.ndarray:
    """int64 [count] of range(size), each by as many random bits as size has: others are dropped."""
    bits = max(1, (size - 1).bit_length())
    drawn, done = np.empty(count, dtype=np.int64), 0
    while done < count:
        raw = rng.random_raw(min(CHUNK, 2 * (count - done) + 16))
        raw >>= np.uint64(64 - bits)
        raw = raw[raw < size][: count - done]
        drawn[done : done + len(raw)] = raw
        done += len(raw)
    return drawn


def _unique(values: np.ndarray) -> np.ndarray:
    values.sort()
    is_first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    return values[is_first]


def _others(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those of `values` that are not in `known` (ascending)."""
    if not len(known):
        return values
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return values[known[at] != values]


def _merged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    merged = np.concatenate([a, b])
    merged.sort(kind="stable")  # of two runs in order: a merge
    return merged


def random_outside(kept: Tensor, size: int, count: int, rng: np.random.PCG64) -> Tensor:
    """`count` different places of range(size), uniformly among those not in `kept` (ascending).

    They come ascending."""
    ranks = random_places(size - kept.shape[0], count, rng).to(kept.device)
    # The r-th free place lies behind as many kept ones as have at most r free places before them.
    before = kept - torch.arange(kept.shape[0], device=kept.device)
    return ranks + torch.searchsorted(before, ranks, right=True)
