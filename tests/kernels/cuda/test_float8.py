"""Kernels of training in E4M3, on the emulator and on a GPU, and the recipe of the scales."""

import pytest
import torch
from emulated_cusparselt import (  # noqa: F401
    cusparselt_library,
    emulated_cuda,
    emulator,
    float8_on_cpu,
    stand_in,
)
from test_two_of_four import two_way

from sparsekern import SparseTensor
from sparsekern.kernels import float8 as recipe
from sparsekern.kernels.cuda import e4m3, float8
from sparsekern.nn.scaling import FIRST_STEPS, Scaling

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request):
    """The emulator's, with the stand-in for cuSPARSELt, and a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("float8_on_cpu")
    return request.param


def bits(t):
    return t.view(torch.uint8)


def one(value, device="cpu"):
    return torch.tensor([float(value)], device=device)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m, k", [(16, 32), (48, 160)])
def test_a_cast_saturates_rounds_as_torch_does_and_notes_the_largest(device, m, k, dtype):
    for factor, scale in ((0, 4), (1, 2.0**7), (1e30, 2.0**-50), (1e-20, 2.0**50)):
        x = (torch.randn(m, k, device=device) * factor).to(dtype)
        noted = one(0, device)
        x8 = float8.quantise(x, one(scale, device), noted)
        assert torch.equal(bits(x8), bits(recipe.cast(x, one(scale, device))))
        assert noted.item() == x.abs().max().item()
        x[3, 5], x[4, 4], x[5, 9] = torch.inf, -torch.inf, torch.nan
        x8 = float8.quantise(x, one(scale, device), noted)
        assert torch.equal(x8.float().isnan(), ~x.isfinite()) and noted.isnan()
        noted.fill_(1e35)
        other, rows = one(0, device), recipe.largest_of_rows(x[:3])
        float8.note(rows, noted, rows[:1], other)
        assert noted.item() == pytest.approx(1e35) and other.item() == rows[0].item()


@pytest.mark.sanitize
@pytest.mark.parametrize("m, k", [(16, 32), (128, 128), (144, 272), (400, 96)])
def test_bytes_are_transposed(device, m, k):
    x = torch.randint(256, (m, k), dtype=torch.uint8, device=device).view(recipe.DTYPE)
    assert torch.equal(bits(float8.transpose(x)), bits(x).t())
    sums = torch.full((float8.tiles(m), k), torch.nan, device=device)
    x = torch.where(torch.rand(m, k, device=device) < 1e-3, torch.nan, torch.randn_like(x.float()))
    x = x.to(recipe.DTYPE)
    noted, rows = one(0, device), recipe.largest_of_rows(torch.randn(m, k, device=device))
    assert torch.equal(bits(float8.transpose(x, sums, (rows, noted))), bits(x).t())
    assert noted.item() == rows.max().item()
    want = torch.stack([part.float().sum(0) for part in x.split(float8.TURN_TILE)])
    torch.testing.assert_close(sums, want, equal_nan=True)
    total = torch.full((k,), torch.nan, device=device)
    float8.transpose(x, adding=(sums, one(0.5, device), total))
    torch.testing.assert_close(total, want.sum(0) / 2, equal_nan=True)


# Without a product: compute-sanitizer neither runs the library's nor sees what they store.
@pytest.mark.sanitize
@pytest.mark.parametrize("n, k", [(32, 32), (96, 160), (288, 64)])
def test_an_operand_holds_each_value_and_the_tail(device, n, k, nan_memory):
    mask = two_way(n, k).to(device)
    w = torch.randn(n, k, device=device) * mask
    W = SparseTensor.from_dense(w, mask)
    pattern = float8.pattern_of(W.row_offsets, W.col_indices, n, k)
    noted, scale = one(0, device), one(64, device)
    w8 = recipe.cast(w, scale).float()
    noting = recipe.largest_of_rows(torch.randn(48, k, device=device)), one(0, device)
    each = W.values, scale, noted, W.row_offsets, W.col_indices, n, k
    found = float8.operands(*each, True, noting)
    for operand, dense, op in zip(found, (w8, w8.t()), ("spmm", "spmm_t"), strict=True):
        slots = operand[: n * k // 2].view(recipe.DTYPE).float().view(len(dense), -1)
        for slot, row in zip(slots.cpu(), dense.cpu(), strict=True):
            assert torch.equal(slot[slot != 0].sort().values, row[row != 0].sort().values)
        assert torch.equal(operand[slots.numel() :], pattern.tails[op])
        assert len(operand) == float8.operand_bytes(*dense.shape, w.device)
    assert noted.item() == w.abs().max().item() and noting[1].item() == noting[0].max().item()
    alone, none = float8.operands(*each, False)
    assert torch.equal(alone, found[0]) and not len(none)


def test_values_and_biases_of_other_lengths_are_refused(device):
    """Kernels would read beyond them."""
    mask = two_way(32, 32).to(device)
    W = SparseTensor.from_dense(torch.randn(32, 32, device=device) * mask, mask)
    each = one(64, device), one(0, device), W.row_offsets, W.col_indices, 32, 32, True
    x8 = torch.randn(16, 32, device=device).to(recipe.DTYPE)
    y, bias = x8.bfloat16(), torch.zeros(32, device=device).bfloat16()
    operand = float8.operands(W.values, *each)[0]
    for refused in (
        lambda: float8.operands(W.values[:3], *each),
        lambda: float8.product(x8, operand, 32, bias[:3]),
        lambda: e4m3.finish(y, None, bias[:3]),
    ):
        with pytest.raises(ValueError, match=r"(values|bias): expected .* got .*\(3,\)"):
            refused()
    with pytest.raises(ValueError, match="bias: expected torch.bfloat16 .* got torch.float32"):
        float8.product(x8, operand, 32, bias.float())


@pytest.mark.parametrize("n, k, m", [(32, 32, 16), (96, 160, 48), (288, 64, 32)])
def test_products_are_those_of_rounded_operands(device, n, k, m, nan_memory):
    mask = two_way(n, k).to(device)
    w = torch.randn(n, k, device=device) * mask
    w[tuple(mask.nonzero()[3])] = 0
    W = SparseTensor.from_dense(w, mask)
    pattern = W.row_offsets, W.col_indices, n, k
    noted, scale = one(0, device), one(64, device)
    w8 = recipe.cast(w, scale)
    found = float8.operands(W.values, scale, noted, *pattern, True)
    for operand, exact in zip(found, (w8.t(), w8), strict=True):
        x8 = torch.randn(m, len(exact), device=device).to(recipe.DTYPE)
        y = float8.product(x8, operand, exact.shape[1])
        torch.testing.assert_close(y.double(), x8.double() @ exact.double(), rtol=0.01, atol=0.5)
    values = torch.where(torch.arange(W.nnz, device=device) == 7, torch.inf, W.values)
    noted = one(0, device)
    operand, operand_t = float8.operands(values, scale, noted, *pattern, True)
    for each, (outputs, inputs) in ((operand, (n, k)), (operand_t, (k, n))):
        y = float8.product(torch.ones(m, inputs, device=device).to(recipe.DTYPE), each, outputs)
        assert y.isnan().any(0).sum() == 1
    assert noted.isinf()


def test_an_unknown_order_of_slots_and_another_pattern_are_refused(stand_in):  # noqa: F811
    assert float8._has_slots_in_rows("cpu")
    stand_in.slots_in_columns()
    assert not float8._has_slots_in_rows("cpu")
    W = SparseTensor.from_dense(torch.ones(32, 32))
    with pytest.raises(ValueError, match="two-way"):
        float8.operands(W.values, one(1), one(0), W.row_offsets, W.col_indices, 32, 32, True)
    assert "8.9" in float8.refuse_dense(torch.device("cpu"))
    assert "multiples of 32" in float8.refuse_size(48, 32) and not float8.refuse_size(64, 32)
    assert "multiples of 16" in float8.refuse_tokens(8) and float8.refuse_tokens(0)


# The recipe


def test_scales_are_powers_of_two_that_keep_the_largest_within_448():
    largest = torch.tensor([448.0, 448.1, 1.0, 3e38, 1e-38, 2.0**-49])
    scale = recipe.scale_of(largest)
    assert scale[:3].tolist() == [1, 0.5, 256] and (scale.log2() % 1 == 0).all()
    assert scale[3] == 2.0**-42 and scale[4] == 2.0**58
    kept = largest[[0, 1, 2, 5]] * scale[[0, 1, 2, 5]]
    assert ((kept <= 448) & (kept > 224)).all()


def test_the_scale_of_a_step_is_that_of_the_largest_before():
    scaling = Scaling(1, "cpu")
    steps = [[1.0, 7.0, 0.0], [3.5, 7.0, torch.inf], [0.25, 0.0, 1e-3], [0.25, 0.0, torch.nan]]
    seen = []
    for noted in steps:
        scaling.noted[:3] = torch.tensor(noted)
        scaling.advance()
        assert not scaling.noted.any()
        assert torch.equal(scaling.scales * scaling.inverses[:, 0], torch.ones(4))
        seen.append(scaling.scales[:3].tolist())
    # 0 or an infinity in the history is no number of it; the largest stays for HISTORY steps.
    assert seen == [[256, 64, 1], [128, 64, 1], [128, 64, 2**18], [128, 64, 2**18]]
    for _ in range(recipe.HISTORY - 3):
        scaling.noted[:3] = torch.tensor([0.25, 0.0, 1e-3])
        scaling.advance()
    assert scaling.scales[:3].tolist() == [128, 64, 2**18]
    scaling.noted[:3] = torch.tensor([0.25, 0.0, 1e-3])
    scaling.advance()
    assert scaling.scales.tolist()[0] == 1024


NUMBERS = torch.tensor([1.0, 0.1, 1e-3])  # largest ones of x, W and dY


def step_of(scaling, *layers):
    """A step in which these values were noted; None for a layer that saw none."""
    for place, numbers in enumerate(layers):
        if numbers is not None:
            scaling.noted[4 * place :][:3] = numbers
    scaling.advance()
    return scaling.exponents.tolist()


@pytest.mark.usefixtures("float8_on_cpu")
@pytest.mark.parametrize("missing", [(0, 1, 2), (0,), (1,)])
def test_a_layer_without_numbers_moves_nothing(missing):
    """It is called in no step, or its x or its W is 0."""
    scaling, some = Scaling(2, "cpu", True), NUMBERS.clone()
    some[list(missing)] = 0
    for _ in range(FIRST_STEPS):
        found = step_of(scaling, NUMBERS, some)
    for _ in range(70):
        assert step_of(scaling, NUMBERS, some) == found
    assert scaling.scales.isfinite().all() and scaling.scales.all()
    other = Scaling(2, "cpu", True)
    other.load_state_dict(scaling.state_dict())
    for each in (scaling, other):
        step_of(each, NUMBERS, NUMBERS)
        of_x, of_w, _ = each.scales[4:7]
        assert of_x == 256 and 512 <= of_w <= 4096
        assert (of_x * of_w).log2() == each.exponents[1] and each.exponents[0] == found[0]


def test_a_cuda_graph_keeps_the_factors_it_has(float8_on_cpu):  # noqa: F811
    """Of forward and backward, while the optimizer's steps are in none: settle() tells."""
    scaling = Scaling(1, "cpu", True)
    for _ in range(3):
        found = step_of(scaling, NUMBERS)
    state = scaling.state_dict()
    assert [float8.exponent_of(scaling.noted)] == found
    grown = step_of(scaling, 100 * NUMBERS)
    assert grown < found and not scaling.settle()
    float8_on_cpu.is_capturing = True
    assert [float8.exponent_of(scaling.noted)] == grown
    float8_on_cpu.is_capturing = False
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"call settle\(\)"):
            assert step_of(scaling, 1e4 * NUMBERS) == grown
    before = scaling.scales.clone()
    with pytest.raises(RuntimeError, match="forget_graphs_"):
        scaling.load_state_dict(state)
    assert torch.equal(scaling.scales, before) and scaling.exponents.tolist() == grown
    scaling.load_state_dict(scaling.state_dict())  # of the same
    with pytest.warns(UserWarning, match=r"call settle\(\)"):
        step_of(scaling, 1e4 * NUMBERS)
    assert scaling.settle() and not scaling.settle()
    assert scaling.exponents.tolist() < grown
    scaling.load_state_dict(state)
    assert scaling.exponents.tolist() == found


def test_notes_of_no_scaling_are_an_error():
    with pytest.raises(RuntimeError, match="buffers of a layer as to_float8_ has made them"):
        float8.exponent_of(torch.zeros(3))


@pytest.mark.parametrize("name", Scaling.STATE + ("exponents",))
def test_a_state_that_does_not_fit_changes_nothing(name):
    scaling = Scaling(2, "cpu", True)
    state = Scaling(2, "cpu", True).state_dict() | {name: torch.full((3,), 7)}
    words = rf"float8: {name}: expected the state of a model with 2 such layers, .*, got \(3,\)"
    with pytest.raises(ValueError, match=words):
        scaling.load_state_dict(state)
    assert scaling.scales.eq(1).all() and not scaling.exponents.any()


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_cast_is_the_eager_one(device, dtype):
    numbers = [0.0, -0.0, 449.0, -1e30, 3e38, 2.0**-10, 0.3, -7.7]
    x = torch.tensor(numbers, device=device).to(dtype).repeat(8, 64)
    x[1, 3], x[2, 4], x[3, 5] = torch.inf, -torch.inf, torch.nan

    def both(x, scale):
        return recipe.cast(x, scale), recipe.largest_of_rows(x)

    found, want = torch.compile(both)(x, one(2, device)), both(x, one(2, device))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def test_a_cast_of_nothing_and_of_what_overflows():
    x = torch.tensor([0.0, -0.0, 449.0, -1e30, torch.inf, torch.nan, 2.0**-10])
    found = recipe.cast(x, one(1)).float()
    assert found[:4].tolist() == [0, 0, 448, -448]
    assert found[4:6].isnan().all() and found[6] == 0
    assert recipe.largest_of(x).item() == pytest.approx(1e30)
    assert recipe.largest_of_rows(x.view(1, -1)).isnan()
