"""accelerate_ on each kind of layer: the same function, and the way back; what stays dense, why."""

import copy
import pickle
from functools import partial

import pytest
import torch
from pruned_models import (
    KINDS,
    LM,
    Attention,
    Conv1D,
    H,
    kinds,
    pruned,
    same_state,
    sparse_is_faster,
)
from torch import nn
from torch.nn.utils import parametrize, prune

from sparsekern import accelerate_, densify_
from sparsekern.models.example import error_between
from sparsekern.nn import pack_, stand_ins
from sparsekern.nn.stand_ins import SparseMultiheadAttention


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    return sparse_is_faster(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_computes_the_same_and_goes_back(kind):
    make, shape, sparse = KINDS[kind]
    model = pruned(nn.Sequential(make()))
    twin, before = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(shape)
    report = accelerate_(model, x)
    assert sum(type(m) is sparse for m in model.modules()) == 1
    assert len(report.sparse) == 1 and report.output_error < 1e-6
    got, want = model(x), twin(x)
    got, want = (y[0] if isinstance(y, tuple) else y for y in (got, want))
    torch.testing.assert_close(got, want)
    assert got.is_contiguous()
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        again.load_state_dict(model.state_dict())
        y = again(x)
        torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, got, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=f"a dense weight, but the layer is a {sparse.__name__}"):
        model.load_state_dict(before, strict=False)  # the keys would be unexpected, which is none
    densify_(model)
    back = [name.replace("Own", "Linear") for name in kinds(twin)]  # a subclass of no other use
    assert kinds(model) == back and same_state(model, before)
    y = model(x)
    torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = pruned(nn.Sequential(nn.Linear(H, 96), nn.GELU(), nn.Linear(96, H))).to(dtype)
    x = torch.randn(5, H, dtype=dtype)
    want = model(x)
    assert len(accelerate_(model, x).sparse) == 2
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(("dims", "size"), [(2, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("of", ["weight", "x"])
def test_channels_last_stays_channels_last(of, dims, size):
    last = stand_ins.CHANNELS_LAST[dims]
    model = pruned(nn.Sequential([nn.Conv2d, nn.Conv3d][dims - 2](96, 48, size)))
    x = torch.randn(2, 96, *(4, 5, 6)[:dims])
    if of == "weight":
        model.to(memory_format=last)
    else:
        x = x.to(memory_format=last)
    strides, want = model[0].weight.stride(), model(x)
    accelerate_(model, x)
    assert model(x).stride() == want.stride() and want.is_contiguous(memory_format=last)
    assert model(x[0]).shape == want[0].shape
    assert densify_(model)[0].weight.stride() == strides


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_takes_masks_and_gives_weights(batch_first):
    model = pruned(Attention(batch_first=batch_first, dropout=0.1))
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, H) if batch_first else torch.randn(5, 2, H)
    accelerate_(model, x)
    assert type(model.inner) is SparseMultiheadAttention
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    cases = [
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal.isinf(), "key_padding_mask": padding, "average_attn_weights": False},
        {"attn_mask": torch.randn(8, 5, 5)},
    ]
    for case in cases:
        for got, want in zip(model(x, **case), twin(x, **case), strict=True):
            torch.testing.assert_close(got, want)
        assert model(x, **case)[0].is_contiguous()
    q, kv = torch.randn(3, H), torch.randn(4, H)  # one sequence, and keys of another
    for got, want in zip(model.inner(q, kv, kv), twin.inner(q, kv, kv), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_leaves_its_fast_path():
    layer = nn.TransformerEncoderLayer(H, 4, 128, batch_first=True)
    model = pruned(nn.TransformerEncoder(layer, 2))
    twin = copy.deepcopy(model)
    x, padding = torch.randn(2, 5, H), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    report = accelerate_(model, {"src": x})
    assert len(report.sparse) == 6
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
        got, want = (m(x, src_key_padding_mask=padding) for m in (model, twin))
    torch.testing.assert_close(got[~padding], want[~padding])


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_stays_dense_is_named_with_its_reason():
    class Model(LM):
        def __init__(self):
            super().__init__()
            self.scaled, self.small, self.unused = Scaled(H, H), nn.Linear(H, 8), nn.Linear(H, H)
            self.shift = nn.Parameter(torch.zeros(2, H))
            self.late = nn.Linear(H, H)
            self.late.register_forward_hook(lambda module, x, y: y + 1)
            self.marked = nn.Linear(H, H)
            self.marked.weight.requires_dense = True
            self.conv = nn.Conv2d(H, H, 3, groups=2)

    model = pruned(Model())
    model.blocks[1][0].weight.data = torch.randn(H, H)
    report = accelerate_(model, {"input_ids": torch.arange(5)[None]})
    reasons = {s.name: s.reason for s in report.skipped} | {s.name: s.reason for s in report.layers}
    expected = {
        "": "more than multiply",
        "embed": "looked up",
        "head": "tied",
        "blocks.0.0": "",
        "blocks.1.0": "too dense",
        "scaled": "forward of its own",
        "small": "too small",
        "unused": "never calls it",
        "late": "hooks",
        "marked": "requires_dense",
        "conv": "in 2 groups",
    }
    for name, words in expected.items():
        assert words in reasons[name], name
    assert {layer.name for layer in report.sparse} == {"blocks.0.0", "blocks.2.0"}


def test_masks_of_torch_prune_are_taken_exactly():
    model = nn.Sequential(nn.Linear(H, 96), nn.ReLU(), nn.Linear(96, H))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.75)
    with torch.no_grad():
        kept = model[0].weight_mask.nonzero()[0]
        model[0].weight_orig[tuple(kept)] = 0.0  # a weight that is kept, and zero
    x, count = torch.randn(5, H), int(model[0].weight_mask.sum())
    want = model(x)
    report = accelerate_(model, x)
    assert report.layers[0].before_s == 4.0 and report.layers[0].dense_s == 2.0
    assert model[0].values.shape[0] == count
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("kind", ["Conv1D", "conv 2d", "attention"])
def test_masks_on_other_modules_have_to_be_removed_first(kind):
    make, shape, _ = KINDS[kind]
    module = make()
    masked, name = (module.inner, "in_proj_weight") if kind == "attention" else (module, "weight")
    prune.l1_unstructured(masked, name, amount=0.75)
    with pytest.raises(ValueError, match=r"masks its \w+: call its remove\(\) first"):
        accelerate_(nn.Sequential(module), torch.randn(shape))


def test_masks_are_multiplied_in_where_dense_is_faster(seconds):
    seconds["sparse"] = 3.0
    model = nn.Sequential(nn.Linear(H, 96))
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    x = torch.randn(5, H)
    want = model(x)
    report = accelerate_(model, x)
    assert not report.sparse and set(dict(model.named_parameters())) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model(x), want)


def test_a_layer_of_which_a_mask_leaves_nothing():
    model, x = nn.Sequential(nn.Linear(H, 96)), torch.randn(5, H)
    prune.l1_unstructured(model[0], "weight", amount=1.0)
    assert accelerate_(model, x).sparse
    torch.testing.assert_close(model(x), model[0].bias.expand(5, 96))


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_packed_layers_have_no_way_back(kind):
    make, shape, _ = KINDS[kind]
    model = pruned(nn.Sequential(make())).bfloat16()
    x = torch.randn(shape, dtype=torch.bfloat16)
    accelerate_(model, x)
    pack_(model)
    before = kinds(model)
    with pytest.raises(ValueError, match="is packed, and from that there is no way back"):
        densify_(model)
    assert kinds(model) == before
    with pytest.raises(ValueError, match=r"1 \w+ \(7\d % zeros\): sparse already"):
        accelerate_(model, x)


def test_something_else_under_the_name_of_conv1d_stays_dense():
    class Other(Conv1D):
        def forward(self, x):
            return super().forward(x).relu()

    Other.__name__ = "Conv1D"
    model = pruned(nn.Sequential(Other(96, H)))
    report = accelerate_(model, torch.randn(3, H))
    assert not report.sparse and "something else" in report.layers[0].reason


def test_weights_of_other_types_are_said_to_stay():
    model = nn.Sequential(*pruned(nn.Sequential(nn.Linear(H, H))))
    model.append(nn.Linear(H, H, dtype=torch.complex64))
    model.append(nn.Linear(H, H, device="meta"))
    model[2].weight = nn.Parameter(torch.zeros(H, H).to(torch.float8_e4m3fn), requires_grad=False)
    model.append(nn.Linear(H, H))
    model[3].weight = nn.Parameter(torch.eye(H).to_sparse_csr())
    model.append(nn.Module())
    model[4].register_buffer("qweight", torch.zeros(H, H, dtype=torch.int32))
    report = accelerate_(model, lambda m: m[0](torch.ones(2, H)))
    reasons = [skipped.reason for skipped in report.skipped]
    assert reasons.pop() == "its qweight is a buffer, no Parameter"
    assert "complex64" in reasons[0] and "float8" in reasons[1] and "sparse_csr" in reasons[2]
    assert report.skipped[2].sparsity == 1 - 1 / H


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.rand(H, H) > 0.75)

    def forward(self, w):
        return w * self.mask


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:torch.quantize_per_tensor")
def test_weights_that_are_made_in_each_call_are_named():
    model = pruned(nn.Sequential(nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)))
    parametrize.register_parametrization(model[0], "weight", Masked())
    model[1].register_state_dict_post_hook(lambda *_: None)
    prune.l1_unstructured(model[2], "weight", 0.75)
    prune.l1_unstructured(model[2], "bias", 0.5)
    model.append(pruned(nn.Linear(H, H)))
    model.append(torch.jit.trace(pruned(nn.Linear(H, H)), torch.ones(1, H)))
    model.append(torch.ao.nn.quantized.dynamic.Linear(H, H))
    report = accelerate_(model, torch.randn(3, H))
    words = [s.reason for s in report.skipped]
    expected = ["remove_parametrizations", "hooks", "its weight, bias", "torch.jit", "quantized"]
    assert len(words) == 5 and all(a in b for a, b in zip(expected, words, strict=True)), words
    assert [s.name for s in report.skipped] == ["0", "1", "2", "4", "5"]
    assert min(s.sparsity for s in report.skipped[:4]) > 0.7


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_kernel_of_one_place_needs_no_padding(padding):
    model, x = pruned(nn.Sequential(nn.Conv1d(H, 96, 1, padding=padding))), torch.randn(2, H, 5)
    want = model(x)
    assert accelerate_(model, x).sparse
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model[0](input=x), want)


def _note_length(sizes, module, x, y):
    sizes.append(len(y))


def test_columns_of_a_convolution_are_gathered_in_parts(monkeypatch):
    model, x = pruned(nn.Sequential(nn.Conv2d(16, 48, 3, padding=1))), torch.randn(5, 16, 6, 7)
    want = model(x)
    report = accelerate_(model, x)
    assert report.layers[0].tokens == {5 * 6 * 7: 1} and report.layers[0].shapes == ((48, 144),)
    for most, parts, lengths in ((2**20, 1, 5), (2 * 42 * 144 * 4, 3, 5), (1, 30, 30)):
        monkeypatch.setattr(stand_ins, "COLUMNS_BYTES", most)
        sizes: list[int] = []
        handle = model[0].linear.register_forward_hook(partial(_note_length, sizes))
        torch.testing.assert_close(model(x), want)
        handle.remove()
        assert len(sizes) == parts and sum(sizes) == lengths
        torch.testing.assert_close(model(x[0]), want[0])
        torch.testing.assert_close(torch.vmap(model)(x), want)
        torch.testing.assert_close(torch.vmap(model, chunk_size=2)(x[:, None])[:, 0], want)
    assert model(x[:0]).shape == (0, 48, 6, 7)
    for wrong in (x[0, 0], x[None]):
        with pytest.raises(RuntimeError) as expected:
            nn.Conv2d(16, 48, 3)(wrong)
        with pytest.raises(RuntimeError) as got:
            model(wrong)
        assert str(got.value) == str(expected.value)


def test_arguments_by_the_names_that_torch_gives_them():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(H, H)

        def forward(self, x):
            return self.layer(input=x)

    assert accelerate_(pruned(Named()), torch.randn(3, H)).sparse


@pytest.mark.parametrize(
    ("masks", "name"),
    [
        ({"is_causal": True}, "is_causal"),
        ({"attn_mask": torch.zeros(1, 5, 5)}, "attn_mask"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.long)}, "attn_mask"),
        ({"key_padding_mask": torch.zeros(1, 5)}, "key_padding_mask"),
    ],
)
def test_attention_refuses_the_masks_that_the_dense_one_refuses(masks, name):
    model = pruned(Attention(batch_first=True))
    x = torch.randn(2, 5, H)
    with pytest.raises((RuntimeError, AssertionError)):
        model(x, **masks)
    accelerate_(model, x)
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        model(x, **masks)


def test_an_optimizer_that_holds_parts_of_a_stand_in_is_refused():
    model = pruned(Attention())
    accelerate_(model, torch.randn(5, 2, H))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="make a new optimizer"):
        densify_(model, optimizer)
    assert type(model.inner) is SparseMultiheadAttention


class Rounded(nn.Linear):
    """What torch may do for float32 where a setting allows it."""

    def __call__(self, x):
        return super().__call__(x).bfloat16().float()


def test_float32_that_torch_multiplies_in_bfloat16_is_no_other_function():
    report = accelerate_(pruned(nn.Sequential(Rounded(H, 96))), torch.randn(5, H))
    assert len(report.sparse) == 1 and 1e-4 < report.output_error < 1e-2


class Patches(nn.Module):
    """As models of images ask their convolutions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 48, 3, stride=2, padding=1, padding_mode="reflect")

    def forward(self, x):
        conv = self.conv
        assert (conv.stride, conv.padding, conv.out_channels) == ((2, 2), (1, 1), 48)
        assert conv.padding_mode == "reflect" and conv.bias.shape == (48,)
        return conv(x.to(conv.weight.device, conv.weight.dtype))


def test_a_convolution_that_is_asked_for_its_settings():
    model, x = pruned(Patches()), torch.randn(2, 16, 9, 7, dtype=torch.double)
    want = model(x)
    assert accelerate_(model, x).sparse
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), want)
    pack_(model.bfloat16())
    weight = model.conv.weight
    assert weight.dtype == torch.bfloat16 and weight.device == torch.device("cpu")
    assert weight.shape == (48, 9 * 16)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_input_that_is_not_finite_is_no_other_function(bad):
    model, x = pruned(nn.Sequential(nn.Linear(H, 96))), torch.randn(5, H)
    x[1, 2] = bad
    report = accelerate_(model, x)
    assert len(report.sparse) == 1 and report.output_error < 1e-6


def test_an_output_that_is_not_finite_any_more_is_another_function():
    assert error_between(torch.ones(3), torch.tensor([1, torch.nan, 1])) == torch.inf
    assert error_between(torch.tensor([1, torch.nan]), torch.tensor([1.0, 2.0])) == 0
    assert error_between(torch.tensor([1.0, -torch.inf]), torch.tensor([2, -torch.inf])) == 1
