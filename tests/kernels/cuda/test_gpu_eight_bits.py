"""On a GPU: packed values of 8 bits with a scale for each row."""

import copy

import pytest
import torch
from infinities import check_stored, tokens_with_infinities, weight_with_infinities
from packed_8_bits import check, layouts, packed_as, types, weight_of_every_number

from sparsekern import SparseTensor, Static, explain, sparsify_
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.nn import SparseLinear, pack_

pytestmark = pytest.mark.gpu


def random_weight(n, k, density):
    w = torch.randn(n, k, device="cuda") * (torch.rand(n, k, device="cuda") < density)
    return w.bfloat16()


@types
@layouts
def test_every_number_is_exact(layout, dtype):
    w = weight_of_every_number(dtype, "cuda")
    packed, rounded = packed_as(layout, w, dtype)
    assert torch.equal(rounded, w.double())
    assert torch.equal(packed.expand().float() * packed.scales[:, None], w.float())
    x = torch.eye(w.shape[1], device="cuda").bfloat16()
    for m in (1, 8, 16, 64):
        for first in range(0, w.shape[1], m):
            some = x[first : first + m]
            assert torch.equal(spmm_packed(some, packed), w[:, first : first + m].T)


@types
@layouts
@pytest.mark.parametrize("n, k, density", [(300, 1300, 0.3), (4096, 2304, 0.25), (1, 7, 1.0)])
def test_every_number_of_tokens(layout, n, k, density, dtype, nan_memory):
    w = random_weight(n, k, density)
    if n > 100:
        w[7], w[9], w[40:80] = 1.5, 0, random_weight(40, k, 0.9)
    packed, rounded = packed_as(layout, w, dtype)
    bias = torch.randn(n).cuda().bfloat16()
    for m in (*range(1, 66), 100) if n == 300 else (1, 7, 16, 33, 64):
        x = torch.randn(m, k, device="cuda").bfloat16()
        y = check(packed, rounded, x, bias)
        assert torch.equal(y, spmm_packed(x, packed, bias))


@pytest.mark.sanitize
@types
@layouts
def test_few_of_everything(layout, dtype):
    """Blocks that share rows, ragged sizes, W written out."""
    packed, rounded = packed_as(layout, random_weight(290, 1031, 0.3), dtype)
    bias = torch.randn(290).cuda().bfloat16()
    for m in (1, 2, 8, 16, 33, 260):
        check(packed, rounded, torch.randn(m, 1031, device="cuda").bfloat16(), bias)


@types
@layouts
def test_infinities_reach_what_a_stored_value_connects(layout, dtype, nan_memory):
    w, mask, bias = weight_with_infinities(300, 1031, torch.bfloat16, "cuda")
    w = torch.where(w.isfinite(), w, 1.0)
    packed, rounded = packed_as(layout, SparseTensor.from_dense(w, mask), dtype)
    for m in (1, 2, 8, 16, 30, 64, 300):
        x = tokens_with_infinities(m, 1031, torch.bfloat16, "cuda")
        for b in (bias, None):
            check_stored(spmm_packed(x, packed, b), x, rounded, rounded != 0, b)


@types
@pytest.mark.parametrize("tokens", [1, 16, 64, (1, 64)], ids=str)
def test_layers_of_a_model(dtype, tokens):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(512, 300), torch.nn.ReLU(), torch.nn.Linear(300, 64))
    made = sparsify_(made, Static(0.75), lambda *_: True).bfloat16().cuda()
    exact = copy.deepcopy(made)
    packed = pack_(made, tokens, values=dtype)
    with torch.no_grad():
        for layer, of_8_bits in zip(exact, packed, strict=True):
            if isinstance(layer, SparseLinear):
                rounded = packed_as("pairs", layer.weight.detach(), dtype)[1]
                x = torch.randn(5, layer.in_features, device="cuda").bfloat16()
                want = x.double() @ rounded.T + layer.bias.double()
                torch.testing.assert_close(of_8_bits(x).double(), want, rtol=1e-2, atol=1e-2)
                assert of_8_bits.values_dtype is dtype
        assert "with a scale for each row" in explain(1, packed)
        x = torch.randn(5, 512, device="cuda").bfloat16()
        want, graph = packed(x), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed(x)
        graph.replay()
        assert torch.equal(y, want)
