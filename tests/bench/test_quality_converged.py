"""A model of others, pruned and trained on (bench/evidence/converged.py), as a toy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest_plugins = "quality_toy"
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def converged(evidence):
    import evidence.converged

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BATCH": 4, "STAGE_TOKENS": 640, "CALIBRATION_ROWS": 8}.items():
            patch.setattr(evidence.converged, name, value)
        yield evidence.converged


@pytest.fixture(scope="module")
def parts(evidence, converged, folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    corpus, tokenizer = evidence.build.load(folder), evidence.build.load_tokenizer(folder)
    text = converged.retold(corpus, tokenizer, lambda texts: [list(t.encode()) for t in texts], 256)
    return converged.Parts(model, text, "cpu")


def test_a_text_is_the_same_in_other_tokens(evidence, folder, parts):
    corpus, text = evidence.build.load(folder), parts.text
    of_bytes = np.where(text.training == 256, 0, text.training)
    assert np.array_equal(of_bytes, corpus.arrays["training"])
    for name, rows in text.rows.items():
        old = corpus.arrays[name]
        if name == "blimp":
            assert rows.ids[:, 0].tolist() == [256] * len(old)
            for new, row, scored in zip(rows.ids, old, rows.is_target, strict=True):
                assert new[scored].tolist() == row[row < evidence.rows.NOT_A_TARGET].tolist()
        elif len(rows):
            assert rows.ids.shape[1] == old.shape[1] and rows.is_target.shape == rows.ids.shape


def test_held_out_text_that_was_trained_on_is_not_scored(evidence, folder, converged):
    corpus = evidence.build.load(folder)
    tokenizer = evidence.build.load_tokenizer(folder)
    arrays = corpus.arrays | {"held-out/manuals": corpus.arrays["training"][None, :200]}
    same = replace(corpus, arrays=arrays)
    text = converged.retold(same, tokenizer, lambda texts: [list(t.encode()) for t in texts], 256)
    known, new = text.rows["held-out/manuals"], text.rows["held-out/novels"]
    assert not known.is_target.any() and new.is_target.any()


def test_stages_begin_with_the_ones_before(converged, parts, tmp_path):
    results: list[dict] = []
    stages = {n: converged.STAGES[n] for n in ("50", "60", "dense", "dense-3", "70-at-once")}
    with pytest.raises(ValueError, match="stages: 50 is not done"):
        converged.make(parts, ["60"], tmp_path, lambda: results, results.append)
    converged.make(parts, list(stages), tmp_path, lambda: list(results), results.append)
    as_it_came = converged.scores(parts, parts.model)
    for name, stage in stages.items():
        rates = converged.tried(results, name)
        assert len(rates) == 1 if stage.rate_of else len(rates) >= len(converged.RATES)
        best = converged.best(results, name)
        found = next(r for r in results if (r["stage"], r["rate"]) == (name, best))
        assert found["density"] == pytest.approx(1 - stage.sparsity, abs=0.01)
        assert found["tokens"] == stage.length * 640 and found["curve"][-1][0] == found["tokens"]
        assert math.isfinite(found["held-out"]) and found["before"]["blimp"] <= 100
        state = torch.load(converged.path_of(tmp_path, name, best))
        model = transformers.LlamaForCausalLM(parts.model.config)
        model.load_state_dict(state)
        for module in converged.linears(model).values():
            zeros = float((module.weight == 0).float().mean())
            assert zeros == pytest.approx(stage.sparsity, abs=0.01)
        assert converged.scores(parts, model)["held-out"] == pytest.approx(found["held-out"])
        if stage.start:
            before = torch.load(converged.path_of(tmp_path, "50", converged.best(results, "50")))
            for key, weight in state.items():
                if "proj" in key:
                    assert not (weight[before[key] == 0] != 0).any()
        if not stage.sparsity:
            assert found["before"] == as_it_came
            assert found["held-out"] < as_it_came["held-out"]
    count = len(results)
    converged.make(parts, list(stages), tmp_path, lambda: list(results), results.append)
    assert len(results) == count


def test_a_rate_that_diverges_is_told(converged, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "loss", lambda logits, *_: logits.sum() * math.nan)
    monkeypatch.setattr(converged, "RATES", (1e-3,))
    results: list[dict] = []
    with pytest.raises(RuntimeError, match="not more"):
        converged.make(parts, ["dense"], tmp_path, lambda: results, stop_after(3, results))
    assert [r["dev"] for r in results] == [None] * 3
    assert "loss is nan" in results[0]["failed"]


def stop_after(count: int, results: list[dict]):
    def keep(result: dict) -> None:
        results.append(result)
        if len(results) == count:
            raise RuntimeError("not more")

    return keep


def test_the_loss_of_the_model_as_it_came_is_cross_entropy_alone(converged):
    logits, y = torch.randn(5, 7), torch.tensor([0, 1, 2, 3, 4])
    plain = torch.nn.functional.cross_entropy(logits, y)
    assert converged.loss_of(logits, logits, y) == pytest.approx(float(plain) / 2)
    assert converged.loss_of(logits, torch.randn(5, 7), y) > plain / 2


def test_the_page_has_what_was_found(evidence, converged):
    about = {"model": "a", "corpus": "text", "device": "GPU", "torch": "2", "date": "day"}
    about["commit"] = "abc"

    def result(name: str, rate: float, loss: float) -> dict:
        found = {"dev": loss, "held-out": loss, "code": loss - 1, "blimp": 80.0}
        stage = converged.STAGES[name]
        before = {"held-out": loss + stage.sparsity, "code": loss, "blimp": 70.0}
        costs = {"tokens": 25e6 * stage.length, "density": 1 - stage.sparsity}
        curve = [[12.5e6, loss + 0.1], [25e6, loss]]
        return (
            found
            | costs
            | about
            | {"stage": name, "rate": rate}
            | {
                "before": before,
                "curve": curve,
            }
        )

    text = evidence.page.text
    last = len(evidence.plan.PLAN) + 2
    page = text([])
    section = page.split(f"## {last}. ")[1].split("## How")[0]
    assert "**Not run yet.**" in section and "| 50 % zeros - dense " in section
    swept = [result("50", rate, 3.2 + abs(rate - 3e-4)) for rate in converged.RATES]
    section = text([], converged=swept).split(f"## {last}. ")[1].split("## How")[0]
    assert "Not run yet" not in section and "0.0003: **3.200**" in section
    dense = [result("dense", rate, 3.0 + abs(rate - 3e-4)) for rate in converged.RATES]
    page = text([], converged=[*swept, *dense, result("60", 3e-4, 3.3)])
    section = page.split(f"## {last}. ")[1].split("## How")[0]
    row = next(line for line in section.splitlines() if line.startswith("| 50 % zeros - dense "))
    assert "+0.200" in row and "yes" in row
    assert "as it came" in section and "- then 60 %: 12.5: 3.400, 25.0: 3.300" in section
    assert f"(section {last}): SmolLM2-135M-Instruct pruned and trained on: 50 % zeros" in page
    diverged = {"stage": "dense", "rate": 1e-2, "dev": None, "failed": "loss is nan"} | about
    assert "0.01: inf" in text([], converged=[*dense, diverged])
