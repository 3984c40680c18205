"""Generation in the GPU's benchmark, without a GPU: a small model in every form that a CPU has."""

import argparse
import copy
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_bench_train_gpu import GPU

from sparsekern.bench import records
from sparsekern.bench.rates import derived
from sparsekern.gpt.llama import LlamaConfig
from sparsekern.nn import PackedLinear
from sparsekern.report.load import read

FORMS = ("packed", "packed, dense copies", "packed int8")


@pytest.fixture
def generate(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    arms, generate = import_module("generate_arms"), import_module("generate_gpu")
    monkeypatch.setitem(generate.PRESETS, "tiny", LlamaConfig(2, 2, 32, 8, 64, n_kv_head=1))

    def in_csr(self, mask, forms):  # packed layers are for GPUs
        return self.of(self.sparse[mask].blocks[0])

    monkeypatch.setattr(arms.Arms, "_every", in_csr)
    return generate


def test_a_page_of_every_batch_and_prompt(generate, tmp_path):
    flags = {"sparsity": 0.75, "batches": [1, 2], "prompts": [3, 5], "tokens": 4, "rounds": 2}
    options = argparse.Namespace(**flags, layers=2, eager=True, compiled=False)
    options.most_read, options.limit_s = 6, 1e9
    found = list(generate.cases("tiny", options, left := [], device="cpu"))
    assert [(c["batch"], c["context"]) for c in found] == [(1, 3), (1, 5), (2, 3), (2, 5)]
    for case in found:
        assert {*FORMS, "packed, not fused", "dense", "dense, W [K, N]"} <= case["ways"].keys()
        assert all(way["is_right"] for way in case["ways"].values())
        is_read = case["batch"] * case["context"] <= 6
        assert all(("first_token_s" in way) == is_read for way in case["ways"].values())
    path = tmp_path / "generate.csv"
    about = {"benchmark": "generate", "date": "2026-01-02", "machine": GPU}
    about["commit"] = {"id": "abc", "dirty": False}
    records.write(path, about, records.flat(found))
    run = records.read(path)
    assert len(derived(run)) == len(read(path).data["runs"]) == 4
    page = generate.page("name", about, found, left, options)
    assert page.count("| tiny") == 4 + 3 + 2 + 4  # steps, first tokens, bytes, microseconds
    assert "Not run" not in page
    options.limit_s = 0
    assert not list(generate.cases("tiny", options, left, device="cpu"))
    page = generate.page("name", about, found, left, options)
    assert "Not run: batch 1 (no time), batch 2 (no time)." in page


def test_wrong_logits_are_an_error(generate):
    arms = generate.Arms(generate.PRESETS["tiny"], 0.75, "cpu")
    made = list(arms.all(1, 3))
    assert [arm.name for arm in made] == ["dense", "dense, W [K, N]", *FORMS]
    wrong = copy.deepcopy(made[2].model)
    wrong.blocks[0].mlp.down.values.data *= 100
    with pytest.raises(ArithmeticError, match="packed: logits are wrong, batch 1"):
        generate.errors_of(arms, [made[0], replace(made[2], model=wrong)], 1, "cpu")


def test_blocks_are_copies_with_memory_of_their_own(generate):
    arms = generate.Arms(generate.PRESETS["tiny"], 0.75, "cpu")
    model = arms.of(arms.dense.blocks[0])
    first, second = (block.mlp.up.weight for block in model.blocks)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert model.lm_head.weight is arms.dense.wte.weight
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tokens 1", "--tokens: expected 2 or more, got 1"),
        ("--batches 1 0", "--batches: expected 1 or more, got [1, 0]"),
        ("--layers 0", "--layers: expected 1 or more, got 0"),
        ("--sparsity 75", "--sparsity: expected a number between 0 and 1, got 75.0"),
    ],
)
def test_mistakes_cost_no_time(generate, capsys, flags, message):
    with pytest.raises(SystemExit):
        generate.main(flags.split())
    assert message in capsys.readouterr().err
