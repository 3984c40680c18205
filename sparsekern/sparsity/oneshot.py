"""Pruning of a trained model at once, with or without calibration inputs.

    Magnitude   keeps the largest |w|
    Wanda       keeps the largest |w_nk| * ||x_k|| of each row (Sun et al. 2023, arXiv 2306.11695)
    SparseGPT   prunes columns from left to right by w^2 / [H^-1]_kk, H = X^T X, and corrects the
                columns to come for the error made (Frantar and Alistarh 2023, arXiv 2301.00774)

A two-way mask keeps the largest sum of squares of these scores.

Each may be applied again at a higher sparsity: what was removed stays removed. Where one fails, in
any layer, the model is as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..nn import SparseLinear, sparsify_
from ..nn.checks import refuse_sharded
from ..nn.convert import MANY_ZEROS, share_of_zeros
from ..nn.kinds import refuse_made_anew
from ..nn.linear import refuse_meta
from ..terminal import Progress
from .algorithm import Layer
from .blockwise import Add, walk
from .calibration import batches_for, checked, evaluating
from .masks import Masks, mask_of
from .optimizers import known_holders
from .pattern import places_of, set_pattern
from .pruned import SAMPLE, PruneReport, compared, few_tokens, left_dense
from .sparsegpt import sparsegpt
from .static import Fixed
from .undo import unchanged_on_failure


@dataclass
class Magnitude(Fixed):
    """Keeps the largest absolute values of each layer, or of all ("erk", "global").

    After `apply(model)`, `report` says what it did to each layer.
    """

    init_method: str = "magnitude"

    report: PruneReport = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_method not in ("magnitude", "topk"):
            raise ValueError(
                f"init_method: {type(self).__name__} has a rule of its own for what is kept, "
                f"expected none, got {self.init_method}"
            )
        self.report = PruneReport()
        self._kept: dict[str, Tensor] = {}  # masks [N, K] of layers that are still an nn.Linear
        self._holders: list[Optimizer] = []

    @torch.no_grad()
    def _sparsify(self, model: nn.Module, chosen: dict[str, Layer]) -> nn.Module:
        refuse_sharded("apply", model, chosen)
        for name, module in chosen.items():
            _check_weights(name, module)
        linears = {name: m for name, m in chosen.items() if type(m) is nn.Linear}
        dense = {name: m.weight.data for name, m in linears.items()}
        self._kept.clear()
        self._holders = known_holders(chosen)  # their state follows
        report = PruneReport(notes=left_dense(model, chosen.values()))
        try:
            with unchanged_on_failure(model, self._holders):
                self._prune(model, chosen, self._counts(chosen), report)
                masks = Masks(lambda name, weight: self._kept[name])
                model = sparsify_(model, masks, lambda module, name: name in self._kept)
        finally:
            # The layers that are replaced had the pruned weights, for the inputs of later ones.
            for name, weight in dense.items():
                linears[name].weight.data = weight
            self._kept.clear()
            self._holders = []
        self.report = report
        return model

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
            elif not (stored := _stored(module)).all():
                counts[name] = min(counts[name], self._family.room(stored))
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

    def _prune(
        self,
        model: nn.Module,
        chosen: dict[str, Layer],
        counts: dict[str, int],
        report: PruneReport,
    ) -> None:
        for name, module in chosen.items():
            weight = _dense(module)
            scores = _scores(module, weight.abs()).flatten()
            n, k = weight.shape
            kept = self._family.largest(scores, None, n, k, counts[name])
            new = self._put(name, module, weight, kept)
            report.layers.append(compared(name, weight, new, kept.shape[0]))

    def _put(self, name: str, module: Layer, weight: Tensor, places: Tensor) -> Tensor:
        """Give the layer these weights [N, K] at these places, and zeros elsewhere; returned."""
        mask = mask_of(places, weight)
        new = weight * mask
        if isinstance(module, SparseLinear):
            set_pattern(module, places, self._holders)
            module.values.copy_(weight.flatten()[places])
        else:
            self._kept[name] = mask
            module.weight.data = new
        return new


@dataclass
class _Calibrated(Magnitude):
    """
    Args:
        calibration: inputs of the model: a list of tensors, of tuples or lists of arguments, of
            dicts of named arguments, or of texts. Where a batch has an attention_mask [B, T], what
            it masks does not count. Layers are pruned in the order in which the model runs them,
            each with the inputs that the pruned ones before it make, block by block
            (blockwise.py); of texts, the first 512 tokens.
        tokenizer: for texts: tokenizer(text, truncation=True, max_length=int) gives a mapping with
            `input_ids`, as those of transformers do.
        progress: whether to show on stderr how far it is.
    """

    calibration: Any = None
    tokenizer: Callable | None = field(default=None, repr=False, kw_only=True)
    progress: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.calibration = checked(self.calibration, self.tokenizer)
        if self.distribution == "global":
            raise ValueError("distribution: expected uniform or erk, got global")

    def mask(self, name: str, weight: Tensor) -> Tensor:
        raise ValueError(f"{type(self).__name__}: needs the model and its inputs: use apply")

    def _prune(
        self,
        model: nn.Module,
        chosen: dict[str, Layer],
        counts: dict[str, int],
        report: PruneReport,
    ) -> None:
        refuse_made_anew(chosen)  # it would run with the weights of before
        batches = batches_for(model, self.calibration, self.tokenizer)
        progress = Progress(len(chosen), unit="layer", is_shown=self.progress)
        unseen: list[str] = []

        def prune(groups: list[list[str]], run: Callable[[Add], None]) -> None:
            progress.about(f"inputs of {groups[0][0]}")
            stats = [_Statistics(g[0], self._needs_hessian, len(batches)) for g in groups]
            run(lambda i, x: stats[i].add(x))
            for names, seen in zip(groups, stats, strict=True):
                if not seen.tokens and len(groups) == 1:
                    raise ValueError(
                        f"calibration: no input reached {names[0]}: leave it out with a "
                        "param_filter, or give inputs that the model sends there"
                    )
                if not seen.tokens:  # an expert that no token was sent to
                    seen.assume_equal(_dense(chosen[names[0]]))
                    unseen.extend(names)
                prune_group(names, seen)

        def prune_group(names: list[str], seen: _Statistics) -> None:
            old = {name: _dense(chosen[name]) for name in names}
            with torch.autocast(seen.sums.device.type, enabled=False):
                found = self._chosen(chosen, old, counts, seen)
                for name, (weight, places) in found.items():
                    new, nnz = self._put(name, chosen[name], weight, places), places.shape[0]
                    row = compared(name, old[name], new, nnz, seen.sample, seen.tokens)
                    report.layers.append(row)
                    progress.advance(name)

        with progress, evaluating(model):
            report.notes += walk(model, chosen, batches, prune)
        if unseen:
            report.notes.append(
                f"{len(unseen)} experts' layers saw no token, and kept their largest weights; the "
                f"first is {unseen[0]}."
            )
        if self._needs_hessian:
            report.notes += few_tokens(report.layers)

    _needs_hessian = False

    def _chosen(
        self,
        layers: dict[str, Layer],
        old: dict[str, Tensor],
        counts: dict[str, int],
        seen: "_Statistics",
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The new weights [N, K] in the place of `old`, and the places kept, of layers that share
        their inputs."""
        raise NotImplementedError


@dataclass
class Wanda(_Calibrated):
    """Weights times the norm of their input, compared within each row: no weight is changed.

    A layer's weights are shared evenly among its rows; the first have one more where they must. Of
    a two-way mask, among its rows of blocks.
    """

    def _chosen(self, layers, old, counts, seen) -> dict[str, tuple[Tensor, Tensor]]:
        norms, found = seen.sums.sqrt(), {}  # [K]
        for name, weight in old.items():
            scores = _scores(layers[name], weight.abs().to(norms.dtype) * norms)
            kept = self._family.evenly(scores, counts[name])
            found[name] = weight, kept.flatten().nonzero().flatten()
        return found


@dataclass
class SparseGPT(_Calibrated):
    """Optimal brain surgeon, a column at a time: the weights that stay change."""

    _needs_hessian = True

    def _chosen(self, layers, old, counts, seen) -> dict[str, tuple[Tensor, Tensor]]:
        stored = [_stored(layers[name]) for name in old]
        of_each = [counts[name] for name in old]
        try:
            found = sparsegpt([*old.values()], stored, seen.sums, of_each, self._family)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"calibration: the Hessian of the inputs of {seen.name} has no Cholesky factor; "
                f"more or other inputs may give it one ({error})"
            ) from error
        for name, (weight, _) in zip(old, found, strict=True):
            if not weight.isfinite().all():
                raise ValueError(f"SparseGPT: the corrected weights of {name} are not finite")
        return dict(zip(old, found, strict=True))


class _Statistics:
    """What a layer's inputs x [M, K] leave behind: X^T X [K, K], or its diagonal; and a sample."""

    def __init__(self, name: str, is_full: bool, batches: int) -> None:
        self.name, self.is_full, self.tokens = name, is_full, 0
        self._of_batch = -(-SAMPLE // max(1, batches))  # tokens of the sample
        self._sample: list[Tensor] = []
        self._sums: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if not x.isfinite().all():
            raise ValueError(f"calibration: the inputs of {self.name} are not finite")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self._sums is None:
                k = x.shape[1]
                self._sums = x.new_zeros((k, k) if self.is_full else (k,))
            if self.is_full:
                self._sums.addmm_(x.t(), x)
            else:
                self._sums += x.square().sum(0)
        self.tokens += x.shape[0]
        step = max(1, x.shape[0] // self._of_batch)
        self._sample.append(x[::step][: self._of_batch].clone())

    def assume_equal(self, weight: Tensor) -> None:
        """In the place of inputs that nobody saw: all alike, for the layer of weight [N, K]."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        ones = torch.ones(weight.shape[1], dtype=dtype, device=weight.device)
        self._sums = ones.diag() if self.is_full else ones

    @property
    def sums(self) -> Tensor:
        """ValueError unless they are finite."""
        assert self._sums is not None
        if not self._sums.isfinite().all():
            raise ValueError(f"calibration: the squared inputs of {self.name} overflow float32")
        return self._sums

    @property
    def sample(self) -> Tensor | None:
        return torch.cat(self._sample) if self.tokens else None


def _check_weights(name: str, module: Layer) -> None:
    weight = module.values if isinstance(module, SparseLinear) else module.weight
    refuse_meta(f"{name}.weight", weight)
    if not weight.isfinite().all():
        raise ValueError(f"weights: expected finite ones, those of {name} have NaN or infinity")


def _dense(module: Layer) -> Tensor:
    if isinstance(module, SparseLinear):
        return module.weight.detach().to_dense()
    return module.weight.detach()


def _scores(module: Layer, scores: Tensor) -> Tensor:
    """The scores [N, K], -inf where the layer stores nothing."""
    stored = _stored(module)
    return scores if stored.all() else scores.masked_fill(~stored, -torch.inf)


def _stored(module: Layer) -> Tensor:
    """Where it stores weights: bool [N, K]. Of a dense layer that is pruned already, where they are
    not zero."""
    if isinstance(module, SparseLinear):
        return mask_of(places_of(module), module.weight)
    if share_of_zeros([module.weight]) > MANY_ZEROS:
        return module.weight.detach() != 0
    return torch.ones_like(module.weight, dtype=torch.bool)
