"""FLOPs of the ops for torch's FlopCounterMode, registered once somebody imports that.

torch.utils.flop_counter imports triton, which takes longer than all of this package.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

import torch

COUNTER = "torch.utils.flop_counter"


def flop_spmm(row_offsets, col_indices, values, n, k, x, *args, **kwargs) -> int:
    """A multiplication and an addition for each token and stored value. Arguments are shapes."""
    return 2 * x[0] * values[0]


def flop_sddmm(row_offsets, col_indices, n, k, dy, x, *args, **kwargs) -> int:
    """The same for sddmm."""
    return 2 * x[0] * col_indices[0]


def flop_packed(x, layout, n, k, nnz, *args, **kwargs) -> int:
    """The same for spmm_packed."""
    return 2 * x[0] * nnz


def flop_lanes(x, n, k, part_steps, heads, cols, values, *args, **kwargs) -> int:
    """The same for spmm_lanes, whose padding counts: it does not know how many are stored."""
    return 2 * x[0] * values[0] * values[1]


def flop_e4m3(x8, operand, n, *args, **kwargs) -> int:
    """The same for spmm_e4m3, of the places that 2 of 4 leave: it does not know how many of them
    are stored."""
    return x8[0] * n * x8[1]


def flop_float8_spmm(x8, largest, values, *args, **kwargs) -> int:
    """The same for float8_spmm."""
    return 2 * x8[0] * values[0]


def flop_float8_spmm_gradients(
    dy8, largest, x8, operand_t, inverses, noted, row_offsets, col_indices, n, k, needs_dx, **kwargs
) -> int:
    """The same for the gradient of values, and for dx."""
    return 2 * x8[0] * col_indices[0] * (1 + needs_dx)


def flop_float8_linear(x8, largest, w8, *args, **kwargs) -> int:
    """That of a dense W [N, K]."""
    return 2 * x8[0] * w8[0] * w8[1]


def flop_float8_linear_gradients(dy8, largest, x8, w8, inverses, noted, needs_dx, **kwargs) -> int:
    """The same for the gradient of W, and for dx."""
    return 2 * x8[0] * w8[0] * w8[1] * (1 + needs_dx)


FORMULAS = {
    "spmm": flop_spmm,
    "spmm_t": flop_spmm,
    "sddmm": flop_sddmm,
    "spmm_packed": flop_packed,
    "spmm_lanes": flop_lanes,
    "spmm_e4m3": flop_e4m3,
}
FLOAT8_FORMULAS = {
    "float8_spmm": flop_float8_spmm,
    "float8_spmm_gradients": flop_float8_spmm_gradients,
    "float8_linear": flop_float8_linear,
    "float8_linear_gradients": flop_float8_linear_gradients,
}


def register_when_imported(formulas: dict[str, Callable[..., int]]) -> None:
    """Register the formulas of these ops now if the counter is there, else when it is imported."""
    if COUNTER in sys.modules:
        _register(formulas)
    else:
        sys.meta_path.insert(0, _AfterImport(formulas))


def _register(formulas: dict[str, Callable[..., int]]) -> None:
    for name, formula in formulas.items():
        sys.modules[COUNTER].register_flop_formula(getattr(torch.ops.sparsekern, name))(formula)


class _AfterImport(MetaPathFinder):
    """Finds the counter as the others do, and registers when it has been loaded."""

    def __init__(self, formulas: dict[str, Callable[..., int]]) -> None:
        self.formulas = formulas

    def find_spec(self, fullname, path=None, target=None):
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            _register(self.formulas)

        spec.loader.exec_module = load_and_register
        return spec
