"""sparsify_ heeds all that an algorithm says, or refuses what it cannot do."""

import math
import re

import pytest
from torch import nn

from sparsekern import Static, densify_, parameter_groups, sparsify_
from sparsekern.models.prune import prune_
from sparsekern.nn import SparseLinear, forget_graphs_
from sparsekern.sparsity import (
    GMP,
    SET,
    Group,
    Magnitude,
    RigL,
    check_same_patterns,
    match_patterns_,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(16, 16) for _ in range(3))


def sparse_in(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]


@pytest.mark.parametrize(
    ("param_filter", "taken"),
    [
        (None, "ab"),
        ("b*", "b"),
        ("head*", ["head"]),
        (["a.weight", re.compile("^h")], ["a", "head"]),
    ],
)
def test_the_filter_of_an_algorithm_says_what_becomes_sparse(param_filter, taken):
    algorithm = Static(0.75, param_filter=param_filter)
    assert sparse_in(sparsify_(Model(), algorithm)) == [*taken]
    assert sparse_in(algorithm.apply(Model())) == [*taken]


def test_a_filter_that_matches_nothing_is_an_error_and_so_are_two():
    model = Model()
    with pytest.raises(ValueError, match="param_filter: 'zzz' matches no layer; there are: a, b,"):
        sparsify_(model, Static(0.75, param_filter="zzz"))
    with pytest.raises(ValueError, match="filter_fn: expected none beside the param_filter"):
        sparsify_(model, Static(0.75, param_filter="a"), lambda module, name: True)
    assert sparse_in(model) == []


@pytest.mark.parametrize(
    "algorithm",
    [RigL(0.9), SET(0.9), GMP({"type": "cubic", "init": 0.0, "final": 0.75, "steps": 10})],
)
def test_an_algorithm_that_moves_wants_apply(algorithm):
    model, name = Model(), type(algorithm).__name__
    with pytest.raises(ValueError, match=rf"got {name}, .* use {name}\(\.\.\.\)\.apply\(model\)"):
        sparsify_(model, algorithm)
    assert sparse_in(model) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda model: sparsify_(model, Static(0.5)),
        densify_,
        forget_graphs_,
        parameter_groups,
        check_same_patterns,
        lambda model: match_patterns_(model, Model()),
        lambda model: match_patterns_(Model(), model),
        lambda model: prune_(model, Magnitude(0.5)),
        Static(0.5).apply,
        Group([Static(0.5)]).apply,
    ],
)
@pytest.mark.parametrize("bad", [Model().parameters(), None, nn.Linear])
def test_what_is_no_model(function, bad):
    expected = "model: expected a torch.nn.Module|apply: expected a model or an optimizer"
    with pytest.raises(TypeError, match=rf"({expected}), got {type(bad).__name__}$"):
        function(bad)


@pytest.mark.parametrize("bad", ["0.1", None, True, -0.1, math.nan, math.inf])
def test_a_weight_decay_is_a_number_of_0_or_more(bad):
    with pytest.raises(
        ValueError, match=f"weight_decay: expected a number of 0 or more, got {bad!r}"
    ):
        parameter_groups(Model(), bad)


@pytest.mark.parametrize("bad", [None, 3, {"a": 0.5}, [Model()]])
def test_a_group_holds_algorithms(bad):
    with pytest.raises(TypeError, match="Group: expected algorithms of sparsekern.sparsity, got "):
        Group(bad)


@pytest.mark.parametrize(
    "make_sparse",
    [
        lambda model, static: sparsify_(model, static),
        lambda model, static: static.apply(model),
        lambda model, static: Group([static]).apply(model),
    ],
)
def test_zeros_to_keep_where_there_are_none(make_sparse):
    model, static = Model(), Static(0.5, init_method="from_zeros")
    with pytest.raises(ValueError, match="from_zeros keeps the zeros .* none of the 2 layers has"):
        make_sparse(model, static)
    assert sparse_in(model) == []
    nn.init.zeros_(model.a.weight[0].detach())  # of a model that is pruned in part, all are taken
    assert sparse_in(make_sparse(model, static)) == ["a", "b"]
    assert (model.a.values.numel(), model.b.values.numel()) == (15 * 16, 16 * 16)


@pytest.mark.parametrize(
    "make_sparse", [lambda layer: sparsify_(layer, Static(0.5)), Static(0.5).apply, RigL(0.5).apply]
)
def test_of_a_bare_layer_the_sparse_one_is_returned(make_sparse):
    """As the docstrings say: nothing can be put in its place."""
    layer = nn.Linear(16, 16)
    made = make_sparse(layer)
    assert type(layer) is nn.Linear and type(made) is SparseLinear
    assert type(densify_(made)) is nn.Linear and type(made) is SparseLinear


def test_a_class_is_no_algorithm():
    with pytest.raises(TypeError, match=r"algorithm: expected an instance, .* the class Static"):
        sparsify_(Model(), Static)
