"""Which layers make a model's output, and stay dense where no filter says otherwise."""

import pytest
from pruned_models import H
from torch import nn

from sparsekern import SparseLinear, Static, sparsify_
from sparsekern.models.prune import prune_
from sparsekern.nn.heads import heads, routers
from sparsekern.sparsity import SET, Magnitude


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(H, 3 * H), nn.Linear(H, H)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention()
        self.up, self.down = nn.Linear(H, 2 * H), nn.Linear(2 * H, H)


class BlockOfExperts(Block):
    def __init__(self, experts=2):
        super().__init__()
        self.experts = nn.ModuleList(mlp() for _ in range(experts))
        self.shared = mlp()  # after them


class Mixer(nn.Module):
    """A block without attention."""

    def __init__(self):
        super().__init__()
        self.tokens, self.channels = mlp(), mlp()


def mlp():
    return nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, H))


class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(8, H), encoder
        self.pooler, self.classifier = nn.Linear(H, H), nn.Linear(H, 3)


def torch_layer():
    return nn.TransformerEncoderLayer(H, 4, 2 * H)


SPARED = {"pooler", "classifier"}
ENCODERS = {
    "two blocks": lambda: nn.ModuleList([Block(), Block()]),
    "one block in a list": lambda: nn.ModuleList([Block()]),
    "one block in a Sequential": lambda: nn.Sequential(Block()),
    "one block": Block,
    "torch's encoder of one layer": lambda: nn.TransformerEncoder(
        torch_layer(), 1, enable_nested_tensor=False
    ),
    "torch's layer": torch_layer,
    "one block without attention": lambda: nn.ModuleList([Mixer()]),
    "two without attention": lambda: nn.Sequential(Mixer(), Mixer()),
    "blocks of two kinds": lambda: nn.ModuleList([Mixer(), Block(), Mixer()]),
    "lists in a block": lambda: nn.ModuleList([BlockOfExperts(), BlockOfExperts()]),
    "one block with a list": lambda: nn.ModuleList([BlockOfExperts()]),
    "one block with one expert": lambda: nn.ModuleList([BlockOfExperts(1)]),
}


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_what_comes_after_the_last_block(encoder):
    assert heads(Classifier(encoder())) == SPARED
    assert heads(nn.Sequential(Classifier(encoder()))) == {f"0.{name}" for name in SPARED}


def test_blocks_and_a_head_in_one_sequential():
    assert heads(nn.Sequential(nn.Embedding(8, H), Block(), Block(), nn.Linear(H, 3))) == {"3"}
    assert heads(nn.Sequential(torch_layer(), nn.Linear(H, 3))) == {"1"}


def test_models_without_blocks_have_heads_by_name():
    assert not heads(nn.Sequential(nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 3)))
    assert not heads(Block()) and not heads(torch_layer()) and not heads(nn.Linear(H, H))
    model = nn.Sequential(nn.Linear(H, H))
    model.lm_head = nn.Linear(H, 3)
    assert heads(model) == {"lm_head"}


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_classifier_stays_dense(blocks):
    def model():
        return Classifier(nn.ModuleList(Block() for _ in range(blocks)))

    def kinds(of):
        return {type(m) for m in (of.pooler, of.classifier)}, type(of.encoder[-1].down)

    assert kinds(sparsify_(model(), Static(0.5))) == ({nn.Linear}, SparseLinear)
    sparse = Static(0.5).apply(model())
    assert kinds(sparse) == ({nn.Linear}, SparseLinear)
    assert kinds(SET(0.5).apply(sparse)) == ({nn.Linear}, SparseLinear)  # takes over
    pruned = model()
    prune_(pruned, Magnitude(0.5))
    assert pruned.classifier.weight.all() and not pruned.encoder[0].up.weight.all()


class MixtureOf(BlockOfExperts):
    """A block whose router is a linear, in a module of its own or not."""

    def __init__(self, name, is_inside):
        super().__init__()
        router = nn.Linear(H, 2, bias=False)
        self.add_module(name, nn.Sequential(router) if is_inside else router)


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("name", ["router", "gate"])
def test_routers_stay_dense(name, is_inside):
    """A weight less there sends tokens to other experts."""

    def make():
        return nn.Sequential(*(MixtureOf(name, is_inside) for _ in range(2)))

    model = make()
    found = {f"{i}.{name}{'.0' * is_inside}" for i in range(2)}
    assert routers(model) == found
    sparsify_(model, Static(0.5))
    assert not any(isinstance(model.get_submodule(n), SparseLinear) for n in found)
    assert isinstance(model[0].experts[0][0], SparseLinear)
    report = prune_(make(), Magnitude(0.5))
    assert found.isdisjoint(row.name for row in report.layers)
    report = prune_(make(), Magnitude(0.5, param_filter="*"))
    assert found <= {row.name for row in report.layers}


def test_a_gate_without_experts_is_no_router():
    class Gated(Block):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(H, 2 * H)

    model = sparsify_(nn.Sequential(Gated(), Gated()), Static(0.5))
    assert not routers(model) and isinstance(model[1].gate, SparseLinear)
