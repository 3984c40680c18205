"""The linear layers' weights of a model: at one density, or with their actual masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from .balance import Mask
from .figures import check_count, check_density, check_share
from .shapes import GPTShape


@dataclass(frozen=True)
class Weight:
    """A linear layer's weight, alike in `layers` blocks (times experts), each of which sees
    `share` of the tokens."""

    name: str
    n: int
    k: int
    density: float
    layers: int
    mask: Mask | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected a text, got {self.name!r:.60}")
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise TypeError(f"{self.name}: expected a wafer.Mask, got {type(self.mask).__name__}")
        for field in ("n", "k", "layers"):
            check_count(f"{self.name}: {field}", getattr(self, field))
        for field in ("density", "share"):
            check_share(f"{self.name}: {field}", getattr(self, field))
        given = self.n, self.k, self.density
        fitting = (*self.mask.shape, self.mask.density) if self.mask else given
        if given != fitting:
            raise ValueError(
                f"{self.name}: expected n, k, density of its mask, {fitting}, got {given}"
            )

    @property
    def matrix(self) -> str:
        """Which of a block's, without the modules before it."""
        return self.name.rpartition(".")[2]

    @property
    def kept_fma(self) -> float:
        """Multiply-adds of one token."""
        return self.layers * self.n * self.k * self.density * self.share


def uniform_weights(shape: GPTShape, density: float) -> tuple[Weight, ...]:
    """Every linear layer of `shape` at one density, its zeros anywhere."""
    density = check_density(density)
    return tuple(
        Weight(m.name, m.n, m.k, density, shape.layers * m.copies, share=m.share)
        for m in shape.block
    )


def masked_weights(masks: Sequence[tuple[str, Mask]]) -> tuple[Weight, ...]:
    """Weights with actual masks: (its name, its mask) of each matrix of each block. `Weight` says
    it for a mask that several blocks share, and for experts."""
    for name, mask in masks:
        if not isinstance(mask, Mask):
            raise TypeError(f"masks: expected a wafer.Mask of {name}, got {type(mask).__name__}")
    return tuple(Weight(name, *mask.shape, mask.density, 1, mask) for name, mask in masks)


def weights_of(shape: GPTShape, density: float | Sequence[Weight]) -> tuple[Weight, ...]:
    if isinstance(density, Real):
        return uniform_weights(shape, float(density))
    weights = tuple(density) if isinstance(density, Sequence) else ()
    if not weights or not all(isinstance(weight, Weight) for weight in weights):
        raise ValueError(
            f"density: expected a number, or the Weights of all linear layers (masked_weights), "
            f"got {type(density).__name__} {density!r:.60}"
        )
    _check_fit(shape, weights)
    return weights


def _check_fit(shape: GPTShape, weights: tuple[Weight, ...]) -> None:
    """ValueError for the first weight that is no matrix of the model, and for a matrix of which
    there are not as many as in the model. Names may have those of modules before them."""
    matrices = {matrix.name: matrix for matrix in shape.block}
    found = dict.fromkeys(matrices, 0)
    for weight in weights:
        name = weight.matrix
        if name not in matrices:
            raise ValueError(
                f"density: {weight.name}: expected the name of a linear layer of {shape.name}, one "
                f"of {', '.join(matrices)}, as in blocks.0.{next(iter(matrices))}"
            )
        n, k = shape.matrices[name]
        if (weight.n, weight.k) != (n, k):
            turned = "; it is transposed: expected is [out_features, in_features], and Conv1D of "
            turned += "GPT-2 stores [in, out]"
            raise ValueError(
                f"density: {weight.name}: expected {n} x {k} in {shape.name}, got "
                f"{weight.n} x {weight.k}{turned if (weight.n, weight.k) == (k, n) else ''}"
            )
        share = matrices[name].share
        if weight.share != share:
            raise ValueError(
                f"density: {weight.name}: expected a share of {share:g}, that of an expert's "
                f"tokens in {shape.name}, got {weight.share:g}"
            )
        found[name] += weight.layers
    for name, count in found.items():
        expected = shape.layers * matrices[name].copies
        if count != expected:
            raise ValueError(
                f"density: expected the weights of all linear layers of {shape.name}, which are "
                f"{shape.layers} x {shape.matrices}; got {count} of {name}, not {expected}"
            )
    if not any(weight.density for weight in weights):
        raise ValueError("density: expected weights that are not all zero, got none that is kept")


def kept_share(shape: GPTShape, density: float | Sequence[Weight]) -> float:
    """The share of the linear layers' multiply-adds that is left."""
    if isinstance(density, Real):
        return float(density)
    return sum(weight.kept_fma for weight in weights_of(shape, density)) / shape.linear_fma
