"""Sparse training in the Trainer of transformers, and in loops of its kind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear, Static
from sparsekern.models.trainer import KEY, SparsityCallback
from sparsekern.sparsity import GMP, Group, IterativePruning, RigL

MAKES = {
    "rigl": lambda: RigL(0.75, update={"freq": 3}),
    "gmp": lambda: GMP({"type": "cubic", "init": 0.0, "final": 0.75, "steps": 8}, update=None),
    "iterative": lambda: IterativePruning(0.75, rounds=3, freq=2, rewind=1),
    "group": lambda: Group({"0": RigL(0.75, update={"freq": 3}), "2": Static(0.5)}),
}


class Loop:
    """The events of a Trainer in its order, with what it gives them."""

    def __init__(self, algorithm, model=None):
        torch.manual_seed(0)
        self.model = model or nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.callback = SparsityCallback(algorithm)
        self.state = SimpleNamespace(global_step=0)
        self.tell("init_end")

    def tell(self, event, **more):
        given = {"model": self.model, "optimizer": getattr(self, "optimizer", None), "x": 1}
        getattr(self.callback, f"on_{event}")(None, self.state, "control", **given | more)

    def train(self, steps, checkpoint=None):
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        if checkpoint:
            self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
            self.state.global_step = checkpoint["step"]
        self.tell("train_begin")
        while self.state.global_step < steps:
            step = self.state.global_step
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            self.model(x).square().mean().backward()
            self.tell("pre_optimizer_step")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.tell("step_end")
        return self

    def checkpoint(self):
        optimizer = self.optimizer.state_dict()
        state = {"model": self.model.state_dict(), "optimizer": optimizer}
        return copy.deepcopy(state) | {"step": self.state.global_step}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("stop", [3, 5])
def test_it_trains_and_resumes_exactly(make, stop):
    whole = Loop(make()).train(8)
    saved = Loop(make()).train(stop).checkpoint()
    resumed = Loop(make()).train(8, saved)
    want = whole.model.state_dict()
    assert all(torch.equal(t, want[name]) for name, t in resumed.model.state_dict().items())
    assert whole.model[0].weight.sparsity == pytest.approx(0.75, abs=0.01)
    state = resumed.optimizer.param_groups[0][KEY]
    assert state.get("steps", 8) == 8


def test_a_second_train_has_an_optimizer_of_its_own():
    loop = Loop(RigL(0.75, update={"freq": 3})).train(4)
    loop.state.global_step = 0
    loop.train(4)
    assert loop.callback.algorithm.steps == 8


def test_what_it_refuses():
    with pytest.raises(TypeError, match="algorithm: expected one of sparsekern.sparsity, got str"):
        SparsityCallback("rigl")
    with pytest.raises(AttributeError, match="has no state"):
        print(SparsityCallback(Static(0.5)).state)
    loop = Loop(Static(0.5)).train(1)
    saved = loop.checkpoint()
    del saved["optimizer"]["param_groups"][0][KEY]
    with pytest.raises(ValueError, match="no state of the algorithm at step 1"):
        Loop(Static(0.5)).train(2, saved)
    loop.model = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(ValueError, match="expected the one that the algorithm has made sparse"):
        loop.train(2)
    late = SparsityCallback(Static(0.5))  # by add_callback, after on_init_end
    with pytest.raises(ValueError, match="got a dense one: give the callback to Trainer"):
        late.on_train_begin(None, None, None, loop.model, None)


def tiny_llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes, **heads))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_the_trainer_of_transformers(tmp_path, settings):
    model = tiny_llama()
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": x, "labels": x} for x in tokens]

    def train(model, resume=None):
        arguments = TrainingArguments(
            tmp_path,
            max_steps=7,
            save_steps=4,
            per_device_train_batch_size=4,
            weight_decay=0.1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **settings,
        )
        callback = SparsityCallback(RigL(0.75, update={"freq": 3}))
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        assert callback.algorithm.steps == 7
        return trainer

    first = train(model)
    want = {name: t.clone() for name, t in first.model.state_dict().items()}
    decayed = {id(p) for p in first.optimizer.param_groups[0]["params"]}
    layers = [m for m in first.model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == 14 and all(id(layer.values) in decayed for layer in layers)
    second = train(tiny_llama(), tmp_path / "checkpoint-4").model.state_dict()
    assert all(torch.equal(t, want[name]) for name, t in second.items())


@pytest.mark.parametrize("is_prepared_first", [False, True])
def test_accelerate_in_any_order(is_prepared_first):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    algorithm = RigL(0.75, update={"freq": 2})
    if not is_prepared_first:
        algorithm.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    if is_prepared_first:
        algorithm.apply(model)
    algorithm.apply(optimizer)
    before = model[0].col_indices.clone()
    values = model[0].values.detach().clone()
    for _ in range(3):
        accelerator.backward(model(torch.randn(4, 16)).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert algorithm.steps == 3 and not torch.equal(model[0].col_indices, before)
    assert not torch.equal(model[0].values, values)
