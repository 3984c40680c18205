"""pack_ on a CPU."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern
from sparsekern import SparseLinear, Static, sparsify_
from sparsekern.kernels.cpu import lanes
from sparsekern.nn import PackedLinear, densify_, pack_
from sparsekern.weights import save_weights, set_weights_, to_bitmasks, to_zeros, weights_of

pytestmark = pytest.mark.skipif(lanes._C is None, reason="the C++ library is not built")


def model(dtype=torch.float32):
    made = nn.Sequential(nn.Linear(130, 70), nn.ReLU(), nn.Linear(70, 30, bias=False))
    return sparsify_(made, Static(0.75), lambda *_: True).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_is_the_same_function(dtype):
    sparse = model(dtype)
    packed = pack_(copy.deepcopy(sparse), tokens=1)
    assert all(isinstance(layer, PackedLinear) for layer in packed[::2])
    bits = torch.finfo(dtype).bits // 8 + 1
    assert packed[0].packed_bytes < 2 * bits * packed[0].nnz + 500
    for shape in ((130,), (1, 130), (2, 3, 130), (0, 130), (100, 130)):
        x = torch.randn(shape).to(dtype)
        with torch.inference_mode():
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(packed(x), sparse(x), rtol=tolerance, atol=tolerance)
    assert not packed.state_dict() and not list(packed.parameters())
    twin, x = copy.deepcopy(packed), torch.randn(2, 130).to(dtype)
    assert torch.equal(twin(x.t().contiguous().t()), packed(x))
    assert torch.equal(pickle.loads(pickle.dumps(packed))(x), twin(x))
    assert torch.equal(packed.half()(x), twin(x))  # casts leave it alone
    assert "layout=lanes" in repr(packed[0])
    assert "1 tokens -> lanes" in sparsekern.explain(1, packed)
    assert "written out" in packed[0].explain(torch.zeros(4, 128, 130))
    for wrong in (-1, 1.5, True):
        for explain in (lambda x: sparsekern.explain(x, packed), packed[0].explain):
            told = f"x: expected .* tokens of at least 0, got {wrong}"
            with pytest.raises(ValueError, match=told):
                explain(wrong)


CHANGES = {
    "bias in place": lambda p: p.bias.add_(1),
    "bias moved": lambda p: setattr(p, "bias", p.bias + 1),
    "bias with gaps": lambda p: (
        setattr(p, "bias", p.bias.repeat(2).view(2, -1).t().contiguous()[:, 0])
        if p.bias.is_contiguous()
        else p.bias.add_(1)
    ),
    "values in place": lambda p: p.values.mul_(2),
    "values moved": lambda p: setattr(p, "values", p.values * 2),
    "data moved": lambda p: setattr(p.values, "data", p.values.data * 2),
    "double": lambda p: p.double(),  # which does nothing
    "to": lambda p: p._apply(torch.clone),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale(change):
    packed = pack_(model())[0]
    with torch.no_grad():
        for shape in ((1, 130), (2, 3, 130), (1, 130), (2, 3, 130)):
            x = torch.randn(shape)
            for _ in range(2):
                assert torch.equal(packed(x), packed._multiply(x))
            CHANGES[change](packed)


def test_a_copy_has_calls_of_its_own_and_a_move_frees_what_was():
    packed, x = pack_(model())[0], torch.randn(1, 130)
    with torch.no_grad():
        packed(x)
        for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(twin(x), packed(x))
            twin.values = twin.values * 2
            assert torch.equal(twin(x), twin._multiply(x)) and not torch.equal(twin(x), packed(x))
    gone = weakref.ref(packed.values)
    packed._apply(torch.clone)
    assert gone() is None


def test_layers_that_share_x_are_one_product():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(130, 70), nn.Linear(130, 30)

        def forward(self, x):
            return torch.cat([self.gate(x), self.up(x)], dim=-1)

    sparse = sparsify_(Gated(), Static(0.75), lambda *_: True)
    packed, x = pack_(copy.deepcopy(sparse), groups=[["gate", "up"]]), torch.randn(3, 130)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), sparse(x))
    assert packed.gate.shared.whole.out_features == 100
    assert packed.gate.shared.whole.layout == "lanes"


def test_a_packed_layer_compiles():
    packed = pack_(model())
    x = torch.randn(3, 130)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), packed(x))


@pytest.mark.parametrize("groups", [[], [["0", "1"]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_types_are_those_of_dense_layers(dtype, groups):
    sparse = nn.ModuleList([nn.Linear(130, 70), nn.Linear(130, 30)])
    sparse = sparsify_(sparse, Static(0.75), lambda *_: True).to(dtype)
    packed, x = pack_(copy.deepcopy(sparse), groups=groups), torch.randn(3, 130)
    torch.compiler.reset()  # what other tests compiled counts against its limit
    compiled = [torch.compile(layer, fullgraph=True, backend="eager") for layer in packed]
    with torch.no_grad():
        wants = [layer(x.to(dtype)).float() for layer in packed]
        for cast, given in itertools.product((torch.bfloat16, torch.float16), (x, x.bfloat16())):
            with torch.autocast("cpu", cast):
                found = [*(layer(given) for layer in packed), *(layer(given) for layer in compiled)]
            for y, want in zip(found, 2 * wants, strict=True):
                assert y.dtype == cast
                torch.testing.assert_close(y.float(), want, atol=0.02, rtol=0.02)
        # The part that is called later, outside, is no part of what autocast made.
        x = x.to(dtype)
        with torch.autocast("cpu", torch.float16):
            packed[0](x)
        assert packed[1](x).dtype == dtype


def test_the_op_is_registered_as_torch_wants_it():
    layer = pack_(model())[0]
    operands = (torch.randn(3, 130), *layer._packed(), layer.bias)
    torch.library.opcheck(torch.ops.sparsekern.spmm_lanes.default, operands)


def test_those_who_look_on_see_the_op():
    layer, x = pack_(model())[0], torch.randn(4, 130)
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        layer(x)
    assert "sparsekern.spmm_lanes.default" in seen
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (4, 70)


def test_wrong_calls():
    packed = pack_(model())
    layer, x = packed[0], torch.randn(2, 130)
    with pytest.raises(RuntimeError, match=r"expected x \[\.\.\., 130\], got \(2, 129\)"):
        layer(x[:, 1:])
    with pytest.raises(RuntimeError, match="expected x of dtype torch.float32, got torch.bfloat16"):
        layer(x.bfloat16())
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x.requires_grad_())
    with pytest.raises(NotImplementedError, match="for which it was packed, got x on meta"):
        layer(torch.empty(2, 130, device="meta"))
    with pytest.raises(ValueError, match="no way back"):
        densify_(packed)
    x = x.detach()
    with forward_ad.dual_level():
        assert torch.equal(layer(x), layer(x))
    for name in ("values", "heads", "bias"):
        twin = copy.deepcopy(layer)
        getattr(twin, name).untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name}: expected .* memory was freed"):
            twin(x)
    layer.cols = layer.cols[1:]
    with pytest.raises(ValueError, match="values: expected contiguous"):
        layer(torch.randn(2, 130))


def test_tangents_are_refused():
    layer, x = pack_(model())[0], torch.randn(2, 130)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="PackedLinear: it has no gradient"):
            layer(dual)
        with pytest.raises(NotImplementedError, match="spmm_lanes: .* has a tangent"):
            torch.ops.sparsekern.spmm_lanes(dual, *layer._packed())
    with pytest.raises(RuntimeError, match="PackedLinear: it has no gradient"):
        torch.func.jvp(layer, (x,), (x,))
    assert torch.equal(layer(input=x), layer(x))  # the name that nn.Linear gives it


def test_the_weight_of_a_packed_layer_is_set_before():
    layer = pack_(model())[0]
    with pytest.raises(AttributeError, match="^weight: of a PackedLinearOnCpu it cannot be set; "):
        layer.weight = nn.Parameter(torch.ones(2, 2))


def test_a_model_that_cannot_be_packed_is_left_as_it_was():
    mixed = model()
    mixed[2] = mixed[2].double()
    before = list(mixed)
    with pytest.raises(TypeError, match="weight: expected float32 or bfloat16 values, got .*64"):
        pack_(mixed)
    assert list(mixed) == before
    for name, dtype in (("values", torch.int8), ("dtype", torch.float8_e4m3fn)):
        made = model(torch.bfloat16)
        before = list(made)
        with pytest.raises(NotImplementedError, match=f"0: {name}: .* is for a weight on a GPU"):
            pack_(made, **{name: dtype})
        assert list(made) == before
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got SparseTensor"):
        pack_(model()[0].weight)


def test_no_input_features():
    with pytest.warns(UserWarning, match="zero-element"):
        dense = nn.Linear(0, 4)
    nn.init.normal_(dense.bias)
    packed = pack_(nn.Sequential(SparseLinear.from_linear(dense, torch.ones(4, 0).bool())))
    for shape in ((0,), (3, 0), (2, 3, 0)):
        x = torch.randn(shape)
        assert torch.equal(packed(x), dense(x).detach())


@pytest.mark.parametrize("groups", [(), [["a", "b"]]], ids=["alone", "in a group"])
def test_no_file_is_written_of_a_packed_model(tmp_path, groups):
    layers = nn.ModuleDict({"a": nn.Linear(130, 70), "b": nn.Linear(130, 70)})
    made = nn.ModuleDict({"block": sparsify_(layers, Static(0.75), lambda *_: True)})
    weights, path = weights_of(made), tmp_path / "model.safetensors"
    save_weights(made, path)
    before, packed = path.read_bytes(), pack_(made, groups=groups)
    assert packed["block"]["b"].weight.shape == (70, 130)
    for call in (
        lambda: save_weights(packed, path),
        lambda: to_zeros(packed),
        lambda: to_bitmasks(packed),
        lambda: set_weights_(packed, weights),
    ):
        with pytest.raises(ValueError, match="weights: block.a is packed for inference.* before"):
            call()
    assert path.read_bytes() == before


def test_torchs_encoder_takes_packed_layers():
    """Its kernel for dense weights is not for them."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    sparsify_(encoder, Static(0.5), lambda module, name: True)
    twin = densify_(copy.deepcopy(encoder))
    pack_(encoder)
    x = torch.randn(2, 3, 8)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), twin(x))
    with pytest.raises(TypeError, match="linear: a packed weight holds no numbers"):
        nn.functional.linear(x, encoder.linear2.weight)
