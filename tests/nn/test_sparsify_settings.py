"""sparsify_ heeds all that an algorithm says, or refuses what it cannot do."""

import re

import pytest
from torch import nn

from sparsekern import Static, sparsify_
from sparsekern.nn import SparseLinear
from sparsekern.sparsity import GMP, SET, RigL


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


def test_a_class_is_no_algorithm():
    with pytest.raises(TypeError, match=r"algorithm: expected an instance, .* the class Static"):
        sparsify_(Model(), Static)
