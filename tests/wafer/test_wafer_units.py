"""Units: bytes, bits, FLOP, FMA, cycles; figures with sources; FLOPs as in gpt/flops.py."""

from dataclasses import replace
from typing import get_args

import pytest

from sparsekern.gpt import flops
from sparsekern.gpt.model import GPTConfig
from sparsekern.wafer.cost import step_cost
from sparsekern.wafer.figures import CALIBRATED, Mark
from sparsekern.wafer.inputs import RANGES, Inputs
from sparsekern.wafer.machine import MACHINES, WSE2, WSE3, machine
from sparsekern.wafer.predict import predict
from sparsekern.wafer.product import product_cycles, stream_bytes
from sparsekern.wafer.shapes import GPT_SHAPES, GPTShape, gpt_shape

# What a name promises, by its end.
UNITS = {
    "_bytes_per_s": "bytes/s",
    "_params_per_s": "parameters/s",
    "_bytes_per_cycle": "bytes/cycle",
    "_per_cycle": "FMA/cycle",
    "_bytes_per_pe": "bytes",
    "cache_bytes": "bytes",
    "_cycles": "cycles",
    "_hz": "Hz",
    "_s": "s",
    "_w": "W",
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_has_the_unit_of_its_name_a_mark_and_a_source(name):
    for figure_name, figure in machine(name).figures().items():
        unit = next((u for end, u in UNITS.items() if figure_name.endswith(end)), None)
        assert figure.unit == unit or figure.unit in ("cores", "PEs"), figure_name
        assert figure.mark in get_args(Mark) and figure.source
        assert figure.value > 0 or (name, figure_name) == ("wse3@24B-axpy", "cache_bytes")


def test_conflicting_figures_are_machines_of_their_own():
    assert machine("wse2")["clock_hz"] != machine("wse2@0.85GHz")["clock_hz"]
    assert (
        machine("wse2")["sram_bytes_per_cycle"]
        != machine("wse2@narrow-sram")["sram_bytes_per_cycle"]
    )
    for name, wafer in MACHINES.items():
        base, _, alternative = name.partition("@")
        differing = {
            key for key, figure in wafer.figures().items() if figure != machine(base).figures()[key]
        }
        assert len(differing) == (1 if alternative else 0) and wafer.name == name


def test_an_fma_is_two_flop_and_a_byte_eight_bits():
    cores, clock_hz = 850_000, 1.1e9
    assert WSE2.peak_flop_per_s("fp16") == pytest.approx(cores * clock_hz * 4 * 2)
    assert WSE2.peak_flop_per_s("fp32") == pytest.approx(cores * clock_hz * 1 * 2)
    assert WSE2.sram_bytes == cores * 48 * 1024
    assert WSE2.fabric_bits_per_s == pytest.approx(cores * clock_hz * 4 * 32 * 2)
    assert WSE2["io_bytes_per_s"] * 8 == 1.2e12


def test_an_axpy_is_as_fast_as_arithmetic_and_sram_allow():
    many = 1000  # tokens of a PE
    assert WSE2.axpy_elems_per_cycle("fp16", many) == 4  # 24 bytes a cycle, 3 x 2 an element
    assert WSE2.axpy_elems_per_cycle("fp32", many) == 1
    assert machine("wse2@narrow-sram").axpy_elems_per_cycle("fp16", many) == 2
    assert WSE3.axpy_elems_per_cycle("fp16", many) == 4
    assert WSE3.axpy_elems_per_cycle("fp16", many, is_dot=True) == 6  # 2 x 2 bytes


def test_sums_in_the_cache_leave_the_sram_to_x():
    # 512 bytes hold fp32 sums of 128 tokens, or 256 elements of a dot's shared vector.
    assert WSE3.axpy_elems_per_cycle("fp16", 128) == 8
    assert WSE3.axpy_elems_per_cycle("fp16", 129) == 4
    assert WSE3.axpy_elems_per_cycle("fp16", 256, is_dot=True) == 8
    assert WSE3.axpy_elems_per_cycle("fp16", 257, is_dot=True) == 6
    assert machine("wse3@24B-axpy").axpy_elems_per_cycle("fp16", 1) == 4
    assert WSE2.axpy_elems_per_cycle("fp16", 64) == 4  # arithmetic bounds
    assert WSE2.wavelet_elems("fp16") == 2 and WSE2.wavelet_elems("fp32") == 1


def test_bytes_of_a_weight_stream():
    n, k = 100, 64
    assert stream_bytes(Inputs(), n, k, 1.0) == 2 * n * k
    assert stream_bytes(Inputs(), n, k, 0.25) == 4 * 0.25 * n * k  # value and 16-bit index
    assert stream_bytes(Inputs(), n, k, 0.5) == stream_bytes(Inputs(), n, k, 1.0)  # break-even
    assert stream_bytes(Inputs(), n, k, 0.75) == 2 * n * k  # zeros are sent too
    bitmap = Inputs(stream_format="bitmap")
    assert stream_bytes(bitmap, n, k, 0.25) == (2 * 0.25 + 1 / 8) * n * k
    best = Inputs(stream_format="best")
    assert stream_bytes(best, n, k, 0.25) == stream_bytes(bitmap, n, k, 0.25)
    assert stream_bytes(best, n, k, 0.01) == stream_bytes(Inputs(), n, k, 0.01)
    assert stream_bytes(Inputs(precision="fp32"), n, k, 1.0) == 4 * n * k


def test_cycles_of_one_product_by_hand():
    """750 columns of one input each, 994 rows of four tokens: one cycle a vector."""
    inputs = Inputs(utilisation=1.0, axpy_overhead_cycles=0.0, column_groups=1)
    found = product_cycles(WSE2, inputs, 4 * 994, n=10, k=750, density=1.0)
    assert found.compute == 10 * 1 * 1 + 10 * 1  # AXPYs, and additions of partial sums
    assert found.arrival == 10 and found.reduction == 10 * 2
    assert found.latency == 993 + 749 * (1 + 2 * 2 + 1) + 1 + 2
    assert found.bound == "reduction" and found.total == 20 + found.latency


def test_seconds_scale_with_the_clock_and_utilisation_is_an_input():
    shape = gpt_shape("gpt3-xl")
    slow = machine("wse2@0.85GHz")
    forward = [step_cost(wafer, shape, 1.0, 64).forward.linear_s for wafer in (WSE2, slow)]
    assert forward[1] / forward[0] == pytest.approx(1.1 / 0.85)
    half, full = (
        step_cost(WSE2, shape, 1.0, 64, inputs=Inputs(utilisation=u)).forward.linear_s
        for u in (0.5, 1.0)
    )
    assert half / full == pytest.approx(2, rel=0.01)
    for name, span in RANGES.items():
        assert span.low <= getattr(Inputs(), name) <= span.high
        assert (span.mark == CALIBRATED) == (name in ("utilisation", "score_cycles"))


def test_energy_is_power_times_time_and_the_peak_is_never_passed():
    shape = gpt_shape("gpt3-xl")
    for density in (1.0, 0.1):
        cost = step_cost(WSE2, shape, density, 264, systems=2)
        busy_s = cost.step_s * (1 - cost.io_share)
        assert cost.energy_j == pytest.approx(2 * (16_100 * cost.step_s + 6_800 * busy_s))
        assert sum(cost.time_parts.values()) == pytest.approx(cost.step_s)
        assert cost.flop == pytest.approx(264 * 2048 * shape.train_flop(density))
        assert 0 < cost.peak_share < 1


def test_flops_are_those_of_the_gpt():
    config = GPTConfig(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=100)
    shape = GPTShape("tiny", 3, 64, 4, 256, 100, 32)
    for sparsity in (0.0, 0.5, 0.75):
        density = 1 - sparsity
        assert shape.train_flop(density) == flops.train_flops_per_token(config, sparsity)
        assert shape.flop_ratio(density) == pytest.approx(flops.flop_ratio(config, sparsity))
    whole = shape.linear_weights + config.embedding_rows * config.n_embd
    assert shape.parameters() == whole
    assert shape.parameter_ratio(0.25) == whole / (whole - 0.75 * shape.linear_weights)


def test_golden_flop_ratios():
    """facts of SPDF's convention: 125M, XL, 6.7B, 175B."""
    golden = {
        ("gpt2-small", 0.5): 1.357,
        ("gpt2-small", 0.75): 1.653,
        ("gpt3-xl", 0.5): 1.665,
        ("gpt3-xl", 0.75): 2.494,
        ("gpt3-xl", 0.838): 3.025,
        ("gpt-6.7b", 0.75): 3.053,
        ("gpt3-175b", 0.75): 3.666,
        ("gpt3-175b", 0.9): 7.853,
    }
    for (name, sparsity), ratio in golden.items():
        assert gpt_shape(name).flop_ratio(1 - sparsity) == pytest.approx(ratio, abs=6e-4)
    caps = {"gpt2-small": 2.11, "gpt3-xl": 4.97, "gpt-6.7b": 9.67, "gpt3-175b": 32.9}
    for name, cap in caps.items():
        assert gpt_shape(name).flop_cap == pytest.approx(cap, rel=2e-3)
    assert set(caps) <= set(GPT_SHAPES)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="machine: expected one of wse2, .*, got 'wse9'"):
        machine("wse9")
    with pytest.raises(ValueError, match="model: expected one of .*, got 'gpt9'"):
        gpt_shape("gpt9")
    with pytest.raises(ValueError, match=r"utilisation: expected a share in \(0, 1\], got 0"):
        Inputs(utilisation=0)
    with pytest.raises(ValueError, match="precision: expected one of fp16, bf16, fp32, got 'fp8'"):
        Inputs(precision="fp8")
    with pytest.raises(ValueError, match="score_cycles: expected a number at least 0, got inf"):
        Inputs(score_cycles=float("inf"))
    with pytest.raises(ValueError, match="column_groups: expected a whole number, got 1.5"):
        Inputs(column_groups=1.5)
    with pytest.raises(ValueError, match="layers: expected at least 1, got 0"):
        replace(gpt_shape("gpt3-xl"), layers=0)
    for arguments in ({"density": 0.0, "batch": 1}, {"density": 1.0, "batch": 0}):
        with pytest.raises(ValueError, match="expected"):
            step_cost(WSE2, gpt_shape("gpt3-xl"), **arguments)
    for arguments, message in (
        (("wse2", gpt_shape("gpt3-xl")), r"machine: expected what machine\(name\) gives"),
        ((WSE2, "gpt3-xl"), r"shape: expected what model_shape\(name\) gives"),
    ):
        with pytest.raises(TypeError, match=message):
            predict(*arguments)
    for density in ("sparse", [], [0.5]):
        with pytest.raises(ValueError, match="density: expected a number, or the Weights of"):
            predict(WSE2, gpt_shape("gpt3-xl"), density)
