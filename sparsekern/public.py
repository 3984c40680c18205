"""The public names, those of `__all__` in __init__.py. To import them registers what torch's
functions do with a SparseTensor."""

# ruff: noqa: F401

import sys
from contextlib import suppress
from importlib import import_module

from . import weights  # messages name `sparsekern.weights.set_weights_` and the like
from .matmul import explain, linear, matmul
from .models import accelerate_, prune
from .nn import SparseLinear, densify_, parameter_groups, sparsify_
from .nn.linear import plug_ins
from .sparsity import Static
from .surface import contractions, elementwise, functions
from .surface.products import sddmm
from .tensor import SparseTensor


def _meet_transformers() -> bool:
    """Where the program has models of transformers', saving one must not lose sparse layers."""
    if "transformers.modeling_utils" not in sys.modules:
        return False
    with suppress(ImportError):  # an older version: save_pretrained says so then
        import_module("sparsekern.hf")
    return True


def _meet_peft() -> bool:
    """Where the program has peft, adapters beside or under sparse layers are to be merged."""
    if "peft.tuners.lora" not in sys.modules:
        return False
    with suppress(ImportError):  # an older version: merge_ says so then
        import_module("sparsekern.models.lora")
    return True


plug_ins += [_meet_transformers, _meet_peft]
