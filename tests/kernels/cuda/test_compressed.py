"""Packed weights on sparse tensor cores: through cuSPARSELt's stand-in, and on a GPU."""

import copy

import pytest
import torch
from emulated_cusparselt import (  # noqa: F401
    WRONG,
    cusparselt_library,
    emulated_cuda,
    emulator,
    stand_in,
)
from test_two_of_four import two_way
from torch import nn

from sparsekern import SparseLinear, SparseTensor, registered
from sparsekern.kernels.cuda import algorithms, compressed, e4m3
from sparsekern.kernels.cuda.choose import fastest, pack_for
from sparsekern.kernels.cuda.few_tokens import spmm_packed
from sparsekern.nn import PackedLinear, pack_
from sparsekern.nn import packed as nn_packed
from sparsekern.testing import relative_error

E4M3 = e4m3.DTYPE
N, K = 64, 96
SIZES = {torch.bfloat16: 64}
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-10}  # one rounding of the result


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """That of the stand-in, and a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("stand_in")
        monkeypatch.setattr(compressed, "DEVICE", "cpu")
    return request.param


def weight(n=N, k=K, dtype=torch.bfloat16, device="cpu"):
    mask = two_way(n, k)
    w = (torch.randn(n, k) * mask).to(dtype)
    w[tuple(mask.nonzero()[3])] = 0  # stored
    w[tuple(mask.nonzero()[5])] = -0.0
    w[tuple(mask.nonzero()[7])] = 1e-6  # 0 in E4M3
    return SparseTensor.from_dense(w, mask).to(device), w.to(device)


def error(y, x, w, bias=None):
    x, w = x.double(), w.double()
    exact, scale = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    return relative_error(y, exact, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 8, 37, 96])
def test_products_of_any_number_of_tokens(device, dtype, m, nan_memory):
    W, w = weight(dtype=dtype, device=device)
    packed = compressed.pack_two_of_four(W, dtype)
    assert 0 <= packed.nbytes - 9 / 16 * 2 * N * K < 1024
    x = torch.randn(m, K, device=device).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    assert error(spmm_packed(x, packed), x, w) <= TOLERANCE[dtype]
    assert error(spmm_packed(x, packed, bias), x, w, bias) <= TOLERANCE[dtype]
    apart = torch.randn(m, K + 1, device=device).to(dtype)[:, 1:]
    assert error(spmm_packed(apart, packed), apart, w) <= TOLERANCE[dtype]
    assert spmm_packed(x[:0], packed, bias).shape == (0, N)


@pytest.mark.parametrize("largest", [None, 0.0, 6.0])  # of an example of zeros: nothing
@pytest.mark.parametrize("m", [1, 16, 37])
def test_in_e4m3_the_rounded_operands_are_multiplied_exactly(
    device, largest, m, nan_memory, request
):
    W, w = weight(device=device)
    packed = compressed.pack_two_of_four(W, E4M3, largest)
    assert (packed.given_exponent is None) == (not largest)
    assert 0 <= packed.nbytes - 10 / 16 * N * K < 1024
    x, bias = torch.randn(m, K, device=device).bfloat16(), torch.randn(N, device=device).bfloat16()
    w8, exponent = e4m3.quantise_weight(w)
    x8, inverse = e4m3.traced(x, packed.given_exponent)
    w8 = w8.double() / 2.0**exponent
    x8 = x8.double() * (2.0**-packed.given_exponent if inverse is None else inverse.double())
    assert (x8 - x.double()).abs().max() <= x.abs().max() / 16
    assert error(spmm_packed(x, packed), x8, w8) <= 2**-8
    for takes_bias in (True, False):
        y = spmm_packed(x, packed, bias)
        assert error(y, x8, w8, bias) <= (1 if takes_bias and inverse is None else 2) * 2**-8
        if device == "cpu":
            request.getfixturevalue("stand_in").e4m3_without_bias()
            compressed._adds_bias_in_e4m3.cache_clear()
    assert spmm_packed(x[:0], packed, bias).shape == (0, N)
    if m > 1:
        for bad in (torch.inf, 1e3) if largest else (torch.inf, torch.nan):
            x[m - 2, 5] = bad
            y = spmm_packed(x, packed)
            assert y[m - 2].isnan().any() and not y[: m - 2].isnan().any()


def test_what_cannot_be_compressed_says_why(device, monkeypatch):
    def refused(error, match, W, dtype=torch.bfloat16):
        with pytest.raises(error, match=match):
            compressed.pack_two_of_four(W, dtype)

    free = SparseTensor.from_dense((torch.rand(N, K) < 0.4).bfloat16()).to(device)
    refused(ValueError, "expected a two-way pattern", free)
    three = torch.zeros(N, K).bfloat16()
    three[3, 8:11] = 1
    refused(ValueError, "expected a two-way pattern", SparseTensor.from_dense(three).to(device))
    across = torch.zeros(N, K).bfloat16()
    across[3, 6:10] = 1  # two and two
    compressed.pack_two_of_four(SparseTensor.from_dense(across).to(device), E4M3)
    refused(
        ValueError, "multiples of 16 for bfloat16, got 8 and 96", weight(8, K, device=device)[0]
    )
    W = weight(48, K, device=device)[0]
    refused(ValueError, "multiples of 32 for float8_e4m3fn, got 48 and 96", W, E4M3)
    W = weight(dtype=torch.float16, device=device)[0]
    refused(TypeError, "expected bfloat16 values for float8_e4m3fn, got float16", W, E4M3)
    W, w = weight(device=device)
    W.values[0] = torch.inf
    refused(ValueError, "expected finite values", W, E4M3)
    refused(ValueError, "got a transpose", W.T.contiguous().T if W.is_transposed else W.T)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    compressed.refuse_gpu.cache_clear()
    refused(NotImplementedError, "two_of_four: .* 9.0 alone, not 8.0", weight(device=device)[0])
    compressed.refuse_gpu.cache_clear()


def test_no_right_algorithm_is_an_error(stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    W, _ = weight()
    packed = compressed.pack_two_of_four(W, torch.bfloat16)
    for number in algorithms.CANDIDATES[torch.bfloat16]:
        stand_in.algorithm(number, WRONG)
    with pytest.warns(UserWarning, match="no algorithm multiplies"):
        with pytest.raises(RuntimeError, match="none of cuSPARSELt's algorithms multiplies"):
            spmm_packed(torch.randn(8, K).bfloat16(), packed)


def test_pack_chooses_it_where_it_pays(stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    W, w = weight()
    monkeypatch.setattr(compressed, "least_size", lambda *_: 64 if _[2] >= 512 else None)

    def names(W, *tokens):
        return [form.name for form in pack_for(W, tokens)]

    assert names(W, 512, 2048) == ["two_of_four"] and "two_of_four" not in names(W, 64, 64)
    few, many = held = tuple(names(W, 1, 2048))
    assert many == "two_of_four" and few in ("gather", "cover", "pairs")
    for m, place in ((1, 0), (2, 0), (511, 1), (512, 1), (4096, 1)):
        fastest.cache_clear()
        assert fastest(held, m, N, K, W.nnz, W.dtype) == place
    fastest.cache_clear()
    free = SparseTensor.from_dense((torch.rand(N, K) < 0.4).bfloat16())
    assert "two_of_four" not in names(free, 512, 512)
    monkeypatch.setattr(compressed, "least_size", lambda *_: 65)
    assert "two_of_four" not in names(W, 512, 512)
    # Each type has sizes of its own.
    monkeypatch.setattr(compressed, "least_size", lambda _, dtype, *__: SIZES.get(dtype))
    assert names(W, 512, 2048) == ["two_of_four"]
    assert "two_of_four" not in names(W.to(torch.float16), 512, 2048)
    held = "dense", "two_of_four"
    assert [fastest(held, 512, N, K, W.nnz, t) for t in (torch.bfloat16, torch.float16)] == [1, 0]
    fastest.cache_clear()


def model(device="cpu"):
    made = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K, bias=False)).bfloat16()
    for i in (0, 2):
        made[i] = SparseLinear.from_linear(made[i], two_way(*made[i].weight.shape))
    return made.to(device)


def test_pack_in_e4m3_refuses_as_a_whole(stand_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    one = model()
    one[2] = SparseLinear.from_linear(nn.Linear(N, K).bfloat16(), torch.rand(K, N) < 0.3)
    layers = [*one]
    with pytest.raises(ValueError, match="^2: weight: expected a two-way pattern"):
        pack_(one, 2048, dtype=E4M3)
    assert [*one] == layers
    with pytest.raises(ValueError, match="dtype: expected torch.float8_e4m3fn or None, got"):
        pack_(one, dtype=torch.float8_e5m2)
    with pytest.raises(ValueError, match="example: it has a meaning with"):
        pack_(one, example=torch.ones(1))
    with pytest.raises(TypeError, match="example: expected a tensor, .* got int"):
        pack_(model(), dtype=E4M3, example=3)
    bad = torch.full((2, K), torch.inf).bfloat16()
    with pytest.raises(ValueError, match="example: expected finite inputs of 0, .* input of inf"):
        pack_(model(), dtype=E4M3, example=bad)
    with pytest.raises(ValueError, match="example: expected finite inputs of 0, it brought none"):
        pack_(model(), dtype=E4M3, example=lambda m: None)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_pack_sees_how_large_the_inputs_are(stand_in, kind, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    one, x = model(), torch.randn(24, K).bfloat16()
    hooks = len(one[0]._forward_pre_hooks)
    with torch.no_grad():
        hidden = one[:2](x)
    pack_(one, dtype=E4M3, example=kind(x))
    assert [type(layer) for layer in one] == [PackedLinear, nn.GELU, PackedLinear]
    assert len(one[0]._forward_pre_hooks) == hooks == 0
    for layer, given in ((one[0], x), (one[2], hidden)):
        assert layer.numbers[1] == e4m3.exponent_of(given.abs().max().item(), 3)
        assert layer.packed_bytes < 0.8 * N * K and layer.dtype is torch.bfloat16
    assert copy.deepcopy(one).half()[0].two_of_four_e4m3_operand.dtype is torch.uint8


@pytest.mark.parametrize("example", [True, False])
def test_what_is_compiled_is_the_same_product(stand_in, example, monkeypatch):  # noqa: F811
    """Its cast is torch's, in the graph; here both run as they are."""
    monkeypatch.setattr(compressed, "DEVICE", "cpu")
    monkeypatch.setattr(nn_packed, "spmm_e4m3", registered.run_spmm_e4m3)
    one, x = model(), torch.randn(24, K).bfloat16()
    pack_(one, dtype=E4M3, example=x if example else None)
    for layer, given in ((one[0], x), (one[2], torch.randn(5, N).bfloat16())):
        y = registered.run_spmm_packed(given, *layer._parts(), layer.bias)
        torch.testing.assert_close(layer._traced(given), y, rtol=2**-7, atol=2**-7)
    with pytest.raises(TypeError, match="x8: expected E4M3 on cpu, got torch.bfloat16"):
        registered.run_spmm_e4m3(x, one[0].two_of_four_e4m3_operand, N, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, example", [(None, False), (E4M3, False), (E4M3, True)])
def test_a_model_is_captured_and_compiled(dtype, example, monkeypatch):
    monkeypatch.setattr(compressed, "least_size", lambda *_: 1)
    one, m = model("cuda").eval(), 64
    one[2].bias = nn.Parameter(torch.randn(K, device="cuda").bfloat16())
    x = torch.randn(3, m, K, device="cuda").bfloat16()
    with torch.no_grad():
        exact = one(x)
    off = (2**-6 if dtype is None else 0.3) * exact.float().square().mean().sqrt().item()
    pack_(one, tokens=m, dtype=dtype, example=x[:1] if example else None)
    layouts = {layer.layout for layer in (one[0], one[2])}
    assert layouts == {"two_of_four" if dtype is None else "two_of_four_e4m3"}
    with torch.inference_mode():
        for few in (1, 17, 3 * m):  # of any number of tokens
            given = x.view(-1, K)[:few]
            torch.testing.assert_close(one(given), exact.view(-1, K)[:few], rtol=0, atol=off)
        compiled = torch.compile(one, fullgraph=True)
        torch.testing.assert_close(compiled(x), exact, rtol=0, atol=off)
    stream, static = torch.cuda.Stream(), x.clone()
    with torch.no_grad(), torch.cuda.stream(stream):
        one(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = one(static)
        for _ in range(2):
            static.normal_()
            graph.replay()
            assert torch.equal(y, one(static))
