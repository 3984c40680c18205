"""A model of others, pruned and trained on (bench/evidence/converged.py), as a toy."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from quality_results import rows as cells_of

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
    with pytest.raises(ValueError, match="expected 50 to be done before 60"):
        converged.make(parts, ["60"], tmp_path, lambda: results, results.append)
    converged.make(parts, ["70-at-once", *stages], tmp_path, lambda: [*results], results.append)
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
    for path in tmp_path.glob("50-*.pt"):  # as on another machine
        path.unlink()
    converged.make(parts, ["60", "70"], tmp_path, lambda: list(results), results.append)
    assert [r["stage"] for r in results[count:]] == ["70"]
    results = [r for r in results if r["stage"] not in ("60", "70")]
    converged.make(parts, ["60"], tmp_path, lambda: list(results), results.append)
    assert len(list(tmp_path.glob("50-*.pt"))) == 1 and results[-1]["stage"] == "60"


def test_a_chain_reads_on_where_the_stage_before_ended(converged, parts, tmp_path, monkeypatch):
    """Or else it would read the same text again and again, and dense other text."""
    seen: list[torch.Tensor] = []
    teach, results = parts.teach, []
    monkeypatch.setattr(parts, "teach", lambda x: seen.append(x.clone()) or teach(x))
    for name, value in (("RATES", (1e-3,)), ("LEAST_RATE", 1e-3), ("MOST_RATE", 1e-3)):
        monkeypatch.setattr(converged, name, value)
    names = ["50", "60", "70", "dense", "dense-3"]
    converged.make(parts, names, tmp_path, lambda: list(results), results.append)
    steps = converged.steps_of(parts, "50")
    chain, long = seen[: 3 * steps], seen[4 * steps :]
    assert len(long) == 3 * steps and all(map(torch.equal, chain, long))


def test_a_zero_has_no_gradient_where_clipping_counts(converged, parts, monkeypatch):
    clipped, clip = [], torch.nn.utils.clip_grad_norm_

    def look(parameters, most):
        for name, linear in converged.linears(parts.student).items():
            clipped.append(not linear.weight.grad[~masks[name]].any())
        return clip(parameters, most)

    parts.student.load_state_dict(parts.model.state_dict())
    masks = converged.pruned(parts, parts.student, 0.5)
    converged.mask_(parts.student, masks)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    converged.train(parts, masks, 2, 1e-3, 0)
    assert clipped and all(clipped)
    for name, linear in converged.linears(parts.student).items():
        assert torch.equal(linear.weight != 0, masks[name])


def test_hidden_states_are_those_of_the_model_and_compile_without_a_mask(converged, parts):
    kinds, x = [], torch.randint(0, 257, (2, 17))

    def backend(graph, _):
        kinds.extend(n.kwargs for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
        return graph.forward

    want = parts.model.model(input_ids=x, use_cache=False).last_hidden_state
    hidden = converged.hidden_of(parts.model)
    torch.testing.assert_close(hidden(x), want)
    compiled = torch.compile(hidden, dynamic=False, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), want)
    assert len(kinds) == 2 and all(k["is_causal"] and k["attn_mask"] is None for k in kinds)


def test_a_text_is_made_once(evidence, parts, tmp_path):
    path, made = tmp_path / "text.npz", []
    for _ in range(2):
        text = evidence.retold.kept(path, lambda: made.append(1) or parts.text)
        assert np.array_equal(text.training, parts.text.training)
        assert text.rows.keys() == parts.text.rows.keys()
        for name, rows in text.rows.items():
            for new, old in zip(rows, parts.text.rows[name], strict=True):
                assert np.array_equal(new, old) and new.dtype == old.dtype
    assert len(made) == 1


def test_a_folder_has_one_model(converged, folder, tmp_path):
    with pytest.raises(ValueError, match=r"model: expected one \.gguf file in .*, got 0"):
        converged.load(tmp_path, folder, tmp_path, "cpu", print)


def test_a_rate_that_diverges_is_told(converged, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "loss", lambda logits, *_: logits.sum() * math.nan)
    monkeypatch.setattr(converged, "RATES", (1e-3,))
    results: list[dict] = []
    with pytest.raises(RuntimeError, match="not more"):
        converged.make(parts, ["dense"], tmp_path, lambda: results, stop_after(3, results))
    assert [r["dev"] for r in results] == [None] * 3
    assert "loss is nan" in results[0]["failed"]


def test_several_add_results_and_read_whole_ones(evidence, converged, tmp_path):
    path, result = tmp_path / "converged.jsonl", {"stage": "50", "curve": [0.5] * 2000}
    with ThreadPoolExecutor(4) as pool:
        added = [pool.submit(converged.add, path, result) for _ in range(60)]
        while not all(one.done() for one in added):
            assert all(r == result for r in evidence.study.kept(path, {"stage"}))
    assert [one.result() for one in added] == [None] * 60
    assert len(evidence.study.kept(path, {"stage"})) == 60


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


@pytest.fixture
def result(converged):
    """A result of a stage that no run has made; of one that diverged where the loss is None."""
    about = {"model": "a", "corpus": "text", "device": "GPU", "torch": "2", "date": "day"}

    def make(name: str, rate: float, loss: float | None) -> dict:
        stage = converged.STAGES[name]
        own = about | {"commit": "abc", "stage": name, "rate": rate, "dev": loss}
        if loss is None:
            return own | {"failed": "loss is nan"}
        before = {"held-out": loss + stage.sparsity, "code": loss, "blimp": 70.0}
        costs = {"tokens": 25e6 * stage.length, "density": 1 - stage.sparsity}
        curve = [[12.5e6, loss + 0.1], [25e6, loss]]
        found = {"held-out": loss, "code": loss - 1, "blimp": 80.0}
        return own | found | costs | {"before": before, "curve": curve}

    return make


@pytest.fixture
def swept(converged, result):
    """Results of a stage at all rates, the best one `at`."""

    def make(name: str, loss: float, at: float = 3e-4) -> list[dict]:
        return [result(name, rate, loss + abs(rate - at)) for rate in converged.RATES]

    return make


def told(evidence, results: list[dict]) -> tuple[str, str, str]:
    """Of the page: its section, what it says of it above all sections, and what was not run."""
    page, last = evidence.page.text([], converged=results), len(evidence.plan.PLAN) + 2
    section = page.split(f"\n## {last}. ")[1].split("\n## How")[0]
    left = [x for x in page.split("\n## Not run")[1].splitlines() if x.startswith(f"- {last}. ")]
    above = page.split(f"\n## {last - 1}. ")[0]
    assert (f"(section {last}; a model of others)" in above) == ("one run each:" in above)
    return section, above.partition("one run each:")[2], "".join(left)


def test_the_page_has_what_was_found(evidence, result, swept):
    section, above, left = told(evidence, [])
    assert "**Not run yet.**" in section and "| 50 % zeros - dense " in section and not above
    assert left.endswith("9 of 9 stages.")
    some = swept("50", 3.2)
    section, above, left = told(evidence, some)
    assert "**Not run yet: 8 of 9 stages (then 60 %; " in section and not above
    assert "0.0003: **3.200**, 0.001: 3.201 (3 rates, the best one inside)" in section
    some += [*swept("dense", 3.0), result("60", 3e-4, 3.3)]
    section, above, left = told(evidence, some)
    assert ["50 % zeros - dense", "+0.1 to +0.25", "+0.200", "yes"] in cells_of(section)
    assert "as it came" in section and "- then 60 %: 12.5: 3.400, 25.0: 3.300" in section
    tokens = {row[0]: row[2] for row in cells_of(section) if len(row) > 4}
    assert tokens["then 60 %"] == "50"  # as much as dense twice
    on_code = "50 % zeros - dense on code, of which their text has none, by learning rate"
    on_code += " (not planned): +0.200 at 0.0001, +0.200 at 0.0003, +0.200 at 0.001"
    assert f"\n\n{on_code}.\n\n" in section
    told_above = ["- 50 % zeros - dense: +0.200 (as predicted)", f"- {on_code}"]
    assert above.strip().splitlines() == told_above
    assert "6 of 9 stages (then 70 %; " in left
    section, above, _ = told(evidence, [*swept("50", 3.2503), *swept("dense", 3.0)])
    assert ["50 % zeros - dense", "+0.1 to +0.25", "+0.2503", "**no**"] in cells_of(section)
    assert above.strip().startswith("- 50 % zeros - dense: +0.2503 (not as predicted)\n")


def test_the_page_claims_nothing_of_stages_that_are_not_done(evidence, result, swept):
    """80 % without dense of its length, and 70 % without that at once."""
    chain = [("60", 3.3), ("70", 3.49), ("dense-3", 2.98), ("75", 3.68), ("80", 3.95)]
    made = [*swept("dense", 3.0), *swept("50", 3.2), *(result(n, 3e-4, x) for n, x in chain)]
    section, above, left = told(evidence, made)
    want = "2 of 9 stages (dense, five times as long; 70 % at once, three times as long)."
    assert f"**Not run yet: {want}**" in section and left.endswith(want)
    assert above.strip().splitlines()[:-1] == [
        "- 50 % zeros - dense: +0.200 (as predicted)",
        "- then 70 % - dense, three times as long: +0.510 (as predicted)",
    ]
    differences = [row[2:] for row in cells_of(section) if " - " in row[0]]
    assert differences == [["+0.200", "yes"], ["+0.510", "yes"], ["-", "-"], ["-", "-"]]
    stages = [row[0] for row in cells_of(section) if len(row) > 4]
    assert "then 80 %" in stages and "dense, five times as long" not in stages


def test_the_page_tells_a_sweep_that_is_not_done(evidence, result, swept):
    """Also where its best rate is at the end: no stage that takes it, or is compared, is told."""
    section, above, left = told(evidence, swept("50", 3.2)[:1])
    assert "(not done, **the best so far is at the end**)" in section and not above
    assert "Sweeps not done: 50 % zeros. 8 of 9 stages (then 60 %; " in left
    section, above, _ = told(evidence, [*swept("50", 3.2), *swept("dense", 3.0, at=1e-3)])
    assert "**Not run yet: Sweeps not done: dense. 7 of 9 stages (then 60 %; " in section
    assert ["50 % zeros - dense", "+0.1 to +0.25"] in cells_of(section) and not above


def test_the_page_names_what_diverged(evidence, converged, result, swept):
    some = [*swept("50", 3.2), *swept("dense", 3.0), result("60", 3e-4, 3.3)]
    section, _, _ = told(evidence, [*some, result("dense", 1e-2, None), result("70", 3e-4, None)])
    assert "0.01: diverged" in section and "**Diverged, in no figure**: then 70 %." in section
    rates = [1e-6, 3.16e-6, 1e-5, 3.16e-5, *converged.RATES]
    for loss in (None, math.nan):  # as it is told, and as a score may be
        nothing = [result("50", rate, None) | {"dev": loss} for rate in rates]
        section, above, left = told(evidence, [*nothing, *swept("dense", 3.0)])
        assert "**Diverged, in no figure**: 50 % zeros." in section and not above
        assert "0.001: diverged (7 rates, all diverged)" in section and "**diverged" not in section
        assert "7 of 9 stages (then 60 %; " in left and "nan" not in section
