"""What must hold for any model, machine, batch and density."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekern import SparseTensor
from sparsekern.wafer.balance import Mask, binomial_imbalance, windowed_imbalance
from sparsekern.wafer.cost import compare_with_dense, step_cost
from sparsekern.wafer.inference import inference_cost
from sparsekern.wafer.inputs import ACTIVATIONS, STREAM_FORMATS, Inputs
from sparsekern.wafer.machine import MACHINES, machine
from sparsekern.wafer.predict import predict
from sparsekern.wafer.product import product_cycles
from sparsekern.wafer.shapes import GPTShape, gpt_shape
from sparsekern.wafer.sweep import sweep
from sparsekern.wafer.weights import Weight, masked_weights

ROUNDING = 1 + 1e-9

shapes = st.builds(
    lambda layers, heads, size, vocabulary, sequence: GPTShape(
        "any", layers, 64 * heads, heads, size * 64 * heads, vocabulary, sequence
    ),
    st.integers(1, 48),
    st.integers(1, 96),
    st.integers(1, 4),
    st.integers(256, 60_000),
    st.sampled_from((128, 1024, 2048)),
)
inputs = st.builds(
    Inputs,
    precision=st.sampled_from(("fp16", "fp32")),
    stream_format=st.sampled_from(STREAM_FORMATS),
    activations=st.sampled_from(ACTIVATIONS),
    column_groups=st.sampled_from((0, 1, 4)),
    utilisation=st.floats(0.1, 1.0),
    axpy_overhead_cycles=st.floats(0, 40),
    score_cycles=st.floats(0, 200),
    element_cycles=st.floats(0, 16),
    partial_sum_share=st.floats(0.01, 0.9),
)
machines = st.sampled_from(sorted(MACHINES)).map(machine)
densities = st.floats(0.005, 1.0)
batches = st.integers(1, 300)


@settings(max_examples=150)
@given(machines, shapes, inputs, batches, densities, densities)
def test_time_is_monotone_in_density(wafer, shape, given_inputs, batch, a, b):
    less, more = (
        step_cost(wafer, shape, d, batch, inputs=given_inputs).step_s for d in sorted((a, b))
    )
    assert less <= more * ROUNDING


@settings(max_examples=150)
@given(machines, shapes, inputs, batches, densities)
def test_no_speedup_above_the_density_or_above_amdahl(wafer, shape, given_inputs, batch, density):
    found = compare_with_dense(wafer, shape, density, batch, inputs=given_inputs)
    assert 1 <= found.speedup * ROUNDING
    assert found.speedup <= ROUNDING / density
    assert found.speedup <= found.amdahl_cap * ROUNDING
    assert found.flop_ratio <= ROUNDING / density and found.flop_ratio <= found.flop_cap * ROUNDING


@settings(max_examples=100)
@given(machines, shapes, inputs, batches, densities, st.integers(1, 200), st.integers(1, 200))
def test_more_systems_are_never_slower(wafer, shape, given_inputs, batch, density, a, b):
    few, many = (
        step_cost(wafer, shape, density, batch, systems, given_inputs) for systems in sorted((a, b))
    )
    assert many.step_s <= few.step_s * ROUNDING


@settings(max_examples=60)
@given(machines, shapes, inputs, batches, densities)
def test_a_range_holds_the_speedup(wafer, shape, given_inputs, batch, density):
    found = compare_with_dense(wafer, shape, density, batch, inputs=given_inputs)
    low, high = found.speedup_range
    assert low <= found.speedup * ROUNDING and found.speedup <= high * ROUNDING
    assert 1 <= low * ROUNDING and high <= ROUNDING / density
    again = step_cost(wafer, shape, density, batch, inputs=replace(given_inputs, score_cycles=7.0))
    moved = found.sparse.with_score_cycles(7.0)
    assert moved.step_s == pytest.approx(again.step_s) and moved.inputs == again.inputs


@settings(max_examples=60)
@given(machines, shapes, densities, st.integers(0, 10**5), st.integers(0, 10**5), st.data())
def test_more_context_and_more_requests_take_longer(wafer, shape, density, a, b, data):
    requests = data.draw(st.integers(1, 100))
    systems = data.draw(st.integers(1, shape.layers))

    def cost(context: int, batch: int = requests, pipeline: int = systems):
        return inference_cost(wafer, shape, density, None, context, batch, pipeline)

    less, more = (cost(context) for context in sorted((a, b)))
    assert less.decode_token_s <= more.decode_token_s * ROUNDING
    assert less.free_bytes >= more.free_bytes and less.most_context == more.most_context
    twice = cost(b, 2 * requests)
    assert cost(b).decode_token_s <= twice.decode_token_s * ROUNDING
    assert twice.throughput_tokens_per_s >= cost(b).throughput_tokens_per_s / ROUNDING
    # A pipeline is no faster for a request, and serves more of them.
    assert cost(b, pipeline=1).decode_token_s <= cost(b).decode_token_s * ROUNDING


@settings(max_examples=60)
@given(machines, shapes, st.integers(0, 5), batches, st.integers(0, 3))
def test_more_experts_and_longer_sequences_take_longer(wafer, shape, doublings, batch, used):
    """Work is rounded up to whole vectors, so halves of it are as long or longer."""
    few = replace(shape, experts=2**used, experts_per_token=2**used)
    many = replace(few, experts=2 ** (used + doublings))
    times = [step_cost(wafer, s, 1.0, batch).step_s for s in (few, many)]
    assert times[0] <= times[1] * 1.01 and few.linear_fma == many.linear_fma
    longer = replace(shape, sequence=2 * shape.sequence)
    times = [step_cost(wafer, s, 1.0, batch).step_s for s in (shape, longer)]
    assert times[0] <= times[1] * ROUNDING


@settings(max_examples=60)
@given(machines, shapes, inputs, batches)
def test_zero_sparsity_is_dense(wafer, shape, given_inputs, batch):
    found = compare_with_dense(wafer, shape, 1.0, batch, inputs=given_inputs)
    assert found.speedup == 1 and found.flop_ratio == 1
    assert all(layer.cycles.imbalance == 1 for layer in found.sparse.layers)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(1, 1e6), densities)
def test_imbalance_is_at_least_one_and_no_part_is_more_than_full(parts, trials, density):
    assert 1 <= binomial_imbalance(parts, trials, density) <= 1 / density * ROUNDING


@settings(deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(1, 64),
    densities,
    st.integers(1, 20_000),
    st.integers(1, 200),
    densities,
)
def test_imbalance_of_windows(parts, k_per_part, density, outputs, window, other):
    def fullest(d: float, w: int) -> float:
        return d * windowed_imbalance(parts, k_per_part, d, outputs, w)

    assert density <= fullest(density, window) * ROUNDING <= ROUNDING**2
    low, high = sorted((density, other))
    assert fullest(low, window) <= fullest(high, window) * ROUNDING
    assert fullest(density, 2 * window) <= fullest(density, window) * ROUNDING


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(1, 12), st.data())
def test_a_mask_counts_what_it_keeps(n, k, density, parts, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    kept = rng.random((n, k)) < density
    mask = Mask.from_dense(kept)
    k_per_part = math.ceil(k / parts)
    counts = mask.counts(parts, k_per_part)
    assert counts.sum() == mask.nnz == kept.sum()
    for part in range(parts):
        columns = kept[:, part * k_per_part : (part + 1) * k_per_part]
        assert (counts[:, part] == columns.sum(axis=1)).all()
    twice = mask.transposed().transposed()
    assert (twice.row_offsets == mask.row_offsets).all()
    assert (twice.col_indices == mask.col_indices).all()
    together = data.draw(st.integers(1, n))
    blocks = np.add.reduceat(counts, np.arange(0, n, together), axis=0)
    assert (mask.counts(parts, k_per_part, together) == blocks).all()


def test_a_full_mask_is_dense_and_a_random_one_is_its_density():
    wafer, shape = machine("wse2"), GPTShape("one block", 1, 768, 12, 3072, 50257, 2048)
    for density, tolerance in ((1.0, 1e-6), (0.25, 0.01)):
        rng = np.random.default_rng(0)
        masks = [
            (name, Mask.from_dense(rng.random(size) < density))
            for name, size in shape.matrices.items()
        ]
        actual = step_cost(wafer, shape, masked_weights(masks), 64)
        uniform = step_cost(wafer, shape, density, 64)
        assert actual.step_s == pytest.approx(uniform.step_s, rel=tolerance)


def test_a_mask_with_uneven_columns_waits_longer():
    wafer, n, k = machine("wse2"), 512, 1500
    rng = np.random.default_rng(0)
    even = rng.random((n, k)) < 0.25
    uneven = rng.random((n, k)) < np.linspace(0, 0.5, k)
    cycles = [
        product_cycles(wafer, Inputs(), 2**18, n, k, Mask.from_dense(kept))
        for kept in (even, uneven)
    ]
    assert cycles[1].imbalance > 1.5 > cycles[0].imbalance >= 1
    assert cycles[1].total > cycles[0].total


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Mask.from_dense(np.ones(3, bool)), r"kept: expected bool \[N, K\]"),
        (lambda: Mask.from_dense(np.ones((3, 3))), "kept: .* got float64"),
        (lambda: Mask((3, 3), np.array([0, 1]), np.array([1])), "row_offsets: expected 4 numbers"),
        (lambda: Mask((1, 3), np.array([0, 1]), np.array([3])), "col_indices: expected 0 to 2"),
        (lambda: Mask((3,), np.array([0, 1]), np.array([1])), r"shape: expected \(N, K\)"),
        (
            lambda: Weight("up", 9, 2, 0.5, 1, Mask.from_dense(np.eye(2) > 0)),
            "up: expected n, k",
        ),
    ],
)
def test_masks_that_are_none_are_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_masks_of_tensors_are_those_of_arrays():
    W = SparseTensor.from_dense(torch.eye(3, 4))
    for mask in (Mask(W.shape, W.row_offsets, W.col_indices), Mask.from_dense(W.to_dense() > 0)):
        assert (mask.transposed().col_indices == [0, 1, 2]).all() and mask.density == 0.25


def test_masks_of_a_part_of_the_model_are_no_model():
    wafer, shape = machine("wse2"), gpt_shape("gpt2-small")
    part = masked_weights([("qkv", Mask.from_dense(np.eye(2304, 768) > 0))])
    with pytest.raises(ValueError, match="all linear layers of gpt2-small.*got 1 of qkv, not 12"):
        step_cost(wafer, shape, part, 64)
    with pytest.raises(TypeError, match="expected a wafer.Mask of qkv, got ndarray"):
        masked_weights([("qkv", np.eye(3) > 0)])
    with pytest.raises(ValueError, match="density: expected a mask of shape"):
        product_cycles(wafer, Inputs(), 64, 9, 9, part[0].mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, n, k: (name, k, n),
            r"qkv: expected 2304 x 768 in gpt2-small, got 768 x 2304; it is transposed: .*Conv1D",
        ),
        (lambda name, n, k: (name, n // 2, 2 * k), "qkv: expected 2304 x 768 .* 1152 x 1536$"),
        (lambda name, n, k: (f"h.0.{name}_", n, k), "h.0.qkv_: .* one of qkv, proj, up, down"),
        (
            lambda name, n, k: ("up", 3072, 768) if name in ("up", "down") else (name, n, k),
            "got 24 of up, not 12",
        ),
    ],
)
def test_weights_that_do_not_fit_the_model(change, message):
    """Each has as many places as the model."""
    shape = gpt_shape("gpt2-small")
    given = [change(name, n, k) for name, (n, k) in shape.matrices.items()]
    weights = [Weight(*weight, 0.25, shape.layers) for weight in given]
    with pytest.raises(ValueError, match=f"density: .*{message}"):
        predict(machine("wse2"), shape, weights)


def test_names_may_have_those_of_modules_before_them():
    shape = GPTShape("two blocks", 2, 64, 4, 256, 100, 32)
    weights = [
        Weight(f"h.{i}.x.{name}", n, k, 0.25, 1)
        for i in range(2)
        for name, (n, k) in shape.matrices.items()
    ]
    assert step_cost(machine("wse2"), shape, weights, 64).step_s > 0


def test_layers_may_differ_in_density():
    wafer, shape = machine("wse2"), gpt_shape("gpt2-small")
    weights = [
        Weight(name, n, k, 1.0 if name == "down" else 0.25, shape.layers)
        for name, (n, k) in shape.matrices.items()
    ]
    times = [step_cost(wafer, shape, d, 64).step_s for d in (0.25, weights, 1.0)]
    assert times == sorted(times) and len(set(times)) == 3


def test_few_tokens_wait_for_the_stream_and_many_hide_it():
    wafer, shape = machine("wse2"), gpt_shape("gpt3-xl")
    fast = Inputs(utilisation=1.0, axpy_overhead_cycles=0.0)
    few, many = (step_cost(wafer, shape, 1.0, batch, inputs=fast) for batch in (1, 128))
    assert few.bound == "I/O" and few.io_share > 0.5
    assert many.bound == "compute" and many.io_share < 0.01


def test_short_sram_recomputes_then_spills():
    wafer, shape = machine("wse2"), gpt_shape("gpt-6.7b")
    modes = [step_cost(wafer, shape, 1.0, batch).activations for batch in (2, 65, 400)]
    assert [plan.mode for plan in modes] == ["resident", "recompute", "spill"]
    assert modes[0].spilled_bytes == modes[1].spilled_bytes == 0 < modes[2].spilled_bytes
    resident = step_cost(wafer, shape, 1.0, 65, inputs=Inputs(activations="resident"))
    assert resident.backward.recompute_s == 0
    assert resident.step_s < step_cost(wafer, shape, 1.0, 65).step_s


def test_micro_batches_stream_the_weights_again():
    wafer, shape = machine("wse2"), gpt_shape("gpt3-xl")
    whole, cut = (step_cost(wafer, shape, 0.25, 64, micro_batch=m) for m in (None, 2))
    assert (whole.micro_steps, cut.micro_steps) == (1, 32)
    assert cut.step_s > whole.step_s and cut.flop == whole.flop


def test_resident_inference_is_bound_by_the_way_not_by_the_weights():
    wafer, shape = machine("wse2"), gpt_shape("gpt-6.7b")
    dense, sparse = (inference_cost(wafer, shape, d) for d in (1.0, 0.1))
    assert dense.decode_compute_s < 0.05 * dense.decode_token_s
    assert 1 <= dense.decode_token_s / sparse.decode_token_s < 1.05
    assert sparse.weight_bytes < 0.3 * dense.weight_bytes and dense.fits
    assert not inference_cost(wafer, gpt_shape("gpt3-175b"), 1.0).fits
    assert sparse.prefill_tokens_per_s > 3 * dense.prefill_tokens_per_s


def test_a_sweep_has_a_row_for_every_configuration():
    sparsities = [percent / 100 for percent in range(0, 100, 2)]
    rows = sweep(sparsities=sparsities, machines=list(MACHINES)[:5])
    assert len(rows) == 1000
