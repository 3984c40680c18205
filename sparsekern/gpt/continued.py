"""A run that begins with the weights of another: what its own settings mean then."""

import copy
import warnings

from ..nn import SparseLinear, densify_
from ..sparsity import GMP, Algorithm, Group, IterativePruning, Magnitude
from .build import build_optimizer, model_from_state
from .config import TrainConfig
from .distributed import load_optimizer
from .model import GPT


def continued(
    config: TrainConfig, settings: object, source: dict, vocab_size: int
) -> tuple[dict, object]:
    """The state before the first step, from the last of the run whose checkpoint holds `source`,
    and the settings of the sparsity from there on."""
    model = model_from_state(config.model(vocab_size), source["model"])
    optimizer = build_optimizer(model, config.lr)
    if config.optimizer_state == "keep":
        load_optimizer(optimizer, source["optimizer"])
    if config.dense:
        densify_(model, optimizer)
    if settings is not None:
        if config.optimizer_state == "keep":
            raise ValueError("optimizer_state: keep needs the pattern of init_from, or dense")
        settings = _from_sparse(model, settings, config)
        model = config.make_algorithm(settings).apply(model)
        optimizer = build_optimizer(model, config.lr)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, settings


def loses_at_random(config: TrainConfig, settings: object, source: dict) -> bool:
    """Whether trained dense weights go by chance, as masks of a new model are chosen."""
    if settings is None or any(name.endswith(".values") for name in source["model"]):
        return False
    parts = _parts(config.make_algorithm(settings))
    return any(part.init_method == "random" and part.target(0) > 0 for part in parts)


def _parts(algorithm: Algorithm | Group | None) -> list[Algorithm]:
    assert algorithm
    return algorithm.algorithms if isinstance(algorithm, Group) else [algorithm]


def _from_sparse(model: GPT, settings: object, config: TrainConfig) -> object:
    """Prune the layers that are sparse already to the sparsity at which the algorithm begins, by
    magnitude, in place. Returns the settings: a gradual schedule of flags begins where the model
    is. ValueError where the algorithm would begin with fewer zeros than there are."""
    if not any(isinstance(module, SparseLinear) for module in model.modules()):
        return settings
    algorithm = config.make_algorithm(settings)
    parts = _parts(algorithm)
    # What each takes, it tells when it is applied: to another model of the same weights, whose
    # pattern is not yet that of these settings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        algorithm.apply(model_from_state(model.config, copy.deepcopy(dict(model.state_dict()))))
    taken = [{n: model.get_submodule(n) for n in part.layers} for part in parts]
    sparse = [{n: m for n, m in t.items() if isinstance(m, SparseLinear)} for t in taken]
    layers = {name: module for each in sparse for name, module in each.items()}
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
        parts = [config.make_algorithm(settings)]
    for part, layers in zip(parts, sparse, strict=True):
        target = part.target(0)
        if layers and _check_more(target, layers, config):
            # By their own names, since Magnitude would prune the dense ones too.
            names = list(layers)
            how = {"distribution": part.distribution, "family": part.family}
            Magnitude(target, param_filter=names, **how).apply(model)
    return settings


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
