"""Calibration block by block: the same as layer by layer, in few passes, with any inputs."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekern import SparseLinear, Static
from sparsekern import nn as sparse_nn
from sparsekern.sparsity import Magnitude, SparseGPT, Wanda
from sparsekern.sparsity.blockwise import walk
from sparsekern.sparsity.calibration import evaluating, of_texts
from sparsekern.sparsity.pattern import places_of

WIDTH, DEPTH = 16, 3


class SomeCache:
    """Grows with each call, as one of keys and values does."""

    def __init__(self):
        self.seen = []


class Block(nn.Module):
    """Attention without scores: q, k, v share their input, up and gate too."""

    def __init__(self, style="tuple"):
        super().__init__()
        for name in ("q", "k", "v", "out", "gate", "up"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.down = nn.Linear(WIDTH, WIDTH)
        self.style, self.calls = style, 0

    def forward(self, hidden, mask=None, *, scale=1.0, cache=None, bias=None):
        self.calls += 1
        if cache is not None:
            cache.seen.append(hidden)
            assert len(cache.seen) == 1
        x = F.layer_norm(hidden, (WIDTH,))
        y = self.out(self.q(x).tanh() * self.k(x).sigmoid() + self.v(x)) * scale
        if mask is not None:
            y = (y * mask[..., None]).cumsum(-2) / mask.cumsum(-1)[..., None].clamp(min=1)
        bias = y.mean() if bias is None else bias
        hidden = hidden + y + bias
        x = F.layer_norm(hidden, (WIDTH,))
        hidden = hidden + self.down(F.silu(self.gate(x)) * self.up(x))
        return (hidden, bias) if self.style == "tuple" else hidden


class Model(nn.Module):
    """`kind`: how the blocks are held and fed."""

    def __init__(self, kind="list"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed = nn.Embedding(32, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        blocks = [Block("plain" if kind == "sequential" else "tuple") for _ in range(DEPTH)]
        if kind == "sequential":
            self.blocks = nn.Sequential(*blocks)
        elif kind == "named":  # no list at all
            for i, block in enumerate(blocks):
                self.add_module(f"block{i}", block)
        else:
            self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.config = SimpleNamespace(use_cache=True)

    def forward(self, ids, attention_mask=None):
        hidden = self.first(self.embed(ids))
        mask = None if attention_mask is None else attention_mask.to(hidden.dtype)
        cache = SomeCache() if self.config.use_cache else None
        if self.kind == "sequential":
            return self.last(self.blocks(hidden))
        bias = None
        for i in range(DEPTH):
            block = getattr(self, f"block{i}") if self.kind == "named" else self.blocks[i]
            # Every second block sees another tensor, as with sliding windows.
            seen = mask * 1 if mask is not None and self.kind == "turns" and i % 2 else mask
            cache = SomeCache() if cache else None
            hidden, bias = block(hidden, seen, scale=0.5, cache=cache, bias=bias)
        return self.last(hidden)


def ids(rows=4, length=8, seed=0):
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches():
    mask = torch.ones(4, 8, dtype=torch.long)
    return [{"ids": ids(seed=s), "attention_mask": mask} for s in range(3)]


def weights(model):
    state = copy.deepcopy(sparse_nn.densify_(model)).state_dict()
    return {
        name.replace("block", "blocks.", 1) if "blocks" not in name else name: t
        for name, t in state.items()
    }


def pruned(kind, make=SparseGPT, inputs=None, **how):
    inputs = batches() if inputs is None else inputs
    algorithm = make(0.5, calibration=inputs, param_filter="*", **how)  # the last one too
    return algorithm.apply(Model(kind)), algorithm


@pytest.mark.parametrize("make", [Wanda, SparseGPT])
@pytest.mark.parametrize("kind", ["list", "turns"])
def test_block_by_block_is_layer_by_layer(make, kind):
    """Without a list the model runs from its beginning for each group of layers."""
    model, algorithm = pruned(kind, make)
    other, from_start = pruned("named", make)
    assert [m.calls for m in model.modules() if isinstance(m, Block)][-1] < 8 * 3
    a, b = weights(model), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any("from its beginning" in note for note in algorithm.report.notes)
    assert "the model ran from its beginning" in from_start.report.notes[-1]
    names = [row.name.replace("block", "blocks.") for row in from_start.report.layers]
    assert names == [row.name for row in algorithm.report.layers]


def test_a_sequential_of_blocks_is_walked_too():
    model, algorithm = pruned("sequential", inputs=[ids()])
    assert not any("from its beginning" in note for note in algorithm.report.notes)
    assert model.blocks[0].calls == 4 + 1 + 1 + 1  # stages, next, the last layer, probe


class Writing(nn.Module):
    """Blocks that write into what they are given (`inside`), or somebody does `between` them, or
    they leave tensors in a list for those that come (`notes`)."""

    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.a, self.b, self.kind = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), kind

        def forward(self, x, notes):
            if self.kind == "inside":
                x += self.a(x)
            else:
                x = x + self.a(x)
            if self.kind == "notes":
                notes.append(x)
            return x + self.b(x.tanh() * len(notes) + sum(notes))

    def __init__(self, kind, is_list):
        super().__init__()
        torch.manual_seed(0)
        blocks = [self.Block(kind) for _ in range(DEPTH)]
        self.kind = kind
        self.blocks = (
            nn.ModuleList(blocks) if is_list else nn.ModuleDict(zip("012", blocks, strict=True))
        )
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        notes = []
        for block in self.blocks.children():
            x = block(x, notes)
            if self.kind == "between":
                x.mul_(3).clamp_(max=1)
        return self.last(x)


@pytest.mark.parametrize("make", [Wanda, SparseGPT])
@pytest.mark.parametrize("kind", ["inside", "between", "notes"])
def test_blocks_that_write_into_what_they_are_given(kind, make):
    """They get other inputs in a second pass: the model runs from its beginning."""
    found = []
    for is_list in (True, False):
        inputs = [torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1))]
        algorithm = make(0.5, calibration=inputs, param_filter="*")
        found.append(weights(algorithm.apply(Writing(kind, is_list))))
        assert "the model ran from its beginning" in "".join(algorithm.report.notes)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_model_that_writes_into_its_input_finds_it_again():
    class Centred(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(1))

    def model():
        torch.manual_seed(0)
        return Centred(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    x = torch.randn(24, WIDTH)
    before, rows = x.clone(), []
    for module in (model(), nn.Sequential(*model())):
        given = [x] if isinstance(module, Centred) else [before - 1]
        algorithm = SparseGPT(0.5, calibration=given, param_filter="*")
        algorithm.apply(module)
        rows.append([(row.weight_error, row.output_error) for row in algorithm.report.layers])
    assert torch.equal(x, before) and rows[0] == rows[1]


def test_passes_do_not_grow_with_the_depth():
    counts = {}

    def prune(groups, run):
        counts[groups[0][0]] = groups[0]
        run(lambda group, x: None)

    model = Model().eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with evaluating(model):
        walk(model, layers, batches(), prune)
    assert counts["blocks.1.q"] == ["blocks.1.q", "blocks.1.k", "blocks.1.v"]
    assert counts["blocks.1.gate"] == ["blocks.1.gate", "blocks.1.up"]
    # Of each batch: 4 stages and one to go on; the layer behind all blocks; and once the probe.
    assert [b.calls for b in model.blocks] == [3 * 6 + 1, 3 * 6 + 1, 3 * 5 + 1]


def test_padding_does_not_count():
    texts = [ids(1, n, seed=n) for n in (8, 5, 3)]
    padded = {"ids": torch.zeros(3, 8, dtype=torch.long), "attention_mask": torch.zeros(3, 8)}
    for i, text in enumerate(texts):
        padded["ids"][i, : text.shape[1]] = text
        padded["attention_mask"][i, : text.shape[1]] = 1
    alone = [{"ids": text, "attention_mask": torch.ones_like(text)} for text in texts]
    found = [pruned("list", Wanda, inputs) for inputs in ([padded], alone)]
    assert {a.report.layers[5].tokens for _, a in found} == {16}
    # Biases of a batch's mean are of other places; the first layer's input is not.
    same = [places_of(model.first) for model, _ in found]
    assert torch.equal(*same)
    batches = [(padded["ids"], padded["attention_mask"])]
    positional = pruned("list", Wanda, batches)
    a, b = weights(found[0][0]), weights(positional[0])
    assert all(torch.equal(a[name], b[name]) for name in a)
    for wrap in (nn.DataParallel, torch.compile):  # whose forward has no names
        algorithm = Wanda(0.5, calibration=batches, param_filter="*")
        algorithm.apply(wrap(Model()))
        assert algorithm.report.layers[5].tokens == 16


def tokenizer(text, truncation, max_length):
    assert truncation
    return {"input_ids": [ord(c) % 31 + 1 for c in text][:max_length]}


def test_texts():
    texts = ["some text", "more", "of another length", ""]
    got = of_texts(texts, tokenizer, 6)
    assert [batch["input_ids"].shape for batch in got] == [(3, 6)]
    assert got[0]["attention_mask"].sum(1).tolist() == [6, 6, 4]
    with pytest.raises(ValueError, match="tokenizer: calibration with texts needs one, got None"):
        Wanda(0.5, calibration=texts)
    with pytest.raises(ValueError, match="tokenizer: calibration with texts needs one, got str"):
        Wanda(0.5, calibration=texts, tokenizer="name")
    with pytest.raises(ValueError, match="calibration: none of the 2 texts has a token"):
        Wanda(0.5, calibration=["", ""], tokenizer=tokenizer).apply(Model())
    with pytest.raises(ValueError, match="Model does not run on the first input, a list"):
        Wanda(0.5, calibration=[[1, 2, 3]]).apply(Model())
    with pytest.raises(ValueError, match="at least one input of the model, got none"):
        Wanda(0.5, calibration=[])
    with pytest.raises(ValueError, match="got 1 of 2 that are text"):
        Wanda(0.5, calibration=["text", ids()], tokenizer=tokenizer)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(32, 8), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        assert input_ids.shape == attention_mask.shape
        return self.layer(self.embed(input_ids))


def test_texts_reach_the_model():
    def code(text, truncation, max_length):
        return {"input_ids": [ord(c) % 32 for c in text][:max_length]}

    algorithm = SparseGPT(0.5, calibration=["a text", "another one"], tokenizer=code)
    assert isinstance(algorithm.apply(Words()).layer, SparseLinear)
    assert algorithm.report.layers[0].tokens == len("a text" + "another one")


class Twice(nn.Module):
    """A layer that is called twice, and experts that few inputs reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert=0):
        return self.experts[expert](self.shared(self.shared(x).relu()))


def test_layers_that_are_called_twice_or_not_by_all():
    x = torch.randn(5, 8)
    algorithm = Wanda(0.5, calibration=[(x, e) for e in (0, 2, 1, 2)])
    algorithm.apply(Twice())
    tokens = {row.name: row.tokens for row in algorithm.report.layers}
    assert tokens == {"shared": 40, "experts.0": 5, "experts.1": 5, "experts.2": 10}
    with pytest.raises(ValueError, match="no input reached experts.1"):
        Wanda(0.5, calibration=[(x, 0), (x, 2)]).apply(Twice())


@pytest.mark.parametrize("make", [Magnitude, Wanda, SparseGPT])
def test_weights_that_are_not_finite_are_refused_by_name(make):
    model = Model()
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    how = {} if make is Magnitude else {"calibration": batches()}
    with pytest.raises(ValueError, match="those of blocks.1.up have NaN or infinity"):
        make(0.5, **how).apply(model)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    assert all(
        torch.equal(t.nan_to_num(9), before[n].nan_to_num(9)) for n, t in model.state_dict().items()
    )


def test_a_failure_in_a_later_block_leaves_all_as_it_was():
    model = Model().train()
    model.blocks[2].out.weight.data *= 1e30
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(ValueError, match="inputs of blocks.2.gate|of blocks.2.down"):
        SparseGPT(0.5, calibration=batches()).apply(model)
    assert list(model.modules()) == modules and model.training and model.config.use_cache
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_a_model_that_is_sparse_already_is_pruned_on_in_blocks():
    model = Static(0.3, init_method="magnitude").apply(Model())
    first = {
        n: set(places_of(m).tolist())
        for n, m in model.named_modules()
        if isinstance(m, SparseLinear)
    }
    algorithm = SparseGPT(0.6, calibration=batches())
    algorithm.apply(model)
    for name, places in first.items():
        assert set(places_of(model.get_submodule(name)).tolist()) < places
    assert algorithm.report.sparsity == pytest.approx(0.6, abs=0.01)


def test_the_report():
    _, algorithm = pruned("list")
    report = algorithm.report
    assert [row.sparsity for row in report.layers] == [0.5] * (DEPTH * 7 + 2)
    down = next(row for row in report.layers if row.name == "blocks.0.down")
    assert 0 < down.output_error < down.weight_error < 1 and down.tokens == 96
    text = str(report)
    assert (
        "| blocks.2.down" in text and "of the output" in text and "23 layers, 50.0% zeros" in text
    )
    assert report.to_dict()["layers"][0]["name"] == "first"
    few = SparseGPT(0.5, calibration=[ids(1, 4)], param_filter="*")
    few.apply(Model())
    assert (
        "first saw 4 tokens, fewer than its 16 inputs, and 22 more layers" in few.report.notes[-1]
    )
    magnitude = Magnitude(0.5)
    magnitude.apply(Model())
    assert "of the output" not in str(magnitude.report)
    assert {row.tokens for row in magnitude.report.layers} == {None}


def test_autocast_does_not_round_the_statistics():
    def found(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            algorithm = SparseGPT(
                0.5, calibration=[torch.randn(64, 8, generator=torch.Generator().manual_seed(0))]
            )
            return algorithm.apply(nn.Sequential(copy.deepcopy(layer)))[0].weight.to_dense()

    layer = nn.Linear(8, 8)
    assert torch.equal(found(True), found(False))


def test_compiled_models_run_eager_in_calibration():
    model = Model()
    compiled = torch.compile(model)
    algorithm = Wanda(0.5, calibration=batches(), param_filter="*")
    algorithm.apply(compiled)
    other, _ = pruned("list", Wanda)
    a, b = weights(model), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
