"""A run that starts from the sparse weights of another: what its own sparsity means then."""

from ..nn import SparseLinear, sparsifiable
from ..sparsity import GMP, Algorithm, Group, IterativePruning, Magnitude
from .config import TrainConfig
from .model import GPT


def from_sparse(model: GPT, settings: object, config: TrainConfig) -> object:
    """Prune the layers that are sparse already to the sparsity at which the algorithm begins, by
    magnitude, in place. Returns the settings: a gradual schedule of flags begins where the model
    is. ValueError where the algorithm would begin with fewer zeros than there are."""
    algorithm = config.make_algorithm(settings)
    layers = _sparse_layers(model, algorithm)
    if not layers:
        return settings
    if isinstance(algorithm, IterativePruning):
        raise ValueError(
            f"algorithm: iterative begins with dense weights, those of {config.init_from} are "
            f"{_sparsity(layers):.4g} sparse; give gmp or magnitude, or use prune"
        )
    if isinstance(algorithm, GMP) and not config.sparsity_config:
        there = _sparsity(layers)
        _check_more(config.sparsity, layers, config)
        settings = settings | {"sparsity": settings["sparsity"] | {"init": there}}
        algorithm = config.make_algorithm(settings)
    taken: set[str] = set()
    for part in algorithm.algorithms if isinstance(algorithm, Group) else [algorithm]:
        layers = _sparse_layers(model, part, taken)
        taken |= layers.keys()
        target = part.target(0)
        if layers and _check_more(target, layers, config):
            # By their own names, since Magnitude would prune the dense ones too.
            names = list(layers)
            Magnitude(target, distribution=part.distribution, param_filter=names).apply(model)
    return settings


def _sparse_layers(
    model: GPT, algorithm: Algorithm | Group, taken: set[str] = frozenset()
) -> dict[str, SparseLinear]:
    """Those that the algorithm takes, and that have a pattern."""
    parts = algorithm.algorithms if isinstance(algorithm, Group) else [algorithm]
    return {
        name: module
        for part in parts
        for name, module in sparsifiable(model, part._filter()).items()
        if isinstance(module, SparseLinear) and name not in taken
    }


def _sparsity(layers: dict[str, SparseLinear]) -> float:
    return 1 - sum(m.values.shape[0] for m in layers.values()) / _size(layers)


def _size(layers: dict[str, SparseLinear]) -> int:
    return max(1, sum(m.in_features * m.out_features for m in layers.values()))


def _check_more(target: float, layers: dict[str, SparseLinear], config: TrainConfig) -> bool:
    """Whether it is more than there is, by more than the rounding of each layer's count."""
    there, rounding = _sparsity(layers), len(layers) / _size(layers)
    if target < there - rounding:
        raise ValueError(
            f"sparsity: expected at least the {there:.4g} of {config.init_from}, got {target:.4g}; "
            "without a sparsity its zeros stay, with --dense they train"
        )
    return target > there + rounding
