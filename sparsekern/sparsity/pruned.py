"""What one-shot pruning did to each layer."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ..terminal import table

SAMPLE = 256  # tokens that the error of a layer's output is measured on


@dataclass(frozen=True)
class PrunedLayer:
    """One layer, before and after.

    Args:
        weight_error: ||W - W'|| / ||W||, Frobenius.
        output_error: ||X (W - W')^T|| / ||X W^T|| over a sample of calibration inputs, which the
            pruned layers before it made; None without calibration.
        tokens: calibration inputs that the layer saw, padding left out.
    """

    name: str
    out_features: int
    in_features: int
    nnz: int
    weight_error: float
    output_error: float | None = None
    tokens: int | None = None

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, self.out_features * self.in_features)


@dataclass
class PruneReport:
    """The layers in the order in which they were pruned, and notes in sentences. As text a table.

    `to_dict()` is for JSON.
    """

    layers: list[PrunedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Of all layers together."""
        size = sum(layer.out_features * layer.in_features for layer in self.layers)
        return 1 - sum(layer.nnz for layer in self.layers) / max(1, size)

    def to_dict(self) -> dict:
        return {"sparsity": self.sparsity, **asdict(self)}

    def __str__(self) -> str:
        rows: list[list[object]] = [
            [
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                f"{layer.sparsity:.1%}",
                f"{layer.weight_error:.3f}",
                *([] if layer.output_error is None else [f"{layer.output_error:.3f}"]),
            ]
            for layer in self.layers
        ]
        header = ["layer", "N x K", "zeros", "error of W"]
        if self.layers and self.layers[0].output_error is not None:
            header.append("of the output")
        total = f"{len(self.layers)} layers, {self.sparsity:.1%} zeros"
        return "\n".join([table(header, rows), "", total, *self.notes])


def compared(
    name: str, old: Tensor, new: Tensor, nnz: int, sample: Tensor | None = None, tokens=None
) -> PrunedLayer:
    """The row of a layer whose weight [N, K] was `old`; sample [M, K] are inputs."""
    old, change = old.float(), old.float() - new.float()
    output_error = None
    if sample is not None:
        x = sample.float()
        output_error = _ratio(x @ change.t(), x @ old.t())
    n, k = old.shape
    return PrunedLayer(name, n, k, nnz, _ratio(change, old), output_error, tokens)


def left_dense(model: nn.Module, pruned: Iterable[nn.Module]) -> list[str]:
    """A sentence on the matrices of the model that are in none of these modules; none without."""
    taken = set(pruned)
    sizes: Counter[str] = Counter()
    counted: set[int] = set()
    for module in model.modules():
        for p in module._parameters.values():
            if module not in taken and p is not None and p.ndim > 1 and id(p) not in counted:
                counted.add(id(p))
                sizes[type(module).__name__] += p.numel()
    if not sizes:
        return []
    there = sum(sizes.values()) + sum(m.out_features * m.in_features for m in taken)  # type: ignore
    parts = ", ".join(f"{kind} {size / there:.1%}" for kind, size in sizes.most_common(4))
    return [f"{sum(sizes.values()) / there:.1%} of the weights in matrices stay dense: {parts}."]


def few_tokens(layers: Iterable[PrunedLayer]) -> list[str]:
    """A sentence on the layers that saw fewer tokens than they have inputs: X^T X is not of full
    rank."""
    few = [layer for layer in layers if (layer.tokens or 0) < layer.in_features]
    if not few:
        return []
    more = f", and {len(few) - 1} more layers too few" if few[1:] else ""
    return [
        f"{few[0].name} saw {few[0].tokens} tokens, fewer than its {few[0].in_features} inputs"
        f"{more}: more calibration inputs would serve better."
    ]


def _ratio(a: Tensor, b: Tensor) -> float:
    norm = torch.linalg.norm(b).item()
    return torch.linalg.norm(a).item() / norm if norm else 0.0
