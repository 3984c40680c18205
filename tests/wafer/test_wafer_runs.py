"""Published runs: the fit, what it leaves over, and files of one's own."""

from dataclasses import replace

import pytest

from sparsekern.cli import main
from sparsekern.wafer import Calibration, Inputs, Run, calibrate, read_runs
from sparsekern.wafer.inputs import RANGES
from sparsekern.wafer.runs import FITTED, HELD_OUT, _fit_one

RUN = """
[[run]]
name = "mine"
model = "gpt2-small"
machine = "wse2"
systems = 1
batch = 64
samples_per_s = 400
use = "utilisation"
source = "a log of mine"
"""


@pytest.fixture(scope="module")
def published() -> Calibration:
    return calibrate(read_runs())


def test_the_defaults_are_what_the_published_runs_fit(published):
    assert published.inputs == Inputs()
    fitted = {run.use: error for run, error in published.errors.items() if run.use != HELD_OUT}
    assert abs(fitted["utilisation"]) < 1e-3 and abs(fitted["score_cycles"]) < 1e-3


def test_the_range_of_utilisation_holds_what_each_size_asks_for():
    span = RANGES["utilisation"]
    runs = [run for run in read_runs() if run.id in ("V29", "V30", "V31")]
    assert len(runs) == 6
    for score_cycles in (0.0, Inputs.score_cycles):
        for run in runs:
            asked = _fit_one(run, "utilisation", Inputs(score_cycles=score_cycles)).utilisation
            assert span.low <= asked <= span.high, run.name


def test_another_form_of_attention_can_be_fitted():
    runs = [
        replace(run, use="attention_efficiency") if run.use == "score_cycles" else run
        for run in read_runs()
        if run.use in FITTED
    ]
    found = calibrate(runs, Inputs(score_cycles=0.0))
    assert 0.2 < found.inputs.attention_efficiency < 0.6


def test_held_out_speeds_meet_their_targets(published):
    errors = {run: abs(error) for run, error in published.held_out.items()}
    old = {run: error for run, error in errors.items() if run.machine == "wse2"}
    assert len(old) == 6
    assert sum(old.values()) / len(old) <= 0.12 and max(old.values()) <= 0.20
    assert all(error <= 0.05 for run, error in old.items() if run.id == "V30")
    assert all(error <= 0.25 for run, error in errors.items() if run.machine == "wse3")
    left_out = [abs(error) for error in published.left_out.values()]
    assert len(left_out) == 8 and max(left_out) <= 0.20


def test_a_file_of_ones_own_fits_one_input(capsys, tmp_path):
    path = tmp_path / "runs.toml"
    path.write_text(RUN + RUN.replace('"utilisation"', '"held out"').replace("= 64", "= 128"))
    found = calibrate(read_runs(path))
    assert found.inputs == replace(Inputs(), utilisation=found.inputs.utilisation)
    first, second = found.errors.values()
    assert abs(first) < 1e-3 < abs(second) and not found.left_out
    assert main(["wafer", "calibrate", str(path), f"--json={tmp_path / 'x.json'}"]) == 0
    out = capsys.readouterr().out
    assert "fitted: --utilisation 0." in out and "needs 4 runs" in out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[run]]", "[run]", r"run: expected \[\[run\]\] tables, got none"),
        ("batch = 64\n", "", "run 1: batch: expected a value, got nothing"),
        ("= 64", "= 6.4", "run 1: batch: expected a whole number above 0, got 6.4"),
        ("= 400", "= -400", "run 1: samples_per_s: expected a number above 0, got -400"),
        ("= 400", '= "fast"', "run 1: samples_per_s: expected a number above 0, got 'fast'"),
        ("source", "sauce", "run 1: sauce: expected one of name, .*, got 'sauce'"),
        ('"utilisation"', '"tuning"', "run 1: use: expected one of utilisation, .*, got 'tuning'"),
        ('"a log of mine"', '"x"\nmark = "sure"', "run 1: mark: expected one of read, .*'sure'"),
        ("gpt2-small", "gpt9", "runs.toml: run 1: model: expected one of"),
        ("wse2", "wse9", "runs.toml: run 1: machine: expected one of"),
        ("[[run]]", "spare = 1\n[[run]]", r"runs.toml: spare: expected \[\[run\]\] tables alone"),
        ('"mine"', "3", "run 1: name: expected a text, got 3"),
    ],
)
def test_a_wrong_file_names_run_and_key(tmp_path, old, new, message):
    path = tmp_path / "runs.toml"
    path.write_text(RUN.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_runs_that_fit_nothing():
    run = Run("a run", "gpt2-small", "wse2", 1, 64, 400.0, HELD_OUT, "nowhere")
    with pytest.raises(ValueError, match="expected a run whose use is one of utilisation"):
        calibrate([run])
    twice = [replace(run, use="utilisation", name=name) for name in "ab"]
    with pytest.raises(ValueError, match="expected one run to fit utilisation, got several"):
        calibrate(twice)
    with pytest.raises(ValueError, match="a run: no utilisation from 0.01 to 1 makes 1e\\+09"):
        calibrate([replace(run, use="utilisation", samples_per_s=1e9)])
