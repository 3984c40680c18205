"""Arithmetic element by element, and comparisons.

    sparse + sparse, -, *         sparse, an entry where either (for *: both) has one
    sparse * dense, * number      sparse, at the stored places alone: NaN elsewhere do not count
    sparse / number               sparse
    sparse ** number above 0      sparse
    sparse + dense, - dense       dense
    abs, relu, sqrt ..            sparse: functions that keep zero at zero
    isnan, == ..                  a dense bool tensor
    equal, allclose               a bool, whatever the patterns: a missing entry is a zero

Gradients flow. Where torch's answer would be full of numbers (W + 1, W / dense, exp) it is refused.
"""

import operator
from collections.abc import Callable
from numbers import Number, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import check_sizes, check_values, count_rows
from ..kernels.derived import derived
from ..matmul import raise_as_torch
from ..tensor import ALTERNATIVES, REFLECTED, TORCH_FUNCTIONS, SparseTensor, register, unsupported

UNARY = """abs absolute neg negative positive relu sqrt square sin sinh tan tanh asin arcsin asinh
arcsinh atan arctan sign sgn ceil floor trunc fix frac round expm1 log1p erf deg2rad rad2deg
nan_to_num""".split()
DENSE = "isnan isinf isfinite isposinf isneginf signbit eq ne lt le gt ge isclose".split()


def _is_scalar(other) -> bool:
    return isinstance(other, Number) or (isinstance(other, Tensor) and other.ndim == 0)


def _dense(t):
    return t.to_dense() if isinstance(t, SparseTensor) else t


def _checked(W: SparseTensor, values: Tensor) -> SparseTensor:
    check_values("the result", values, ndim=1)
    return W._with_values(values, W.is_transposed)


def _check_written(W: SparseTensor) -> None:
    """ValueError where a write that torch counts has left no pattern: what is computed from it
    would be another matrix. Not in a graph of torch.compile, which cannot look."""
    if torch.compiler.is_compiling() or W.col_indices.is_meta:
        return
    check_sizes(W.row_offsets, W.col_indices, W.values, (W.n, W.k))
    derived("checked", W.row_offsets, W.col_indices, W.n, W.k, lambda *_: True)


def align(a: SparseTensor, b: SparseTensor) -> tuple[SparseTensor, Tensor, Tensor, Tensor]:
    """The union of the patterns, the values of both there, and a mask of what both store.

    The values of the first result are those of a."""
    if a.shape != b.shape:
        raise RuntimeError(
            f"The size of tensor a {tuple(a.shape)} must match the size of tensor b "
            f"{tuple(b.shape)}: a SparseTensor does not broadcast"
        )
    if a.row_offsets is b.row_offsets and a.col_indices is b.col_indices:
        if a.is_transposed == b.is_transposed:
            return a, a.values, b.values, torch.ones_like(a.col_indices, dtype=torch.bool)
    _check_written(a)
    _check_written(b)
    n, k = a.shape
    places = [rows * k + cols for rows, cols in (a._coordinates(), b._coordinates())]
    union, at, counts = torch.cat(places).unique(return_inverse=True, return_counts=True)
    a_at, b_at = at.split([a.nnz, b.nnz])
    a_values = a.values.new_zeros(union.shape).index_put((a_at,), a.values)
    b_values = b.values.new_zeros(union.shape).index_put((b_at,), b.values)
    pattern = _from_places(union, a_values, n, k)
    return pattern, a_values, b_values, counts == 2


def _from_places(places: Tensor, values: Tensor, n: int, k: int) -> SparseTensor:
    """From ascending places row * K + column."""
    rows = places.div(max(1, k), rounding_mode="floor")
    cols = (places - rows * k).int()
    return SparseTensor._trusted(count_rows(rows, n), cols, values, n, k)


def _sum(name: str) -> Callable:
    func = getattr(torch, name)

    def run(input, other, *, alpha=1):
        if isinstance(input, SparseTensor) and isinstance(other, SparseTensor):
            pattern, a, b, _ = align(input, other)
            return _checked(pattern, func(a, b, alpha=alpha))
        if _is_scalar(input) or _is_scalar(other):
            raise TypeError(
                f"{name}: a number and a SparseTensor have no sparse sum: use W.to_dense(), or "
                "W.values for the stored places alone"
            )
        return func(_dense(input), _dense(other), alpha=alpha)

    return run


def _reflected_sub(self, other):
    return _sub(other, self)


def _factor(W: SparseTensor, other) -> Tensor | Number:
    """`other` at the stored places."""
    if _is_scalar(other):
        return other
    if not isinstance(other, Tensor):
        raise TypeError(
            f"mul: expected a number, a tensor or a SparseTensor, got {type(other).__name__}"
        )
    sizes = zip(other.shape[::-1], W.shape[::-1], strict=False)
    if other.ndim > 2 or any(s not in (1, size) for s, size in sizes):
        raise_as_torch(torch.mul, W, other)
    return other.expand(W.shape)[W._coordinates()]


def _mul(input, other):
    if not isinstance(input, SparseTensor):
        input, other = other, input
    if not isinstance(other, SparseTensor):
        return _checked(input, torch.mul(input.values, _factor(input, other)))
    pattern, a, b, both = align(input, other)
    if pattern is input:
        return _checked(input, a * b)
    n, k = pattern.shape
    rows, cols = pattern._coordinates()
    return _from_places((rows * k + cols)[both], a[both] * b[both], n, k)


def _mul_(input, other):
    if not isinstance(input, SparseTensor) or isinstance(other, SparseTensor):
        raise TypeError(unsupported("mul_"))
    input.values.mul_(_factor(input, other))
    return input


def _div(input, other, *, rounding_mode=None):
    _check_quotient(input, other)
    return _checked(input, torch.div(input.values, other, rounding_mode=rounding_mode))


def _div_(input, other, *, rounding_mode=None):
    _check_quotient(input, other)
    input.values.div_(other, rounding_mode=rounding_mode)
    return input


def _check_quotient(input, other) -> None:
    if not isinstance(input, SparseTensor) or not _is_scalar(other):
        raise TypeError(
            "div: only a SparseTensor by a number: zeros divided by zeros would fill it with NaN; "
            "W * (1 / x) divides the stored places"
        )


def _reflected_div(self, other):
    return _div(other, self)


def _pow(input, exponent):
    if not isinstance(input, SparseTensor) or not (isinstance(exponent, Real) and exponent > 0):
        raise TypeError(
            "pow: only of a SparseTensor and a number above 0, which keeps zero at zero: use "
            "W.to_dense()"
        )
    return _checked(input, torch.pow(input.values, exponent))


def _unary(name: str) -> Callable:
    func = getattr(torch, name)

    def run(input, *args, **kwargs):
        if "out" in kwargs:
            raise TypeError(f"{name}: out= takes no SparseTensor")
        return _checked(input, func(input.values, *args, **kwargs))

    return run


def _relu(input, inplace: bool = False):
    if inplace:
        raise TypeError(unsupported("relu_"))
    return input.relu()


def _to_dense_first(name: str) -> Callable:
    func = getattr(torch, name)

    def run(*args, **kwargs):
        return func(*map(_dense, args), **kwargs)

    return run


def _equal(input, other) -> bool:
    if isinstance(input, SparseTensor) and isinstance(other, SparseTensor):
        return input.shape == other.shape and torch.equal(*align(input, other)[1:3])
    return torch.equal(_dense(input), _dense(other))


def _allclose(input, other, rtol=1e-05, atol=1e-08, equal_nan=False) -> bool:
    if isinstance(input, SparseTensor) and isinstance(other, SparseTensor):
        input, other = align(input, other)[1:3]
    return torch.allclose(_dense(input), _dense(other), rtol, atol, equal_nan)


def _operator(implementation: Callable, reflected: bool = False) -> Callable:
    """The method behind an operator, which leaves what it does not know to the other operand."""

    def run(self, other):
        if not isinstance(other, (Number, Tensor, SparseTensor)):
            return NotImplemented
        return implementation(other, self) if reflected else implementation(self, other)

    return run


_add, _sub = _sum("add"), _sum("sub")
for _names, _implementation in {
    ("add",): _add,
    ("sub", "subtract"): _sub,
    ("mul", "multiply"): _mul,
    ("div", "divide", "true_divide"): _div,
    ("pow",): _pow,
    ("mul_",): _mul_,
    ("div_",): _div_,
    ("equal",): _equal,
    ("allclose",): _allclose,
    **{(name,): _unary(name) for name in UNARY},
    **{(name,): _to_dense_first(name) for name in DENSE},
}.items():
    for _name in _names:
        register(_name, _implementation)
register("rsub", _reflected_sub, method=False)
TORCH_FUNCTIONS[F.relu] = _relu
REFLECTED |= {"__rsub__": _reflected_sub, "__rdiv__": _reflected_div}

# Defined here and not in the class, __eq__ leaves the hash: that of the object, as torch's.
for _name in ("add", "sub", "mul", "truediv", "pow", "eq", "ne", "lt", "le", "gt", "ge"):
    _implementation = TORCH_FUNCTIONS[getattr(torch, _name.replace("truediv", "div"))]
    setattr(SparseTensor, f"__{_name}__", _operator(_implementation))
    if hasattr(operator, f"i{_name}"):
        setattr(SparseTensor, f"__r{_name}__", _operator(_implementation, reflected=True))
SparseTensor.__imul__ = _operator(_mul_)
SparseTensor.__itruediv__ = _operator(_div_)
SparseTensor.__neg__ = SparseTensor.neg
SparseTensor.__pos__ = SparseTensor.positive
SparseTensor.__abs__ = SparseTensor.abs
ALTERNATIVES["add_"] = ALTERNATIVES["sub_"] = "x + W is a new dense tensor, W + V a sparse one"
ALTERNATIVES["exp"] = "it is 1 where W is 0: use W.to_dense()"
