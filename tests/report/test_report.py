"""Tables, sections, and a report that is whole or not there."""

from pathlib import Path

import pytest

from sparsekern.report import demo as demo_report

TIMINGS = [
    {
        "pass": name,
        "tokens": tokens,
        "dense_s": 2e-3,
        "best_dense": "NumPy, OpenBLAS with its kernel for Zen",
        "sparse_s": {0.5: 2e-3, 0.9: 0.5e-3},
    }
    for name in ("forward", "forward + backward")
    for tokens in (16, 1024)
]
STEPS = {
    "dense": {"F.linear": 0.5, "oneDNN": 0.4},
    "best_dense": "oneDNN",
    "rounds": 7,
    "dense_s": 0.4,
    "sparse_s": 0.2,
    "spread": 0.05,
    "parts_s": {"linear forward": 0.1, "linear backward": 0.2, "rest": 0.1},
    "linears_s": {"dense": 0.3, "sparse": 0.1},
    "predicted_s": 0.2,
    "cap": 4.0,
}


def metrics(step_s: float) -> dict:
    return {
        "config": {
            "layers": 4,
            "heads": 8,
            "width": 512,
            "context": 128,
            "batch": 8,
            "steps": 4,
            "data": "stdlib",
            "sparsity": 0.75,
        },
        "threads": 2,
        "parameters": 3_000_000,
        "losses": [5.5, 5.0, 4.5, 4.0],
        "seconds": [step_s] * 4,
        "evaluations": [
            {"step": 0, "seconds": 0.0, "loss": 5.545},
            {"step": 4, "seconds": 4 * step_s, "loss": 3.9},
        ],
        "tokens_per_s": 1024 / step_s,
        "flops_per_token": 30e6,
        "sparsity": 0.75,
        "flop_ratio": 2.4,
        "vocab_size": 256,
        "peak_memory_bytes": 400 * 2**20,
        "wall_s": 4 * step_s + 3,
    }


def test_a_table_lines_up_and_is_markdown():
    assert demo_report.table(["name", "n"], [["a", 1], ["longer", 22]]) == (
        "| name   |   n |\n| ------ | --: |\n| a      |   1 |\n| longer |  22 |"
    )


def test_kernel_section_states_speedups_over_dense():
    text = demo_report.kernel_section(TIMINGS, "8 x 4", 1, {"oneDNN": "no operator"})
    assert "| forward            |     16 | 2.000 ms | NumPy | 1.00x | 4.00x |" in text
    assert "(8 x 4, float32, 1 thread)" in text
    assert "oneDNN takes no part: no operator." in text


def test_training_section_compares_the_two_runs():
    text = demo_report.training_section(metrics(0.4), metrics(0.2), STEPS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["wall-clock of all steps", "1.6 s", "0.8 s", "2.00x as fast"] in rows
    assert ["", "dense by oneDNN", "75% sparse", "ratio"] in rows
    assert ["last validation loss", "3.900", "3.900", ""] in rows
    assert "So short a run says nothing of quality" in text
    line = text.splitlines()[-1]
    assert line.startswith("75% sparse: 2.00x as fast here, 2.40x fewer FLOPs, ")
    assert line.endswith("x as fast predicted on a wafer (wse2, 262,144 tokens a step).")


def test_a_run_without_a_dense_twin_states_the_prediction_alone():
    assert demo_report.wafer_line(metrics(0.2)).startswith("75% sparse: 2.40x fewer FLOPs, ")


def test_a_run_that_kept_no_weight_has_no_prediction():
    line = demo_report.wafer_line(metrics(0.2) | {"sparsity": 1.0})
    assert (
        line == "100% sparse: 2.40x fewer FLOPs, no weight is left to predict a wafer's speed for."
    )


def test_a_step_is_held_to_the_best_dense_one_and_to_its_own_cap():
    text = demo_report.steps_section(STEPS, 0.75)
    assert "| dense by F.linear | 500.0 ms |             2.50x |" in text
    assert "| dense by oneDNN   | 400.0 ms |             2.00x |" in text
    assert "cannot be more than 4.00x as fast, because 100.0 ms of it are no linears" in text
    assert "are 3.00x as fast; that foretells 2.00x for the step.\nMeasured: 2.00x." in text
    assert "busy" not in text


def test_times_that_cannot_be_are_called_so():
    assert "too busy to tell" in demo_report.steps_section(STEPS | {"sparse_s": 0.05}, 0.75)
    text = demo_report.steps_section(STEPS | {"spread": 0.5}, 0.75)
    assert "the middle half of the rounds is 50% apart" in text


def test_the_report_has_its_sections_and_plots(tmp_path: Path):
    pytest.importorskip("matplotlib")
    sections = {"Kernels": "table one", "Training": "table two", "What to do next": "text"}
    runs = {"dense": metrics(0.4), "75% sparse": metrics(0.2)}
    written = demo_report.write(tmp_path / "out", sections, TIMINGS, runs)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    text = written[0].read_text()
    assert "## Kernels\n\ntable one\n\n![Kernels](speedup.png)" in text
    assert "## Training\n\ntable two\n\n![Training](loss.png)" in text
    for plot in written[1:]:
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_plots_show_what_was_measured():
    pytest.importorskip("matplotlib")
    panels = demo_report.plot_speedup(TIMINGS).axes
    assert [panel.get_title() for panel in panels] == ["forward", "forward + backward"]
    curve = panels[0].lines[0]
    assert curve.get_label() == "M = 16 tokens"
    assert list(curve.get_xdata()) == [50, 90] and list(curve.get_ydata()) == [1, 4]
    panel = demo_report.plot_losses({"dense": metrics(0.5)}).axes[0]
    assert list(panel.lines[0].get_xdata()) == [0.5, 1.0, 1.5, 2.0]
    assert list(panel.lines[1].get_ydata()) == [5.545, 3.9]
