"""Pruning of a trained model at once, with or without calibration text.

    Magnitude   keeps the largest |w|
    Wanda       keeps the largest |w_nk| * ||x_k|| of each row (Sun et al. 2023, arXiv 2306.11695)
    SparseGPT   prunes columns from left to right by w^2 / [H^-1]_kk, H = X^T X, and corrects the
                columns to come for the error made (Frantar and Alistarh 2023, arXiv 2301.00774)

A two-way mask keeps the largest sum of squares of these scores.

Each may be applied again at a higher sparsity: what was removed stays removed. Where one fails, in
any layer, the model is as it was.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SparseLinear, sparsify_
from .algorithm import Layer, Masks, mask_of
from .families import UNSTRUCTURED, Unstructured
from .pattern import places_of, set_pattern
from .static import Fixed
from .undo import unchanged_on_failure

DAMPING = 0.01  # of the mean diagonal of H, as in SparseGPT
COLUMNS = 128  # that SparseGPT chooses the zeros of together


@dataclass
class Magnitude(Fixed):
    """Keeps the largest absolute values of each layer, or of all ("erk", "global")."""

    init_method: str = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._kept: dict[str, Tensor] = {}  # masks [N, K] of layers that are still an nn.Linear

    @torch.no_grad()
    def _sparsify(self, model: nn.Module, chosen: dict[str, Layer]) -> nn.Module:
        linears = {name: m for name, m in chosen.items() if type(m) is nn.Linear}
        dense = {name: m.weight.data for name, m in linears.items()}
        self._kept.clear()
        try:
            with unchanged_on_failure(model, self.optimizers):
                self._prune(model, chosen, self._counts(chosen))
                masks = Masks(lambda name, weight: self._kept[name])
                return sparsify_(model, masks, lambda module, name: name in self._kept)
        finally:
            # The layers that are replaced had the pruned weights, for the inputs of later ones.
            for name, weight in dense.items():
                linears[name].weight.data = weight
            self._kept.clear()

    def _counts(self, chosen: dict[str, Layer]) -> dict[str, int]:
        """Weights to keep in each layer. ValueError where a layer stores fewer already."""
        shapes = {name: (m.out_features, m.in_features) for name, m in chosen.items()}
        if self.distribution == "global":
            scores = {
                name: (_scores(module, _dense(module).abs()).flatten(), None, *shapes[name])
                for name, module in chosen.items()
            }
            total = round((1 - self.target(0)) * sum(n * k for n, k in shapes.values()))
            kept = self._family.largest_of_each(scores, total)
            counts = {name: places.shape[0] for name, places in kept.items()}
        else:
            counts = self._budgets(shapes, self.target(0))
        for name, module in chosen.items():
            if isinstance(module, SparseLinear):
                self._check_room(name, module, counts[name])
        return counts

    def _check_room(self, name: str, layer: SparseLinear, count: int) -> None:
        nnz = layer.values.shape[0]
        if nnz < count:
            raise ValueError(
                f"sparsity: {name} stores {nnz} weights already, "
                f"fewer than the {count} of sparsity {self.target(0)}"
            )
        room = self._family.room(_stored(layer))
        if room < count:
            raise ValueError(
                f"family: a {self.family} mask within the {nnz} weights that {name} stores keeps "
                f"{room} at most, fewer than the {count} of sparsity {self.target(0)}"
            )

    def _prune(self, model: nn.Module, chosen: dict[str, Layer], counts: dict[str, int]) -> None:
        for name, module in chosen.items():
            weight = _dense(module)
            scores = _scores(module, weight.abs()).flatten()
            n, k = weight.shape
            kept = self._family.largest(scores, None, n, k, counts[name])
            self._put(name, module, weight, kept)

    def _put(self, name: str, module: Layer, weight: Tensor, places: Tensor) -> None:
        """Give the layer these weights [N, K] at these places, and zeros elsewhere."""
        if isinstance(module, SparseLinear):
            set_pattern(module, places, self.optimizers)
            module.values.copy_(weight.flatten()[places])
        else:
            self._kept[name] = mask_of(places, weight)
            module.weight.data = weight * self._kept[name]


@dataclass
class _Calibrated(Magnitude):
    """
    Args:
        calibration: inputs of the model, read once for each layer: an iterable of tensors, of
            tuples or lists of arguments, or of dicts of named arguments. Layers are pruned in the
            order of their names in the model, each with the inputs that the pruned ones before it
            give.
    """

    calibration: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        is_list = isinstance(self.calibration, Iterable) and not isinstance(
            self.calibration, (str, bytes, Mapping)
        )
        if not is_list:
            got = type(self.calibration).__name__
            raise ValueError(f"calibration: expected a list of inputs of the model, got {got}")
        self.calibration = list(self.calibration)
        if self.distribution == "global":
            raise ValueError("distribution: expected uniform or erk, got global")

    def mask(self, name: str, weight: Tensor) -> Tensor:
        raise ValueError(f"{type(self).__name__}: needs the model and its inputs: use apply")

    def _prune(self, model: nn.Module, chosen: dict[str, Layer], counts: dict[str, int]) -> None:
        with _evaluating(model):
            for name, module in chosen.items():
                self._prune_layer(name, module, counts[name], self._inputs(model, module, name))

    def _inputs(self, model: nn.Module, module: Layer, name: str) -> list[Tensor]:
        """x [M, K] of the layer, for each calibration batch. ValueError unless all are finite."""
        seen: list[Tensor] = []

        def stop(layer: nn.Module, arguments: tuple, named: dict) -> None:
            x = arguments[0] if arguments else named[next(iter(named))]
            seen.append(x.detach().reshape(-1, x.shape[-1]))
            raise _Seen

        hook = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for batch in self.calibration:
                try:
                    _call(model, batch)
                except _Seen:
                    pass
        finally:
            hook.remove()
        if not sum(x.shape[0] for x in seen):
            raise ValueError(f"calibration: no input reached {name}")
        if not all(x.isfinite().all() for x in seen):
            raise ValueError(f"calibration: the inputs of {name} are not finite")
        return seen

    def _prune_layer(self, name: str, module: Layer, count: int, inputs: list[Tensor]) -> None:
        raise NotImplementedError


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs."""


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; each module has its own mode again afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass
class Wanda(_Calibrated):
    """Weights times the norm of their input, compared within each row: no weight is changed.

    A layer's weights are shared evenly among its rows; the first have one more where they must. Of
    a two-way mask, among its rows of blocks.
    """

    def _prune_layer(self, name: str, module: Layer, count: int, inputs: list[Tensor]) -> None:
        norms = _sum(x.float().square().sum(0) for x in inputs).sqrt()  # [K]
        _check_finite(name, norms)
        weight = _dense(module)
        scores = _scores(module, weight.abs().float() * norms)
        kept = self._family.evenly(scores, count)
        self._put(name, module, weight, kept.flatten().nonzero().flatten())


@dataclass
class SparseGPT(_Calibrated):
    """Optimal brain surgeon, a column at a time: the weights that stay change."""

    def _prune_layer(self, name: str, module: Layer, count: int, inputs: list[Tensor]) -> None:
        weight = _dense(module)
        hessian = _sum(x.float().t() @ x.float() for x in inputs)
        _check_finite(name, hessian)
        try:
            new, places = sparsegpt(weight, _stored(module), hessian, count, self._family)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"calibration: the Hessian of the inputs of {name} has no Cholesky factor; more "
                f"or other inputs may give it one ({error})"
            ) from error
        if not new.isfinite().all():
            raise ValueError(f"SparseGPT: the corrected weights of {name} are not finite")
        self._put(name, module, new, places)


def _check_finite(name: str, squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise ValueError(f"calibration: the squared inputs of {name} overflow float32")


def sparsegpt(
    weight: Tensor,
    stored: Tensor,
    hessian: Tensor,
    count: int,
    family: Unstructured = UNSTRUCTURED,
) -> tuple[Tensor, Tensor]:
    """Keep `count` of weight [N, K] where bool `stored` [N, K], given hessian = X^T X [K, K].

    Returns the new weight and the places kept. Of each COLUMNS columns, which are whole blocks of
    a two-way mask, the same share of what can stay does.
    """
    w = weight.float()
    n, k = w.shape
    h = hessian.clone()
    diagonal = h.diagonal()
    dead = diagonal == 0  # inputs that calibration never saw: their weights do nothing
    diagonal[dead] = 1.0
    w = w.masked_fill(dead, 0.0)
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)  # row i: what column i corrects to its right
    kept = torch.zeros(n, k, dtype=torch.bool, device=w.device)
    rooms = [family.room(part) for part in stored.split(COLUMNS, dim=1)]
    done = 0
    for i, first in enumerate(range(0, k, COLUMNS)):
        last = min(first + COLUMNS, k)
        block, factor = w[:, first:last].clone(), u[first:last, first:last]
        scores = (block / factor.diagonal()).abs().masked_fill(~stored[:, first:last], -torch.inf)
        # What the columns so far keep in all, exactly, and never more than there is.
        wanted = round(count * sum(rooms[: i + 1]) / max(1, sum(rooms))) - done
        wanted = min(max(wanted, count - done - sum(rooms[i + 1 :])), rooms[i])
        done += wanted
        chosen = family.largest(scores.flatten(), None, n, last - first, wanted)
        keep = mask_of(chosen, block)
        kept[:, first:last] = keep
        errors = torch.empty_like(block)
        for j in range(last - first):
            error = block[:, j].masked_fill(keep[:, j], 0.0) / factor[j, j]
            block[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
            errors[:, j] = error
        w[:, first:last] = block * keep
        w[:, last:] -= errors @ u[first:last, last:]
    return w.to(weight.dtype), kept.flatten().nonzero().flatten()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)


def _dense(module: Layer) -> Tensor:
    if isinstance(module, SparseLinear):
        return module.weight.detach().to_dense()
    return module.weight.detach()


def _scores(module: Layer, scores: Tensor) -> Tensor:
    """The scores [N, K], -inf where the layer stores nothing."""
    if not isinstance(module, SparseLinear):
        return scores
    return scores.masked_fill(~_stored(module), -torch.inf)


def _stored(module: Layer) -> Tensor:
    """Where it stores weights: bool [N, K]."""
    if not isinstance(module, SparseLinear):
        return torch.ones_like(module.weight, dtype=torch.bool)
    return mask_of(places_of(module), module.weight)
