"""Products with infinities and NaN, and what they are where a place that is not stored takes no
part."""

import torch
from torch import Tensor

BAD = (torch.inf, -torch.inf, torch.nan)


def weight_with_infinities(n: int, k: int, dtype: torch.dtype, device: str = "cpu"):
    """w [n, k], its mask and a bias. In column 3 nothing is stored, in column 4 everything; some
    stored values are 0, -0, infinite or NaN; row 1 is empty, row 0 full."""
    mask = torch.rand(n, k) < 0.2
    mask[:, 3], mask[:, 4], mask[0], mask[1] = False, True, True, False
    mask[:, 3] = False
    w = torch.randn(n, k).to(dtype) * mask
    places = mask.nonzero()
    some = places[torch.randperm(len(places))[: len(places) // 10]]
    w[some[:, 0], some[:, 1]] = 0.0
    w[some[::2, 0], some[::2, 1]] = -0.0
    for i, bad in enumerate(BAD):
        row = 5 + 7 * i
        w[row, places[places[:, 0] == row][1, 1]] = bad
    return w.to(device), mask.to(device), torch.randn(n).to(device, dtype)


def tokens_with_infinities(m: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """x [m, k]: tokens with one of BAD at a column that is not stored, at a full one, at others,
    and finite ones between them."""
    x = torch.randn(m, k)
    columns = (3, 4, k - 1, 0, k // 2)
    for token in range(0, m, 3 if m > 2 else 1):
        turn = token // 3
        x[token, columns[turn % 5]] = BAD[turn % 3]
        if turn % 4 == 3:
            x[token, 3] = BAD[(turn + 1) % 3]
            x[token, 9] = -torch.inf
    if m > 6:
        x[5] = torch.nan
    return x.to(device, dtype)


def stored_product(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias of the stored places alone, in float64."""
    rows = [x.double()[:, m] @ v[m] for v, m in zip(w.double(), mask, strict=True)]
    y = torch.stack(rows, 1)
    return y if bias is None else y + bias.double()


def check_stored(y: Tensor, x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None = None) -> None:
    """y is that: infinite, NaN or finite at the same places, and the same number."""
    y, want = y.double().cpu(), stored_product(*(t.cpu() for t in (x, w, mask)))
    if bias is not None:
        want += bias.double().cpu()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert torch.equal(y[want.isinf()], want[want.isinf()])
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(x.dtype, 1e-4)
    finite = want.isfinite()
    torch.testing.assert_close(y[finite], want[finite], rtol=tolerance, atol=tolerance)
