"""SparseLinear, sparsify_ and densify_: an ordinary module to everything torch has for modules."""

import copy
import gc
import io
import re
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import random_dense
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx import GraphModule
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from sparsekern import SparseLinear, SparseTensor, Static, densify_, parameter_groups, sparsify_
from sparsekern.kernels.cpu import lanes
from sparsekern.nn import pack_
from sparsekern.sparsity import SET

N, K = 6, 9


def sparse_linear(bias=True, dtype=torch.float32) -> SparseLinear:
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    return SparseLinear.from_linear(linear, torch.rand(N, K) < 0.4)


def dense_twin(module: SparseLinear) -> nn.Linear:
    return copy.deepcopy(module).to_linear()


class Model(nn.Module):
    """An embedding tied to its head, a norm, two linears, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, K)
        self.norm = nn.LayerNorm(K)
        self.up = nn.Linear(K, N)
        self.blocks = nn.Sequential(nn.Linear(N, K, bias=False), nn.GELU(), self.up)
        self.down = nn.Linear(N, K)
        self.lm_head = nn.Linear(K, 16, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.up(self.norm(self.embedding(tokens)))
        return self.lm_head(self.down(self.blocks(x)))


# The module


@pytest.mark.parametrize("tokens", [(2, 5), (0, 5), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(bias, tokens):
    module = sparse_linear(bias, torch.float64)
    twin = dense_twin(module)
    x, y = (torch.randn(*tokens, K, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data = x.data
    torch.testing.assert_close(module(x), twin(y))
    module(x).sin().sum().backward()
    twin(y).sin().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    mask = twin.weight != 0
    torch.testing.assert_close(module.values.grad, twin.weight.grad[mask])
    if bias:
        torch.testing.assert_close(module.bias.grad, twin.bias.grad)


def test_from_linear():
    linear = nn.Linear(K, N)
    linear.weight.requires_grad_(False)
    mask = torch.rand(N, K) < 0.4
    module = SparseLinear.from_linear(linear.eval(), mask)
    assert (module.in_features, module.out_features) == (K, N)
    assert torch.equal(module.weight.to_dense(), torch.where(mask, linear.weight, 0))
    assert module.bias is linear.bias and not module.values.requires_grad and not module.training
    assert SparseLinear.from_linear(linear).values.shape == (N * K,)
    assert SparseLinear.from_linear(nn.Linear(K, N, bias=False)).bias is None


def test_to_linear_round_trip():
    module = sparse_linear()
    linear = module.to_linear()
    assert linear.bias is module.bias and linear.weight.requires_grad
    back = SparseLinear.from_linear(linear)
    assert torch.equal(back.values, module.values)
    assert torch.equal(back.col_indices, module.col_indices)
    assert dict(linear.named_parameters()).keys() == {"weight", "bias"}


def test_what_it_holds():
    module = sparse_linear()
    assert dict(module.named_parameters()).keys() == {"values", "bias"}
    assert dict(module.named_buffers()).keys() == {"row_offsets", "col_indices"}
    nnz = module.values.shape[0]
    assert module.extra_repr() == (
        f"in_features=9, out_features=6, bias=True, nnz={nnz}, sparsity={1 - nnz / 54:.4g}"
    )
    W = module.weight
    assert W.values is module.values and W.shape == (N, K)


def test_wrong_arguments():
    W = SparseTensor.from_dense(random_dense(N, K))
    parts = (W.row_offsets, W.col_indices, W.values)
    with pytest.raises(ValueError, match="row_offsets: expected 8 elements, got 7"):
        SparseLinear(K, N + 1, *parts)
    with pytest.raises(ValueError, match=re.escape("bias: expected shape (6,), got (9,)")):
        SparseLinear(K, N, *parts, torch.zeros(K))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        SparseLinear(K, N, *parts)(torch.zeros(2, N, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype(dtype):
    module = sparse_linear().to(dtype)
    assert module.values.dtype == module.bias.dtype == dtype
    assert module.col_indices.dtype == torch.int32
    x = torch.randn(3, K, dtype=dtype)
    # The bias is added to a rounded product, where nn.Linear rounds once.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(module(x), dense_twin(module)(x), rtol=2 * eps, atol=4 * eps)


# torch's own machinery


def test_deepcopy():
    module = sparse_linear()
    other = copy.deepcopy(module)
    assert other.values is not module.values
    x = torch.randn(2, K)
    assert torch.equal(other(x), module(x))


def test_state_dict_round_trip_through_a_file():
    module = sparse_linear()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = sparse_linear()
    parameter = other.values
    other(torch.ones(1, K)).sum().backward()
    state = torch.load(file, weights_only=True)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.values is parameter  # the optimizer's reference still holds
    x = torch.randn(2, K)
    assert torch.equal(other(x), module(x))
    for name in state:
        assert torch.equal(other.state_dict()[name], state[name])
    other(x).sum().backward()
    assert other.values.grad.shape == other.values.shape


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_narrows_and_casts(assign):
    module, other = sparse_linear(dtype=torch.float64), sparse_linear()
    state = module.state_dict()
    state["row_offsets"] = state["row_offsets"].long()
    state["col_indices"] = state["col_indices"].long()
    other.load_state_dict(state, assign=assign)
    assert other.row_offsets.dtype == other.col_indices.dtype == torch.int32
    assert other.values.dtype == (torch.float64 if assign else torch.float32)
    torch.testing.assert_close(other.values.double(), module.values)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("col_indices", lambda t: t + K, "col_indices: expected to lie in [0, 9)"),
        ("col_indices", lambda t: t * 0, "col_indices: expected to increase strictly"),
        ("row_offsets", lambda t: t[1:], "row_offsets: expected 7 elements, got 6"),
        ("values", lambda t: t[1:], "values: expected"),
        ("values", lambda t: t.int(), "values: expected float32, bfloat16"),
    ],
)
def test_load_state_dict_refuses(name, change, text):
    module = nn.Sequential(sparse_linear())
    before = copy.deepcopy(module.state_dict())
    wrong = sparse_linear().state_dict()
    wrong[name] = change(wrong[name])
    with pytest.raises(RuntimeError, match=r"0\." + re.escape(text) if text[0] != "n" else text):
        module.load_state_dict({f"0.{key}": t for key, t in wrong.items()})
    for key, t in module.state_dict().items():
        assert torch.equal(t, before[key]), "half-written"


def test_load_state_dict_without_a_key():
    module = sparse_linear()
    state = module.state_dict()
    del state["col_indices"]
    with pytest.raises(RuntimeError, match='Missing key.*"col_indices"'):
        module.load_state_dict(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["AdamW", "AdamW foreach", "AdamW fused", "SGD", "Adagrad"],
)
def test_optimizers_match_masked_dense_training(make):
    """Step by step the same as a dense weight with a mask on weight and gradient, and nothing
    that was removed comes back by momentum or weight decay."""
    module = sparse_linear(dtype=torch.float64)
    twin = dense_twin(module)
    mask = twin.weight.detach() != 0
    twin.weight.register_hook(lambda gradient: gradient * mask)
    optimizers = make(module.parameters()), make(twin.parameters())
    for _ in range(5):
        x = torch.randn(4, K, dtype=torch.float64)
        for model, optimizer in zip((module, twin), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(module.weight.to_dense(), twin.weight)
    assert not module.weight.to_dense()[~mask].any()
    state = optimizers[0].state[module.values]
    assert {t.shape for t in state.values() if torch.is_tensor(t) and t.ndim} == {
        (int(mask.sum()),)
    }


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    module = sparse_linear()
    x = torch.randn(2, 5, K)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sin().sum().backward()
    got = module.values.grad.clone()
    module.zero_grad()
    module(x).sin().sum().backward()
    torch.testing.assert_close(got, module.values.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    module = sparse_linear()
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        module, (torch.randn(4, 5, K),), dynamic_shapes=({0: batch},), strict=strict
    )
    # A strict export of a module with gradients puts the op into a submodule.
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "sparsekern.spmm.default" in targets
    for size in (1, 7):
        x = torch.randn(size, 5, K)
        torch.testing.assert_close(program.module()(x), module(x))


def test_exported_and_traced_models_train():
    """Their graphs call the op by its name."""

    def gradients(m):
        return torch.autograd.grad(m(x).sin().sum(), list(m.parameters()))

    module, x = sparse_linear(), torch.randn(4, 5, K)
    want = gradients(module)
    exported = torch.export.export(module, (x,)).module()
    for graph in (exported, torch.jit.trace(module, x[:2])):
        torch.testing.assert_close(gradients(graph), want)


def test_functional_call_and_per_sample_gradients():
    module = sparse_linear(dtype=torch.float64)
    parameters = dict(module.named_parameters())
    x = torch.randn(4, K, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(module, parameters, x).sin().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    loss(parameters, x).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)


def test_autocast():
    module, x = sparse_linear(), torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.values.grad.dtype == torch.float32


def test_checkpoint_and_frozen_values():
    module, x = sparse_linear(), torch.randn(3, K, requires_grad=True)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    want, x.grad = x.grad, None
    module.values.requires_grad_(False)
    module(x).sum().backward()
    assert torch.equal(x.grad, want)


class Doubled(nn.Module):
    def forward(self, values):
        return 2 * values

    def right_inverse(self, values):
        return values / 2


def test_parametrized_values():
    """On d6bc3ee the module lost its parameter."""
    module = sparse_linear()
    x, before = torch.randn(3, K), copy.deepcopy(module.state_dict())
    want = module(x)
    parametrize.register_parametrization(module, "values", Doubled())
    original = module.parametrizations["values"].original
    assert torch.equal(module(x), want) and torch.equal(original, before["values"] / 2)
    assert dict(module.named_parameters()).keys() == {"bias", "parametrizations.values.original"}
    module(x).sum().backward()
    twin = sparse_linear()
    twin.load_state_dict(before)
    twin(x).sum().backward()
    torch.testing.assert_close(original.grad, 2 * twin.values.grad)
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    y = functional_call(module, doubled, (x,))
    torch.testing.assert_close(y, 2 * want)
    assert parameter_groups(module)[0]["params"] == [original]
    copied = copy.deepcopy(module)
    copied.load_state_dict(module.state_dict())
    assert torch.equal(copied(x), want)
    state = module.state_dict()
    state["col_indices"] = state["col_indices"].flip(0)
    with pytest.raises(RuntimeError, match="col_indices: expected the layer's own"):
        module.load_state_dict(state)
    algorithm = SET(0.5, update={"freq": 1})
    algorithm.apply(nn.Sequential(module))
    optimizer = algorithm.apply(torch.optim.SGD([original], 0.1))
    with pytest.raises(RuntimeError, match="the values of 0 are parametrized"):
        optimizer.step()
    with pytest.raises(ValueError, match="densify_: the values of 0 are parametrized"):
        densify_(nn.Sequential(module), optimizer)
    parametrize.remove_parametrizations(module, "values")
    assert torch.equal(module.values, before["values"]) and torch.equal(module(x), want)


@pytest.mark.parametrize("replace", [densify_, pack_])
def test_values_that_hooks_make_are_those_of_the_last_forward_pass(replace):
    model = nn.Sequential(sparse_linear())
    prune.l1_unstructured(model[0], "values", 0.3)
    with pytest.raises(ValueError, match="nn.utils.prune masks those of 0: call its remove"):
        replace(model)
    prune.remove(model[0], "values")
    nn.utils.weight_norm(model[0], "values")
    with pytest.raises(ValueError, match="anew in each forward pass, from values_g, values_v"):
        replace(model)
    assert type(model[0]) is SparseLinear


def test_parametrized_bias():
    module = sparse_linear()
    x = torch.randn(3, K)
    want = module(x)
    parametrize.register_parametrization(module, "bias", Doubled())
    torch.testing.assert_close(module(x), want)


def train_in_parallel(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # other weights on each rank, for DDP to broadcast
    linear = nn.Linear(K, N, dtype=torch.float64)
    module = SparseLinear.from_linear(linear, Static(0.6).mask("layer", linear.weight))
    parallel = nn.parallel.DistributedDataParallel(module)
    for convert in (densify_, partial(sparsify_, algorithm=Static(0.6))):
        with pytest.raises(TypeError, match="_: expected the model itself, got a Distributed"):
            convert(parallel)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1)
    first = copy.deepcopy(module.state_dict())
    x = torch.arange(4 * K, dtype=torch.float64).sin().view(4, K)
    parallel(x[2 * rank : 2 * rank + 2]).pow(2).mean().backward()
    optimizer.step()
    record = {"first": first, "grad": module.values.grad, "last": module.state_dict()}
    torch.save(record, results / f"{rank}.pt")
    dist.barrier()  # a process that leaves while the other still works may abort
    dist.destroy_process_group()


def test_ddp(tmp_path):
    torch.multiprocessing.spawn(train_in_parallel, (tmp_path / "store", tmp_path), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    module = SparseLinear.from_linear(nn.Linear(K, N, dtype=torch.float64))
    module.load_state_dict(a["first"])
    x = torch.arange(4 * K, dtype=torch.float64).sin().view(4, K)
    module(x).pow(2).mean().backward()
    torch.testing.assert_close(a["grad"], module.values.grad)
    assert not torch.equal(a["last"]["values"], a["first"]["values"])


# Whole models


def test_sparsify():
    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    assert sparsify_(model, Static(0.75)) is model
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name in ("up", "down", "blocks.0"):
        assert kinds[name] is SparseLinear
    assert kinds["lm_head"] is nn.Linear and kinds["embedding"] is nn.Embedding
    assert kinds["norm"] is nn.LayerNorm
    assert model.blocks[2] is model.up  # used twice before, used twice after
    assert model.lm_head.weight is model.embedding.weight
    assert model.up.values.shape == (round(0.25 * N * K),)
    with torch.no_grad():
        for name in ("up", "down", "blocks.0"):
            mask = Static(0.75).mask(name, twin.get_submodule(name).weight)
            twin.get_submodule(name).weight.mul_(mask)
    tokens = torch.arange(16).view(2, 8)
    torch.testing.assert_close(model(tokens), twin(tokens))
    assert densify_(model) is model
    torch.testing.assert_close(model(tokens), twin(tokens))
    assert model.state_dict().keys() == twin.state_dict().keys()
    for name, t in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], t)


def test_sparsify_skips_names_and_ties():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.overhead = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.attention = nn.MultiheadAttention(4, 1)  # out_proj is a subclass of nn.Linear

    model = sparsify_(Heads(), Static(0.5))
    sparse = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    assert sparse == ["overhead"]
    model = sparsify_(Heads(), Static(0.5), lambda module, name: name in ("head", "a"))
    sparse = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    assert sparse == ["head"]  # the filter replaces the rule of names; a tied weight stays dense


@pytest.mark.parametrize(
    ("model", "seen"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "2 Conv2d"),
        (nn.MultiheadAttention(8, 2), "1 MultiheadAttention, 1 NonDynamicallyQuantizableLinear"),
        (nn.Sequential(nn.Embedding(4, 8), nn.LSTM(8, 8)), "1 Embedding, 1 LSTM"),
        (nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), "1 Linear"),
        (nn.GELU(), "none"),
    ],
)
def test_nothing_to_sparsify_is_an_error(model, seen):
    with pytest.raises(ValueError, match=f"no nn.Linear to replace; .* matrix: {seen}. Its sub"):
        sparsify_(model, Static(0.5))


@pytest.mark.parametrize("wrong", [0.75, None, {"0": 1}])
def test_what_is_no_algorithm_is_named(wrong):
    with pytest.raises(TypeError, match=r"algorithm: expected one that has mask\(name, weight\)"):
        sparsify_(nn.Sequential(nn.Linear(8, 8)), wrong)


def test_an_algorithm_that_returns_no_mask_is_named():
    class Forgetful:
        def mask(self, name, weight):
            (weight > 0).sum()

    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"0: expected a mask, .* from Forgetful, got None"):
        sparsify_(model, Forgetful())
    assert type(model[0]) is nn.Linear


def test_a_filter_may_take_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    assert sparsify_(model, Static(0.5), lambda module, name: False) is model
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="no nn.Linear"):  # there is nothing to filter
        sparsify_(nn.Conv2d(3, 4, 3), Static(0.5), lambda module, name: True)
    sparse = sparsify_(model, Static(0.5))
    assert sparsify_(sparse, Static(0.5)) is sparse  # sparse already


def test_parameter_groups_decay_what_a_dense_model_decays():
    model = Model()
    names = {name: p.ndim > 1 for name, p in model.named_parameters()}
    sparsify_(model, Static(0.5))
    decayed, others = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    ids = {id(p) for p in decayed["params"]}
    for name, p in model.named_parameters():
        dense = name.replace("values", "weight")
        assert (id(p) in ids) == names[dense], name
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    optimizer = torch.optim.SGD([decayed, others], lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 0.7 if names[name.replace("values", "weight")] else 1.0
        torch.testing.assert_close(p, share * before[name])


def test_sparsify_a_single_linear():
    linear = nn.Linear(4, 4)
    module = sparsify_(linear, Static(0.5))
    assert isinstance(module, SparseLinear) and isinstance(densify_(module), nn.Linear)


def test_a_failing_algorithm_leaves_the_model_as_it_was():
    class Fails:
        def mask(self, name, weight):
            if name == "down":
                raise RuntimeError("no mask")
            return torch.ones_like(weight, dtype=torch.bool)

    class WrongShape:
        def mask(self, name, weight):
            return torch.ones(1, 1, dtype=torch.bool)

    model = Model()
    for algorithm, error in ((Fails(), RuntimeError), (WrongShape(), ValueError)):
        with pytest.raises(error):
            sparsify_(model, algorithm)
        assert not any(isinstance(m, SparseLinear) for m in model.modules())


def test_a_sparse_model_learns_and_keeps_its_pattern():
    model = sparsify_(Model(), Static(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(16, (4, 8))
    patterns = [m.col_indices.clone() for m in model.modules() if isinstance(m, SparseLinear)]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    kept = [m.col_indices for m in model.modules() if isinstance(m, SparseLinear)]
    assert all(torch.equal(a, b) for a, b in zip(patterns, kept, strict=True))


def test_what_is_replaced_is_free_at_once(uncollected):
    """Not only when Python next looks for cycles: it may be most of a GPU's memory."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sparsify = partial(sparsify_, algorithm=Static(0.75), prune_again=True)
    for convert in (sparsify, densify_, sparsify, *[pack_] * (lanes._C is not None)):
        replaced = [weakref.ref(module) for module in model]
        convert(model)
        assert [module() for module in replaced] == [None, None]


@pytest.fixture
def uncollected():
    gc.collect()
    gc.disable()
    yield
    gc.enable()
