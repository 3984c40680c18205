"""Which layouts a packed weight is held in, and which of them runs: by what was measured."""

import re

import pytest
import torch
from emulated_cuda import emulated_cuda, emulator  # noqa: F401

from sparsekern import SparseTensor, registered
from sparsekern.kernels.cuda import choose as choosing
from sparsekern.kernels.cuda import cover, explained, few_tokens, times
from sparsekern.kernels.cuda.choose import choose_forms, choose_layout, fastest, pack_for
from sparsekern.kernels.cuda.explained import explain_packed
from sparsekern.kernels.cuda.kept import Dense
from sparsekern.kernels.cuda.layout import Gpu
from sparsekern.kernels.cuda.times import Times, share

# A layout takes so long, as a share of dense, at 1, 8, 64 and 512 tokens.
SHARES = {
    "gather": [0.4, 0.9, 3.0, 3.0],
    "cover": [0.8, 0.6, 1.5, 2.0],
    "pairs": [0.9, 0.8, 1.2, 1.5],
    "dense": [1.0, 1.0, 1.0, 1.0],
}
SIZES = 100, 100, 2500  # of W: N, K, nnz
NAMES = "gather", "cover", "pairs"


def choose(tokens, *names) -> tuple[str, ...]:
    return choose_forms(tokens, *SIZES, names or NAMES)


@pytest.fixture
def measure(monkeypatch):
    """Lets other measurements of one shape at one density be the shipped ones."""

    def forget():
        times.share.cache_clear()
        fastest.cache_clear()

    def use(**shares: list) -> None:
        found = {name: [[each]] for name, each in (SHARES | shares).items()}
        data = Times("a GPU", [1, 8, 64, 512], [[100, 100]], [0.25], found)
        for module in (times, choosing, explained):
            monkeypatch.setattr(module, "measured", lambda: data)
        forget()

    monkeypatch.setattr(cover, "is_built", lambda: True)
    use()
    yield use
    forget()


@pytest.mark.parametrize(
    ("tokens", "packed_alone", "with_dense"),
    [
        ((1, 1), ("gather",), ("gather",)),
        ((8, 8), ("cover",), ("cover",)),
        ((64, 64), ("pairs",), ("dense",)),
        ((1, 8), ("gather", "cover"), ("gather", "cover")),
        ((1, 512), ("gather", "pairs"), ("gather", "dense")),
        ((64, 512), ("pairs",), ("dense",)),
        ((8, 64), ("cover", "pairs"), ("cover", "dense")),
    ],
)
def test_layouts_are_those_that_were_fastest(measure, tokens, packed_alone, with_dense):
    assert choose(tokens) == packed_alone
    assert choose(tokens, *NAMES, "dense") == with_dense


def test_a_second_layout_is_worth_its_bytes_or_not_held(measure):
    measure(cover=[0.9, 0.85, 3, 3], pairs=[0.9, 0.85, 3, 3])
    assert choose((1, 8)) == ("gather",)
    measure(cover=[0.9, 0.7, 3, 3])
    assert choose((1, 8)) == ("gather", "cover")


def test_dense_is_kept_where_something_between_the_ends_is_slow(measure):
    measure(gather=[0.4, 1.2, 0.5, 0.5], cover=[2, 2, 2, 2], pairs=[2, 2, 2, 2])
    assert choose((1, 64)) == ("gather",)
    assert choose((1, 64), *NAMES, "dense") == ("gather", "dense")
    measure(gather=[0.98, 1.2, 1.0, 1.0], cover=[2, 2, 2, 2], pairs=[2, 2, 2, 2])
    assert choose((1, 64), *NAMES, "dense") == ("dense",)  # it gains nothing
    measure(gather=[1.02, 1.02, 1.02, 1.02])  # 0.98 of dense: not worth a larger weight
    assert choose((1, 1), *NAMES, "dense") != ("dense",)


def test_each_call_takes_the_faster_layout(measure):
    def runs(held: str, m: int) -> str:
        names = held.split(",")
        return names[fastest(tuple(names), m, *SIZES, torch.bfloat16)]

    assert [runs("gather,dense", m) for m in (1, 2, 8, 9, 64, 65, 4096)] == 3 * ["gather"] + 4 * [
        "dense"
    ]
    assert [runs("cover,gather", m) for m in (1, 2, 512)] == ["gather", "cover", "cover"]
    measure(gather=[None] * 4, dense=[None] * 4)
    assert runs("gather,dense", 1) == "dense"
    assert runs("gather,cover", 1) == "cover"


def test_times_follow_the_density_along_a_line(monkeypatch):
    shares = {"gather": [[[0.4], [0.6]], [[0.1], [None]]]}
    data = Times("a GPU", [1], [[100, 100], [9999, 100]], [0.1, 0.2], shares)
    monkeypatch.setattr(times, "measured", lambda: data)
    times.share.cache_clear()
    found = [share("gather", m, 120, 90, d) for m, d in ((1, 0.15), (7, 0.1), (1, 0.05), (1, 0.4))]
    times.share.cache_clear()
    assert found == pytest.approx([0.5, 0.4, 0.4, 1.0])
    assert share("gather", 1, 9000, 100, 0.2) == 0.1  # the one density that there is
    assert share("pairs", 1, 100, 100, 0.2) is None
    times.share.cache_clear()


@pytest.mark.skipif(not cover.is_built(), reason="the C++ library is not built")
def test_what_ships_knows_every_layout_and_agrees_with_the_choice_for_one_number():
    data = times.measured()
    assert data.shares.keys() == {*NAMES, "dense"}
    assert data.tokens == sorted(data.tokens) and data.densities == sorted(data.densities)
    for by_shape in data.shares.values():
        assert len(by_shape) == len(data.shapes)
        assert {len(by_density) for by_density in by_shape} == {len(data.densities)}
        assert {len(each) for s in by_shape for each in s} == {len(data.tokens)}
    lost = []
    for at in range(len(data.shapes)):
        for d, density in enumerate(data.densities):
            for t, m in enumerate(data.tokens):
                found = {name: s[at][d][t] for name, s in data.shares.items() if name in NAMES}
                found = {name: each for name, each in found.items() if each is not None}
                chosen = found.get(choose_layout(m, density).kind.name)
                if m <= few_tokens.MOST_TOKENS and chosen:
                    lost.append(chosen / min(found.values()))
    assert sum(lost) / len(lost) < 1.1


def weight(n: int = 100, k: int = 100) -> SparseTensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator).bfloat16()
    return SparseTensor.from_dense(w, torch.rand(n, k, generator=generator) < 0.25)


def parts_of(forms) -> tuple:
    tensors = [t for form in forms for t in form.tensors().values()]
    numbers = [number for form in forms for number in form.numbers()]
    W = forms[0]
    return ",".join(form.name for form in forms), W.n, W.k, W.nnz, numbers, tensors


@pytest.mark.usefixtures("emulated_cuda")
def test_both_layouts_give_the_product(measure, monkeypatch):
    monkeypatch.setattr(few_tokens, "gpu_of", lambda device: Gpu(3, 227 * 1024))
    W, bias = weight(), torch.randn(100).bfloat16()
    forms = pack_for(W, (1, 512), may_be_dense=True)
    parts = parts_of(forms)
    assert parts[0] == "gather,dense"
    for m in (1, 5, 64, 100):
        x = torch.randn(m, 100).bfloat16()
        want = x.double() @ W.to_dense().double().T + bias.double()
        y = registered.run_spmm_packed(x, *parts, bias)
        torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=2e-2)
        x = torch.zeros(m, 100).bfloat16()
        x[0, 3] = torch.inf
        finite = registered.run_spmm_packed(x, *parts)[0].isfinite()
        dense_multiplies_its_zeros = torch.zeros(100, dtype=torch.bool)
        missing = W.to_dense()[:, 3] == 0
        assert torch.equal(finite, missing if m <= 8 else dense_multiplies_its_zeros)


def test_parts_that_do_not_fit(measure):
    layout, *sizes, numbers, tensors = parts_of(pack_for(weight(), (1, 512), may_be_dense=True))
    x = torch.randn(64, 100).bfloat16()
    for wrong in ((numbers, tensors[1:]), (numbers[1:], tensors)):
        with pytest.raises(ValueError, match="gather,dense: expected 1 numbers and 9 tensors"):
            registered.run_spmm_packed(x, layout, *sizes, *wrong)
    with pytest.raises(ValueError, match="layout: expected some of gather, .*, got 'x'"):
        registered.run_spmm_packed(x, "gather,x", *sizes, numbers, tensors)
    with pytest.raises(ValueError, match=r"weight: expected a 16-bit float of shape \(100, 100\)"):
        registered.run_spmm_packed(x, layout, *sizes, numbers, [*tensors[:-1], tensors[-1][1:]])
    with pytest.raises(TypeError, match="x: expected torch.bfloat16"):
        registered.run_spmm_packed(x.half(), layout, *sizes, numbers, tensors)


def test_a_dense_copy_is_a_packed_weight():
    W = weight(70, 36)
    packed = Dense.of(W)
    packed.check()
    assert torch.equal(packed.expand(), W.to_dense()) and packed.nbytes == 2 * 70 * 36
    assert packed.clone().weight is not packed.weight
    with pytest.raises(TypeError, match="weight: expected a 16-bit float"):
        Dense.of(SparseTensor.from_dense(torch.ones(4, 4))).check()


def test_explained(measure):
    parts = parts_of(pack_for(weight(), (1, 512), may_be_dense=True))
    one, many = explain_packed(1, parts), explain_packed(100, parts)
    held = r"100 x 100, 2\d% of it stored, held as gather and dense in 0\.03\d+ MB "
    held += r"\(1\.\d\d of dense\)"
    for text, m, how, took in (
        (one, 1, "gather, on a GPU", "0.40"),
        (many, 100, "dense: torch.mm of the copy that is kept", "1.00"),
    ):
        match, _, rest = text.partition("; ")
        assert re.fullmatch(held, match)
        assert rest == (
            f"{m} tokens -> {how}; {took} of the time of the best dense call, as measured near "
            "100 x 100 (a GPU)"
        )
    measure(gather=[None] * 4, dense=[None] * 4)
    assert "not measured for so many" in explain_packed(1, parts)
