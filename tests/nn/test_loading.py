"""A SparseLinear takes all of a state_dict or nothing, and bears whatever Python does to it."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from sparsekern import SparseLinear, SparseTensor, Static, densify_, sparsify_
from sparsekern.sparsity.pattern import places_of, set_pattern

N, K = 12, 20


def layer(density: float = 0.4, n: int = N, k: int = K, bias: bool = True) -> SparseLinear:
    return SparseLinear.from_linear(nn.Linear(k, n, bias=bias), torch.rand(n, k) < density)


def model(density: float = 0.4) -> nn.Sequential:
    return nn.Sequential(layer(density))


def bytes_of(module: nn.Module) -> dict:
    """Everything that a call could have changed, the identity of parameters included."""
    tensors = {k: (t.clone(), t.dtype, t.device) for k, t in module.state_dict().items()}
    return tensors | {f"id {k}": id(p) for k, p in module.named_parameters()}


def assert_same(module: nn.Module, before: dict) -> None:
    after = bytes_of(module)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key.startswith("id "):
            assert after[key] == value, key
        else:
            assert torch.equal(after[key][0], value[0]) and after[key][1:] == value[1:], key


def assert_right(module: nn.Module) -> None:
    x = torch.randn(70, K, dtype=module[0].values.dtype)
    y = F.linear(x, module[0].weight.to_dense(), module[0].bias)
    torch.testing.assert_close(module(x), y)


def damaged(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[5] = 10**9
    return t


PARTS = ("row_offsets", "col_indices", "values")
PARTIAL = [(name,) for name in PARTS] + [("row_offsets", "col_indices"), ("col_indices", "values")]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("names", PARTIAL, ids="+".join)
@pytest.mark.parametrize("nnz", ["same nnz", "other nnz"])
def test_a_part_of_another_pattern_is_refused(names, nnz, strict, assign):
    """On d6bc3ee these were copied in, and read and wrote out of bounds afterwards."""
    mine, other = model(), model(0.6)
    if nnz == "same nnz":
        set_pattern(other[0], torch.randperm(N * K)[: mine[0].values.shape[0]].sort().values)
    before = bytes_of(mine)
    state = {f"0.{name}": other.state_dict()[f"0.{name}"] for name in names}
    if names == ("values",) and nnz == "same nnz":  # parameters alone, as of any module
        if strict:
            with pytest.raises(
                RuntimeError, match=r'Missing key.*"0.row_offsets", "0.col_indices"'
            ):
                mine.load_state_dict(state, assign=assign)
        else:
            mine.load_state_dict(state, strict=False, assign=assign)
        assert torch.equal(mine[0].values, other[0].values)
    else:
        with pytest.raises(RuntimeError, match=rf"0\.({'|'.join(names)}): expected"):
            mine.load_state_dict(state, strict=strict, assign=assign)
        assert_same(mine, before)
    assert_right(mine)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("part", ["col_indices", "row_offsets"])
@pytest.mark.parametrize("alone", [False, True])
def test_damaged_indices_are_refused(part, alone, strict):
    """With a density at which the dense weight is written out, too."""
    mine = nn.Sequential(layer(0.97, 64, 64))
    state = mine.state_dict() | {f"0.{part}": damaged(mine[0].state_dict()[part])}
    before = bytes_of(mine)
    with pytest.raises(RuntimeError, match=rf"0\.{part}|Missing key"):
        mine.load_state_dict({k: state[k] for k in ([f"0.{part}"] if alone else state)}, strict)
    assert_same(mine, before)
    x = torch.randn(64, 64)
    y = F.linear(x, mine[0].weight.to_dense(), mine[0].bias)
    torch.testing.assert_close(mine(x), y)


def test_indices_alone_are_fine_where_they_are_its_own():
    mine = model()
    state = {k: t.long() for k, t in mine.state_dict().items() if "indices" in k or "row" in k}
    mine.load_state_dict(state, strict=False)
    mine.load_state_dict({"0.bias": torch.ones(N)}, strict=False)
    assert_right(mine)
    assert torch.equal(mine[0].bias, torch.ones(N)) and mine[0].col_indices.dtype == torch.int32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("nnz", ["same nnz", "other nnz"])
def test_another_pattern(nnz, assign):
    mine, other = model(), model(0.7 if nnz == "other nnz" else 0.4)
    if nnz == "same nnz":
        set_pattern(other[0], torch.randperm(N * K)[: mine[0].values.shape[0]].sort().values)
    state = {k: t.long() if t.dtype == torch.int32 else t for k, t in other.state_dict().items()}
    assert_right(mine)  # what kernels keep of the old pattern goes
    mine.load_state_dict(state, assign=assign)
    assert_right(mine)
    for name, t in other.state_dict().items():
        assert torch.equal(mine.state_dict()[name], t)
    mine(torch.randn(5, K)).sum().backward()
    assert mine[0].values.grad.shape == mine[0].values.shape
    set_pattern(mine[0], torch.arange(7))  # not in the memory of the checkpoint
    assert torch.equal(state["0.values"], other[0].values)


def test_its_own_pattern_is_not_written():
    """So kernels keep what they derived, and a captured CUDA graph stays right."""
    mine = model()
    indices = mine[0].row_offsets, mine[0].col_indices
    versions = [t._version for t in indices]
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert mine[0].row_offsets is indices[0] and mine[0].col_indices is indices[1]
    assert [t._version for t in indices] == versions


def test_other_threads_run_forward_while_its_own_pattern_loads(monkeypatch):
    there, x, seen = model(), torch.randn(3, K), []
    load = nn.Module._load_from_state_dict

    def loading(module, *arguments):
        seen.append(there(x))
        load(module, *arguments)
        seen.append(there(x))

    state = {k: t * 2 if t.is_floating_point() else t for k, t in there.state_dict().items()}
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", loading)
    there.load_state_dict(state)
    torch.testing.assert_close(seen[-1], 2 * seen[0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s | {"0.values": s["0.values"].to("meta")}, "0.values: expected a tensor with"),
        (lambda s: s | {"0.col_indices": s["0.col_indices"].to("meta")}, "0.col_indices: expected"),
        (lambda s: s | {"0.values": s["0.values"].int()}, "0.values: expected float32"),
        (lambda s: s | {"0.values": [1.0]}, "0.values: expected a tensor, got list"),
        (lambda s: s | {"0.values": s["0.values"][:, None]}, "0.values: expected a 1-D tensor"),
        (lambda s: s | {"0.bias": torch.ones(3)}, "size mismatch for 0.bias: expected (12,)"),
        (lambda s: s | {"0.bias": None}, "0.bias: expected a dense tensor, got NoneType"),
        (lambda s: s | {"0.bias": torch.ones(N).to_sparse()}, "0.bias: expected a dense tensor"),
        (lambda s: s | {"0.bias": torch.ones(N, device="meta")}, "0.bias: expected a tensor with"),
    ],
)
def test_wrong_entries(change, text):
    mine = model()
    as_many = copy.deepcopy(mine)  # weights, in other places
    set_pattern(as_many[0], ((places_of(mine[0]) + 1) % (N * K)).sort().values)
    before = bytes_of(mine)
    for other in (model(0.7), as_many):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            mine.load_state_dict(change(other.state_dict()))
        assert_same(mine, before)


def test_each_layer_by_its_name():
    mine = nn.ModuleDict({"a": layer(), "b": layer()})
    state = mine.state_dict()
    state["a.values"], state["b.col_indices"] = state["a.values"][1:], state["b.col_indices"] + K
    before = bytes_of(mine)
    with pytest.raises(RuntimeError, match=r"(?s)a\.values: expected.*b\.col_indices: expected"):
        mine.load_state_dict(state)
    assert_same(mine, before)


@pytest.mark.parametrize("strict", [False, True])
def test_a_dense_state_dict_says_what_to_use(strict):
    dense = nn.Sequential(nn.Linear(K, N))
    mine = sparsify_(copy.deepcopy(dense), Static(0.5))
    before = bytes_of(mine)
    with pytest.raises(RuntimeError, match=r"0\.weight: a dense .*set_weights_.*densify_") as told:
        mine.load_state_dict(dense.state_dict(), strict=strict)
    assert "Missing" not in str(told.value)
    assert_same(mine, before)
    densify_(mine).load_state_dict(dense.state_dict())


def test_hooks_before_loading_see_the_state_once():
    mine, other = model(), model(0.7)
    calls = []

    def rename(module, state, prefix, *_):
        calls.append(prefix)
        for key in [k for k in state if k.startswith(f"{prefix}old_")]:
            state[key.replace("old_", "")] = state.pop(key)

    mine[0].register_load_state_dict_pre_hook(rename)
    mine.load_state_dict({k.replace(".", ".old_"): t for k, t in other.state_dict().items()})
    assert calls == ["0."] and torch.equal(mine[0].values, other[0].values)
    assert_right(mine)


def test_buffers_of_the_user_load_as_well():
    mine, other = model(), model(0.7)
    for m in (mine, other):
        m[0].register_buffer("scale", torch.rand(3))
    mine.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(mine[0].scale, other[0].scale)
    assert list(mine.state_dict()) == list(other.state_dict())


# Meta device


def test_meta_then_load():
    state = model(0.7).state_dict()
    for assign in (True, False):
        mine = model().to("meta")
        if not assign:
            mine = mine.to_empty(device="cpu")
        mine.load_state_dict(state, assign=assign)
        assert torch.equal(mine[0].values, state["0.values"])
        assert_right(mine)
    with torch.device("meta"):
        parts = torch.zeros(N + 1, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
        made = nn.Sequential(SparseLinear(K, N, *parts, torch.zeros(9), torch.zeros(N)))
    assert made[0].values.is_meta and made[0].col_indices.dtype == torch.int32
    made.load_state_dict(state, assign=True)
    assert_right(made)
    with pytest.raises(ValueError, match="row_offsets: expected 13 elements, got 12"):
        SparseLinear(K, N, parts[0][1:], parts[1], torch.zeros(9, device="meta"))


def test_no_weights_on_meta_to_choose_from():
    linear = nn.Linear(K, N, device="meta")
    with pytest.raises(
        NotImplementedError, match="weight: on the meta device there are no weights"
    ):
        SparseLinear.from_linear(linear, torch.ones(N, K, dtype=torch.bool))
    whole = nn.Sequential(nn.Linear(K, N), linear)
    for sparsify in (lambda m: sparsify_(m, Static(0.5)), Static(0.5).apply):
        with pytest.raises(NotImplementedError, match="1.weight: on the meta device"):
            sparsify(whole)
        assert type(whole[0]) is nn.Linear


# What Python can do to a module


def test_empty_memory_is_refused():
    for density in (0.2, 0.9):
        mine = copy.deepcopy(nn.Sequential(layer(density))).to("meta").to_empty(device="cpu")
        mine[0].row_offsets.fill_(2**30)
        mine[0].col_indices.fill_(-(2**30))
        with pytest.raises((ValueError, RuntimeError), match="row_offsets|col_indices"):
            mine(torch.randn(64, K))


REPLACED = {
    "values": lambda m: setattr(m, "values", nn.Parameter(torch.randn(4))),
    "data": lambda m: setattr(m.values, "data", torch.randn(3)),
    "longer": lambda m: setattr(m.values, "data", torch.randn(m.values.shape[0] + 1)),
    "two columns": lambda m: setattr(m.values, "data", torch.randn(m.values.shape[0], 2)),
    "row_offsets": lambda m: setattr(m, "row_offsets", m.row_offsets[:-1].clone()),
    "indices": lambda m: (
        setattr(m, "row_offsets", layer(0.8).row_offsets),
        setattr(m, "col_indices", torch.arange(K, dtype=torch.int32).repeat(N)),
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("what", REPLACED)
def test_tensors_that_do_not_fit_each_other(what, tokens, grad):
    """No kernel may start: on d6bc3ee these read beyond the end."""
    mine = layer()
    REPLACED[what](mine)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((ValueError, RuntimeError, TypeError)) as error,
    ):
        mine(torch.randn(tokens, K))
    assert re.search("values|row_offsets|col_indices", str(error.value))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 2), None])
def test_functional_call_with_values_of_another_shape(shape, compiled):
    mine = layer()
    values = torch.randn(shape or (mine.values.shape[0], 2))
    if compiled:
        torch._dynamo.reset()
    call = torch.compile(functional_call, backend="eager") if compiled else functional_call
    with pytest.raises((ValueError, RuntimeError, TypeError), match="values"):
        call(mine, {"values": values}, (torch.randn(4, K),))


def test_values_of_another_dtype_raise_what_torch_raises():
    mine = layer().double()
    twin = copy.deepcopy(mine).to_linear()
    x = torch.randn(3, K)
    with pytest.raises(RuntimeError) as got:
        mine(x)
    with pytest.raises(RuntimeError) as want:
        twin(x)
    assert str(got.value) == str(want.value)


def test_int64_indices_in_a_module():
    mine = layer()
    x = torch.randn(4, K)
    want = mine(x)
    mine.row_offsets, mine.col_indices = mine.row_offsets.long(), mine.col_indices.long()
    try:
        got = mine(x)
    except (TypeError, ValueError, RuntimeError) as error:
        assert "int32" in str(error)
    else:
        torch.testing.assert_close(got, want)
    for cast in (lambda m: m.type(torch.float64), lambda m: m.to(torch.bfloat16)):
        other = cast(layer())
        assert other.row_offsets.dtype == other.col_indices.dtype == torch.int32
        assert places_of(other).numel() == other.values.numel()


# Inference mode


def test_indices_have_version_counters_wherever_they_come_from():
    with torch.inference_mode():
        made = layer()
        loaded, moved = model(), layer()
        loaded.load_state_dict(model(0.7).state_dict())
        assigned = model()
        assigned.load_state_dict(model(0.7).state_dict(), assign=True)
        moved._apply(lambda t: t.clone())
        changed = layer()
        set_pattern(changed, torch.arange(9))
    for module in (made, loaded[0], assigned[0], moved, changed):
        assert not module.row_offsets.is_inference() and not module.col_indices.is_inference()
        with torch.no_grad():
            x = torch.randn(3, K)
            y = F.linear(x, module.weight.to_dense(), module.bias)
            torch.testing.assert_close(module(x), y)


def test_a_tensor_made_in_inference_mode():
    with torch.inference_mode():
        w = SparseTensor.from_dense(torch.randn(N, K), torch.rand(N, K) < 0.4)
    mine = SparseLinear(K, N, w.row_offsets, w.col_indices, nn.Parameter(w.values.clone()))
    assert not mine.col_indices.is_inference()
    mine(torch.randn(3, K)).sum().backward()
    assert mine.values.grad.shape == w.values.shape


def test_loading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().load_state_dict(model(0.7).state_dict())
