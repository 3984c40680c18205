"""Products of any shape, stride, mask, type, number of threads: against float64, with gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern import SparseTensor, linear

# Of a sum of `terms` products, over the sum of their magnitudes; 16 bits are rounded once more.
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-52}
sizes = st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 127, 256, 300]))
MASKS = {
    "random": lambda n, k, density: torch.rand(n, k) < density,
    "empty": lambda n, k, density: torch.zeros(n, k, dtype=torch.bool),
    "full": lambda n, k, density: torch.ones(n, k, dtype=torch.bool),
    "rows": lambda n, k, density: (torch.rand(n, 1) < density).expand(n, k),
    "columns": lambda n, k, density: (torch.rand(1, k) < density).expand(n, k),
    "triangle": lambda n, k, density: torch.ones(n, k, dtype=torch.bool).tril(),
}
STRIDES = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "every second": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda t: torch.cat([t.new_full((1, t.shape[1]), torch.nan), t])[1:],
    "expanded": lambda t: t[:1].expand_as(t) if t.shape[0] else t,
}


def expect(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor, terms: int) -> None:
    assert got.shape == want.shape and got.is_contiguous()
    wide = EPS[torch.float64 if got.dtype == torch.float64 else torch.float32]
    bound = (terms + 8) * wide * scale + 2 * EPS[got.dtype] * want.abs()
    tiny = torch.finfo(got.dtype).tiny
    assert ((got.double() - want).abs() <= bound + tiny).all()


@settings(max_examples=120)
@given(
    m=sizes,
    n=sizes,
    k=sizes,
    density=st.floats(0, 1),
    mask=st.sampled_from(sorted(MASKS)),
    dtype=st.sampled_from(sorted(EPS, key=str)),
    strides=st.sampled_from(sorted(STRIDES)),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_products_and_gradients(m, n, k, density, mask, dtype, strides, has_bias, threads, seed):
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    kept = MASKS[mask](n, k, density)
    w = torch.randn(n, k).to(dtype)
    W = SparseTensor.from_dense(w, kept)
    W.values.requires_grad_()
    x = STRIDES[strides](torch.randn(m, k).to(dtype)).requires_grad_()
    bias = torch.randn(n).to(dtype).requires_grad_() if has_bias else None
    h = STRIDES[strides](torch.randn(m, n).to(dtype))

    y = linear(x, W, bias)
    y.backward(h)

    w, x64, h64 = (w * kept).double(), x.detach().double(), h.double()
    b64 = torch.zeros(n, dtype=torch.float64) if bias is None else bias.detach().double()
    expect(y, x64 @ w.T + b64, x64.abs() @ w.abs().T + b64.abs(), k + 1)
    expect(x.grad.contiguous(), h64 @ w, h64.abs() @ w.abs(), n)
    scale = (h64.abs().T @ x64.abs())[kept]
    expect(W.values.grad, (h64.T @ x64)[kept], scale, m)
    if has_bias:
        torch.testing.assert_close(bias.grad.double(), h64.sum(0), rtol=0.02, atol=0.05 * m**0.5)
