"""Sums over indices: torch.einsum, tensordot, inner, linalg.multi_dot and chain_matmul, with one
sparse operand W [a, b] and one dense x.

    an index of W is summed, the other stays and is not in x    a matrix product
    both are summed, or x has the one that stays                values times x at the stored places
    both stay                                                   W written out: the result is larger
"""

from functools import reduce
from string import ascii_letters

import torch
from torch import Tensor

from ..matmul import autocast, matmul, raise_as_torch, times
from ..tensor import TORCH_FUNCTIONS, SparseTensor, register


def _einsum(equation, *operands):
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    sparse = [i for i, t in enumerate(operands) if isinstance(t, SparseTensor)]
    if len(sparse) > 1 or len(operands) > 2:
        raise NotImplementedError(
            f"einsum: {equation}: expected one SparseTensor and at most one dense tensor; contract "
            "two at a time, and two SparseTensors by torch.matmul"
        )
    W, (at,) = operands[sparse[0]], sparse
    x = operands[1 - at] if len(operands) == 2 else W.values.new_ones(())
    parsed = _parse(equation, operands)
    if parsed is None or not isinstance(x, Tensor):
        raise_as_torch(torch.einsum, equation, *operands)
    letters, result = parsed
    w, x_letters = letters[at], letters[1 - at] if len(operands) == 2 else ""
    sizes = dict(zip(w, W.shape, strict=True))
    values = W.values
    if any(sizes[c] != 1 for c in set(w) & set(x_letters) - set(result)):
        x, values = autocast(x, values)
    else:  # torch has no matrix product to cast for: it multiplies, and promotes
        dtype = torch.promote_types(x.dtype, values.dtype)
        if dtype.is_floating_point:
            x, values = x.to(dtype), values.to(dtype)
    same = (x.dtype, x.device, x.layout) == (values.dtype, values.device, torch.strided)
    if not same or any(sizes.get(c, s) != s for c, s in zip(x_letters, x.shape, strict=True)):
        raise_as_torch(torch.einsum, equation, *operands)
    if len(sizes) < 2:
        raise NotImplementedError(
            f"einsum: {equation}: the diagonal of a SparseTensor is not supported: use W.to_dense()"
        )
    return _contract(W._with_values(values, W.is_transposed), w, x, x_letters, result)


def _parse(equation: str, operands) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result, those for an ellipsis too; None if wrong."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        return None
    free = [c for c in ascii_letters if c not in equation]
    dots, letters = "", []
    for term, t in zip(terms, operands, strict=True):
        ndim = getattr(t, "ndim", None)
        named = term.replace("...", "")
        if ndim is None or not all(c in ascii_letters for c in named):
            return None
        rest = ndim - len(named)
        if rest < 0 or (rest and "..." not in term):
            return None
        mine = "".join(free[len(free) - rest :])  # aligned at the right
        dots = max(dots, mine, key=len)
        letters.append(term.replace("...", mine))
    if arrow:
        result = result.replace("...", dots)
    else:
        once = [c for c in "".join(letters) if "".join(letters).count(c) == 1]
        result = dots + "".join(sorted(set(once) - set(dots)))
    if len(set(result)) < len(result) or not set(result) <= set("".join(letters)):
        return None
    return letters, result


def _contract(W: SparseTensor, w: str, x: Tensor, x_letters: str, result: str) -> Tensor:
    """The sum over all letters that are not in `result`."""
    # What is left of x: each letter once, without those that it alone has and that are summed.
    kept = "".join(c for c in dict.fromkeys(x_letters) if c in w or c in result)
    if kept != x_letters:
        x = torch.einsum(f"{x_letters}->{kept}", x)
    if not set(w) & set(kept + result):
        return torch.einsum(f",{kept}->{result}", W.values.sum(), x)
    for summed, other in (w, w[::-1]):
        if summed not in kept + result:
            total = sum_over(W, w.index(summed))  # [other]
            return torch.einsum(f"{other},{kept}->{result}", total, x)
    stay = [c for c in w if c in result]
    if len(stay) == 2:
        return torch.einsum(f"{w},{kept}->{result}", W.to_dense(), x)
    if len(stay) == 1 and stay[0] not in kept:
        a, b = (w[0], w[1]) if w[0] == stay[0] else (w[1], w[0])
        y = times(x.movedim(kept.index(b), -1), W.T if w[0] == a else W, W.values)
        return torch.einsum(f"{kept.replace(b, '')}{a}->{result}", y)
    # x at the stored places, [nnz, ..]
    x = x.movedim((kept.index(w[0]), kept.index(w[1])), (0, 1))
    rest = "".join(c for c in kept if c not in w)
    coordinates = W._coordinates()
    x = x[coordinates]
    if not stay:
        z = next(c for c in ascii_letters if c not in rest)
        return torch.einsum(f"{z},{z}{rest}->{result}", W.values, x)
    wide = _wider(x.dtype)
    products = W.values.to(wide).view(-1, *[1] * len(rest)) * x.to(wide)
    at = w.index(stay[0])
    y = _sum_at(coordinates[at], products, W.shape[at]).to(x.dtype)
    return torch.einsum(f"{stay[0]}{rest}->{result}", y)


def sum_over(W: SparseTensor, dim: int) -> Tensor:
    """The sum of each column of W (dim 0) or of each row (dim 1)."""
    values = W.values.to(_wider(W.dtype))
    return _sum_at(W._coordinates()[1 - dim], values, W.shape[1 - dim]).to(W.dtype)


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _sum_at(places: Tensor, products: Tensor, size: int) -> Tensor:
    """[size, ..]: the sum of those products [nnz, ..] that have the same place. One after the other
    and so in a wider type; unlike index_add, index_put is deterministic on a GPU too."""
    y = products.new_zeros(size, *products.shape[1:])
    return y.index_put((places,), products, accumulate=True)


def _tensordot(a, b, dims=2, out=None):
    pair = _contracted_dims(a, b, dims)
    if pair is None or not _are_alike(a, b, pair):
        raise_as_torch(torch.tensordot, a, b, dims)
    a, b = _autocast(a, b)
    letters = iter(ascii_letters)
    a_letters = [next(letters) for _ in range(a.ndim)]
    b_letters = [next(letters) for _ in range(b.ndim)]
    for i, j in zip(*pair, strict=True):
        b_letters[j] = a_letters[i]
    summed = {a_letters[i] for i in pair[0]}
    result = [c for c in a_letters + b_letters if c not in summed]
    equation = f"{''.join(a_letters)},{''.join(b_letters)}->{''.join(result)}"
    y = _einsum(equation, a, b).contiguous()  # as torch's is
    if out is None:
        return y
    empty = (y[..., :0], y.new_empty(0, y.shape[-1])) if y.ndim else (y.view(1)[:0],) * 2
    torch.tensordot(*empty, dims=1, out=out)
    return out.copy_(y)


def _are_alike(a, b, pair: tuple[list[int], list[int]]) -> bool:
    """Whether both have one dtype, on one device, and the dimensions of each pair one size."""
    sizes = [[t.shape[d] for d in dims] for t, dims in zip((a, b), pair, strict=True)]
    return (a.dtype, a.device) == (b.dtype, b.device) and sizes[0] == sizes[1]


def _autocast(*operands) -> list[Tensor | SparseTensor]:
    """As those of a matrix product, which tensordot and inner always make."""
    cast = autocast(*(t.values if isinstance(t, SparseTensor) else t for t in operands))
    return [
        t._with_values(c, t.is_transposed) if isinstance(t, SparseTensor) else c
        for t, c in zip(operands, cast, strict=True)
    ]


def _contracted_dims(a, b, dims) -> tuple[list[int], list[int]] | None:
    ndims = getattr(a, "ndim", None), getattr(b, "ndim", None)
    if None in ndims:
        return None
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        if not 0 <= dims <= min(ndims):
            return None
        return list(range(ndims[0] - dims, ndims[0])), list(range(dims))
    pair = [[d] if isinstance(d, int) else list(d) for d in dims]
    if len(pair) != 2 or len(pair[0]) != len(pair[1]):
        return None
    for side, ndim in zip(pair, ndims, strict=True):
        if not all(-ndim <= d < ndim for d in side) or len({d % ndim for d in side}) < len(side):
            return None
    return tuple([d % ndim for d in side] for side, ndim in zip(pair, ndims, strict=True))


def _inner(input, other, *, out=None):
    ndims = getattr(input, "ndim", None), getattr(other, "ndim", None)
    if None in ndims:
        raise_as_torch(torch.inner, input, other)
    if 0 in ndims:  # torch multiplies
        y = (input * other).to_dense()
    elif not _are_alike(input, other, ([-1], [-1])):
        raise_as_torch(torch.inner, input, other)
    else:
        y = _tensordot(input, other, ([-1], [-1]))
    if out is None:
        return y
    torch.inner(y[..., :0], y.new_empty(y.shape[-1], 0), out=out)
    return out.copy_(y)


def _multi_dot(tensors, *, out=None):
    return _chain(torch.linalg.multi_dot, tensors, out)


def _chain_matmul(*matrices, out=None):
    if len(matrices) == 1 and isinstance(matrices[0], (list, tuple)):
        matrices = matrices[0]
    return _chain(torch.linalg.multi_dot, matrices, out)


def _chain(func, tensors, out):
    """From the end that makes the narrower intermediate results."""
    tensors = list(tensors)
    ndims = [getattr(t, "ndim", None) for t in tensors]
    right = len(tensors) > 1 and {ndims[0], ndims[-1]} <= {1, 2} and set(ndims[1:-1]) <= {2}
    right = right and all(
        a.shape[-1] == b.shape[0] and (a.dtype, a.device) == (b.dtype, b.device)
        for a, b in zip(tensors, tensors[1:], strict=False)
    )
    if not right:
        raise_as_torch(func, tensors)
    rows = tensors[0].shape[0] if ndims[0] == 2 else 1
    columns = tensors[-1].shape[1] if ndims[-1] == 2 else 1
    if rows <= columns:
        y = reduce(matmul, tensors)
    else:
        y = reduce(lambda right, left: matmul(left, right), tensors[::-1])
    if out is None:
        return y
    if isinstance(y, SparseTensor):
        raise NotImplementedError(f"{func.__name__}: out= takes no SparseTensor")
    # torch itself checks, warns and resizes, and computes nothing of size.
    if y.ndim == 0:
        empty = y.view(1)[:0], y.view(1)[:0]
    elif y.ndim == 1:
        empty = y[:0], y.new_empty(0, y.shape[0])
    else:
        empty = y[:, :0], y[:0]
    func(empty, out=out)
    return out.copy_(y)


register("einsum", _einsum, method=False)
register("tensordot", _tensordot, method=False)
register("inner", _inner)
register("chain_matmul", _chain_matmul, method=False)
TORCH_FUNCTIONS[torch.linalg.multi_dot] = _multi_dot
TORCH_FUNCTIONS[torch.functional.einsum] = _einsum
