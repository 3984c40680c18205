"""Steps cut into micro-batches, caps and ranges: how parts add up to what is printed."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from sparsekern.cli import main
from sparsekern.wafer import (
    MACHINES,
    RANGES,
    Inputs,
    Mask,
    Weight,
    compare_with_dense,
    gpt_shape,
    inference_cost,
    machine,
    predict,
    step_cost,
)

WSE2 = machine("wse2")
XL, SMALL = gpt_shape("gpt3-xl"), gpt_shape("gpt2-small")


def alone_s(sequences: int, **more) -> float:
    cost = step_cost(WSE2, XL, 0.25, sequences, **more)
    return cost.step_s - cost.boundary_s


def test_the_last_micro_batch_is_as_long_as_what_is_left_for_it():
    cost = step_cost(WSE2, XL, 0.25, 128, micro_batch=50)
    assert [(micro.count, micro.sequences) for micro in cost.micro] == [(2, 50), (1, 28)]
    assert cost.micro_steps == 3 and cost.tokens == 128 * XL.sequence
    by_hand = 2 * alone_s(50) + alone_s(28) + cost.boundary_s
    assert cost.step_s == pytest.approx(by_hand)
    assert sum(cost.time_parts.values()) == pytest.approx(cost.step_s)
    assert sum(cost.energy_parts_j.values()) == pytest.approx(cost.energy_j)
    moved = cost.with_score_cycles(7.0)
    again = step_cost(WSE2, XL, 0.25, 128, 1, Inputs(score_cycles=7.0), 50)
    assert moved.step_s == pytest.approx(again.step_s)


def test_a_share_that_systems_cannot_split_evenly_is_the_fullest_ones():
    assert step_cost(WSE2, XL, 0.25, 65, 2).step_s == step_cost(WSE2, XL, 0.25, 33).step_s
    assert step_cost(WSE2, XL, 0.25, 65, 2, micro_batch=99).micro_steps == 1
    assert step_cost(WSE2, XL, 0.25, 2, 5).micro[0].sequences == 1


def test_one_sequence_more_than_a_micro_batch_is_no_jump():
    whole = step_cost(WSE2, XL, 0.25, 128).step_s
    assert step_cost(WSE2, XL, 0.25, 128, micro_batch=127).step_s < 1.1 * whole


def test_every_matrix_has_its_own_share_of_the_cap():
    rng = np.random.default_rng(0)
    for _ in range(40):
        weights = [
            Weight(m.name, m.n, m.k, float(rng.choice([0.01, 0.05, 0.25, 1.0])), SMALL.layers)
            for m in SMALL.block
        ]
        given = Inputs(column_groups=int(rng.choice([0, 1])))
        batch = int(rng.choice([1, 8, 64, 300]))
        found = compare_with_dense(machine("wse3"), SMALL, weights, batch, 1, given, 50)
        assert found.speedup <= found.speedup_range[1] <= found.amdahl_cap * (1 + 1e-9)


def test_the_order_of_weights_does_not_count():
    weights = [Weight(m.name, m.n, m.k, 0.25, SMALL.layers) for m in SMALL.block]
    forth, back = (step_cost(WSE2, SMALL, order, 64) for order in (weights, weights[::-1]))
    assert forth.step_s == pytest.approx(back.step_s, rel=1e-12)
    assert forth.boundary_s == back.boundary_s == step_cost(WSE2, SMALL, 0.25, 64).boundary_s


@pytest.mark.parametrize("density", [0.25, 0.05])
def test_the_range_of_a_sparse_step_holds_both_of_its_doubts(density):
    """Published runs fit a costly score with a high utilisation, and none with a low one: 0.436."""
    found = predict(WSE2, XL, density)
    low, high = found.step_s
    for cycles, utilisation in ((0.0, 0.436), (77.25, 0.4716), (105.0, 0.484)):
        given = Inputs(score_cycles=cycles, utilisation=utilisation)
        assert low < step_cost(WSE2, XL, density, 128, inputs=given).step_s < high
    ends = RANGES["utilisation"]
    for utilisation in (ends.low, ends.high):
        given = Inputs(utilisation=utilisation)
        assert low <= step_cost(WSE2, XL, density, 128, inputs=given).step_s <= high
    dense, speedups = found.dense_step_s, found.step.speedup_range
    assert low == pytest.approx(dense[0] / speedups[1], rel=1e-3)
    assert high == pytest.approx(dense[1] / speedups[0], rel=1e-3)


def test_a_dense_model_is_as_sure_as_its_dense_step():
    found = predict(WSE2, XL, 1.0)
    assert found.step_s == pytest.approx(found.dense_step_s) and found.step.speedup == 1


def test_errors_are_of_the_machine_that_was_asked_for(capsys, tmp_path):
    errors = {name: predict(machine(name), XL).held_out[0] for name in ("wse2", "wse2@0.85GHz")}
    assert errors["wse2"] < 0.05 < 0.15 < errors["wse2@0.85GHz"]
    for name, wafer in MACHINES.items():
        found = predict(wafer, XL)
        assert found.held_against == name and found.nearest.machine == name.partition("@")[0]
    faster = replace(WSE2, clock_hz=WSE2.clock_hz.scaled(2.0))
    assert predict(faster, XL).held_out == predict(WSE2, XL).held_out
    (tmp_path / "own.toml").write_text('base = "wse2"\n')
    assert main(["wafer", "predict", "--sparsity=0", f"--machine={tmp_path / 'own.toml'}"]) == 0
    assert "no run of own.toml is known; dense steps of wse2: mean" in capsys.readouterr().out


def test_the_numbers_of_a_cut_step_add_up(capsys, tmp_path):
    file = tmp_path / "numbers.json"
    flags = ("--sparsity=0.75", "--batch=128", "--micro-batch=50", "--details", f"--json={file}")
    assert main(["wafer", "predict", *flags]) == 0
    out = capsys.readouterr().out
    assert "3 micro-steps of 50 sequences, the last of 28" in out and "sparse step " in out
    numbers = json.loads(file.read_text())["sparse"]

    def seconds(micro: dict) -> float:
        parts = ("linear_s", "attention_s", "elementwise_s", "head_s", "recompute_s")
        ways = micro["forward"], micro["backward"]
        return sum(max(sum(way[part] for part in parts), way["io_in_s"]) for way in ways)

    total = 2 * seconds(numbers) + seconds(numbers["last_micro_step"]) + numbers["boundary_s"]
    assert numbers["step_s"] == pytest.approx(total)


def test_the_guide_shows_what_the_command_prints(capsys):
    guide = (Path(__file__).parents[2] / "docs/guide/wafer.md").read_text()
    _, _, block = guide.partition("```text\n")
    command = "wafer predict --model gpt3-xl --sparsity 0.75 --beside"
    assert f"python -m sparsekern {command}\n" in guide
    assert main(command.split()) == 0
    assert capsys.readouterr().out == block.partition("```")[0]


def test_order_of_rows_and_columns_counts_for_a_mask():
    """Blocks on the diagonal keep neighbours apart; the same places at random do not."""
    shape = replace(SMALL, layers=1)
    rng = np.random.default_rng(0)

    def weights(is_shuffled: bool) -> list[Weight]:
        found = []
        for name, (n, k) in shape.matrices.items():
            rows, columns = np.indices((n, k))
            kept = rows * 4 // n == columns * 4 // k
            if is_shuffled:
                kept = kept[rng.permutation(n)][:, rng.permutation(k)]
            mask = Mask.from_dense(kept)
            found.append(Weight(name, n, k, mask.density, 1, mask))
        return found

    blocks, shuffled = (compare_with_dense(WSE2, shape, weights(x), 64) for x in (False, True))
    slow, fast = (
        found.dense.forward.linear_s / found.sparse.forward.linear_s for found in (blocks, shuffled)
    )
    assert slow < 1.5 < 2.5 < fast <= 4
    assert asdict(blocks.sparse.forward)["io_in_s"] == shuffled.sparse.forward.io_in_s


def test_a_pipeline_is_as_full_and_as_slow_as_the_system_with_most_layers():
    shape = replace(SMALL, layers=3)
    found = {n: inference_cost(WSE2, shape, 1.0, context=64, pipeline=n) for n in (1, 2, 3)}
    assert [cost.at_work for cost in found.values()] == [1, 1.5, 3]
    rates = {n: cost.throughput_tokens_per_s * cost.decode_token_s for n, cost in found.items()}
    assert rates == pytest.approx({1: 1, 2: 1.5, 3: 3})
    for cost in found.values():
        again = inference_cost(WSE2, shape, 1.0, None, cost.most_context, 1, cost.pipeline)
        more = inference_cost(WSE2, shape, 1.0, None, cost.most_context + 1, 1, cost.pipeline)
        assert again.fits and not more.fits
    # 80.6 GB are less than two systems have, but two of the three layers do not fit one.
    large = replace(XL, layers=3, width=32_768, heads=256, ffn=131_072)
    costs = {n: inference_cost(WSE2, large, 1.0, pipeline=n) for n in (2, 3)}
    assert costs[2].weight_bytes < 2 * WSE2.sram_bytes
    assert not costs[2].fits and costs[3].fits
