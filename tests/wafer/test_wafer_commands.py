"""python -m sparsekern wafer: what each command prints, writes and refuses."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from sparsekern import sparsify_, terminal
from sparsekern.bench import records
from sparsekern.cli import main
from sparsekern.commands import wafer, wafer_flags, wafer_masks
from sparsekern.gpt.build import build_model
from sparsekern.gpt.config import TrainConfig
from sparsekern.gpt.train import train
from sparsekern.sparsity import Static
from sparsekern.wafer.balance import Mask
from sparsekern.wafer.cost import step_cost
from sparsekern.wafer.inputs import RANGES, Inputs
from sparsekern.wafer.machine import WSE2
from sparsekern.wafer.runs import Calibration, Run
from sparsekern.wafer.sensitivity import sensitivity
from sparsekern.wafer.shapes import gpt_shape
from sparsekern.wafer.validation.points import ratio_point
from sparsekern.wafer.validation.validate import Validation


def run(capsys, *arguments: str) -> str:
    assert main(["wafer", *arguments]) == 0
    return capsys.readouterr().out


def error_line(capsys, *arguments: str) -> str:
    assert main(["wafer", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_sparsity_that_was_not_given_is_told(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 2, "n_embd": 768, "n_head": 12, "vocab_size": 100, '
        '"n_positions": 64}'
    )
    for flags, told in (
        ([], "sparsity: 0.75 is the default, as --sparsity was not given\n"),
        ([f"--model={tmp_path}"], f"; of {tmp_path} its config is read, not how many weights are"),
        (["--sparsity=0.75"], ""),
    ):
        assert main(["wafer", "predict", *flags]) == 0
        printed = capsys.readouterr()
        assert told in printed.err and bool(told) == ("default" in printed.err)
        assert "75% zeros" in printed.out


def test_the_sparsity_of_a_pruned_folder_is_read(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 2, "n_embd": 768, "n_head": 12, "vocab_size": 100, '
        '"n_positions": 64}'
    )
    table = tmp_path / "prune.json"
    for text, zeros, told in (
        ('{"sparsity": 0.503, "layers": []}', "50% zeros", f"0.503 is that of {table}, as --spar"),
        ('[{"sparsity": 0.5}]', "75% zeros", "0.75 is the default"),
        ('{"sparsity": 1}', "75% zeros", "0.75 is the default"),
        ('{"sparsity": "x"}', "75% zeros", "0.75 is the default"),
        ("{", "75% zeros", "0.75 is the default"),
    ):
        table.write_text(text)
        for model in (tmp_path, tmp_path / "config.json"):
            assert main(["wafer", "predict", f"--model={model}"]) == 0
            printed = capsys.readouterr()
            assert zeros in printed.out and f"sparsity: {told}" in printed.err
    table.write_text('{"sparsity": 0.5}')
    assert "90% zeros" in run(capsys, "predict", f"--model={tmp_path}", "--sparsity=0.9")
    reads, read = [], wafer_flags._pruned
    monkeypatch.setattr(wafer_flags, "_pruned", lambda model: reads.append(model) or read(model))
    assert main(["wafer", "sensitivity", f"--model={tmp_path}"]) == 0
    assert reads == [str(tmp_path)]  # once: what is told is what was taken
    assert f"sparsity: 0.5 is that of {table}" in capsys.readouterr().err


def test_a_run_as_model_is_told_to_be_a_checkpoint(capsys, tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    message = error_line(capsys, "predict", f"--model={tmp_path}")
    assert f"model: {tmp_path} is a run of `sparsekern train`, whose shape and masks" in message


def test_predict_prints_the_step_its_terms_and_its_doubts(capsys, tmp_path):
    file = tmp_path / "numbers.json"
    out = run(capsys, "predict", "--details", "--sources", "--json", str(file))
    for text in ("gpt3-xl on 1 x wse2", "speed-up  1.", "at none", "activations: recompute"):
        assert text in out
    for text in (
        "energy a token",
        "weight gradient",
        "reduction",
        "imbalance",
        "I/O in",
        "tokens/s a request",
    ):
        assert text in out
    assert "is calibrated" in out and "sparse speed-ups are not validated" in out
    assert "mean error" in out and "h200" in out
    assert "second-hand" in out and "assumed" in out and "Argonne documentation" in out
    numbers = json.loads(file.read_text())
    assert numbers["speedup_low"] <= numbers["speedup"] <= numbers["speedup_high"]
    assert numbers["sparse"]["step_s_low"] < numbers["sparse"]["step_s_high"]
    assert 1 < numbers["speedup"] < numbers["amdahl_cap"] < 4
    assert numbers["machine"]["clock_hz"]["source"]
    assert len(numbers["sparse"]["layers"]) == 5 * 3


def test_predict_takes_a_shape_a_machine_and_systems(capsys):
    out = run(capsys, "predict", "--width=1024", "--layers=2", "--machine=wse3", "--systems=4")
    assert "gpt3-xl, changed on 4 x wse3" in out
    assert "bound by" in run(capsys, "predict", "--model=gpt2-small", "--batch=1")


def test_predict_imports_no_torch():
    command = (sys.executable, "-X", "importtime", "-m", "sparsekern", "wafer", "predict")
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in found.stderr.splitlines()}
    assert "numpy" in imported and not {"torch", "matplotlib"} & imported


def test_decode_against_context_and_on_several_systems(capsys):
    shape = ("--layers=80", "--width=8192", "--heads=64", "--kv-heads=8", "--ffn=28672", "--gated")
    shape += ("--machine=wse3", "--sparsity=0", "--batch=1", "--beside")
    assert "DO NOT FIT THE SRAM" in run(capsys, "predict", *shape)
    out = run(capsys, "predict", *shape, "--pipeline=4", "--context=8192", "--requests=2")
    assert "DO NOT FIT" not in out and "at context 8,192" in out and "of all 8" in out
    for flag, message in (
        ("--context=-1", "context: expected at least 0, got -1"),
        ("--requests=0", "requests: expected at least 1, got 0"),
        ("--pipeline=99", "pipeline: expected at most the 80 layers, got 99"),
    ):
        assert message in error_line(capsys, "predict", *shape, flag)


def test_a_product_for_a_host_gains_less(capsys, tmp_path):
    file = tmp_path / "product.json"
    sizes = ("--tokens=512", "--n=4096", "--k=4096", "--sparsity=0.99")
    out = run(capsys, "product", *sizes, f"--json={file}")
    assert "y[512, 4096] = x[512, 4096] @ W[4096, 4096].T on wse2" in out
    found = json.loads(file.read_text())
    alone = found["dense"]["wafer_s"] / found["sparse"]["wafer_s"]
    both = sum(found["dense"].values()) / sum(found["sparse"].values())
    assert alone > both > 1
    assert "k: expected at least 1, got 0" in error_line(capsys, "product", *sizes, "--k=0")
    # In: x, and 4 bytes a nonzero; out: y.
    moved = 2 * 2 * 512 * 4096 + 4 * 0.01 * 4096**2
    assert found["sparse"]["transfer_s"] == pytest.approx(moved / 1.5e11 + 4e-5)


def test_sweep_takes_lengths_batches_and_utilisations(capsys):
    lists = ("--sequences", "1024", "4096", "--batch", "8", "16", "--utilisations", "0.33", "0.5")
    out = run(capsys, "sweep", "--models", "gpt2-small", "--sparsities", "0.5", *lists)
    assert out.count("| wse2 ") == 8 and out.count(" to ") >= 8
    assert "its range is 0.33 to 0.5" in out
    given = run(capsys, "sweep", "--models=gpt2-small", "--sparsities=0.5", "--utilisation=0.4")
    assert "utilisation 0.4 was asked for, 0.472 is calibrated" in given


MEASURED = Path(__file__).with_name("measured.csv")  # as bench/run.py would
FASTER = 'base = "wse2"\nclock_hz = {value=2.2e9, unit="Hz", mark="assumed", source="a guess"}\n'


def test_every_command_takes_a_machine_of_ones_own(capsys, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(FASTER)
    small = ("--models", "gpt2-small", "--sparsities", "0.5")
    out = run(capsys, "predict", "--sources", f"--machine={own}")
    assert "gpt3-xl on 1 x own.toml" in out and "a guess" in out
    assert "| own.toml |" in run(capsys, "sweep", *small, "--machines", "wse2", str(own))
    assert "clock_hz" in run(capsys, "sensitivity", "--model=gpt2-small", f"--machine={own}")
    arguments = ("compare", "--match=train_step", "--results", str(MEASURED))
    assert run(capsys, *arguments, f"--machine={own}") != run(capsys, *arguments)


def test_predict_mistakes(capsys):
    assert "got 75.0; did you mean 0.75?" in error_line(
        capsys, "product", "--tokens=1", "--n=1", "--k=1", "--sparsity=75"
    )
    assert "sparsity: expected at least 0 and below 1, got 1.0" in error_line(
        capsys, "predict", "--sparsity=1"
    )
    assert "machine: expected one of" in error_line(capsys, "predict", "--machine=wse9")
    assert "model: expected one of" in error_line(capsys, "predict", "--model=gpt9")
    assert "column_groups: expected at most 750" in error_line(
        capsys, "predict", "--column-groups=1000"
    )
    assert "checkpoint: none.pt does not exist" in error_line(
        capsys, "predict", "--checkpoint=none.pt"
    )
    for flag in ("batch", "layers", "systems"):
        message = error_line(capsys, "predict", f"--{flag}=0")
        assert f"{flag}: expected at least 1, got 0" in message
    assert "batch: expected at least 1, got 0" in error_line(capsys, "sweep", "--batch=0")


def test_predict_reads_the_masks_of_a_checkpoint(capsys, tmp_path):
    train(tiny_config(tmp_path, sparsity=0.75, layers=2, steps=2))
    capsys.readouterr()
    path = tmp_path / "run" / "checkpoint.pt"
    shape, weights = wafer_masks.checkpoint_weights(path)
    assert (shape.layers, shape.width, shape.sequence, len(weights)) == (2, 32, 16, 8)
    assert all(w.mask is not None and abs(w.density - 0.25) < 0.01 for w in weights)
    assert {(w.n, w.k) for w in weights} == set(shape.matrices.values())
    assert sum(w.n * w.k for w in weights) == shape.linear_fma
    out = run(capsys, "predict", f"--checkpoint={path}", "--batch=64", "--details")
    assert "run on 1 x wse2" in out and "blocks" not in out and "0.250" in out
    for flag in ("--sparsity=0.5", "--model=gpt3-xl", "--kv-heads=1", "--gated"):
        message = f"expected its shape and masks alone, got {flag.split('=')[0]} too"
        assert message in error_line(capsys, "predict", f"--checkpoint={path}", flag)
    empty = Mask.from_dense(np.zeros((weights[0].n, 32), bool))
    pruned = replace(weights[0], density=0.0, mask=empty)
    found = step_cost(WSE2, shape, (pruned, *weights[1:]), 64)
    assert found.step_s < step_cost(WSE2, shape, weights, 64).step_s


def test_masks_of_modules_are_their_patterns():
    config = TrainConfig(layers=1, heads=2, width=32, context=8)
    model = build_model(config, 256)
    dense = [wafer_masks._mask(m) for m in model.blocks.modules()]
    assert all(mask.density == 1 for mask in dense if mask is not None)
    sparsify_(model, Static(0.5))
    for module in model.blocks.modules():
        mask = wafer_masks._mask(module)
        if mask is not None:
            kept = torch.zeros(mask.shape, dtype=torch.bool)
            rows = torch.arange(mask.shape[0]).repeat_interleave(
                torch.from_numpy(mask.row_offsets).diff()
            )
            kept[rows, torch.from_numpy(mask.col_indices)] = True
            assert torch.equal(kept, module.to_linear().weight != 0)


def test_sweep_lists_every_combination(capsys, tmp_path):
    file = tmp_path / "rows.json"
    out = run(
        capsys,
        *("sweep", "--models", "gpt2-small", "gpt3-xl", "--sparsities", "0", "0.5", "0.9"),
        *("--machines", "wse2", "wse3", "--systems", "1", "16", "--json", str(file)),
    )
    assert out.count("| wse2 ") == out.count("| wse3 ") == 12
    rows = json.loads(file.read_text())
    assert len(rows) == 24
    for row in rows:
        assert 1 <= row["speedup"] <= row["amdahl_cap"] * (1 + 1e-9)
        assert row["systems"] * 128 == row["batch"]


def test_sweep_draws_its_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out = run(capsys, "sweep", "--models", "gpt3-xl", "--plots", str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "speedup.png",
        "roofline.png",
        "decode.png",
        "imbalance.png",
        "stacked-time-gpt3-xl.png",
        "total-cost-gpt3-xl.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert out.count("wrote ") == 6


RUN = Run("a run", "gpt2-small", "wse2", 1, 8, 1.0, "held out", "nowhere")
SPEEDS = Calibration(Inputs(), {RUN: 0.0}, {RUN: 0.0})


def test_validate_fails_where_a_point_must_hold(capsys, monkeypatch, tmp_path):
    wrong = ratio_point("V01", "A", "wrong", 2.0, 2.5, 0.01, "nowhere")
    held = ratio_point("V14", "B", "right", 2.5, 2.5, 0.01, "nowhere")
    held = type(held)(**{**vars(held), "held_out_errors": (0.0, 0.0)})
    for points, code in (([held], 0), ([held, wrong], 1)):
        monkeypatch.setattr(
            wafer.validate,
            "validate",
            lambda *_, points=points: Validation(points, [held], SPEEDS),
        )
        assert main(["wafer", "validate", f"--json={tmp_path / 'v.json'}"]) == code
        failed = [point.id for point in points if point is wrong]
        assert json.loads((tmp_path / "v.json").read_text())["failed"] == failed
        assert ("none." in capsys.readouterr().out) == (code == 0)


def test_compare_lists_measurements_beside_predictions(capsys, tmp_path):
    file = tmp_path / "pairs.json"
    arguments = ("compare", "--match", "3072x768", "--json", str(file), "--results", str(MEASURED))
    assert "of its density" in run(capsys, *arguments)
    out = run(capsys, *arguments, "--masks=actual")
    assert "spmm 3072x768, 1024 tokens, float32, 16 threads" in out and "actual" in out
    pairs = json.loads(file.read_text())
    assert {pair["what"].split()[0] for pair in pairs} == {"spmm", "spmm_t", "sddmm"}
    for pair in pairs:
        assert 1 <= pair["same"] and 1 <= pair["full"] and pair["measured"] > 0
        assert max(pair["same"], pair["full"]) <= pair["flop_ratio"] * 1.0001
        if pair["what"].startswith("spmm ") and pair["sparsity"] == 0.5:
            # Few tokens wait for the stream: index and value are as many bytes as dense values.
            assert pair["same"] == pytest.approx(1, abs=0.05) and pair["full"] > 1.5


def test_compare_takes_training_steps(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE_S", -1.0)
    assert main(["wafer", "compare", "--match", "train_step", f"--results={MEASURED}"]) == 0
    printed = capsys.readouterr()
    assert "train_step demo, 1024 tokens, 1 threads" in printed.out
    progress = printed.err.splitlines()  # a line for each
    assert len(progress) == printed.out.count("| train_step ") == 2
    assert all("train_step" in line and line.endswith("% zeros") for line in progress)


def test_compare_takes_products_of_a_gpu(capsys, tmp_path, monkeypatch):
    """Those of our kernels that are right. By default, all results in bench/results are read."""
    ways = {
        name: {"kind": kind, "is_right": is_right, "error": 0.0, "median_s": seconds}
        for name, kind, is_right, seconds in (
            ("F.linear cublas", "dense", True, 2.0),
            ("few_tokens", "ours", True, 1.0),
            ("triton", "ours", False, 0.1),
            ("torch CSR", "sparse", True, 0.1),
        )
    }
    cell = {"op": "spmm", "device": "cuda", "M": 8, "N": 96, "K": 64, "nnz": 1536, "threads": 0}
    cell |= {"sparsity": 0.75, "mask": "random", "dtype": "bfloat16", "is_cold": True}
    folder = tmp_path / "bench" / "results"
    records.write(folder / "gpu.csv", {}, records.flat([cell | {"ways": ways}]))
    assert "spmm 96x64, 8 tokens" in run(capsys, "compare", "--results", str(folder))
    monkeypatch.chdir(tmp_path)
    assert "few_tokens" in run(capsys, "compare", "--results", str(folder))
    out = run(capsys, "compare", "--json=pairs.json")
    assert "spmm 96x64, 8 tokens, bfloat16, few_tokens, cold" in out
    pairs = json.loads(Path("pairs.json").read_text())
    assert [pair["measured"] for pair in pairs] == [2.0]
    assert pairs[0]["mask"] == "of its density" and 1 <= pairs[0]["full"] <= 4.0001


def test_compare_refuses_other_files(capsys, tmp_path):
    (tmp_path / "x.json").write_text("[]")
    message = error_line(capsys, "compare", "--results", str(tmp_path / "x.json"))
    assert "results: " in message and "x.json is not a table of measurements" in message
    assert "none.csv does not exist" in error_line(capsys, "compare", "--results", "none.csv")
    records.write(tmp_path / "x.csv", {}, [{"op": "spmm", "contender": "ours"}])
    message = error_line(capsys, "compare", "--results", str(tmp_path / "x.csv"))
    assert "results: " in message and "x.csv is damaged (KeyError: 'M')" in message
    (tmp_path / "empty").mkdir()
    message = error_line(capsys, "compare", "--results", str(tmp_path / "empty"))
    assert f"results: no table in {tmp_path / 'empty'}; give" in message
    message = error_line(capsys, "compare", "--match=nothing", "--results", str(MEASURED))
    assert "match: no measurement has 'nothing' in its name" in message


def test_a_benchmark_mask_is_the_measured_one():
    workload = {"N": 96, "K": 64, "sparsity": 0.75, "mask": "random"}
    mask = wafer_masks.benchmark_mask(workload)
    assert mask.shape == (96, 64) and mask.nnz == 96 * 64 // 4
    assert wafer_masks.benchmark_mask(workload | {"mask": "pruned"}) is None


def test_sensitivity_ranks_its_inputs(capsys, tmp_path):
    out = run(capsys, "sensitivity", "--model=gpt2-small")
    assert "clock_hz" in out and "utilisation" in out and "###" in out
    swings = sensitivity(WSE2, gpt_shape("gpt3-xl"), 0.25, 128)
    widths = [swing.width for swing in swings]
    assert widths == sorted(widths, reverse=True)
    names = {swing.name for swing in swings}
    assert names == {*WSE2.figures(), *RANGES}
    assert next(s for s in swings if s.name == "power_peak_w").energy_high > 0.19
    clock = next(swing for swing in swings if swing.name == "clock_hz")
    assert clock.step_low == pytest.approx(0.25, abs=0.01)  # a clock 20% lower
    assert abs(clock.speedup_low) < 0.01


def test_sensitivity_draws_its_bars(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert "wrote " in run(capsys, "sensitivity", "--plots", str(tmp_path))
    assert (tmp_path / "sensitivity.png").exists()


def test_predict_sets_the_newest_measurements_beside(capsys, tmp_path, monkeypatch):
    """Of the contexts in a table that nearest to the one asked for."""
    cell = {"op": "generate", "device": "cuda", "model": "big", "layers": 32, "width": 4096}
    cell |= {"batch": 1, "sparsity": 0.75, "dtype": "bfloat16", "threads": 0}
    folder = tmp_path / "bench" / "results"
    for name, day, seconds in (
        ("generate-big-2026-11-28", "2026-11-28", {128: 1.0}),
        ("a-gpu-generate-big-2026-11-29", "2026-11-29", {16: 0.5, 512: 0.8}),
    ):
        way = {"is_right": True, "error": 0.0}
        cells = [
            cell
            | {
                "context": context,
                "ways": {
                    "dense": way | {"kind": "dense", "median_s": 2.0},
                    "packed": way | {"kind": "ours", "median_s": s},
                },
            }
            for context, s in seconds.items()
        ]
        about = {"date": day, "machine": {"gpu": "NVIDIA H200"}}
        records.write(folder / f"{name}.csv", about, records.flat(cells))
    monkeypatch.chdir(tmp_path)
    for context, speedup in ((16, 4.0), (2048, 2.5)):
        out = run(capsys, "predict", "--sparsity=0.75", f"--context={context}")
        assert f"sparse measured {speedup:.2f}x on big" in out
