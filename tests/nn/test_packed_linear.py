"""pack_ with numbers of tokens, dense copies and groups. On a GPU also: the products themselves."""

import copy
import pickle
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import sparsekern
from sparsekern import SparseLinear, Static, sparsify_
from sparsekern.kernels.cuda import choose
from sparsekern.kernels.cuda.choose import pack_for
from sparsekern.kernels.cuda.kept import Dense
from sparsekern.nn import PackedLinear, densify_, pack_, shared
from sparsekern.nn.largest import largest_inputs
from sparsekern.nn.packed import token_range
from sparsekern.nn.shared import PackedPart, SharedInput
from sparsekern.registered import run_spmm_packed

WIDTH, GROUPS = 32, [["q", "k", "v"], ["gate", "up"]]


@pytest.fixture(autouse=True)
def packed_for_a_gpu(monkeypatch):
    """Of models on a CPU, too."""
    monkeypatch.setattr("sparsekern.nn.packed.is_for_cpu", lambda weight: False)


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width // 4, bias=False)
        self.v = nn.Linear(width, width // 4)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:-1], 4, -1)
        k, v = self.k(x).unsqueeze(-2), self.v(x).unsqueeze(-2)
        return self.out((q * k + v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))


def model(width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Attention(width), MLP(width), Attention(width))
    return sparsify_(made, Static(0.75), lambda *_: True).to(dtype)


@pytest.fixture
def products(monkeypatch):
    """Names of the layers of which a product ran: on a CPU, of a dense copy."""
    ran = []

    def forward(self, input):
        x = input
        if not torch.compiler.is_compiling():
            ran.append(self)
        y = x.reshape(-1, self.in_features) @ self.dense_weight
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    monkeypatch.setattr(PackedLinear, "forward", forward)
    monkeypatch.setattr(choose, "choose_forms", lambda *_: ("dense",))
    return ran


# Numbers of tokens


def test_numbers_of_tokens():
    assert token_range(7) == (7, 7) and token_range([1, 64]) == (1, 64)
    assert token_range((1, 2048)) == (1, 2048) and token_range(range(1, 65)) == (1, 64)
    for wrong in (
        0,
        -1,
        (),
        (1,),
        (1, 2, 3),
        (5, 1),
        (1.0, 2),
        "ab",
        1.5,
        None,
        range(0),
        range(3),
        (0, 5),
    ):
        with pytest.raises(ValueError, match="tokens: expected a number above 0"):
            pack_(model(), wrong)
    with pytest.raises(ValueError, match="tokens: expected a number above 0.* got True"):
        pack_(model(), True)
    with pytest.raises(ValueError, match="dense: expected True, False or a function, got 'auto'"):
        pack_(model(), dense="auto")


def test_a_layer_says_what_it_holds_and_runs():
    packed = pack_(model(), (1, 2048), dense=lambda module, name: name == "1.down")
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    assert layers["1.down"].layout.endswith("dense") and layers["1.up"].layout != "dense"
    text = sparsekern.explain(512, packed)
    assert [line.split(":")[0] for line in text.splitlines()] == [*layers, f"all {len(layers)}"]
    held = sum(layer.packed_bytes for layer in layers.values())
    assert f"all {len(layers)}: {held / 1e6:.3g} MB (" in text
    down = next(line for line in text.splitlines() if line.startswith("1.down"))
    assert "512 tokens -> dense: torch.mm" in down
    x = torch.zeros(4, 128, 2 * WIDTH).bfloat16()
    assert "1.down: " + sparsekern.explain(x, layers["1.down"]) == down
    refused = r"x: expected \[\.\.\., 64\] or a number of tokens, got \(4, 128, 63\)"
    with pytest.raises(ValueError, match=refused):
        sparsekern.explain(x[..., 1:], layers["1.down"])
    with pytest.raises(ValueError, match="W: expected layers that pack_ has made, Linear has none"):
        sparsekern.explain(1, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="x: expected a Tensor beside a SparseTensor"):
        sparsekern.explain(1, model()[0].q.weight)


def test_layouts_of_other_weights_do_not_stand_in_one_layer():
    W = [layer.weight.detach() for layer in (model()[1].gate, model()[1].down)]
    for forms in (map(Dense.of, W), (Dense.of(W[0]), Dense.of(W[0]))):
        with pytest.raises(ValueError, match="packed: expected one W in different layouts"):
            PackedLinear(list(forms))


def test_a_packed_layer_moves_and_copies_with_all_that_it_holds():
    layer = PackedLinear.from_sparse(model()[1].down, (1, 2048), dense=True)
    assert layer.layout.endswith("dense")
    twin = copy.deepcopy(layer)
    for (name, buffer), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer.view(torch.uint8), other.view(torch.uint8)), name
    assert layer.packed_bytes == sum(b.nbytes for n, b in layer.named_buffers() if n != "bias")
    assert not layer.state_dict() and not list(layer.parameters())
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}
    with pytest.raises(NotImplementedError, match="PackedLinear: it has no way back from meta"):
        layer.to_empty(device="cpu")
    text = sparsekern.explain(300, PackedLinear.from_sparse(model()[1].down))
    assert "gather: W is written out for the call" in text


# Groups


def test_groups_are_one_product(products):
    made, x = model(), torch.randn(2, 5, WIDTH).bfloat16()
    want = copy.deepcopy(made)(x)
    packed = pack_(made, groups=GROUPS)
    kinds = [type(m).__name__ for m in packed[0].children()]
    assert kinds == 3 * ["PackedPart"] + ["PackedLinear"]
    with torch.no_grad():
        torch.testing.assert_close(packed(x), want, rtol=2e-2, atol=2e-2)
    assert [layer.out_features for layer in products] == [48, 32, 128, 32, 48, 32]
    shared = packed[0].q.shared
    assert shared is packed[0].v.shared and shared._pass is None
    with pytest.raises(ValueError, match="is packed"):
        densify_(packed)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_only_the_same_tensor_shares_a_product(products, mode):
    layer = pack_(model(dtype=torch.bfloat16), groups=GROUPS)[0]
    with mode():
        x = torch.randn(3, WIDTH).bfloat16()
        alone = [p(x.clone()) for p in (layer.q, layer.k, layer.v)]

        def check(count: int, *calls):
            products.clear()
            for part, given in calls:
                want = alone[[layer.q, layer.k, layer.v].index(part)]
                assert torch.equal(part(given), want)
            assert len(products) == count

        q, k, v = layer.q, layer.k, layer.v
        check(1, (q, x), (k, x), (v, x))
        check(1, (v, x), (q, x), (k, x))  # any order
        check(2, (q, x), (k, x), (v, x), (q, x), (k, x), (v, x))  # and nothing is kept
        check(3, (q, x), (k, x.clone()), (v, x))
        x = x.clone()
        check(2, (q, x), (q, x), (k, x), (v, x))  # a second call of q is another pass


def test_a_tensor_that_was_written_to_is_another(products):
    layer = pack_(model(), groups=GROUPS)[0]
    with torch.no_grad():
        x = torch.randn(3, WIDTH).bfloat16()
        layer.q(x)
        x.mul_(2)
        want = layer.k(x.clone())
        products.clear()
        layer.q(x)
        x.copy_(x)
        assert torch.equal(layer.k(x), want) and len(products) == 2
        # The part of a pass that never came to its end.
        layer.q(x)
        x.zero_()
        assert torch.equal(layer.v(x), layer.v(x.clone()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_groups_are_one_product(products, backend):
    torch.compiler.reset()
    packed, x = pack_(model()[:1], groups=GROUPS[:1]), torch.randn(2, 5, WIDTH).bfloat16()
    with torch.no_grad():
        want = packed(x)
        graphs = []

        def count(graph, inputs):
            graphs.append(sum("matmul" in str(node.target) for node in graph.graph.nodes))
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        compiled = torch.compile(packed, backend=count, fullgraph=True)
        for given in (x, x.clone(), x):
            torch.testing.assert_close(compiled(given), want, rtol=2e-2, atol=2e-2)
    assert graphs == [2]  # the group and `out`
    assert packed[0].q.shared._pass is None


class Writes(Attention):
    """One that writes to x between the layers of a group, perhaps where a graph ends."""

    breaks = False

    def forward(self, x):
        q = self.q(x)
        if self.breaks:
            torch._dynamo.graph_break()
        x[:, 1:].mul_(2)  # through a view
        return q, self.k(x), self.v(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("breaks", [False, True])
def test_compiled_groups_see_writes(products, mode, breaks):
    torch.compiler.reset()
    made = sparsify_(nn.Sequential(Writes()), Static(0.75), lambda *_: True).bfloat16()
    made[0].breaks = breaks
    alone, groups = pack_(copy.deepcopy(made)), pack_(made, groups=GROUPS[:1])
    compiled = torch.compile(groups, backend="eager", fullgraph=not breaks)
    with mode():
        for _ in range(2):
            x = torch.randn(3, WIDTH).bfloat16()
            for got, want in zip(compiled(x.clone()), alone(x), strict=True):
                assert torch.equal(got, want)


def test_what_one_capture_began_no_other_ends(products, monkeypatch):
    layer, x = pack_(model(), groups=GROUPS)[0], torch.randn(3, WIDTH).bfloat16()
    for captures, times in (((1, 1, 1), 1), ((1, 2, 2), 2), ((None, 1, None), 3)):
        before = len(products)
        for capture, part in zip(captures, (layer.q, layer.k, layer.v), strict=True):
            monkeypatch.setattr(shared, "capture_of", lambda x, capture=capture: capture)
            part(x)
        assert len(products) == before + times
        layer.q.shared._pass = None


def test_groups_refuse_what_inference_mode_made(products):
    """A write to it would not be seen."""
    layer, x = pack_(model(), groups=GROUPS)[0], torch.randn(3, WIDTH).bfloat16()
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="expected x of another mode .* torch.no_grad, or"):
            layer.q(x.clone())
        before = layer.q(x)  # one from outside has a version, and keeps it
        x.mul_(2)
        after = layer.q(x)
    with torch.no_grad():
        assert torch.equal(layer.q(x.clone()), after) and not torch.equal(before, after)


def test_groups_follow_gradients_parameters_and_copies(products):
    layer = pack_(model(), groups=GROUPS)[0]
    x = nn.Parameter(torch.randn(3, WIDTH).bfloat16())
    with torch.no_grad():
        layer.q(x)
        assert not list(layer.parameters())  # x is kept, but is no part of the module
        twin, again = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert twin.q.shared._pass is again.q.shared._pass is None is not layer.q.shared._pass
    products.clear()
    layer.k(x)
    assert len(products) == 1  # with a gradient, which PackedLinear refuses


def test_a_copy_of_a_group_shares_nothing_with_it(products):
    packed, x = pack_(model(), groups=GROUPS), torch.randn(3, WIDTH).bfloat16()
    with torch.no_grad():
        packed[0].q(x)
        twin = copy.deepcopy(packed)
        assert twin[0].q.shared is twin[0].k.shared is not packed[0].q.shared
        torch.testing.assert_close(twin(x), packed(x))


def test_groups_that_are_none():
    for groups, message in {
        (("q", "x"),): "nothing in the model is called x",
        (("q", "gate"),): "nothing in the model has two SparseLinear of q, gate",
        (("q",),): "expected lists of two names or more",
        (("q", "q"),): "expected lists of two names or more",
        ("qk",): "expected lists of two names or more, each another, got 'qk'",
        (("q", "k"), ("k", "v")): "0.k is in two of them",
        None: "expected lists of two names or more, each another, got None",
        (None,): "expected lists of two names or more, each another, got None",
        ((1, 2),): "expected lists of two names or more, each another, got (1, 2)",
        (("q", "k", "vv"),): "nothing in the model is called vv",
        (("gate", "down"),): "expected 1.down to have in_features, dtype and device of 1.gate",
    }.items():
        made = model()
        before = dict(made.named_modules())
        with pytest.raises(ValueError, match=f"groups: .*{re.escape(message)}"):
            pack_(made, groups=groups)
        assert dict(made.named_modules()) == before
    made = model()
    made[0].k = made[0].q
    with pytest.raises(ValueError, match="groups: 0.q is in two of them, or in one twice"):
        pack_(made, groups=GROUPS)
    made = nn.Sequential(Attention())
    sparsify_(made, Static(0.75), lambda m, name: name != "0.k")
    packed = pack_(made.bfloat16(), groups=GROUPS[:1])
    kinds = [type(m) for m in packed[0].children()]
    assert kinds == [PackedPart, nn.Linear, PackedPart, PackedLinear]


def test_layers_in_float32_stay(products):
    made = model(dtype=torch.float32)
    with pytest.raises(TypeError, match="expected bfloat16 or float16 values"):
        pack_(made, groups=GROUPS)
    assert all(isinstance(m, SparseLinear) for m in (made[0].q, made[1].down))


def test_what_is_packed_takes_no_weights(products):
    made = model()
    weights, packed = made.state_dict(), pack_(made, groups=GROUPS)
    before = packed[1].down.bias.clone()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="(?s)0.q is packed and takes no .*2.out is packed"):
            packed.load_state_dict(weights, strict=strict)
    packed.load_state_dict(packed.state_dict())
    made = model()
    layer = PackedLinear.from_sparse(made[1].down)
    with torch.no_grad():
        made[1].down.bias.zero_()
    assert torch.equal(layer.bias, before)
    x = torch.randn(3, 2 * WIDTH).bfloat16()
    assert torch.equal(layer(input=x), layer(x))  # the name that nn.Linear gives it


def test_tangents_are_refused():
    form = Dense.of(model()[1].gate.weight.detach())
    parts = form.name, form.n, form.k, form.nnz, form.numbers(), list(form.tensors().values())
    x = torch.randn(3, WIDTH).bfloat16()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="spmm_packed: .*tangent"),
    ):
        run_spmm_packed(forward_ad.make_dual(x, x), *parts)
    assert run_spmm_packed(x, *parts).shape == (3, 2 * WIDTH)


def test_nothing_to_pack():
    with pytest.raises(ValueError, match="pack_: no SparseLinear in Linear; sparsify_ or"):
        pack_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no SparseLinear in Sequential; it is packed already"):
        pack_(pack_(model()))
    with pytest.raises(NotImplementedError, match="pack_: 0.q is on meta, without values"):
        pack_(model().to("meta"))


def test_hooks_are_not_taken_over():
    made = model()
    made[0].out.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="^pack_: 0.out had hooks, .* register them again$"):
        pack_(made)


def test_a_group_is_explained_under_all_its_names():
    packed = pack_(model(), groups=GROUPS)
    names = [line.split(":")[0] for line in sparsekern.explain(1, packed).splitlines()]
    assert names[:3] == ["0.q, 0.k, 0.v", "0.out", "1.gate, 1.up"]
    assert sparsekern.explain(1, packed[0].k).startswith("48 x 32, ")


def test_the_largest_input_of_layers_with_named_and_with_no_tokens():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = model(dtype=torch.float32)[1].up

        def forward(self, x):
            return self.up(input=x[:0]), self.up(input=x)

    made = Experts()
    assert largest_inputs(made, torch.full((2, WIDTH), -3.0)) == {made.up: 3.0}


def test_inputs_are_looked_at_as_inference_has_them():
    made = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), model()[1].up.float()).train()
    made[1].eval()
    before = copy.deepcopy(made.state_dict())
    largest = largest_inputs(made, torch.full((2, WIDTH), -3.0))
    assert largest[made[2]] == pytest.approx(3.0, rel=1e-4)
    assert [m.training for m in made] == [True, False, True]
    for name, tensor in before.items():
        assert torch.equal(made.state_dict()[name], tensor), name


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dense", "dtype"),
    [
        (1, True, torch.bfloat16),
        ((1, 2048), False, torch.float16),
        ((16, 64), True, torch.bfloat16),
    ],
    ids=str,
)
def test_products(tokens, dense, dtype):
    made = model(256, dtype).cuda()
    packed = pack_(copy.deepcopy(made), tokens, dense=dense, groups=GROUPS)
    assert sum(isinstance(m, SharedInput) for m in packed.modules()) == 3
    exact = densify_(made).double()
    for m in (1, 3, 16, 64, 65, 300):
        x = torch.randn(m, 256, device="cuda").to(dtype)
        want = exact(x.double())
        for mode in (torch.no_grad, torch.enable_grad):
            with mode():
                y = packed(x).double()
            assert (y - want).norm() <= 2e-2 * want.norm()
        assert f"{m} tokens -> " in sparsekern.explain(m, packed)


@pytest.mark.gpu
def test_compiled_products_choose_when_they_run():
    made = model(256).cuda()
    packed = pack_(copy.deepcopy(made), (1, 2048), dense=True, groups=GROUPS)
    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    for m in (2, 64, 300):
        x = torch.randn(m, 256, device="cuda").bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), packed(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_graph_of_a_group_follows_its_input():
    made = model(256).cuda()
    packed = pack_(copy.deepcopy(made), (1, 64), dense=True, groups=GROUPS)
    x = torch.randn(8, 256, device="cuda").bfloat16()
    with torch.no_grad():
        packed(x)
        packed[0].q(x)  # a pass that ended early: nothing of it goes into the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed(x)
        for _ in range(3):
            x.copy_(torch.randn(8, 256, device="cuda"))
            graph.replay()
            got, want = y.clone(), packed(x)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_half_of_a_group_in_each_of_two_graphs():
    """Each multiplies for itself: the second may be replayed where the first is not."""
    packed = pack_(model(256).cuda(), (1, 64), groups=GROUPS)[0]
    x = torch.randn(8, 256, device="cuda").bfloat16()
    graphs, got = [torch.cuda.CUDAGraph() for _ in range(2)], []
    with torch.no_grad():
        packed.q(x), packed.k(x), packed.v(x)
        for graph, layer in zip(graphs, (packed.q, packed.k), strict=True):
            with torch.cuda.graph(graph):
                got.append(layer(x))
        x.copy_(torch.randn(8, 256, device="cuda"))
        graphs[1].replay()
        assert torch.equal(got[1], packed.k(x))


@pytest.mark.gpu
def test_whole_numbers_are_exact_whatever_runs():
    """Sums of small integers are exact in any order: the parts equal the layers to the bit."""
    made = model(256)
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, SparseLinear):
                layer.values.copy_(torch.randint(-2, 3, layer.values.shape))
    made = made.cuda()
    parts = pack_(copy.deepcopy(made), (1, 2048), groups=GROUPS)[0]
    alone = pack_(copy.deepcopy(made), (1, 2048), dense=True)[0]
    for m in (1, 16, 64, 200):
        x = torch.randint(-2, 3, (m, 256), device="cuda").bfloat16()
        with torch.no_grad():
            for name in ("q", "k", "v"):
                assert torch.equal(getattr(parts, name)(x), getattr(alone, name)(x))


# Values of 8 bits

EIGHT_BITS = pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn], ids=str)


@EIGHT_BITS
def test_values_of_8_bits(values):
    made = model()
    layer = PackedLinear.from_sparse(made[1].down, (1, 64), values=values)
    assert layer.dtype is torch.bfloat16 and layer.values_dtype is values
    of_16_bits = PackedLinear.from_sparse(made[1].down, (1, 64))
    assert layer.packed_bytes < 0.9 * of_16_bits.packed_bytes  # of a small layer
    name = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}[values]
    assert f"layout=gather_{name}" in repr(layer)
    assert ", with a scale for each row, in " in sparsekern.explain(1, layer)
    packed = pack_(made, groups=GROUPS, values=values)
    kinds = {m.values_dtype for m in packed.modules() if isinstance(m, PackedLinear)}
    assert kinds == {values}


@EIGHT_BITS
def test_values_of_8_bits_move_copy_and_are_saved(values, tmp_path):
    layer = PackedLinear.from_sparse(model()[1].down, (1, 64), values=values)
    layer.half().float().bfloat16()  # no cast reaches codes and scales
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(twin) == repr(layer)
        for (name, buffer), other in zip(layer.named_buffers(), twin.buffers(), strict=True):
            assert other.dtype is buffer.dtype, name
            assert torch.equal(buffer.view(torch.uint8), other.view(torch.uint8)), name
    assert not layer.state_dict()
    with pytest.raises(RuntimeError, match="is packed and takes no weights"):
        layer.load_state_dict(model()[1].down.state_dict())


def test_what_8_bits_do_not_take(monkeypatch):
    def refused(kind, match, made=None, **given):
        made = model() if made is None else made
        before = dict(made.named_modules())
        with pytest.raises(kind, match=match):
            pack_(made, **given)
        assert dict(made.named_modules()) == before

    int8, e4m3 = torch.int8, torch.float8_e4m3fn
    for wrong in (torch.uint8, torch.float8_e5m2, torch.float16, "int8", 8):
        refused(
            ValueError,
            r"values: expected torch.int8, torch.float8_e4m3fn or None, got",
            values=wrong,
        )
    refused(ValueError, "dtype: expected torch.float8_e4m3fn or None, got torch.int8", dtype=int8)
    refused(ValueError, "values, dtype: expected one of the two", values=int8, dtype=e4m3)
    refused(ValueError, "example: it has a meaning with dtype", values=int8, example=torch.ones(1))
    for dense in (True, lambda *_: False):
        refused(
            ValueError, "dense: expected False with values=torch.int8", values=int8, dense=dense
        )
    refused(TypeError, "0.q: weight: expected bfloat16", model(dtype=torch.float16), values=int8)
    made = model()
    with torch.no_grad():
        made[1].down.values[5] = torch.nan
    refused(
        ValueError, "1.down: weight: expected finite values, .* got nan in row", made, values=e4m3
    )
    monkeypatch.setattr("sparsekern.nn.packed.is_for_cpu", lambda weight: True)
    refused(NotImplementedError, "0.q: values: torch.int8 is for a weight on a GPU", values=int8)
    form = pack_for(model()[1].gate.weight.detach(), (1, 1), values=int8)[0]
    with pytest.raises(TypeError, match="values: expected torch.uint8 of shape"):
        replace(form, values=form.values.view(torch.int8)).check()
    with pytest.raises(TypeError, match="scales: expected torch.float32 of shape"):
        replace(form, scales=form.scales.double()).check()
    other = pack_for(model()[1].gate.weight.detach(), (64, 64), values=e4m3)[0]
    with pytest.raises(ValueError, match="packed: expected one W in different layouts"):
        PackedLinear([form, other])
