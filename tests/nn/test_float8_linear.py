"""Layers that train in E4M3, on the emulator and a stand-in for cuSPARSELt, and on a GPU."""

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import SparseLinear, Static, sparsify_
from sparsekern.kernels import float8 as recipe
from sparsekern.kernels.cuda import float8
from sparsekern.nn import forget_graphs_
from sparsekern.nn.float8 import (
    Float8Linear,
    Float8SparseLinear,
    float8_step,
    scaling_of,
    to_float8_,
)
from sparsekern.nn.scaling import EACH
from sparsekern.testing import frobenius_error

sys.path.append(str(Path(__file__).parents[1] / "kernels" / "cuda"))
from emulated_cusparselt import (  # noqa: E402, F401
    cusparselt_library,
    emulated_cuda,
    emulator,
    float8_on_cpu,
    stand_in,
)

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
TOKENS, WIDTH = 32, 64


@pytest.fixture(params=["cpu", ON_GPU])
def device(request):
    if request.param == "cpu":
        request.getfixturevalue("float8_on_cpu")
    return request.param


def mlp(device, is_sparse, bias=True):
    model = nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH, bias=bias), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH, bias=bias)
    ).to(device)
    if is_sparse:
        sparsify_(model, Static(0.75, family="two-way"), lambda module, name: True)
    return model


def step(model, call):
    """What the forward pass of a step returns; then the scales move."""
    with float8_step(model):
        y = call()
        y.sum().backward()
    scaling_of(model).advance()
    return y


def every(module, name):
    return True


def to_float8(model):
    to_float8_(model, every)
    return model


def rounded(t, scale=None):
    """t in E4M3 and back, by its own scale."""
    scale = recipe.scale_of(recipe.largest_of(t)) if scale is None else scale
    return recipe.cast(t, scale).double() / scale.double()


def weight_of(layer):
    return layer.weight.to_dense() if isinstance(layer, SparseLinear) else layer.weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_layer_multiplies_what_is_rounded(device, is_sparse, bias):
    model = mlp(device, is_sparse, bias)
    to_float8_(model, every)
    layer = model[0]
    x = torch.randn(2, TOKENS // 2, WIDTH, device=device, requires_grad=True)
    dy = torch.randn(2, TOKENS // 2, 2 * WIDTH, device=device).bfloat16()
    with float8_step(model):
        y = layer(x)
        y.backward(dy)
    x8, w8, dy8 = (rounded(t.detach().flatten(0, -2)) for t in (x, weight_of(layer), dy))
    exact = x8 @ w8.T + (layer.bias.double() if bias else 0)
    close = dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(y.double().flatten(0, 1), exact, **close)
    torch.testing.assert_close(x.grad.double().flatten(0, 1), dy8 @ w8, **close)
    dw = dy8.T @ x8
    if is_sparse:
        rows = torch.repeat_interleave(
            torch.arange(2 * WIDTH, device=device), layer.row_offsets.diff()
        )
        torch.testing.assert_close(layer.values.grad.double(), dw[rows, layer.col_indices], **close)
    else:
        torch.testing.assert_close(layer.weight.grad.double(), dw, **close)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), dy8.sum(0), **close)
    noted = [t.abs().max().item() for t in (x, weight_of(layer), dy)]
    assert layer.float8_noted.tolist() == pytest.approx(noted)
    of_noted = recipe.scale_of(layer.float8_noted)
    scaling_of(model).advance()
    assert torch.equal(layer.float8_scales, of_noted) and not layer.float8_noted.any()


@pytest.mark.parametrize("is_sparse", [True, False])
def test_calls_of_a_first_step_have_scales_of_their_own(device, is_sparse):
    model = nn.Sequential(mlp(device, is_sparse)[0])
    exact = copy.deepcopy(model)
    to_float8_(model, every)
    small, large = (size * torch.randn(TOKENS, WIDTH, device=device) for size in (1, 50))
    with float8_step(model):
        loss = model(small).square().sum() + model(large).sum()
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
    (exact(small).square().sum() + exact(large).sum()).backward()
    for p, of in zip(model.parameters(), exact.parameters(), strict=True):
        assert frobenius_error(p.grad, of.grad.double()) < 0.05


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_second_gradient_is_an_error(device, is_sparse):
    model = nn.Sequential(mlp(device, is_sparse)[0])
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    with float8_step(model):
        first = torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first[0].square().sum().backward()


def test_layers_that_begin_at_0_lose_no_step(device):
    model = mlp(device, True)
    with torch.no_grad():
        model[2].values.zero_()
    scaling = to_float8_(model, every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaling.follow(optimizer)
    x = torch.randn(TOKENS, WIDTH, device=device)
    for i, rate in enumerate((0.0, 1e-3, 1e-3, 1e-3)):  # a warm-up begins at 0
        exact = copy.deepcopy(model).eval()
        optimizer.param_groups[0]["lr"] = rate
        for each in (model, exact):
            each.zero_grad()
            with float8_step(each):
                (each(x) - 1).square().sum().backward()
        for p, of in zip(model.parameters(), exact.parameters(), strict=True):
            assert frobenius_error(p.grad, of.grad.double()) < 0.3 or not of.grad.any()
        assert scaling.has_begun == (i == 3)
        optimizer.step()
    assert model[0].values.grad.any() and scaling.has_begun


def test_scales_stay_together_when_weights_move(device):
    model = mlp(device, True)
    scaling = to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    model.to("meta" if device == "cpu" else "cpu")
    views = [layer.float8_scales.data_ptr() for layer in (model[0], model[2])]
    assert views == [scaling.scales[place:].data_ptr() for place in (0, 4)]
    assert not any(layer.float8_noted.storage_offset() % 4 for layer in (model[0], model[2]))
    for moved in (model, to_float8(mlp(device, True)).bfloat16()):
        with pytest.raises(TypeError, match="expected weights in float32 on .*, got torch"):
            moved(x)


def test_a_step_outgrows_its_scales_and_the_next_one_has_others(device):
    model = mlp(device, True)
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    first = step(model, lambda: model(x))
    second = step(model, lambda: model(x))
    assert frobenius_error(second, first.double()) < 0.01  # a bias is added before it is rounded
    assert torch.equal(step(model, lambda: model(x)), second)
    saturated = step(model, lambda: model[0](64 * x))
    larger = step(model, lambda: model[0](64 * x))
    assert larger.abs().max() > 4 * saturated.abs().max()
    bad = x.clone()
    bad[3, 5] = torch.inf
    y = step(model, lambda: model(bad))
    assert y[3].isnan().all() and not y[[0, 31]].isnan().any()
    assert step(model, lambda: model(x)).isfinite().all()
    model.eval()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert model(x).dtype is torch.bfloat16  # the layer that it was


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_compiled_step_is_the_eager_one(device, is_sparse, monkeypatch):
    model = mlp(device, is_sparse)
    exact = copy.deepcopy(model).double()
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    y = exact(x.double())
    y.square().sum().backward()
    unrounded = [y.detach(), *(p.grad for p in exact.parameters())]
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch.compile asks
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = []
    with pytest.raises(RuntimeError, match="first step that is not compiled"):
        compiled(x)
    for each in (compiled, compiled, model, compiled):  # the first one is never compiled
        model.zero_grad()
        with float8_step(model):
            y = each(x)
            y.square().sum().backward()
        noted = scaling_of(model).noted.clone()
        scaling_of(model).advance()
        found.append((noted, [y.detach(), *(p.grad for p in model.parameters())]))
    (first_noted, first), *others = found
    # Compiled, gelu's result is rounded once, not twice: some values then go to E4M3's other
    # neighbour. That is another rounding, and no larger one.
    for noted, other in others:
        assert frobenius_error(noted, first_noted.double()) < 0.02
        for a, b, true in zip(first, other, unrounded, strict=True):
            rounding = frobenius_error(a, true)
            assert rounding < 0.1 and frobenius_error(b, true) < 1.5 * rounding


def test_the_host_knows_the_factor_of_a_two_way_layer(device, monkeypatch):
    model = mlp(device, True)
    scaling = to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)

    def check(factor):
        exact = copy.deepcopy(model[0]).eval()
        y = model[0](factor * x)
        assert frobenius_error(y, exact(factor * x).double()) < 0.06
        of_x, of_w, _ = model[0].float8_scales.log2().tolist()
        assert of_x + of_w == scaling.exponents[0]

    step(model, lambda: model(x))
    found = scaling.exponents.tolist()
    check(1)
    # A graph replays; the host looks later, and until then W gives way to x.
    is_capturing = "is_current_stream_capturing"
    for factor, is_settled in ((4, False), (16, True), (1 / 64, False)):
        with monkeypatch.context() as replayed:
            replayed.setattr(torch.cuda, is_capturing, lambda: True)
            step(model, lambda: model[0](factor * x))  # noqa: B023
        assert scaling.exponents.tolist() == found
        if is_settled:
            assert scaling.settle() and not scaling.settle()
            assert scaling.exponents[0] < found[0] and scaling.exponents[1] == found[1]
            found = scaling.exponents.tolist()
        check(factor)
    state = scaling.state_dict()
    del state["exponents"]  # as that of a dense run
    with pytest.raises(RuntimeError, match="forget_graphs_"):
        scaling.load_state_dict(state)
    forget_graphs_(model)
    scaling.load_state_dict(state)
    check(1 / 64)


def test_state_goes_on_elsewhere(device):
    model = mlp(device, True)
    scaling = to_float8_(model, every)
    assert not [name for name in model.state_dict() if "float8" in name]
    x = torch.randn(TOKENS, WIDTH, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaling.follow(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        with float8_step(model):
            model(x).sum().backward()
        optimizer.step()
    other = mlp(device, True)
    other.load_state_dict(model.state_dict())
    to_float8_(other, every).load_state_dict(scaling.state_dict())
    twin = copy.deepcopy(model)
    results = []
    for each in (model, other, twin):
        results.append(step(each, lambda: each(3 * x)))  # noqa: B023
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    text = "scales: expected the state of a model with 1 such layers, (3,), got (6,)"
    with pytest.raises(ValueError, match=re.escape(text)):
        to_float8_(mlp(device, True)[:1], every).load_state_dict(scaling.state_dict())


@pytest.mark.parametrize("has_exponents", [True, False])
@pytest.mark.parametrize("is_sparse", [True, False])
def test_states_of_versions_before(device, is_sparse, has_exponents):
    """They had no `wanted`; at first no exponents either, and then dense runs, too."""
    model = mlp(device, is_sparse)
    scaling = to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    step(model, lambda: model(x)), step(model, lambda: model(2 * x))
    state = {"exponents": scaling.exponents.clone()} | scaling.state_dict()
    del state["wanted"]
    if not has_exponents:
        del state["exponents"], state["first_steps"]
    other = mlp(device, is_sparse)
    other.load_state_dict(model.state_dict())
    loaded = to_float8_(other, every)
    loaded.load_state_dict(state)
    assert loaded.has_begun and torch.equal(loaded.wanted, scaling.wanted)
    first, second = (step(each, lambda: each(3 * x)) for each in (model, other))  # noqa: B023
    if has_exponents or not is_sparse:
        assert torch.equal(first, second) and torch.equal(loaded.scales, scaling.scales)
    else:  # exponents were sought anew, and so its scales may be others
        assert frobenius_error(second, first.double()) < 0.06
    if not is_sparse:  # a two-way run goes on from that of a dense one
        two_way = to_float8_(mlp(device, True), every)
        two_way.load_state_dict(state)
        of_x, of_w, _ = two_way.scales.view(-1, EACH)[:, :3].log2().unbind(1)
        assert torch.equal(of_x + of_w, two_way.exponents.to(of_x)) and two_way.exponents.all()


def assert_goes_on_as(model, other, x):
    for factor in (1, 50, 50):
        first, second = (step(each, lambda: each(factor * x)) for each in (model, other))  # noqa: B023
        assert torch.equal(first, second)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_pickled_model_goes_on(device, is_sparse):
    model = mlp(device, is_sparse)
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    step(model, lambda: model(x)), step(model, lambda: model(x))
    assert_goes_on_as(model, pickle.loads(pickle.dumps(model)), x)


def pickled_before(model, *lacking):
    """As versions before have pickled a model: its scales lack these, its layers their places."""
    for layer in (model[0], model[2]):
        del layer._place
    for name in lacking:
        del layer.scaling.__dict__[name]
    return pickle.dumps(model)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_a_model_that_a_version_before_has_pickled_goes_on(device, is_sparse):
    model = mlp(device, is_sparse)
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    step(model, lambda: model(x)), step(model, lambda: model(x))
    assert_goes_on_as(model, pickle.loads(pickled_before(copy.deepcopy(model), "wanted")), x)
    without = pickled_before(model, "wanted", "exponents", "is_two_way")
    with pytest.raises(ValueError, match="float8: expected a model with exponents, this one was"):
        pickle.loads(without)


def test_a_step_between_forward_and_backward_is_an_error(device):
    model = mlp(device, True)
    to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
    step(model, lambda: model(x))
    y = model(x)
    scaling_of(model).advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_graphs_that_are_gone_let_factors_change(device, monkeypatch):
    model = mlp(device, True)
    scaling = to_float8_(model, every)
    x = torch.randn(TOKENS, WIDTH, device=device)
    step(model, lambda: model(x))
    with monkeypatch.context() as captured:
        captured.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with torch.no_grad():
            model(x)
    found = scaling.exponents.tolist()
    for _ in range(2):
        with pytest.warns(UserWarning, match="forget_graphs_"):
            step(model, lambda: model(100 * x))
    assert scaling.exponents.tolist() == found
    forget_graphs_(model)
    step(model, lambda: model(100 * x))
    assert scaling.exponents.tolist() < found


def test_torch_compile_captures_no_factor():
    """Its own CUDA graphs (reduce-overhead) would keep the one they saw."""
    op = torch.ops.sparsekern.float8_spmm.default
    assert torch.Tag.cudagraph_unsafe in op.tags


@pytest.mark.gpu
def test_graphs_of_torch_compile_follow_the_factors():
    model = mlp("cuda", True)
    scaling = to_float8_(model, every)
    compiled = torch.compile(model, mode="reduce-overhead")
    x = torch.randn(TOKENS, WIDTH, device="cuda")
    found = []
    for factor in (1, 1, 1, 1, 64, 64, 64):
        torch.compiler.cudagraph_mark_step_begin()
        exact = copy.deepcopy(model).eval()
        y = step(model, lambda: compiled(factor * x))  # noqa: B023
        found.append(frobenius_error(y.detach(), exact(factor * x).detach().double()))
    assert scaling.has_begun and max(found[:4]) < 0.2 and found[-1] < 0.2


def test_what_cannot_train_in_float8_is_refused_in_one_sentence(device, monkeypatch):
    free = sparsify_(mlp(device, False), Static(0.5), every)
    narrow = nn.Sequential(nn.Linear(48, 32)).to(device)
    for model, message in (
        (free, "0: float8: expected a two-way pattern"),
        (narrow, "multiples of 32, got 32, 48"),
        (mlp(device, True).double(), "expected weights in float32, got torch.float64"),
        (nn.Sequential(nn.GELU()), "expected linear layers"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            to_float8_(model, every)
        assert not any(isinstance(m, Float8Linear | Float8SparseLinear) for m in model.modules())
    model = mlp(device, True)
    to_float8_(model, every)
    with pytest.raises(ValueError, match="already"):
        to_float8_(model, every)
    for x, message in (
        (torch.randn(8, WIDTH), "tokens in multiples of 16, got 8"),
        (torch.randn(16, 32), "got (16, 32)"),
        (torch.randn(16, WIDTH).half(), "torch.float16"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            model(x.to(device))
    monkeypatch.setattr(float8, "refuse_two_way", lambda device: "cuSPARSELt is not usable: gone")
    with pytest.raises(NotImplementedError, match="0: cuSPARSELt is not usable: gone"):
        to_float8_(mlp(device, True), every)


def test_without_a_gpu_it_is_refused():
    for is_sparse in (True, False):
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU .*got cpu"):
            to_float8_(mlp("cpu", is_sparse), every)


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "two-way"])
def test_flops_are_counted(device, is_sparse):
    model = mlp(device, is_sparse)
    to_float8_(model)
    weights = sum(p.numel() for name, p in model.named_parameters() if "bias" not in name)
    x = torch.randn(TOKENS, WIDTH, device=device)
    with float8_step(model), FlopCounterMode(display=False) as counter:
        y = model(x)
        assert counter.get_total_flops() == 2 * TOKENS * weights
        y.sum().backward()
    first = WIDTH * 2 * WIDTH // (4 if is_sparse else 1)  # x needs no gradient
    assert counter.get_total_flops() == 2 * TOKENS * (3 * weights - first)
