"""Odd arguments of every entry point: refused, with the argument's name, or harmless."""

from dataclasses import replace

import numpy as np
import pytest

from sparsekern.wafer import (
    RANGES,
    Inputs,
    Mask,
    Weight,
    compare_with_dense,
    gpt_shape,
    gpu,
    gpu_cost,
    inference_cost,
    machine,
    masked_weights,
    offloaded_s,
    predict,
    step_cost,
)

WSE2, SMALL = machine("wse2"), gpt_shape("gpt2-small")
OF_A_DENSITY = {
    "step_cost": lambda d: step_cost(WSE2, SMALL, d, 8),
    "compare_with_dense": lambda d: compare_with_dense(WSE2, SMALL, d, 8),
    "inference_cost": lambda d: inference_cost(WSE2, SMALL, d),
    "offloaded_s": lambda d: offloaded_s(WSE2, Inputs(), 8, 64, 64, d),
    "predict": lambda d: predict(WSE2, SMALL, d),
}


@pytest.mark.parametrize("entry", OF_A_DENSITY)
@pytest.mark.parametrize("density", [float("nan"), 1.5, -0.5, 0, 5e-324, "x", "0.5", None, 0.5j])
def test_a_density_that_is_none(entry, density):
    with pytest.raises(ValueError, match="density: expected"):
        OF_A_DENSITY[entry](density)


def test_a_density_of_numpy_gives_plain_numbers():
    found = inference_cost(WSE2, SMALL, np.float32(0.5))
    assert type(found.decode_token_s) is float
    assert found == inference_cost(WSE2, SMALL, 0.5)


@pytest.mark.parametrize("density", [-1, 1.5, float("nan"), "x"])
def test_flops_and_parameters_of_a_density_that_is_none(density):
    for count in (SMALL.flop_ratio, SMALL.parameters, SMALL.parameter_ratio, SMALL.train_flop):
        with pytest.raises(ValueError, match="density: expected"):
            count(density)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", ["x", None, [1], float("nan"), -1, float("inf")])
def test_inputs_that_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Inputs(**{name: value})


@pytest.mark.parametrize("value", [1.5, 0, -1, float("nan"), "3", 10**400])
def test_counts_that_are_none(value):
    for name in ("batch", "systems", "micro_batch"):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            step_cost(WSE2, SMALL, 0.5, **{"batch": 8, name: value})
    for name in ("requests", "pipeline", "context"):
        if (name, value) != ("context", 0):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                inference_cost(WSE2, SMALL, 0.5, **{name: value})
    with pytest.raises(ValueError, match="tokens: expected"):
        offloaded_s(WSE2, Inputs(), value, 64, 64, 0.5)
    with pytest.raises(ValueError, match="context: expected at least 0, got -5"):
        gpu_cost(gpu("h200"), SMALL, 8, context=-5)


def test_things_of_another_kind():
    of_both = (
        lambda wafer, shape: step_cost(wafer, shape, 0.5, 8),
        lambda wafer, shape: inference_cost(wafer, shape, 0.5),
        lambda wafer, shape: predict(wafer, shape),
    )
    for call in of_both:
        with pytest.raises(
            TypeError, match=r"machine: expected what machine\(name\) gives, got 'w"
        ):
            call("wse2", SMALL)
        with pytest.raises(TypeError, match=r"shape: expected what model_shape\(name\) gives"):
            call(WSE2, "gpt2-small")
    for inputs in ({}, {"utilisation": 0.4}):
        with pytest.raises(TypeError, match=r"inputs: expected what Inputs\(\) gives, got {"):
            step_cost(WSE2, SMALL, 0.5, 8, inputs=inputs)
    with pytest.raises(TypeError, match=r"device: expected what gpu\(name\) gives, got 'h200'"):
        gpu_cost("h200", SMALL, 8)
    with pytest.raises(TypeError, match=r"gpus: expected what gpu\(name\) gives, got 'h200'"):
        predict(WSE2, SMALL, gpus=["h200"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": float("nan")}, "up: density: expected 0 to 1, got nan"),
        ({"density": 1.5}, "up: density: expected 0 to 1, got 1.5"),
        ({"density": "x"}, "up: density: expected a number, got 'x'"),
        ({"layers": -1}, "up: layers: expected at least 1, got -1"),
        ({"layers": 2.5}, "up: layers: expected a whole number, got 2.5"),
        ({"n": 0}, "up: n: expected at least 1, got 0"),
        ({"share": 2.0}, "up: share: expected 0 to 1, got 2"),
    ],
)
def test_weights_that_are_none(change, message):
    given = {"name": "up", "n": 3072, "k": 768, "density": 0.5, "layers": 12}
    with pytest.raises(ValueError, match=message):
        Weight(**given | change)


def test_weights_of_another_kind():
    with pytest.raises(TypeError, match="name: expected a text, got 3"):
        Weight(3, 3072, 768, 0.5, 12)
    with pytest.raises(TypeError, match="up: expected a wafer.Mask, got ndarray"):
        Weight("up", 2, 2, 0.5, 1, np.eye(2) > 0)


OFFSETS, COLUMNS = np.array([0, 2]), np.array([0, 1])


@pytest.mark.parametrize(
    ("shape", "row_offsets", "col_indices", "message"),
    [
        ((1, 3), OFFSETS, np.array([1, 1]), "col_indices: expected each column once in a row"),
        ((1, 1), OFFSETS, np.array([0, 0]), "col_indices: expected each column once in a row"),
        ((1, 3), OFFSETS, np.array([0.0, 1.0]), r"col_indices: expected whole .*, got float64 \[2"),
        ((1, 3), OFFSETS, np.array([[0, 1]]), r"col_indices: expected .* in one row, got int64 \["),
        ((1, 3), OFFSETS * 1.0, COLUMNS, "row_offsets: expected whole numbers"),
        ((0, 3), np.array([0]), np.array([], int), r"shape: expected \(N, K\), both at least 1"),
        ((3, 0), np.array([0]), np.array([], int), r"shape: expected \(N, K\), both at least 1"),
        ((1.7, 3), OFFSETS, COLUMNS, r"shape: expected \(N, K\)"),
        (None, OFFSETS, COLUMNS, r"shape: expected \(N, K\), .* got None"),
    ],
)
def test_masks_whose_parts_do_not_fit(shape, row_offsets, col_indices, message):
    with pytest.raises(ValueError, match=message):
        Mask(shape, row_offsets, col_indices)


def test_columns_of_a_row_may_come_in_any_order_and_in_few_bits():
    mask = Mask((2, 300), np.array([0, 2, 3], np.uint8), np.array([200, 100, 0], np.uint8))
    assert mask.transposed().transposed().col_indices.tolist() == [100, 200, 0]
    assert mask.counts(2, 150).tolist() == [[1, 1], [1, 0]]


def test_a_model_of_which_nothing_is_left():
    empty = [Weight(m.name, m.n, m.k, 0.0, SMALL.layers) for m in SMALL.block]
    with pytest.raises(ValueError, match="density: expected weights that are not all zero"):
        predict(WSE2, SMALL, empty)
    some = [replace(empty[0], density=1e-6), *empty[1:]]
    assert predict(WSE2, SMALL, some).step.speedup > 1


def test_masks_of_experts_need_their_share_of_the_tokens():
    shape = replace(SMALL, layers=1, experts=4, experts_per_token=2)
    kept = {
        name: np.arange(n * k).reshape(n, k) % 4 == 0 for name, (n, k) in shape.matrices.items()
    }
    masks = [(m.name, Mask.from_dense(kept[m.name])) for m in shape.block for _ in range(m.copies)]
    with pytest.raises(ValueError, match="up: expected a share of 0.5, that of an expert's tokens"):
        step_cost(WSE2, shape, masked_weights(masks), 64)
    share = {m.name: m.share for m in shape.block}
    weights = [replace(w, share=share[w.name]) for w in masked_weights(masks)]
    assert step_cost(WSE2, shape, weights, 64).step_s > 0
    with pytest.raises(ValueError, match="got 2 of up, not 4"):
        step_cost(
            WSE2, shape, [w for w in weights if w.share == 1] + weights[-4:] + weights[2:4], 64
        )
