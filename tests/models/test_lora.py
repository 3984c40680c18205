"""LoRA adapters on sparse layers: trained, saved, merged both ways, and left alone by pruning."""

import copy
import warnings

import pytest
import torch
from pruned_models import pruned, sparse_is_faster
from torch import nn

from sparsekern import SparseLinear, Static, accelerate_, sparsify_
from sparsekern.sparsity import Magnitude, SparseGPT


class Adapted(nn.Module):
    """A layer with an adapter, by the marks of peft's."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_algorithms_leave_adapters_alone():
    x = torch.randn(32, 16)
    for algorithm in (Magnitude(0.5), Static(0.5), SparseGPT(0.5, calibration=[x])):
        model = nn.Sequential(Adapted(nn.Linear(16, 16)), nn.Linear(16, 8))
        model[0].base_layer.requires_grad_(False)
        algorithm.apply(model)
        assert list(algorithm.layers) == ["0.base_layer", "1"]
        assert not model[0].base_layer.values.requires_grad
        assert type(model[0].lora_A["default"]) is nn.Linear
    sparse = sparsify_(Adapted(nn.Linear(16, 16)), Static(0.5))
    assert sum(isinstance(m, SparseLinear) for m in sparse.modules()) == 1
    with pytest.raises(ValueError, match=r"matches no layer; there are: base_layer$"):
        Static(0.5, param_filter="*lora_A*").apply(Adapted(nn.Linear(16, 16)))


def test_a_weight_with_a_merged_adapter_stays_dense(monkeypatch):
    sparse_is_faster(monkeypatch)
    model = pruned(nn.Sequential(Adapted(nn.Linear(64, 64)), Adapted(nn.Linear(64, 64))))
    model[1].merged_adapters = ["default"]
    report = accelerate_(model, torch.randn(3, 64))
    assert [layer.name for layer in report.sparse] == ["0.base_layer"]
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert "an adapter is merged into it" in reasons["1.base_layer"]


def test_a_weight_cannot_be_set_to_another():
    layer = SparseLinear.from_linear(nn.Linear(8, 8))
    layer.weight = layer.weight
    for other in (SparseLinear.from_linear(nn.Linear(8, 8)).weight, nn.Parameter(torch.eye(8))):
        with pytest.raises(AttributeError, match="weight: of a SparseLinear it cannot be set; `va"):
            layer.weight = other


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.last = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.down(self.up(x).relu()))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))


def adapted(peft, **settings):
    from sparsekern.models import lora  # noqa: F401

    model = sparsify_(Net(), Static(0.75, "magnitude"), lambda module, name: name != "last")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["up", "down", "last"]} | settings)
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(5):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def sparse_layers(model):
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_an_adapter_on_a_dense_model_that_accelerate_made_sparse(peft, merge, monkeypatch):
    # Nobody has imported sparsekern.models.lora here, if this test runs alone.
    sparse_is_faster(monkeypatch)
    net = pruned(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64)))
    config = peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
    model = peft.get_peft_model(net, config).eval()
    x = torch.randn(3, 128)
    with torch.no_grad():
        want = model(x)
        assert len(accelerate_(model, x).sparse) == 2
        torch.testing.assert_close(model(x), want)
        with warnings.catch_warnings(record=True):
            merged = getattr(model, merge)() or model
        torch.testing.assert_close(merged(x), want)
        if merge == "merge_adapter":
            model.unmerge_adapter()
            assert len(sparse_layers(model)) == 2
            torch.testing.assert_close(model(x), want)


def test_lora_on_sparse_layers(peft, tmp_path):
    from sparsekern.models import lora

    model = adapted(peft)
    assert sum(isinstance(m, lora.SparseLora) for m in model.modules()) == 2
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    want = model(X)
    model.save_pretrained(tmp_path)
    base = sparsify_(Net(), Static(0.75, "magnitude"), lambda module, name: name != "last")
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path).eval()(X), want)
    with pytest.warns(UserWarning, match="B A is dense"):
        model.merge_adapter()
    assert not sparse_layers(model)
    torch.testing.assert_close(model(X), want)
    model.unmerge_adapter()
    assert len(sparse_layers(model)) == 2
    torch.testing.assert_close(model(X), want)
    assert len(sparse_layers(model.unload())) == 2


def test_merged_into_the_pattern_or_exactly(peft):
    from sparsekern.models.lora import merge_

    model = adapted(peft)
    want = model(X)
    exact = merge_(copy.deepcopy(model), keep_pattern=False)
    assert not sparse_layers(exact) and type(exact) is Net
    torch.testing.assert_close(exact(X), want)
    before = copy.deepcopy(sparse_layers(model))
    delta = model.base_model.model.up.get_delta_weight("default")
    with pytest.warns(UserWarning, match=r"of \|B A\|\^2 lay where nothing is stored"):
        kept = merge_(model, keep_pattern=True)
    assert type(kept) is Net and torch.equal(kept.up.col_indices, before[0].col_indices)
    mask = kept.up.weight.to_dense() != 0
    change = kept.up.weight.to_dense() - before[0].weight.to_dense()
    torch.testing.assert_close(change, delta * mask)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora: sparse layers have plain LoRA, got True"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights: a sparse layer begins with .* 'pissa'",
        ),
    ],
)
def test_what_needs_a_dense_weight_is_refused(peft, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(peft, **settings)


def test_pruned_after_the_adapter_was_there(peft):
    from sparsekern.models.lora import merge_

    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
    Magnitude(0.75).apply(model)
    other = copy.deepcopy(model)
    want = model(X)
    merged = merge_(model, keep_pattern=False)
    torch.testing.assert_close(merged(X), want)
    with warnings.catch_warnings(record=True):
        torch.testing.assert_close(other.merge_and_unload()(X), want)


def test_an_adapter_that_is_not_finite_changes_nothing(peft):
    from sparsekern.models.lora import merge_

    model = adapted(peft, target_modules=["up", "down"])
    before = [layer.values.clone() for layer in sparse_layers(model)]
    with torch.no_grad():
        model.base_model.model.down.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="adapter 'default' has others"):
        merge_(model, keep_pattern=True)
    after = [layer.values for layer in sparse_layers(model)]
    assert all(map(torch.equal, before, after))
    with pytest.raises(TypeError, match="expected a model of peft's with LoRA adapters, got Net"):
        merge_(Net(), keep_pattern=True)


def test_adapters_are_looked_at_before_any_layer_changes(peft):
    from sparsekern.models.lora import merge_

    for keep_pattern in (True, False):
        model = adapted(peft)
        with pytest.raises(ValueError, match="expected a list of some of default, got .'other'."):
            merge_(model, keep_pattern=keep_pattern, adapter_names=["other"])
        model.base_model.model.last.lora_A["default"].weight.data[0, 0] = torch.inf  # a dense layer
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        with pytest.raises(ValueError, match="adapter 'default' has others in .*last.lora_A"):
            merge_(model, keep_pattern=keep_pattern)
        after = model.state_dict()
        assert list(model.modules()) == modules and before.keys() == after.keys()
        assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_dense_weights_with_zeros_have_no_pattern_to_keep(peft):
    from sparsekern.models.lora import merge_
    from sparsekern.models.prune import prune_

    model = Net()
    prune_(model, Magnitude(0.5))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"], r=4))
    nn.init.normal_(model.base_model.model.up.lora_B["default"].weight)
    with pytest.raises(ValueError, match="keep_pattern: expected sparse layers .* got none"):
        merge_(model, keep_pattern=True)
    Static(0.5, init_method="from_zeros").apply(model)
    with pytest.warns(UserWarning, match="nothing is stored"):
        assert merge_(model, keep_pattern=True).up.weight.sparsity == 0.5


def test_moved_while_merged(peft):
    model = adapted(peft)
    with pytest.warns(UserWarning, match="B A is dense"):
        model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert {layer.values.dtype for layer in sparse_layers(model)} == {torch.float64}
    assert model(X.double()).isfinite().all()


def test_all_linear_takes_sparse_layers_too(peft):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from sparsekern.models import lora

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes)
    model = Magnitude(0.75).apply(transformers.LlamaForCausalLM(config))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert sum(isinstance(m, lora.SparseLora) for m in model.modules()) == 7
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear"))
    adapters = [m.lora_A.keys() for m in model.modules() if isinstance(m, lora.SparseLora)]
    assert [set(names) for names in adapters] == [{"default", "second"}] * 7
