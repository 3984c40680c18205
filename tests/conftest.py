"""Fixtures and small helpers that several test files share."""

import gc
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor

from sparsekern import SparseTensor
from sparsekern.kernels import crossover, table

RESULTS = Path(__file__).parents[1] / "bench" / "results"
needs_results = pytest.mark.skipif(
    not RESULTS.is_dir(), reason="bench/results is not in a source distribution"
)

# A machine may be busy with other tests: no time of an example is a fault.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items):
    """The long ones first, so that no process is left with one of them at the end; those for a GPU
    only where there is one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))


def pytest_collection_finish():
    """What stays, modules and thousands of tests, is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def shipped_crossover():
    """What somebody has calibrated on this machine chooses no kernel in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossover, "_calibrated", dict)
        yield


@pytest.fixture(autouse=True)
def keep_threads():
    """A test may set torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_table(monkeypatch):
    """Kernels are picked anew: the table reads the environment when a problem is first met."""
    monkeypatch.delenv("SPARSEKERN_KERNEL", raising=False)
    monkeypatch.delenv("SPARSEKERN_DEBUG", raising=False)
    table.forget_choices()
    yield monkeypatch
    table.forget_choices()


@pytest.fixture
def nan_memory(monkeypatch):
    """Fresh float memory is NaN, so an output that is not fully written fails."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def random_dense(n: int, k: int, density: float = 0.4, dtype: torch.dtype = torch.float64):
    """w [n, k] with about that density of non-zeros, all columns in use where there are any."""
    return torch.randn(n, k, dtype=dtype) * (torch.rand(n, k) < density)


def sparse(w: Tensor) -> SparseTensor:
    """The stored entries of w as a SparseTensor that requires grad if w does."""
    values = SparseTensor.from_dense(w.detach())
    values.values.requires_grad_(w.requires_grad)
    return values


def written_out(row_offsets, col_indices, values, n, k):
    """W [n, k] of what the arrays hold now."""
    w = values.new_zeros(n, k)
    w[torch.arange(n).repeat_interleave(row_offsets.diff()), col_indices.long()] = values
    return w


def products(t):
    """op -> arguments of the kernels' functions, for the operands of a Case."""
    n, k = t.mask.shape
    return {
        "spmm": (t.row_offsets, t.col_indices, t.values, n, k, t.x),
        "spmm_t": (t.row_offsets, t.col_indices, t.values, n, k, t.dy),
        "sddmm": (t.row_offsets, t.col_indices, n, k, t.dy, t.x),
    }


def outcome(call):
    """(result, None) or (None, "Type: text") of a call."""
    try:
        return call(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
