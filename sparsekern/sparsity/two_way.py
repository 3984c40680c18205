"""Two-way masks (../two_way.py): draws, and the choice of the best by scores. Math: docs/math.md.

A block of 4 x 4 places has 7343 legal masks. The best one for each number of places is found
without looking at all of them: two rows have 121 masks, of which the best for each of 50 column
counts matters, and 998 pairs of such counts fit together. What a block gains by one place more
never grows with their number, since its masks are matchings of a bipartite graph. So the largest
gains of all blocks together are the best mask of a layer, exactly, whatever the budget.

Sums are of float64, in a fixed order: every machine and device chooses the same.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .select import CHUNK, draw, even_shares, largest_of_each, largest_of_rows, random_places

MOST = 8  # places that a whole block keeps
# Masks of a row, one bit a place: of no place, of each one, of each two.
ROWS = [0, 1, 2, 4, 8, *(1 << i | 1 << j for i, j in itertools.combinations(range(4), 2))]
# What a place is worth: its score squared, in parts of the largest of its block, if it may stay. No
# sum of 8 such reaches half of what one place is worth that must stay, or must not.
MUST, MUST_NOT = 32.0, -1024.0
CPU_BLOCKS, GPU_BLOCKS = 2**10, 2**16  # looked at together: their sums fit a cache, or the memory


def most(n: int, k: int) -> int:
    """The places that a two-way mask [n, k] can keep: half of them, or a few more at the ends."""
    return sum(min(2 * r, 2 * c, r * c) * many for (r, c), many in block_sizes(n, k).items())


def block_sizes(n: int, k: int) -> dict[tuple[int, int], int]:
    """The sizes of the blocks of a mask [n, k], and how many there are of each."""
    runs = [[(4, size // 4), (size % 4, 1)] for size in (n, k)]
    pairs = {(r, c): x * y for (r, x), (c, y) in itertools.product(*runs)}
    return {(r, c): many for (r, c), many in pairs.items() if r * c * many}


def largest(layers: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Two-way masks, bool [N, K], that keep `count` places of all layers together, with the largest
    sum of squares of their scores [N, K] (as for `Best`). More than fit are kept beside the best
    masks of as many as fit. ValueError where what is there leaves no room for `count`.
    """
    scale = largest_finite(*layers.values())
    best = {name: Best(scores, scale) for name, scores in layers.items()}
    fitting = min(count, sum(most(*scores.shape) for scores in layers.values()))
    room = sum(b.room for b in best.values())
    if room < fitting:
        raise ValueError(
            f"family: a two-way mask within what is stored keeps at most {room} weights, "
            f"expected {fitting}"
        )
    gains = {name: b.gains for name, b in best.items()}
    chosen = largest_of_each(gains, fitting)
    masks = {}
    for name, b in best.items():
        blocks = b.gains.shape[:2]
        counts = (chosen[name] // MOST).bincount(minlength=blocks.numel())
        masks[name] = b.mask(counts.view(blocks))
    if count > fitting:
        others = {
            name: scores.masked_fill(masks[name], -torch.inf) for name, scores in layers.items()
        }
        for name, places in largest_of_each(others, count - fitting).items():
            masks[name].view(-1)[places] = True
    return masks


def largest_of_bands(scores: Tensor, counts: Tensor) -> Tensor:
    """The same for one layer and a count for each row of blocks, int64 [bands]. What one has no
    room for goes to the others."""
    best = Best(scores)
    gains = best.gains.flatten(1)
    rooms, count = (gains > best.NONE).sum(1), int(counts.sum())
    within = counts.minimum(rooms)
    counts = within + even_shares(rooms - within, count - int(within.sum()))
    if int(counts.sum()) < count:
        raise ValueError(
            f"family: a two-way mask within what is stored has no room for {count} weights"
        )
    return best.mask(largest_of_rows(gains, counts).view(best.gains.shape).sum(2))


# The best masks


class Best:
    """The best two-way masks of scores [N, K], one for each number of places: they keep the
    largest sum of squares.

    A score of inf (or NaN) must stay if anything can, one of -inf is not there. `scale` is the
    largest of the other scores, of all layers that are compared.

    gains: float64 [bands, cols, 8], what each block gains by its first place, by its second, ...:
        never more than by the one before, and NONE or less where nothing is left that may stay.
    """

    NONE = MUST_NOT / 2

    def __init__(self, scores: Tensor, scale: float | None = None) -> None:
        self.scores = scores
        scale = largest_finite(scores) if scale is None else scale
        bands, cols = (-(-size // 4) for size in scores.shape)
        self.gains = scores.new_empty(bands, cols, MOST, dtype=torch.float64)
        for part, worth, unit in self._parts():
            gain = _best_sums(worth).diff(dim=0)
            level = (gain / MUST).round_() * MUST
            gain = ((gain - level) * (unit / scale).square() + level).cummin(0).values
            self.gains[part] = gain.t().view(-1, cols, MOST)

    @property
    def room(self) -> int:
        """The most places that can be kept."""
        return int((self.gains > self.NONE).sum())

    def mask(self, counts: Tensor) -> Tensor:
        """The best mask, bool [N, K], of these many places in each block: int64 [bands, cols]."""
        (n, k), (bands, cols) = self.scores.shape, counts.shape
        mask = self.scores.new_empty(bands * 4, cols * 4, dtype=torch.bool)
        blocks = mask.view(bands, 4, cols, 4).permute(1, 3, 0, 2)  # as in _parts
        for part, worth, _ in self._parts():
            bits = _best_bits(worth, counts[part].flatten()).view(-1, cols)
            shifts = torch.arange(16, device=bits.device).view(4, 4, 1, 1)
            blocks[:, :, part] = (bits >> shifts & 1).bool()
        return mask[:n, :k].contiguous()

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows of blocks; what their places are worth, float64 [16, blocks]; and in which
        unit, the largest score of each block."""
        n, k = self.scores.shape
        bands, cols = -(-n // 4), -(-k // 4)
        together = max(1, GPU_BLOCKS // max(1, cols))
        for first in range(0, bands, together):
            part = slice(first, min(first + together, bands))
            scores = self.scores[4 * part.start : 4 * part.stop].double()
            rest = (0, 4 * cols - k, 0, -scores.shape[0] % 4)
            padded = torch.nn.functional.pad(scores, rest, value=-torch.inf)
            blocks = padded.view(-1, 4, cols, 4).permute(1, 3, 0, 2)  # [4, 4, bands, cols]
            yield part, *_worth(blocks.reshape(16, -1))


def _worth(scores: Tensor) -> tuple[Tensor, Tensor]:
    unit = scores.abs().nan_to_num_(0, 0, 0).amax(0)
    unit.masked_fill_(unit == 0, 1)
    worth = (scores / unit).square_()
    worth.masked_fill_((scores == torch.inf) | scores.isnan(), MUST)
    return worth.masked_fill_(scores == -torch.inf, MUST_NOT), unit


def largest_finite(*scores: Tensor) -> float:
    """The largest finite absolute value, or 1 if there is none above zero."""
    found = [s.abs().nan_to_num(0, 0, 0).max().item() for s in scores if s.numel()]
    return max(found, default=0.0) or 1.0


@dataclass(frozen=True)
class _Tables:
    """Masks of half a block, two rows, by the column counts that they have; and which counts of the
    upper and the lower half fit together. Fewer than 6 masks of the same counts are repeated."""

    rows: tuple[Tensor, Tensor]  # int64 [6, 50] each: the masks of the two rows, indices into ROWS
    bits: Tensor  # int64 [6, 50]: both together
    pairs: list[tuple[Tensor, ...]]  # two for each of 0 to 8 places: counts that fit


@functools.cache
def _tables(device: torch.device) -> _Tables:
    halves: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for a, b in itertools.product(range(len(ROWS)), repeat=2):
        counts = tuple((ROWS[a] >> j & 1) + (ROWS[b] >> j & 1) for j in range(4))
        halves.setdefault(counts, []).append((a, b))
    width = max(map(len, halves.values()))
    repeated = [(masks * width)[:width] for masks in halves.values()]
    first, second = torch.tensor(repeated, device=device).permute(2, 1, 0)
    bits = torch.tensor(ROWS, device=device)
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(MOST + 1)]
    for (i, x), (j, y) in itertools.product(enumerate(halves), repeat=2):
        if all(p + q <= 2 for p, q in zip(x, y, strict=True)):
            pairs[sum(x) + sum(y)].append((i, j))
    fitting = [torch.tensor(p, device=device).t().contiguous().unbind() for p in pairs]
    return _Tables((first, second), bits[first] | bits[second] << 4, fitting)


def _row_masks(worth: Tensor) -> list[Tensor]:
    """What the masks of each of the 4 rows are worth, float64 [11, blocks]."""
    rows = []
    for row in worth.unflatten(0, (4, 4)):
        pairs = [row[i] + row[j] for i, j in itertools.combinations(range(4), 2)]
        rows.append(torch.cat([torch.zeros_like(row[:1]), row, torch.stack(pairs)]))
    return rows


def _half(first: Tensor, second: Tensor) -> Tensor:
    """What the best masks of two rows are worth for each of the column counts: [50, blocks]."""
    of_masks = zip(*_tables(first.device).rows, strict=True)
    sums = (first.index_select(0, a).add_(second.index_select(0, b)) for a, b in of_masks)
    return functools.reduce(lambda best, masks: torch.maximum(best, masks, out=best), sums)


def _half_bits(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """The best mask of two rows that has these column counts [blocks], one bit a place."""
    table = _tables(first.device)
    a, b = (row[:, counts] for row in table.rows)
    best = (first.gather(0, a) + second.gather(0, b)).max(0).indices
    return table.bits[best, counts]


def _best_sums(worth: Tensor) -> Tensor:
    """What the best masks of 0 to 8 places are worth, float64 [9, blocks]."""
    pairs, found = _tables(worth.device).pairs, []
    for part in worth.split(_together(worth), dim=1):
        rows = _row_masks(part)
        upper, lower = _half(*rows[:2]), _half(*rows[2:])
        sums = (upper.index_select(0, i).add_(lower.index_select(0, j)) for i, j in pairs)
        found.append(torch.stack([s.amax(0) for s in sums]))
    return torch.cat(found, dim=1)


def _best_bits(worth: Tensor, places: Tensor) -> Tensor:
    """The best masks of these many places, int64 [blocks], one bit a place."""
    pairs, bits = _tables(worth.device).pairs, torch.zeros_like(places)
    for number, (i, j) in enumerate(pairs[1:], 1):
        for blocks in (places == number).nonzero().flatten().split(_together(worth)):
            rows = _row_masks(worth[:, blocks])
            first, second, third, fourth = rows
            upper, lower = _half(first, second), _half(third, fourth)
            sums = upper.index_select(0, i).add_(lower.index_select(0, j))
            best = sums.max(0).indices
            below = _half_bits(third, fourth, j[best]) << 8
            bits[blocks] = _half_bits(first, second, i[best]) | below
    return bits


def _together(worth: Tensor) -> int:
    return CPU_BLOCKS if worth.is_cpu else GPU_BLOCKS


# Random masks


@functools.cache
def legal_blocks() -> np.ndarray:
    """All 7343 two-way blocks, uint16, one bit a place, row by row."""
    bits = np.arange(2**16, dtype="<u2")
    places = _places(bits).reshape(-1, 4, 4)
    return bits[(places.sum(1) <= 2).all(1) & (places.sum(2) <= 2).all(1)]


def _places(bits: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 16], 1 where a place is kept."""
    return np.unpackbits(bits.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")


def random_mask(n: int, k: int, count: int, rng: np.random.PCG64) -> Tensor:
    """The places of a two-way mask [n, k] that keeps `count` of them, ascending: int64 [count].

    Uniform over all such masks. The numbers of places in the blocks are drawn independently, as of
    masks of any size with odds t a place, until they add up to `count`: what is left is uniform,
    whatever t. So that this takes few trials, of the most common kind of block the numbers i and
    i + 1 are drawn as one, and only then how many of these blocks have i + 1: as many as are
    missing, with the probability of that.
    """
    if not 0 <= count <= most(n, k):
        raise ValueError(f"count: expected 0 to {most(n, k)}, got {count}")
    bands, cols = -(-n // 4), -(-k // 4)
    index = np.arange(bands * cols).reshape(bands, cols)
    sizes = block_sizes(n, k)
    kinds = sorted(sizes, key=sizes.__getitem__, reverse=True)
    masks = [_masks_within(*size) for size in kinds]
    blocks = [index[_run(bands, n, r)][:, _run(cols, k, c)].ravel() for r, c in kinds]
    numbers = _numbers(masks, [len(b) for b in blocks], count, rng)
    bits = np.zeros(bands * cols, dtype="<u2")
    for of_kind, at, number in zip(masks, blocks, numbers, strict=True):
        for places, choices in enumerate(of_kind):
            there = at[number == places]
            bits[there] = choices[draw(len(choices), len(there), rng)]
    mask = _places(bits).reshape(bands, cols, 4, 4).swapaxes(1, 2).reshape(bands * 4, cols * 4)
    return torch.from_numpy(np.flatnonzero(mask[:n, :k]))


def _run(blocks: int, size: int, width: int) -> slice:
    """Which of the blocks along an axis have this width: whole ones come first."""
    return slice(0, size // 4) if width == 4 else slice(blocks - 1, blocks)


@functools.cache
def _masks_within(r: int, c: int) -> list[np.ndarray]:
    """The legal blocks in the first r rows and c columns, by their number of places."""
    outside = sum(1 << 4 * i + j for i in range(4) for j in range(4) if i >= r or j >= c)
    inside = legal_blocks()[legal_blocks() & outside == 0]
    size = _places(inside).sum(1)
    return [inside[size == places] for places in range(size.max() + 1)]


def _numbers(
    masks: list[list[np.ndarray]], sizes: list[int], count: int, rng: np.random.PCG64
) -> list[np.ndarray]:
    """How many places each block of each kind keeps: together `count`."""
    chances = _chances([[len(choices) for choices in m] for m in masks], sizes, count)
    if not chances:
        return []
    first = chances[0]
    i = min(int(sum(places * p for places, p in enumerate(first))), len(first) - 2)
    both = first[i] + first[i + 1]
    odds = first[i] / both, first[i + 1] / both
    merged = [*first[:i], both, 0.0, *first[i + 2 :]]
    # The most that a probability can be, but where i and i + 1 are rarer by 10 deviations.
    fewest = max(0, int(sizes[0] * both - 10 * math.sqrt(sizes[0] * both * (1 - min(both, 1)))))
    bound = _log_binomial(fewest, int((fewest + 1) * odds[1]), odds)
    while True:
        numbers = [
            _categories(p, s, rng) for p, s in zip([merged, *chances[1:]], sizes, strict=True)
        ]
        undecided = np.flatnonzero(numbers[0] == i)
        missing = count - sum(int(number.sum(dtype=np.int64)) for number in numbers)
        chance = (rng.random_raw() + 1) / 2**64
        if 0 <= missing <= len(undecided):
            if math.log(chance) <= _log_binomial(len(undecided), missing, odds) - bound:
                more = random_places(len(undecided), missing, rng).numpy()
                numbers[0][undecided[more]] += 1
                return numbers


def _chances(ways: list[list[int]], sizes: list[int], count: int) -> list[list[float]]:
    """For each kind of block, with ways[c] masks of c places, the probabilities of c: in proportion
    to ways[c] t^c, with t such that `count` places are expected in all."""
    low, high = 0.0, 1.0
    for _ in range(50):
        density = (low + high) / 2
        chances = [_tilted(of_kind, density / (1 - density)) for of_kind in ways]
        means = (sum(c * p for c, p in enumerate(of_kind)) for of_kind in chances)
        expected = sum(s * mean for s, mean in zip(sizes, means, strict=True))
        low, high = (density, high) if expected < count else (low, density)
    return chances


def _tilted(ways: list[int], t: float) -> list[float]:
    weights = [number * t**c for c, number in enumerate(ways)]
    return [weight / sum(weights) for weight in weights]


def _log_binomial(n: int, k: int, odds: tuple[float, float]) -> float:
    """log of the probability that k of n are the second, of two with these probabilities."""
    k = min(k, n)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + (n - k) * math.log(odds[0]) + k * math.log(odds[1])


def uniform(size: int, rng: np.random.PCG64) -> np.ndarray:
    """float64 [size], each of [0, 1)."""
    parts = [rng.random_raw(min(CHUNK, size - done)) for done in range(0, size, CHUNK)]
    return np.concatenate([(part >> np.uint64(11)) / 2.0**53 for part in parts])


def _categories(chances: list[float], size: int, rng: np.random.PCG64) -> np.ndarray:
    """int8 [size], each number with its probability."""
    ends = np.array([int(p * 2**63) for p in itertools.accumulate(chances)], dtype=np.uint64)
    parts = [rng.random_raw(min(CHUNK, size - done)) for done in range(0, size, CHUNK)]
    numbers = [np.searchsorted(ends[:-1], p >> np.uint64(1), side="right") for p in parts]
    return np.concatenate(numbers).astype(np.int8)
