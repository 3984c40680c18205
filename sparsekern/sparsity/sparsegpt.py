"""SparseGPT: the zeros of a layer from left to right, and the correction of what stays.

A layer's output error ||X (W - W')^T||^2 is a quadratic form with H = X^T X. With U upper and
H^-1 = U^T U, setting w_k to zero costs (w_k / U_kk)^2, and the best change of the columns to the
right of it is -(w_k / U_kk) U_k (Frantar and Alistarh 2023, arXiv 2301.00774; docs/math.md).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .families import UNSTRUCTURED, Unstructured
from .masks import mask_of

DAMPING = 0.01  # of the mean diagonal of H, as in SparseGPT
COLUMNS = 128  # whose zeros are chosen together
RUN = 32  # of these, whose corrections are applied one by one


def sparsegpt(
    weights: Sequence[Tensor],
    stored: Sequence[Tensor],
    hessian: Tensor,
    counts: Sequence[int],
    family: Unstructured = UNSTRUCTURED,
) -> list[tuple[Tensor, Tensor]]:
    """Keep counts[i] of each of weights [N_i, K] where bool stored[i] [N_i, K], for layers that
    share their inputs: hessian = X^T X [K, K].

    Returns for each the new weight and the places kept. Of each COLUMNS columns, which are whole
    blocks of a two-way mask, the same share of what can stay does.
    torch.linalg.LinAlgError if the Hessian has no Cholesky factor.
    """
    u, is_dead = _factor(hessian)
    # Feature-major: a column of W is a run of memory, [K, sum of N_i].
    w = torch.cat([weight.to(u.dtype) for weight in weights]).t().contiguous()
    w.masked_fill_(is_dead[:, None], 0.0)
    kept = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    shares = [_Share(s, count, family) for s, count in zip(stored, counts, strict=True)]
    sizes = [s.shape[0] for s in stored]
    for index, first in enumerate(range(0, w.shape[0], COLUMNS)):
        block, factor = w[first : first + COLUMNS], u[first : first + COLUMNS]
        last = first + block.shape[0]
        keep = kept[first:last]
        scores = (block / factor[:, first:last].diagonal()[:, None]).abs_()
        for share, mine, score in zip(
            shares, keep.split(sizes, 1), scores.split(sizes, 1), strict=True
        ):
            mine.copy_(share.choose(index, score.t()).t())
        errors = _correct(block, keep, factor[:, first:last])
        w[last:].addmm_(factor[:, last:].t(), errors, alpha=-1)
    result = []
    for weight, new, mask in zip(weights, w.split(sizes, 1), kept.split(sizes, 1), strict=True):
        result.append((new.t().to(weight.dtype), mask.t().flatten().nonzero().flatten()))
    return result


def _factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """U, upper, with (H + damping)^-1 = U^T U; and which inputs calibration never saw: their
    weights do nothing."""
    h = hessian.clone()
    diagonal = h.diagonal()
    is_dead = diagonal == 0
    diagonal[is_dead] = 1.0
    diagonal += DAMPING * diagonal.mean()
    # H = R R^T with R upper, from the other end than usual; U is the inverse of R.
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    identity = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(r, identity, upper=True), is_dead


class _Share:
    """How many weights of a layer each COLUMNS columns keep."""

    def __init__(self, stored: Tensor, count: int, family: Unstructured) -> None:
        self.parts, self.count, self.family = stored.split(COLUMNS, dim=1), count, family
        self.rooms = [family.room(part) for part in self.parts]
        self.done = 0

    def choose(self, index: int, scores: Tensor) -> Tensor:
        """The mask [N, columns] of the best scores of these columns."""
        # What the columns so far keep in all, exactly, and never more than there is.
        rooms = self.rooms
        wanted = round(self.count * sum(rooms[: index + 1]) / max(1, sum(rooms))) - self.done
        least = self.count - self.done - sum(rooms[index + 1 :])
        wanted = min(max(wanted, least), rooms[index])
        self.done += wanted
        stored = self.parts[index]
        scores = scores.masked_fill(~stored, -torch.inf)
        n, columns = stored.shape
        chosen = self.family.largest(scores.flatten(), None, n, columns, wanted)
        return mask_of(chosen, stored)


def _correct(block: Tensor, keep: Tensor, factor: Tensor) -> Tensor:
    """Zeros in the block [columns, N] where not kept, each corrected for in the columns to come.

    Returns what the columns behind the block need: the errors [columns, N] over U_kk."""
    errors = torch.empty_like(block)
    scale = (~keep) / factor.diagonal()[:, None]
    columns = block.shape[0]
    for first in range(0, columns, RUN):
        last = min(first + RUN, columns)
        for j in range(first, last):
            error = torch.mul(block[j], scale[j], out=errors[j])
            block[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
        block[last:].addmm_(factor[first:last, last:].t(), errors[first:last], alpha=-1)
    block.mul_(keep)
    return errors
