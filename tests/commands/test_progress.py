"""What takes long says how far it is: a bar on a terminal, lines on stderr elsewhere."""

import pytest
from tiny import besides_progress, flags, tiny_config

from sparsekern import terminal
from sparsekern.cli import main
from sparsekern.gpt import presets
from sparsekern.gpt.model import GPTConfig
from sparsekern.terminal import Progress
from sparsekern.wafer.validation import mesh


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A line for each unit."""
    monkeypatch.setattr(terminal, "SILENCE_S", -1.0)


def test_results_go_to_stdout_and_progress_to_stderr(capsys):
    with Progress(3, done=1, unit="round") as progress:
        progress.advance()
        progress.line("a result")
        progress.advance("last")
    with Progress(None) as progress:
        progress.advance()
    printed = capsys.readouterr()
    assert printed.out == "a result\n"
    assert printed.err == "round 2/3\nround 3/3: last\nstep 1\n"


def test_what_takes_long_is_told_meanwhile(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE_S", 0.0)
    with Progress(None) as progress:
        progress.about("slow")
        progress._timer.join(60)
    monkeypatch.setattr(terminal, "SILENCE_S", 60.0)
    with Progress(None) as progress:
        progress.about("quick")
    progress._timer.join(30)
    assert capsys.readouterr().err == "slow\n" and progress._timer.finished.is_set()


def test_who_is_not_shown_says_nothing(capsys):
    with Progress(3, is_shown=False) as progress:
        progress.about("slow")
        progress.advance()
        progress.line("a result")
    assert capsys.readouterr() == ("", "")


def test_quick_work_has_no_progress(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SILENCE_S", 3600.0)
    with Progress(2) as progress:
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(KeyboardInterrupt), Progress(4, unit="mesh") as progress:
        progress.advance("the first")
        progress.line("a result")
        raise KeyboardInterrupt
    printed = capsys.readouterr()
    assert printed.out == "a result\n" and "1/4" in printed.err and "the first" in printed.err
    assert printed.err.endswith("\r")  # the bar is gone


def shown(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().err


def test_train_and_prune(tmp_path, capsys):
    config = tiny_config(tmp_path)
    err = shown(capsys, *flags(config))
    assert "step 6/6" in err and not besides_progress(err)
    settings = ("--rounds=2", "--steps=4", f"--out={tmp_path / 'pruned'}")
    err = shown(capsys, "prune", f"--source={config.out}", *settings)
    assert "step 4/4" in err and not besides_progress(err)


def test_generate(capsys, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "gpt2-small", GPTConfig(2, 2, 32, 16, 256))
    model = ("generate", "--preset=gpt2-small", "--random-weights", "--sparsity=0.5")
    err = shown(capsys, *model, "--tokens=5", "--device=cpu")
    assert "block 2/2" in err and "token 5/5" in err
    err = shown(capsys, *model, "--tokens=5", "--device=cpu", "--bench")
    assert "block 4/4" in err and "model and round 10: sparse, eager" in err


def test_wafer(capsys, monkeypatch):
    monkeypatch.setattr(mesh, "PROBLEMS", mesh.PROBLEMS[:1])
    assert "mesh 1/1" in shown(capsys, "wafer", "validate")
