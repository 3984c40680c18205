"""What sparsify_ and the algorithms ask and spare: pruned models; and Conv1D."""

import copy

import pytest
from pruned_models import Conv1D, H, Mixture, kinds, pruned
from torch import nn

from sparsekern import Static, densify_, sparsify_
from sparsekern.nn.stand_ins import SparseConv1D
from sparsekern.sparsity import Group, Magnitude


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
    recwarn.clear()
    sparsify_(nn.Sequential(nn.Linear(H, H)), Static(0.5))
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
