"""What a model makes of rows of tokens (rows.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekern.gpt.model import GPT

from .rows import IDS, NOT_A_TARGET

AT_ONCE = 32768  # tokens


@dataclass
class Scores:
    """Of each row: nats of its targets together, how many they are, and whether each of them was
    the most probable token."""

    nats: np.ndarray
    targets: np.ndarray
    right: np.ndarray

    @classmethod
    def together(cls, found: Sequence["Scores"]) -> "Scores":
        parts = ([s.nats for s in found], [s.targets for s in found], [s.right for s in found])
        return cls(*map(np.concatenate, parts))

    @property
    def loss(self) -> float:
        """Nats a target."""
        return float(self.nats.sum() / max(1, self.targets.sum()))


def score(model: GPT, rows: np.ndarray, dtype: torch.dtype) -> Scores:
    """Of rows as rows.py has them. `dtype`: as of autocast."""
    hidden = partial(_hidden, model)
    return score_rows(model, hidden, rows & IDS, rows < NOT_A_TARGET, dtype)


@torch.no_grad()
def score_rows(
    model: nn.Module,
    hidden: Callable[[Tensor], Tensor],
    ids: np.ndarray,
    is_target: np.ndarray,
    dtype: torch.dtype,
) -> Scores:
    """Rows of about one length go together, without what comes after their last target, and logits
    are made of targets alone. `hidden`: of tokens int64 [B, T], what model.lm_head gets,
    [B, T, C]."""
    is_target = is_target[:, 1:]
    lengths = np.where(is_target, np.arange(1, ids.shape[1]), 1).max(1)
    order, found = np.argsort(-lengths, kind="stable"), []
    kind = model.lm_head.weight.device.type
    model.eval()
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        while len(order):
            length = int(lengths[order[0]])
            now, order = np.split(order, [max(1, AT_ONCE // length)])
            given = ids[now, : length + 1], is_target[now, :length]
            found.append((now, *_score(model, hidden, *given)))
    model.train()
    nats, right = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
    for now, nats_now, wrong_now in found:
        nats[now], right[now] = nats_now.cpu(), wrong_now.cpu() == 0
    return Scores(nats, is_target.sum(1), right)


def _score(
    model: nn.Module, hidden: Callable[[Tensor], Tensor], ids: np.ndarray, is_target: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Of each row: nats of its targets together, and how many of them were not the most probable
    token."""
    device = model.lm_head.weight.device
    window = torch.from_numpy(ids.astype(np.int64)).to(device)
    places = torch.from_numpy(np.flatnonzero(is_target)).to(device)
    y = window[:, 1:].flatten()[places]
    logits = model.lm_head(hidden(window[:, :-1]).flatten(0, 1)[places])
    nats = F.cross_entropy(logits.float(), y, reduction="none").double()
    row, sums = places // is_target.shape[1], nats.new_zeros(2, len(ids))
    sums[0].index_add_(0, row, nats)
    sums[1].index_add_(0, row, (logits.argmax(-1) != y).double())
    return sums[0], sums[1]


def _hidden(model: GPT, x: Tensor) -> Tensor:
    """[B, T, C], what the head gets."""
    hidden = model.embed(x, torch.arange(x.shape[1], device=x.device))
    for block in model.blocks:
        hidden = block(hidden)
    return model.norm(hidden)
