"""FLOPs of the ops for torch's FlopCounterMode, registered once somebody imports that.

torch.utils.flop_counter imports triton, which takes longer than all of this package.
"""

import sys
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


def register_when_imported() -> None:
    """Register the formulas now if the counter is there, else when it is imported."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    register_flop_formula = sys.modules[COUNTER].register_flop_formula
    ops = torch.ops.sparsekern
    register_flop_formula([ops.spmm, ops.spmm_t])(flop_spmm)
    register_flop_formula(ops.sddmm)(flop_sddmm)
    register_flop_formula(ops.spmm_packed)(flop_packed)
    register_flop_formula(ops.spmm_lanes)(flop_lanes)


class _AfterImport(MetaPathFinder):
    """Finds the counter as the others do, and registers when it has been loaded."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register
        return spec
