"""accelerate_ as a whole: all or nothing, and a report that says what was done. Times are given by
the tests, so that no clock decides."""

import copy
import json
import math
import re
import weakref
from statistics import median

import pytest
import torch
from pruned_models import (
    KINDS,
    LM,
    H,
    kinds,
    pruned,
    same_state,
    sparse_is_faster,
)
from torch import nn
from torch.nn.utils import prune

from sparsekern import SparseLinear, accelerate_
from sparsekern.models import accelerate, timing, work
from sparsekern.models.candidates import Candidate
from sparsekern.models.example import one_token
from sparsekern.nn import adopt_values_
from sparsekern.nn.kinds import pruning_masks


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    return sparse_is_faster(monkeypatch)


def first(output):
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def test_a_layer_that_is_faster_dense_stays_dense(seconds):
    seconds["sparse"] = 1.95
    model = pruned(LM())
    before = list(model.parameters())
    report = accelerate_(model, {"input_ids": torch.arange(5)[None]})
    assert not report.sparse and "no faster" in report.layers[0].reason
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


def test_layers_that_gain_nothing_in_the_model_become_dense_again(monkeypatch, seconds):
    times_of = work.times_of

    def of_narrow_ones_more(ready, layers, *others):
        found = times_of(ready, layers, *others)
        is_sparse = [isinstance(layer, SparseLinear) for layer in layers]
        found.layers_s = [
            s + (sparse and layer.out_features == H)
            for s, sparse, layer in zip(found.layers_s, is_sparse, layers, strict=True)
        ]
        found.rest_s -= any(is_sparse)
        return found

    monkeypatch.setattr(work, "times_of", of_narrow_ones_more)
    model = pruned(nn.Sequential(nn.Linear(H, 96), nn.Linear(96, H), nn.Linear(H, H)))
    prune.l1_unstructured(model[2], "weight", amount=0.75)
    x = torch.randn(5, H)
    want, weight = model(x), model[1].weight.detach().clone()
    report = accelerate_(model, x)
    assert [layer.is_sparse for layer in report.layers] == [True, False, False]
    assert report.layers[1].sparse_s == 2.0 and "no faster" in report.layers[1].reason
    assert report.rest_gained_s == 1.0 and report.gained_s == 1.0 + 1.0 + 0.0 + 2.0
    assert torch.equal(model[1].weight, weight) and type(model[2]) is nn.Linear
    assert not pruning_masks(model[2])
    torch.testing.assert_close(model(x), want)


def test_a_layer_without_hope_is_not_tried(seconds, monkeypatch):
    seconds["sparse"] = 4.5
    monkeypatch.setattr(accelerate.Exchange, "replace", None)
    layers = accelerate_(pruned(LM()), {"input_ids": torch.arange(5)[None]}).layers
    assert all(x.sparse_s == 4.5 and "no faster" in x.reason for x in layers)


def test_times_of_layers_in_their_model(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(timing, "clock", lambda is_gpu: (lambda: next(ticks), median))
    once, twice = nn.Linear(H, H), nn.Linear(H, H)
    model, x = nn.Sequential(once, twice, nn.Tanh(), twice), torch.randn(3, H)
    cpu = torch.device("cpu")
    times = timing.times_of(lambda: lambda: model(x), [once, twice, nn.Linear(3, 3)], cpu)
    assert times.layers_s == [1.0, 2.0, 0.0] and times.whole_s == 1.0 and times.rest_s == 7.0 - 3.0
    both = times.plus(2, times, 0.5)
    assert (both.whole_s, both.rest_s, both.layers_s) == (4.0, 13.0, [3.0, 6.0, 0.0])
    long = timing.times_of(lambda: lambda: model(x), [once], cpu, is_whole_apart=False)
    assert long.whole_s == 3.0  # more than enough: the run with clocks
    assert not once._forward_hooks and not once._forward_pre_hooks


@pytest.mark.parametrize("whole, rounds", [(1.04, 1), (2.0, 2)])
def test_a_long_run_is_timed_again_where_clocks_seem_to_change_it(whole, rounds, monkeypatch):
    one = [0, 0.2, 0.5, 1, 0, whole]  # the run's begin, its layer's, their ends; without clocks
    readings = iter(rounds * one)
    monkeypatch.setattr(timing, "clock", lambda is_gpu: (lambda: next(readings), median))
    layer, x = nn.Linear(H, H), torch.randn(3, H)
    times = timing.times_of(lambda: lambda: layer(x), [layer], torch.device("cpu"))
    assert (times.whole_s, times.rest_s, times.layers_s) == (whole, 0.7, [0.3])
    assert next(readings, None) is None


def test_a_model_that_is_slower_as_a_whole_goes_back(seconds, monkeypatch):
    whole, times_of = iter([1.0, 2.0, 1.5]), work.times_of

    def slower(*arguments):
        seconds["whole"] = next(whole)
        return times_of(*arguments)

    monkeypatch.setattr(work, "times_of", slower)
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


class Answers(nn.Module):
    """A model whose output `answer` makes of [B, T, H]."""

    def __init__(self, answer):
        super().__init__()
        self.lm, self.answer = LM(), answer

    def forward(self, input_ids):
        return self.answer(self.lm(input_ids)["logits"])


def classes(logits):
    return logits.mean(1)[:, :3]


def last_token(logits):
    return logits[:, -1:]


IDS = torch.arange(10).view(2, 5)


def test_new_tokens_of_a_model_that_makes_none():
    model = pruned(Answers(classes))
    twin = copy.deepcopy(model)
    text = r"^new_tokens: expected 0 for a model that makes no tokens, got 7: .*Answers.* \(2, 3\)"
    with pytest.raises(ValueError, match=text):
        accelerate_(model, IDS, new_tokens=7)
    assert kinds(model) == kinds(twin) and same_state(model, twin.state_dict())
    accelerate_(model, IDS)
    images = pruned(nn.Sequential(nn.Conv2d(3, H, 4), nn.Flatten(), nn.Linear(H, H)))
    text = "^new_tokens: expected 0 for a model that makes no tokens; with the example cut"
    with pytest.raises(ValueError, match=text):
        accelerate_(images, torch.randn(2, 3, 4, 4), new_tokens=7)


def test_new_tokens_of_models_that_may_make_them():
    def tokens(model, x):
        return next(iter(accelerate_(pruned(copy.deepcopy(model)), x, new_tokens=7).layers)).tokens

    assert tokens(Answers(last_token), IDS) == {10: 1, 2: 7}
    assert tokens(Answers(lambda logits: (logits.mean(), logits)), IDS) == {10: 1, 2: 7}
    assert tokens(LM(), IDS[:, :1]) == {2: 8}
    mlp = nn.Sequential(nn.Linear(H, H), nn.Linear(H, 3))  # the rows of a matrix are tokens
    assert tokens(mlp, torch.randn(5, H)) == {5: 1, 1: 7}
    assert tokens(mlp, torch.randn(1, H)) == {1: 8}
    own = Answers(classes)
    own.generate = lambda input_ids: input_ids  # it says that it generates
    assert tokens(own, IDS) == {10: 1, 2: 7}


def test_the_example_is_cut_to_one_token():
    ids, embeds, x = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 5, H), torch.zeros(5, H)

    def shapes(*given):
        return [tuple(t.shape) for t in one_token(given)]

    assert shapes(ids, torch.ones(2, 5)) == [(2, 1), (2, 1)]
    assert shapes(embeds, torch.ones(2, 5)) == [(2, 1, H), (2, 1)]
    assert shapes(x, x, torch.ones(3)) == [(1, H), (1, H), (3,)]


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
    if kind == "linear" or "experts" in kind:
        held = {}  # and these are made anew
    if kind == "attention":
        held = {name: p for name, p in held.items() if "out_proj" in name}
    x = torch.randn(shape)

    def fail(*_):
        raise MemoryError

    if at == "make":
        monkeypatch.setattr(accelerate.Exchange, "_put", _then(accelerate.Exchange._put, fail))
    else:
        monkeypatch.setattr(accelerate, "compared", fail)
    with pytest.raises(MemoryError):
        accelerate_(model, x)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert same_state(model, before) and all(m.training for m in model.modules())
    assert all(held[n] is p for n, p in model.named_parameters() if n in held)
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


@pytest.mark.parametrize("is_masked", [False, True])
def test_an_optimizer_that_was_made_before(is_masked):
    model, x = nn.Sequential(nn.Linear(H, H)), torch.randn(3, H)
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    if not is_masked:
        prune.remove(model[0], "weight")
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    pruned(model)
    accelerate_(model, x)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="adopt_values_"):
        optimizer.step()
    before = model[0].values.clone()
    adopt_values_(optimizer).step()
    assert not torch.equal(model[0].values, before)
    assert optimizer.state[model[0].values]["exp_avg"].shape == before.shape


def test_compiled_parts_are_refused():
    model = nn.Sequential(pruned(LM()), nn.Linear(H, H))
    model[0].compile(backend="eager")
    with pytest.raises(TypeError, match="0 is compiled; make it sparse first"):
        accelerate_(model, torch.arange(3))
    with pytest.raises(TypeError, match="it is compiled"):
        accelerate_(model[0], torch.arange(3))


def test_an_example_that_calls_no_layer_with_zeros():
    for example in (lambda m: None, torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"calls none of its 3 layers with zeros \(blocks.0.0"):
            accelerate_(pruned(LM()), example)


def test_names_that_are_no_names():
    model = nn.Sequential()
    for name in ("<script>", "a\nb", "\u202eb"):
        model.add_module(name, nn.Linear(H, H))
    model.add_module("never", nn.ModuleDict({"called": nn.Linear(H, H)}))
    report = accelerate_(pruned(model), lambda m: [m[i](torch.ones(2, H)) for i in range(3)])
    assert "<script>" not in report.to_html() and "&lt;script&gt;" in report.to_html()
    for text in (str(report), report.to_html()):
        assert "\u202e" not in text and r"a\nb" in text
    assert math.isnan(report.layers[3].gain) and "never calls" in report.layers[3].reason
    report.output_error = math.inf
    assert json.loads(report.to_json())["output_error"] == "inf"


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
        (lambda: nn.Sequential(nn.LazyLinear(H)), torch.ones(1, H), {}, ValueError, "no shape yet"),
        (lambda: pruned(LM()), pruned(LM()), {}, TypeError, "example: expected .* got LM"),
        (lambda: pruned(LM()).to("meta"), torch.arange(3), {}, NotImplementedError, "meta"),
    ],
)
def test_wrong_input_is_named(model, example, options, error, words):
    with pytest.raises(error, match=words):
        accelerate_(model(), example, **options)


def test_offloaded_weights_are_refused_with_what_to_do():
    model = pruned(nn.Sequential(nn.Linear(H, H), nn.Linear(H, H, device="meta")))
    model[1]._hf_hook = object()
    with pytest.raises(NotImplementedError, match=r"1\.weight: accelerate .*on one device"):
        accelerate_(model, torch.randn(3, H))


def test_compiled_models_are_refused_with_what_to_do():
    compiled = nn.Sequential(pruned(LM()))
    compiled._orig_mod = compiled[0]  # what torch.compile returns has it
    with pytest.raises(TypeError, match="_orig_mod"):
        accelerate_(compiled, torch.arange(3))


def test_the_clock_of_a_layer_takes_turns(monkeypatch):
    monkeypatch.undo()
    model = pruned(nn.Sequential(nn.Linear(256, 256)), 0.95)
    report = accelerate_(model, torch.randn(4, 256))
    layer = report.layers[0]
    assert min(layer.before_s, layer.sparse_s, report.before_s, report.after_s) > 0


def test_dense_weights_go_one_after_the_other(monkeypatch):
    model = pruned(LM())
    dense = [weakref.ref(block[0].weight) for block in model.blocks]
    alive, make = [], Candidate.make

    def counting(candidate):
        alive.append(sum(weight() is not None for weight in dense))
        return make(candidate)

    monkeypatch.setattr(Candidate, "make", counting)
    accelerate_(model, {"input_ids": torch.arange(5)[None]})
    assert alive[-3:] == [3, 2, 1] and not any(weight() for weight in dense)


def test_a_model_that_calls_layers_past_its_modules_is_as_it_was():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(H, H)
            self.calls = [self.layer]

        def forward(self, x):
            return self.calls[0](x)

    model, x = pruned(Hidden()), torch.randn(3, H)
    want = model(x)
    with pytest.raises(ValueError, match="past its module .* keeps one dense.: TypeError"):
        accelerate_(model, x)
    assert torch.equal(model(x), want)
    with pytest.raises(ValueError, match=r"keeps one dense\), in 1\.0: TypeError"):
        accelerate_(nn.Sequential(nn.ReLU(), nn.Sequential(model)), x)
    model.layer.weight.requires_dense = True
    with pytest.raises(ValueError, match=r"1 Linear \(7.*requires_dense"):
        accelerate_(model, x)


class Branching(nn.Module):
    """Two layers, of which something looks at the second one's weight or class."""

    def __init__(self, casts: bool):
        super().__init__()
        self.first, self.second = nn.Linear(H, 96).half(), nn.Linear(96, H)
        self.casts = casts

    def forward(self, x):
        h = self.first(x)
        if self.casts:  # as T5, whose second layer stays float32
            return self.second(h.float() if isinstance(self.second.weight, torch.Tensor) else h)
        y = self.second(h.float())
        return y if isinstance(self.second, nn.Linear) else 2 * y


def test_a_layer_that_does_not_run_sparse_stays_dense():
    model = pruned(Branching(casts=True))
    x = torch.randn(5, H).half()
    want = model(x)
    report = accelerate_(model, x)
    first, second = report.layers
    assert first.is_sparse and type(model.second) is nn.Linear
    assert second.reason.startswith("it does not run sparse: RuntimeError: ")
    torch.testing.assert_close(model(x), want)


def test_an_output_that_is_another_is_told_of():
    model = pruned(Branching(casts=False))
    with pytest.warns(
        UserWarning, match=r"^accelerate_: the output changed by 1\.0e\+00, more than"
    ):
        accelerate_(model, torch.randn(5, H).half())
