"""The registered ops, called directly with operands that do not fit: one error that names the
argument, whatever the dtype and the kernel, and the right product afterwards."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_dense

from sparsekern import SparseTensor, testing
from sparsekern.kernels.cpu import panel
from sparsekern.kernels.problem import Problem
from sparsekern.kernels.table import pick

N, K = 48, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# M and density for `few_tokens`, `panel` and `expand` in float32; `dense` takes the 16 and 64 bits.
SHAPES = {"few tokens": (4, 0.3), "many tokens": (64, 0.05), "nearly full": (64, 0.97)}


def operands(dtype, m, density):
    """op -> its arguments by name, and what the op gives."""
    w = random_dense(N, K, density, torch.float64).to(dtype)
    W = SparseTensor.from_dense(w)
    x, dy = torch.randn(m, K).to(dtype), torch.randn(m, N).to(dtype)
    pattern = {"row_offsets": W.row_offsets, "col_indices": W.col_indices}
    sizes = {"n": N, "k": K}
    bias, bias_t = torch.randn(N).to(dtype), torch.randn(K).to(dtype)
    wide, (xd, dyd) = w.double(), (x.double(), dy.double())
    return {
        "spmm": (
            {**pattern, "values": W.values, **sizes, "x": x, "bias": bias},
            xd @ wide.T + bias,
        ),
        "spmm_t": (
            {**pattern, "values": W.values, **sizes, "dy": dy, "bias": bias_t},
            dyd @ wide + bias_t,
        ),
        "sddmm": ({**pattern, **sizes, "dy": dy, "x": x}, (dyd.T @ xd)[w != 0]),
    }


def changed(t, index, value):
    t = t.clone()
    t[index] = value
    return t


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def longer(t):
    return torch.cat([t, t[-1:]])


def strided(t):
    return t.repeat_interleave(2, dim=0)[::2]


INDEX_FAULTS = {
    "shorter": lambda t: t[:-1],
    "longer": longer,
    "empty": lambda t: t[:0],
    "int64": lambda t: t.long(),
    "int16": lambda t: t.short(),
    "float": lambda t: t.float(),
    "strided": strided,
    "2-D": lambda t: t[None],
    "0-D": lambda t: t[0],
    "meta": lambda t: t.to("meta"),
    "freed": freed,
    "negative": lambda t: changed(t, 7, -1),
    "most negative": lambda t: changed(t, 7, -(2**31)),
    "greatest": lambda t: changed(t, 7, 2**31 - 1),
}
FAULTS = {
    "row_offsets": {
        **INDEX_FAULTS,
        "late begin": lambda t: changed(t, 0, 1),
        "early end": lambda t: changed(t, -1, t[-1] - 1),
        "decreasing": lambda t: changed(t, 20, t[10] - 1),
    },
    "col_indices": {
        **INDEX_FAULTS,
        "K": lambda t: changed(t, -1, K),
        "twice": lambda t: changed(t, 7, t[6]),
    },
    "values": {
        "shorter": lambda t: t[:-1],
        "five": lambda t: t[:5],
        "longer": longer,
        "empty": lambda t: t[:0],
        "2-D": lambda t: t[:, None],
        "integers": lambda t: t.int(),
        "another float": lambda t: t.to(torch.float32 if t.dtype != torch.float32 else torch.half),
        "meta": lambda t: t.to("meta"),
    },
    "x": {
        "narrower": lambda t: t[:, :-1],
        "wider": lambda t: torch.cat([t, t], 1),
        "1-D": lambda t: t[0],
        "3-D": lambda t: t[None],
        "meta": lambda t: t.to("meta"),
        "another float": lambda t: t.to(torch.float32 if t.dtype != torch.float32 else torch.half),
    },
    "bias": {
        "shorter": lambda t: t[:3],
        "longer": longer,
        "2-D": lambda t: t[None],
        "0-D": lambda t: t[0],
        "meta": lambda t: t.to("meta"),
        "another float": lambda t: t.to(torch.float32 if t.dtype != torch.float32 else torch.half),
    },
    "n": {"less": lambda n: n - 1, "more": lambda n: n + 1, "negative": lambda n: -1},
    "k": {
        "less": lambda k: k - 1,
        "negative": lambda k: -5,
        "too large": lambda k: 2**31,
        "far too large": lambda k: 2**40,
    },
}
FAULTS["dy"] = {**FAULTS["x"], "fewer rows": lambda t: t[:-1]}

# An operand is wrong beside the others: each of the two may be the one that is named.
BESIDE = {
    "n": ("row_offsets", "dy"),
    "k": ("x", "col_indices", "bias"),
    "x": ("values", "row_offsets", "bias", "dy"),
    "dy": ("values", "row_offsets", "bias", "x"),
    "col_indices": ("values", "row_offsets"),
    "row_offsets": ("col_indices",),
}


def run(op, arguments):
    return getattr(torch.ops.sparsekern, op)(**arguments)


def assert_right(got, want):
    eps = torch.finfo(got.dtype).eps
    assert testing.relative_error(got, want, want.abs() + want.abs().mean()) <= 20 * eps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_operand_is_named(dtype, shape):
    for op, (right, want) in operands(dtype, *SHAPES[shape]).items():
        assert_right(run(op, right), want)
        for name, faults in FAULTS.items():
            if name not in right:
                continue
            names = "|".join((name, *BESIDE.get(name, ())))
            for what, fault in faults.items():
                if (op, name, what) == ("spmm_t", "dy", "fewer rows"):
                    continue  # is another product
                with pytest.raises((ValueError, TypeError), match=rf"\b({names}):") as error:
                    run(op, {**right, name: fault(right[name])})
                    pytest.fail(f"{op}: accepted {name}: {what}")
                assert "\n" not in str(error.value)
        assert_right(run(op, right), want)


@pytest.mark.skipif(panel._C is None, reason="the C++ library is not built")
def test_each_cpu_kernel_meets_the_faults():
    names = {
        pick(Problem("spmm", "cpu", dtype, m, N, K, int(density * N * K))).name
        for dtype in (torch.float32, torch.float16, torch.float64)
        for m, density in SHAPES.values()
    }
    assert names == {"few_tokens", "panel", "expand", "widened"}


@pytest.mark.parametrize("op", ["spmm", "spmm_t", "sddmm"])
def test_sizes_and_dtypes_that_cannot_be(op):
    right, _ = operands(torch.float32, 4, 0.3)[op]
    empty = {name: t[:0] for name, t in right.items() if name in ("row_offsets", "col_indices")}
    if op != "sddmm":
        empty["values"] = right["values"][:0]
    if "bias" in right:
        empty["bias"] = None
    with pytest.raises(ValueError, match=r"\b(n|dy): expected"):
        run(op, {**right, **empty, "n": -1})
    if op == "spmm_t":  # whose other operands do not tell K
        for k in (-5, 2**31, 2**40):
            with pytest.raises(
                ValueError, match=rf"spmm_t: k: expected 0 <= k < 2\*\*31.* got {k}"
            ):
                run(op, {**right, "k": k, "bias": None})
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        cast = {
            name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for name, t in right.items()
        }
        with pytest.raises(TypeError, match="values, x, dy: expected float32"):
            run(op, cast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_freed_values_and_activations_are_not_read(dtype, shape):
    for op, (right, want) in operands(dtype, *SHAPES[shape]).items():
        for name in {"values", "x", "dy"} & right.keys():
            with pytest.raises(
                (ValueError, RuntimeError), match="freed|not allocated|storage of size 0"
            ):
                run(op, {**right, name: freed(right[name])})
        assert_right(run(op, right), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_freed_memory_is_not_read_behind_an_offset(dtype, shape):
    """There the address is no null pointer; and a bias whose address is one is not left out."""

    def freed_view(t):
        t = torch.cat([t, t])[t.shape[0] :]
        t.untyped_storage().resize_(0)
        return t

    for op, (right, want) in operands(dtype, *SHAPES[shape]).items():
        for name in {"row_offsets", "col_indices", "values", "x", "dy", "bias"} & right.keys():
            for free in (freed, freed_view):
                if right[name] is None:
                    continue
                with pytest.raises(
                    (ValueError, RuntimeError), match="freed|not allocated|storage of size 0"
                ):
                    run(op, {**right, name: free(right[name])})
        assert_right(run(op, right), want)


def test_strided_values_activations_and_bias_are_right():
    for dtype in DTYPES:
        for shape in SHAPES.values():
            for op, (right, want) in operands(dtype, *shape).items():
                for name in {"values", "x", "dy", "bias"} & right.keys():
                    assert_right(run(op, {**right, name: strided(right[name])}), want)


def test_tensors_of_a_weight_that_no_longer_fit():
    """What a module's attributes may become: views, replaced tensors, other sizes."""
    w = random_dense(N, K, 0.3, torch.float32)
    other = random_dense(N, K, 0.6, torch.float32)
    for m in (4, 64):
        x = torch.randn(m, K)
        W, V = SparseTensor.from_dense(w), SparseTensor.from_dense(other)
        whole = SimpleNamespace(ro=W.row_offsets, ci=W.col_indices, v=W.values)
        for name, value in (
            ("values", W.values[:5]),
            ("values", torch.nn.Parameter(torch.randn(4))),
            ("values", V.values),
            ("col_indices", V.col_indices),
            ("row_offsets", V.row_offsets),
            ("row_offsets", W.row_offsets.long()),
            ("col_indices", W.col_indices.repeat_interleave(2)[::2]),
        ):
            setattr(W, name, value)
            with pytest.raises((ValueError, TypeError), match="values|col_indices|row_offsets"):
                x @ W.T
            W.row_offsets, W.col_indices, W.values = whole.ro, whole.ci, whole.v
            torch.testing.assert_close(x @ W.T, x @ w.T)
        W.values.data = torch.randn(3)
        with pytest.raises(ValueError, match="values: expected shape"):
            x @ W.T
