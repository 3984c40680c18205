"""What sparsify_ and the algorithms ask and spare: pruned models; and Conv1D."""

import copy

import pytest
import torch
from pruned_models import Conv1D, H, Mixture, Own, kinds, pruned, sparse_is_faster
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from sparsekern import SparseLinear, SparseTensor, Static, accelerate_, densify_, sparsify_
from sparsekern.models.prune import prune_
from sparsekern.nn import adopt_values_
from sparsekern.nn.stand_ins import SparseConv1D
from sparsekern.sparsity import Group, Magnitude, Wanda
from sparsekern.weights import set_weights_, weights_of


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


def test_hooks_are_not_lost_in_silence(recwarn):
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="^sparsify_: 1 had hooks, .* register them again$"):
        sparsify_(model, Static(0.5))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="^densify_: 1 had hooks"):
        densify_(model)
    recwarn.clear()
    densify_(sparsify_(nn.Sequential(nn.Linear(H, H)), Static(0.5)))
    assert not recwarn.list


def test_pruning_conv1d():
    model = nn.Sequential(Conv1D(96, H))
    weight = model[0].weight.detach().clone()
    sparsify_(model, Static(0.5, init_method="magnitude"))
    assert type(model[0]) is SparseConv1D
    kept = densify_(model)[0].weight
    assert type(model[0]) is Conv1D and kept.shape == (H, 96)
    assert int((kept == weight).sum()) == H * 96 // 2


def test_what_stays_dense_beside_the_linears_is_said():
    model = nn.Sequential(nn.Linear(H, H), Conv1D(96, H), Mixture())
    with pytest.warns(UserWarning, match=r"sparsify_: 1 Experts with 7\d% of the weights"):
        sparsify_(copy.deepcopy(model), Static(0.5))
    with pytest.warns(UserWarning, match=r"apply: 1 Conv1D, 1 Experts with 8\d% .*prune_ prunes"):
        Magnitude(0.5).apply(copy.deepcopy(model))
    encoder = nn.TransformerEncoderLayer(H, 4, 2 * H)
    with pytest.warns(UserWarning, match=r"1 MultiheadAttention with \d+% .*accelerate_ takes"):
        sparsify_(encoder, Static(0.5))
    Magnitude(0.5, param_filter="0").apply(model)
    with pytest.raises(ValueError, match="apply: no nn.Linear .* sparsekern.models.prune.prune_"):
        Magnitude(0.5).apply(nn.Sequential(Conv1D(96, H)))


def mask_some(layer):
    return prune.random_unstructured(layer, "weight", amount=0.1)


CONVERSIONS = {
    "sparsify_": lambda model: sparsify_(model, Static(0.5, init_method="magnitude")),
    "apply": lambda model: Magnitude(0.5).apply(model),
    "from_linear": lambda model: model.append(SparseLinear.from_linear(model.pop(0))),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("hook", [mask_some, weight_norm, spectral_norm])
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_weight_that_is_made_in_each_call_is_that_of_now(hook, convert):
    model, other = (nn.Sequential(hook(nn.Linear(H, H))).eval() for _ in range(2))
    with torch.no_grad():  # under which the weight that the call leaves needs no gradient
        model(torch.ones(1, H))
        other(torch.ones(1, H))
    model.load_state_dict(other.state_dict())
    trained = next(p for n, p in model.named_parameters() if n in ("0.weight_orig", "0.weight_v"))
    optimizer = torch.optim.SGD([trained], 0.1)
    convert(model)
    weight = model[0].weight.to_dense()
    kept = weight != 0
    assert 0.4 < kept.float().mean() and torch.equal(weight[kept], other[0].weight[kept])
    assert model[0].values.requires_grad
    if convert is not CONVERSIONS["from_linear"]:
        adopt_values_(optimizer)
        assert optimizer.param_groups[0]["params"][0] is model[0].values


def test_masked_weights_that_are_tied_or_marked_stay_dense():
    model = nn.Sequential(*(nn.Linear(H, H) for _ in range(4)))
    model[1].weight = model[0].weight
    for layer in model:
        mask_some(layer)
    model[2].weight_orig.requires_dense = True
    sparsify_(model, Static(0.5))
    assert [type(m) for m in model] == [nn.Linear] * 3 + [SparseLinear]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("hook", [weight_norm, spectral_norm])
def test_what_runs_with_a_norm_is_not_pruned_by_its_inputs(hook):
    model = nn.Sequential(hook(nn.Linear(H, H)))
    with pytest.raises(ValueError, match="those of 0 are made anew in each .*remove_weight_norm"):
        Wanda(0.5, calibration=[torch.ones(2, H)]).apply(model)


def test_a_forward_of_its_own_is_not_lost():
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    model[0].forward = lambda x: 3 * nn.Linear.forward(model[0], x)
    for call in (lambda m: sparsify_(m, Static(0.5)), Magnitude(0.5).apply):
        copied = copy.copy(model)
        copied._modules = dict(model._modules)
        with pytest.warns(UserWarning, match="1 Linear with 50% .* a forward of their own"):
            call(copied)
        assert copied[0] is model[0] and type(copied[1]) is SparseLinear


def test_the_hooks_of_accelerate_are_told_of():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    with pytest.warns(UserWarning, match="^sparsify_: 0 had hooks"):
        sparsify_(model, Static(0.5))
    assert type(model[0]) is SparseLinear


class Loop(nn.Module):
    """With matrices for each expert that no other code knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, H, H))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Own(H, H), "1 Own with 50% .*; they are subclasses"),
        (lambda: nn.LSTMCell(H, H // 4), "1 LSTMCell with .*; no sparse layer takes their place"),
        (lambda: nn.Bilinear(H, 8, 8), "1 Bilinear with .*; no sparse layer"),
        (lambda: nn.Conv1d(H, H, 4, groups=4), "1 Conv1d with 50% .*; no sparse layer"),
        (Loop, "1 Loop with 67% .*; no sparse layer"),
    ],
)
@pytest.mark.parametrize("call", [lambda m: sparsify_(m, Static(0.5)), Magnitude(0.5).apply])
def test_what_no_sparse_layer_takes_is_said_to_stay(make, said, call):
    with pytest.warns(UserWarning, match=f"^(sparsify_|apply): {said}"):
        call(nn.Sequential(make(), nn.Linear(H, H)))


@pytest.mark.parametrize("call", [lambda m: sparsify_(m, Static(0.5)), Magnitude(0.5).apply])
@pytest.mark.parametrize(
    ("to", "kind"),
    [
        (lambda w: w.to(torch.int8), "torch.int8"),
        (lambda w: w.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.Tensor.to_sparse_csr, "torch.sparse_csr"),
    ],
)
def test_weights_that_no_sparse_layer_has_are_named(call, to, kind):
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H))
    model[1].weight = nn.Parameter(to(model[1].weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=rf"^1\.weight: expected float32, .*{kind}.*param_filter"):
        call(model)
    assert type(model[0]) is nn.Linear


SAME = torch.eye(H)
CALLS = {
    "sparsify_": lambda m: sparsify_(m, Static(0.8), prune_again=True),
    "accelerate_": lambda m: accelerate_(m, torch.randn(5, H)),
    "prune_": lambda m: prune_(m, Magnitude(0.8), prune_again=True),
    "set_weights_": lambda m: set_weights_(
        m, weights_of(m) | {"0.weight": SAME, "1.weight": SparseTensor.from_dense(SAME)}
    ),
}


@pytest.mark.filterwarnings("ignore:set_weights_. written out")
@pytest.mark.parametrize("name", CALLS)
def test_weights_of_the_same_memory_are_tied(name, monkeypatch):
    sparse_is_faster(monkeypatch)
    model = pruned(nn.Sequential(*(nn.Linear(H, H) for _ in range(3))))
    model[1].weight.data = model[0].weight.data
    want = SAME if name == "set_weights_" else model[0].weight.detach().clone()
    CALLS[name](model)
    assert [type(m) for m in model[:2]] == [nn.Linear] * 2
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()
    assert torch.equal(model[0].weight, want)
