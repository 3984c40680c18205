"""Run by test_mutations.py, in a process of its own since a fault here ends it: products before and
after writes to the indices. Prints the name of each case when it begins, then what went wrong."""

import re
import sys
from itertools import cycle

import torch
from torch.autograd.graph import increment_version

from sparsekern import SparseLinear, SparseTensor

N, K = 160, 192
DENSITIES, TOKENS = (0.05, 0.3, 0.97), (1, 16, 64, 300)


def expand(row_offsets, col_indices, values):
    """W in float64; None if this is no pattern."""
    ro, ci = row_offsets.long(), col_indices.long()
    if ro[0] != 0 or ro[-1] != len(ci) or (ro.diff() < 0).any() or ((ci < 0) | (ci >= K)).any():
        return None
    flat = torch.arange(N).repeat_interleave(ro.diff()) * K + ci
    if (flat.diff() <= 0).any():
        return None
    return torch.zeros(N * K, dtype=torch.float64).index_put((flat,), values.double()).view(N, K)


class Products:
    """y, dx and dvalues of a holder of W, by the library and in float64."""

    def __init__(self, holder, x, dy):
        self.holder, self.x, self.dy = holder, x, dy

    def run(self, between=lambda: None):
        holder = self.holder
        x, values = self.x.clone().requires_grad_(), holder.values.detach().requires_grad_()
        W = SparseTensor._trusted(holder.row_offsets, holder.col_indices, values, N, K)
        y = torch.nn.functional.linear(x, W)
        between()
        dx, dvalues = torch.autograd.grad(y, (x, values), self.dy)
        return y.detach(), dx, dvalues

    def exact(self):
        """The three and their scales; None if the indices are no pattern."""
        holder = self.holder
        values = holder.values.detach()
        w = expand(holder.row_offsets, holder.col_indices, values)
        if w is None:
            return None
        x, dy = self.x.double(), self.dy.double()
        mask = expand(holder.row_offsets, holder.col_indices, torch.ones_like(values)) > 0
        return [
            (x @ w.T, torch.outer(x.norm(dim=1), w.norm(dim=1))),
            (dy @ w, torch.outer(dy.norm(dim=1), w.norm(dim=0))),
            ((dy.T @ x)[mask], torch.outer(dy.norm(dim=0), x.norm(dim=0))[mask]),
        ]


def is_close(got, want_scale):
    """Whether a sum in float32 or wider, rounded once, may be this."""
    want, scale = want_scale
    bound = torch.finfo(got.dtype).eps * want.abs() + 1e-7
    bound += (1e-14 if got.dtype == torch.float64 else 3e-6) * scale
    return got.shape == want.shape and bool(((got.double() - want).abs() <= bound).all())


def checked(products, allowed, text, **kwargs):
    """Each of the three products is one of allowed(); None in it: it may be a ValueError."""
    try:
        got = products.run(**kwargs)
    except ValueError as error:
        if None not in allowed() or not re.search("row_offsets|col_indices", str(error)):
            print(f"FAILED: {text}: ValueError: {error}", flush=True)
        return
    wholes = [whole for whole in allowed() if whole is not None]
    for i, (name, result) in enumerate(zip(("y", "dx", "dvalues"), got, strict=True)):
        wants = [whole[i] for whole in wholes]
        if not any(is_close(result, want) for want in wants):
            print(f"FAILED: {text}: a wrong {name}", flush=True)


def a_legal_move(ro, ci):
    """A place in the middle whose column may be one more."""
    room = torch.cat([ci[1:], ci.new_tensor([K])]) - ci
    ends = (ro[1:] - 1)[ro.diff() > 0].long()
    room[ends] = K - ci[ends]
    places = (room > 1).nonzero().flatten()
    return int(places[len(places) // 2])


def put(t, at, value):
    t[at] = value


def redraw(ro, ci):
    mask = torch.zeros(N * K, dtype=torch.bool)
    mask[torch.randperm(N * K)[: len(ci)]] = True
    W = SparseTensor.from_dense(mask.view(N, K).float())
    ro.copy_(W.row_offsets) if isinstance(ro, torch.Tensor) else put(ro, ..., W.row_offsets.numpy())
    ci.copy_(W.col_indices) if isinstance(ci, torch.Tensor) else put(ci, ..., W.col_indices.numpy())


def swap(ci, p, q):
    ci[p], ci[q] = int(ci[q]), int(ci[p])


WRITES = {
    "a column moves": lambda ro, ci, p: put(ci, p, int(ci[p]) + 1),
    "another pattern": lambda ro, ci, p: redraw(ro, ci),
    "a column is 10^9": lambda ro, ci, p: put(ci, p, 10**9),
    "a column is -10^9": lambda ro, ci, p: put(ci, p, -(10**9)),
    "a column is -1": lambda ro, ci, p: put(ci, p, -1),
    "the last column is beyond K": lambda ro, ci, p: put(ci, -1, K + 4000),
    "a column of row 0 is K + 3": lambda ro, ci, p: put(ci, int(ro[1]) - 1, K + 3),
    "a column twice": lambda ro, ci, p: put(ci, 1, int(ci[0])),
    "two columns swapped": lambda ro, ci, p: swap(ci, 0, 1),
    "a row offset is 2^31 - 1": lambda ro, ci, p: put(ro, 3, 2**31 - 1),
    "a row offset is -2^31": lambda ro, ci, p: put(ro, 3, -(2**31)),
    "a row offset falls": lambda ro, ci, p: put(ro, 90, int(ro[80]) - 1),
}
# How a write reaches the arrays; only the first is counted.
ROUTES = {
    "counted": lambda holder: (holder.row_offsets, holder.col_indices),
    ".data": lambda holder: (holder.row_offsets.data, holder.col_indices.data),
    "numpy": lambda holder: (holder.row_offsets.numpy(), holder.col_indices.numpy()),
    "scipy": lambda holder: scipy_arrays(holder),
    "shared memory": lambda holder: (
        holder.row_offsets.share_memory_().data,
        holder.col_indices.share_memory_().data,
    ),
}


def scipy_arrays(holder):
    values = holder.values.detach()
    W = SparseTensor._trusted(holder.row_offsets, holder.col_indices, values.float(), N, K)
    csr = W.to_scipy()
    return csr.indptr, csr.indices


def fresh(dtype, m, density, kind):
    w = torch.randn(N, K).to(dtype)
    W = SparseTensor.from_dense(w, torch.rand(N, K) < density)
    holder = W
    if kind == "layer":
        holder = SparseLinear(K, N, W.row_offsets, W.col_indices, torch.nn.Parameter(W.values))
    return Products(holder, torch.randn(m, K).to(dtype), torch.randn(m, N).to(dtype))


def case(dtype, m, density, what, route, kind, when):
    text = f"{dtype} M={m} density={density} {kind}: {what}, {route}, {when}"
    print(text, flush=True)
    products = fresh(dtype, m, density, kind)
    holder = products.holder
    arrays = ROUTES[route](holder)
    before = products.exact()
    place = a_legal_move(holder.row_offsets, holder.col_indices)

    def write():
        WRITES[what](*arrays, place)

    if when == "between forward and backward":
        checked(products, lambda: [before, products.exact()], f"{text}, first", between=write)
    else:
        checked(products, lambda: [before], f"{text}, first")
        write()
    after = products.exact()
    wants = [after] if route == "counted" else [before, after]
    checked(products, lambda: wants, text)
    increment_version((holder.row_offsets, holder.col_indices))
    checked(products, lambda: [after], f"{text}, versions moved")


def main(dtype):
    dtype = getattr(torch, dtype)
    uncounted = cycle(route for route in ROUTES if route != "counted")
    kinds = cycle(("tensor", "layer"))
    whens = cycle(("before", "between forward and backward", "before"))
    for m in TOKENS:
        torch.set_num_threads(2 if m == 16 else 1)
        for density in DENSITIES:
            for i, what in enumerate(WRITES):
                # Each write with half of the tokens.
                if dtype != torch.float32 and (i + TOKENS.index(m)) % 2:
                    continue
                # Autograd itself refuses counted writes between the two.
                case(dtype, m, density, what, "counted", next(kinds), "before")
                case(dtype, m, density, what, next(uncounted), next(kinds), next(whens))
            next(uncounted)  # 12 writes and 4 routes: another one for each the next time


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:]:
        main(name)
    print("end", flush=True)
