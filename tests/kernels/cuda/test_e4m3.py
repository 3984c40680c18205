"""x and W in E4M3: the kernels and their twin in torch's operations."""

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401

from sparsekern.kernels.cuda import e4m3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The emulator's, and a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("emulated_cuda")
    return request.param


def bits(t):
    return t.view(torch.uint8)


@pytest.mark.sanitize
@pytest.mark.parametrize("m, k", [(1, 16), (16, 32), (37, 160), (300, 64)])
def test_the_kernels_round_as_torch_does(device, m, k):
    for factor, exponent in ((0, None), (1e-38, None), (1e-3, None), (1, 5), (3e38, None), (1, 8)):
        x = (torch.randn(m, k, device=device) * factor).bfloat16()
        if m == 37:
            x[3, 7], x[5, 9], x[36, 159] = torch.inf, torch.nan, -torch.inf
        x8, inverse = e4m3.quantise(x, exponent)
        want8, want = e4m3.traced(x, exponent)
        assert x8.shape == (-(-m // 16) * 16, k) and not bits(x8[m:]).any()
        got, want8 = bits(x8[:m]), bits(want8)
        assert torch.equal(got & 0x7F, want8 & 0x7F)  # a NaN may have any sign
        assert torch.equal(got[want8 % 128 < 127], want8[want8 % 128 < 127])
        if exponent is None:
            assert torch.equal(inverse, want)
            unit = inverse.double()
        else:
            assert inverse is None
            unit = 2.0**-exponent
        back = x8[:m].double() * unit
        kept = x.isfinite() & ~(back.isnan() & (x.abs() * 2.0 ** (exponent or 0) > 464))
        assert torch.equal(back.isnan(), ~kept)
        off = (back - x.double()).abs()
        assert (
            off[kept] <= torch.maximum(x.double().abs() / 16, 2**-10 * unit + 0 * off)[kept]
        ).all()


@pytest.mark.sanitize
def test_results_are_scaled_and_get_a_bias(device):
    y, bias = (
        torch.randn(37, 48, device=device).bfloat16(),
        torch.randn(48, device=device).bfloat16(),
    )
    inverse = torch.tensor([2.0**-5], device=device).bfloat16()
    for factor, added in ((inverse, None), (None, bias), (inverse, bias)):
        want = y.float() * (1.0 if factor is None else factor.float())
        want = (want if added is None else want + added.float()).bfloat16()
        assert torch.equal(e4m3.finish(y.clone(), factor, added), want)


def test_weights_keep_three_bits_and_no_negative_zero():
    w = torch.randn(64, 128).bfloat16() * torch.tensor([1e-6, 1.0]).repeat(64)
    w8, exponent = e4m3.quantise_weight(w)
    assert not (bits(w8) == 0x80).any() and (w8.float().abs().max() > 224)
    back = w8.double() / 2.0**exponent
    large = w.double().abs() * 2.0**exponent > 2**-6
    assert ((back - w.double()).abs()[large] <= w.double().abs()[large] / 16).all()
    assert e4m3.exponent_of(448) == 0 and e4m3.exponent_of(448.1) == -1
    assert e4m3.exponent_of(56, headroom=3) == 0 and e4m3.exponent_of(0) == 58
    assert e4m3.quantise_weight(torch.zeros(4, 4))[0].view(torch.uint8).sum() == 0
