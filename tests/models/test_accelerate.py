"""accelerate_ on toy models of each kind: the same function, all or nothing, and a report that says
what was done. Times are given by the tests, so that no clock decides."""

import copy
import json
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sparsekern import SparseLinear, Static, accelerate_, densify_, sparsify_
from sparsekern.models import accelerate, measure
from sparsekern.nn.stand_ins import (
    SparseConv,
    SparseConv1D,
    SparseExperts,
    SparseMultiheadAttention,
)
from sparsekern.sparsity import Group, Magnitude

H = 64


class Conv1D(nn.Module):
    """As transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], self.nf)


class Experts(nn.Module):
    """As transformers has them, of three with two for each token."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.limit = 3, 2.0
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * 48, H) / 8)
        self.down_proj = nn.Parameter(torch.randn(3, H, 48) / 8)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate.clamp(max=self.limit)) * up

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            tokens, at = torch.where(top_k_index == e)
            h = self._apply_gate(hidden_states[tokens] @ self.gate_up_proj[e].T)
            h = h @ self.down_proj[e].T * top_k_weights[tokens, at, None]
            y.index_add_(0, tokens, h)
        return y


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(H, 3), Experts()

    def forward(self, x):
        weights, index = self.router(x.flatten(0, -2)).softmax(-1).topk(2)
        return self.experts(x.flatten(0, -2), index, weights).view_as(x)


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.inner = nn.MultiheadAttention(H, 4, **settings)

    def forward(self, x, **masks):
        return self.inner(x, x, x, **masks)


class Own(nn.Linear):
    """A subclass that only holds a weight."""


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class LM(nn.Module):
    """Embeddings tied to a head, and blocks between."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, H)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(H, H), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(H, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, scale=1.0):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return {"logits": self.head(x) * scale}


@torch.no_grad()
def pruned(model, share=0.75):
    for p in model.parameters():
        if p.ndim > 1:
            p *= torch.rand_like(p) >= share
    return model.eval()


@pytest.fixture(autouse=True)
def sparse_is_twice_as_fast(monkeypatch):
    """By the clock of these tests; `seconds` may be changed."""
    seconds = {"before": 4.0, "dense": 2.0, "sparse": 1.0, "whole": 9.0}

    def usual_seconds(runs, *_):
        return {name: seconds[name] for name in runs}

    monkeypatch.setattr(measure, "usual_seconds", usual_seconds)
    monkeypatch.setattr(accelerate, "seconds_of", lambda run, device: seconds["whole"])
    return seconds


def first(output):
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def kinds(model):
    return [type(m).__name__ for m in model.modules()]


def same_state(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


KINDS = {
    "linear": (lambda: nn.Linear(H, 96), (7, H), SparseLinear),
    "no bias": (lambda: nn.Linear(H, 96, bias=False), (2, 7, H), SparseLinear),
    "subclass": (lambda: Own(H, 96), (7, H), SparseLinear),
    "Conv1D": (lambda: Conv1D(96, H), (2, 7, H), SparseConv1D),
    "square Conv1D": (lambda: Conv1D(H, H), (2, 7, H), SparseConv1D),
    "conv 1d": (lambda: nn.Conv1d(H, 96, 1), (2, H, 9), SparseConv),
    "conv 2d": (lambda: nn.Conv2d(H, 96, 1, stride=2, bias=False), (2, H, 9, 7), SparseConv),
    "attention": (lambda: Attention(batch_first=True), (2, 5, H), SparseMultiheadAttention),
    "experts": (Mixture, (2, 9, H), SparseExperts),
}


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


def test_channels_last_stays_channels_last():
    model = pruned(nn.Sequential(nn.Conv2d(H, 96, 1)))
    x = torch.randn(2, H, 5, 6).to(memory_format=torch.channels_last)
    accelerate_(model, x)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert model(x[0]).shape == (96, 5, 6)


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
            self.conv = nn.Conv2d(H, H, 3)

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
        "conv": "several places",
    }
    for name, words in expected.items():
        assert words in reasons[name], name
    assert {layer.name for layer in report.sparse} == {"blocks.0.0", "blocks.2.0"}


def test_a_layer_that_is_faster_dense_stays_dense(sparse_is_twice_as_fast):
    sparse_is_twice_as_fast["sparse"] = 1.95
    model = pruned(LM())
    before = list(model.parameters())
    report = accelerate_(model, {"input_ids": torch.arange(5)[None]})
    assert not report.sparse and "no faster" in report.layers[0].reason
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


def test_a_model_that_is_slower_as_a_whole_goes_back(sparse_is_twice_as_fast, monkeypatch):
    whole = iter([1.0, 2.0, 1.5])
    monkeypatch.setattr(accelerate, "seconds_of", lambda run, device: next(whole))
    model = pruned(LM())
    twin = copy.deepcopy(model)
    report = accelerate_(model, {"input_ids": torch.arange(5)[None]})
    assert not report.sparse and "1.50 times as long" in report.layers[0].reason
    assert kinds(model) == kinds(twin) and same_state(model, twin.state_dict())


def test_tokens_of_the_example_and_of_generation_are_counted():
    model = pruned(LM())
    report = accelerate_(model, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, new_tokens=7)
    layer = report.layers[0]
    assert layer.tokens == {10: 1, 2: 7}
    assert (layer.before_s, layer.after_s) == (16.0, 8.0)
    assert report.before_s == 9.0 * 8 and report.expected_after_s == 9.0 * 8 - 3 * 8.0
    model = pruned(LM())
    report = accelerate_(model, lambda m: [m(torch.zeros(1, n, dtype=torch.long)) for n in (5, 1)])
    assert report.layers[0].tokens == {5: 1, 1: 1}
    assert accelerate_(pruned(LM()), (torch.arange(3), 2.0)).layers[0].tokens == {3: 1}


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
    with pytest.raises(ValueError, match=r"masks it: call its remove\(\) first"):
        accelerate_(nn.Sequential(module), torch.randn(shape))


def test_masks_are_multiplied_in_where_dense_is_faster(sparse_is_twice_as_fast):
    sparse_is_twice_as_fast["sparse"] = 3.0
    model = nn.Sequential(nn.Linear(H, 96))
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    x = torch.randn(5, H)
    want = model(x)
    report = accelerate_(model, x)
    assert not report.sparse and set(dict(model.named_parameters())) == {"0.weight", "0.bias"}
    torch.testing.assert_close(model(x), want)


def test_nan_as_a_mark():
    model = pruned(LM())
    twin = copy.deepcopy(model)
    ids = {"input_ids": torch.arange(5)[None]}
    with torch.no_grad():
        model.blocks[0][0].weight.masked_fill_(model.blocks[0][0].weight == 0, torch.nan)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks.0.0.weight: \d+ of 4096 .* nan_is_pruned=True"):
        accelerate_(model, ids)
    with pytest.raises(ValueError, match="did not run"):
        accelerate_(model, {"input_ids": "text"}, nan_is_pruned=True)
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k], equal_nan=True, rtol=0, atol=0)
    accelerate_(model, ids, nan_is_pruned=True)
    torch.testing.assert_close(first(model(**ids)), first(twin(**ids)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["make", "look"])
def test_a_failure_leaves_the_model_as_it_was(kind, at, monkeypatch):
    make, shape, _ = KINDS[kind]
    model = pruned(nn.Sequential(make(), nn.Identity())).train()
    held = dict(model.named_parameters())  # these are the same afterwards
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    if kind in ("linear", "experts"):
        held = {}  # and these are made anew
    x = torch.randn(shape)

    def fail(*_):
        raise MemoryError

    if at == "make":
        monkeypatch.setattr(accelerate.Exchange, "_put", _then(accelerate.Exchange._put, fail))
    else:
        monkeypatch.setattr(accelerate, "error_between", fail)
    with pytest.raises(MemoryError):
        accelerate_(model, x)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert same_state(model, before) and all(m.training for m in model.modules())
    assert all(held[n] is p for n, p in model.named_parameters() if held)
    model(x)


def _then(do, fail):
    """do(), and fail() the first time."""
    done = []

    def both(*arguments):
        do(*arguments)
        if not done:
            done.append(1)
            fail()

    return both


def test_a_module_in_two_places_and_modes_of_training():
    layer = nn.Linear(H, H)
    model = pruned(nn.Sequential(layer, nn.Dropout(), nn.Sequential(layer)))
    model[1].train()
    report = accelerate_(model, torch.randn(3, H))
    assert model[0] is model[2][0] and report.layers[0].tokens == {3: 2}
    assert model[1].training and not model[0].training


def test_inside_inference_mode_the_tensors_are_ordinary():
    model = pruned(nn.Sequential(nn.Linear(H, H)))
    with torch.inference_mode():
        accelerate_(model, torch.randn(3, H))
    assert not model[0].values.is_inference() and not model[0].col_indices.is_inference()


def test_autocast_in_the_example():
    model = pruned(nn.Sequential(nn.Linear(H, 96)))

    def example(m):
        with torch.autocast("cpu", torch.bfloat16):
            return m(torch.randn(3, H))

    assert accelerate_(model, example).sparse


def test_the_report_as_text_json_and_html():
    report = accelerate_(pruned(LM()), {"input_ids": torch.arange(5)[None]})
    text = str(report)
    assert "3 of 3 layers with zeros are sparse now" in text
    assert re.search(r"3 x blocks\.\*\.\* .*64 x 64.*2\.00 x", text)
    assert "tied: another module has the same weight" in text
    data = json.loads(report.to_json())
    assert [layer["name"] for layer in data["layers"]] == [f"blocks.{i}.0" for i in range(3)]
    assert data["layers"][0]["after_s"] == 1.0 and data["skipped"]
    page = report.to_html()
    assert page.startswith("<!DOCTYPE html>") and "blocks.2.0" in page


def test_a_second_call_says_that_layers_are_sparse_already():
    model = pruned(LM())
    ids = {"input_ids": torch.arange(5)[None]}
    accelerate_(model, ids)
    with pytest.raises(ValueError, match=r"3 SparseLinear \(7.*% zeros\): sparse already"):
        accelerate_(model, ids)


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(H, H)), torch.ones(1, H), {}, ValueError, "1 Linear"),
        (lambda: nn.ReLU(), torch.ones(1, H), {}, ValueError, "no matrices at all"),
        (lambda: pruned(nn.Linear(H, H)), torch.ones(1, H), {}, TypeError, "Sequential"),
        (lambda: pruned(LM()), "text", {}, TypeError, "example: expected a tensor"),
        (lambda: pruned(LM()), torch.ones(1, H), {}, ValueError, "example: the model did not run"),
        (lambda: pruned(LM()), torch.arange(3), {"new_tokens": -1}, ValueError, "new_tokens"),
        (lambda: pruned(LM()), lambda m: m, {"new_tokens": 1}, ValueError, "new_tokens"),
        (lambda: "model", torch.ones(1, H), {}, TypeError, "model: expected"),
        (lambda: pruned(LM()).to("meta"), torch.arange(3), {}, NotImplementedError, "meta"),
    ],
)
def test_wrong_input_is_named(model, example, options, error, words):
    with pytest.raises(error, match=words):
        accelerate_(model(), example, **options)


def test_compiled_models_are_refused_with_what_to_do():
    compiled = nn.Sequential(pruned(LM()))
    compiled._orig_mod = compiled[0]  # what torch.compile returns has it
    with pytest.raises(TypeError, match="_orig_mod"):
        accelerate_(compiled, torch.arange(3))


def test_something_else_under_the_name_of_conv1d_stays_dense():
    class Other(Conv1D):
        def forward(self, x):
            return super().forward(x).relu()

    Other.__name__ = "Conv1D"
    model = pruned(nn.Sequential(Other(96, H)))
    report = accelerate_(model, torch.randn(3, H))
    assert not report.sparse and "something else" in report.layers[0].reason


def test_the_clock_of_a_layer_takes_turns(monkeypatch):
    monkeypatch.undo()
    model = pruned(nn.Sequential(nn.Linear(256, 256)), 0.95)
    report = accelerate_(model, torch.randn(4, 256))
    layer = report.layers[0]
    assert min(layer.before_s, layer.sparse_s, report.before_s, report.after_s) > 0


# Pruning of what is pruned


def test_pruning_a_pruned_model_asks_first():
    model = pruned(nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)))
    before = kinds(model)
    with pytest.raises(ValueError, match=r"7\d% .*accelerate_.* prune_again=True"):
        sparsify_(model, Static(0.8, init_method="magnitude"))
    assert kinds(model) == before
    sparsify_(copy.deepcopy(model), Static(0.8, init_method="magnitude"), prune_again=True)
    sparsify_(model, Static(0.8, init_method="from_zeros"))  # removes nothing
    assert "SparseLinear" in kinds(model)


def test_algorithms_ask_too():
    model = pruned(nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)))
    before = list(model)
    for algorithm in (Magnitude(0.8), Group([Static(0.8)])):
        with pytest.raises(ValueError, match=r"apply: 7\d% .* prune_again=True"):
            algorithm.apply(model)
        assert [id(m) for m in model] == [id(m) for m in before]
    Magnitude(0.8).apply(model, prune_again=True)
    assert model[0].weight.sparsity == pytest.approx(0.8, abs=1e-3)


def test_pruning_conv1d():
    model = nn.Sequential(Conv1D(96, H))
    weight = model[0].weight.detach().clone()
    sparsify_(model, Static(0.5, init_method="magnitude"))
    assert type(model[0]) is SparseConv1D
    kept = densify_(model)[0].weight
    assert type(model[0]) is Conv1D and kept.shape == (H, 96)
    assert int((kept == weight).sum()) == H * 96 // 2


def test_heads_are_spared_by_their_place():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.ModuleList(nn.Sequential(nn.Linear(H, H)) for _ in range(2))
            self.pooler, self.classifier = nn.Linear(H, H), nn.Linear(H, 3)

    model = sparsify_(Classifier(), Static(0.5))
    assert type(model.pooler) is type(model.classifier) is nn.Linear
    assert all(type(block[0]) is SparseLinear for block in model.encoder)


def test_an_optimizer_that_holds_parts_of_a_stand_in_is_refused():
    model = pruned(Attention())
    accelerate_(model, torch.randn(5, 2, H))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="make a new optimizer"):
        densify_(model, optimizer)
    assert type(model.inner) is SparseMultiheadAttention


def test_weights_of_other_types_are_said_to_stay():
    model = nn.Sequential(*pruned(nn.Sequential(nn.Linear(H, H))))
    model.append(nn.Linear(H, H, dtype=torch.complex64))
    model.append(nn.Linear(H, H, device="meta"))
    model[2].weight = nn.Parameter(torch.zeros(H, H).to(torch.float8_e4m3fn), requires_grad=False)
    model.append(nn.LazyLinear(3))
    report = accelerate_(model, lambda m: m[0](torch.ones(2, H)))
    reasons = [skipped.reason for skipped in report.skipped]
    assert "complex64" in reasons[0] and "float8" in reasons[1] and "no shape" in reasons[2]
