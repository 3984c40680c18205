"""Training on several GPUs: what is predicted, and the page of cases that nobody measured."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsekern.bench import gpt_gpu, records, scaling
from sparsekern.bench.rates import derived
from sparsekern.bench.scale_gpu import (
    ACCUMULATED,
    ALONE,
    FSDP,
    MODELS,
    NO_MASK,
    TOGETHER,
    case_of,
    in_short,
)
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.presets import PRESETS

XL = PRESETS["gpt3-xl"]
GPU = {"gpu": "NVIDIA H200", "capability": "sm_90", "multiprocessors": 132, "torch": "2.11.0"}
GPU |= {"cuda": "13.0", "under_load": {}}


@pytest.fixture
def scale(monkeypatch):
    """bench/scale.py, a script of no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    return import_module("scale")


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_predicted_bytes_are_those_of_the_gradients(sparsity):
    config = GPTConfig(2, 2, 32, 16, 64)
    model = gpt_gpu.make_gpt(config, torch.device("cpu"), "random" if sparsity else "", sparsity)
    predicted = sum(scaling.gradients(config, sparsity))
    last_norm = 4 * 2 * config.n_embd  # which the prediction leaves out
    assert predicted + last_norm == sum(p.nbytes for p in model.parameters())


def test_one_gpu_exposes_nothing_and_more_expose_more():
    for sparsity in (0.0, 0.75):
        exposed = [scaling.predict(XL, sparsity, 0.15, n).exposed_s for n in (1, 2, 8, 64, 1024)]
        assert exposed[0] == 0 and exposed == sorted(exposed) and exposed[1] > 0


@pytest.mark.parametrize("gpus", [2, 8, 1024])
def test_sparse_gradients_expose_less_and_links_bound_it(gpus):
    dense, sparse = (scaling.predict(XL, s, 0.15, gpus) for s in (0.0, 0.75))
    assert sparse.exposed_s < dense.exposed_s and sparse.sent_bytes < 0.32 * dense.sent_bytes
    bounds = [
        scaling.predict(XL, 0.75, 0.15, gpus, links).exposed_s
        for links in (scaling.CHEAP, scaling.MEASURED, scaling.DEAR)
    ]
    assert bounds == sorted(bounds)


def test_only_the_last_gradients_are_exposed_where_links_are_fast():
    links = replace(scaling.MEASURED, interference=0.0, spread=0.0)
    step = scaling.predict(XL, 0.75, 1.0, 2, links)
    *_, block, embedding = scaling.gradients(XL, 0.75)
    sent_s = [links.all_reduce_s(nbytes, 2) for nbytes in (block, embedding)]
    assert step.exposed_s == pytest.approx(sum(sent_s), rel=0.05)  # a block is cut into buckets


def test_shares_send_as_much_and_save_most_of_the_update():
    links = replace(scaling.MEASURED, interference=0.0, spread=0.0, inside_latency_s=0.0)
    for sparsity in (0.0, 0.75):
        whole, shares = (scaling.predict(XL, sparsity, 0.15, 2, links, it) for it in (False, True))
        update_s = scaling.UPDATE_BYTES * whole.sent_bytes / scaling.FP32
        update_s /= scaling.MEMORY_BYTES_PER_S
        gather_s = links.all_reduce_s(whole.sent_bytes, 2) / 2
        assert shares.sent_bytes == whole.sent_bytes
        clip_s = 0.3 * update_s / 2
        beside_s = shares.exposed_s + update_s - gather_s - clip_s  # what backward does not hide
        assert 0 < beside_s <= whole.exposed_s
    alone = scaling.predict(XL, 0.75, 0.15, 1, links, is_sharded=True)
    assert alone.exposed_s == 0


def test_slow_links_hold_the_whole_step():
    links = replace(scaling.MEASURED, inside_bytes_per_s=1e9)
    step = scaling.predict(XL, 0.0, 0.15, 2, links)
    assert step.step_s > step.sent_bytes / 1e9


def test_a_page(scale, tmp_path, monkeypatch):
    ranks = SimpleNamespace(size=2, device=torch.device("cuda"))
    times = {"two-way": 0.128, NO_MASK: 0.152}
    cases = [
        {"op": "all_reduce", "device": "cuda", "gpus": 2, "case": f"{nbytes} bytes", "ways": ways}
        for nbytes in (2**16, 2**26)
        for ways in [{"all_reduce": _way(1e-5 + nbytes / 3e11) | {"bytes": nbytes}}]
    ]
    for mask in MODELS[0].masks:
        case = case_of(MODELS[0], mask, ranks)
        if mask in times:
            seconds = times[mask]
            found = {"sent_bytes": 10**9, "peak_bytes": 3 * 10**10, "error": 1e-3, "loss": 9.5}
            case["ways"] = {TOGETHER: _way(1.02 * seconds) | found, ALONE: _way(seconds)}
            case["ways"][ACCUMULATED] = _way(1.9 * seconds)
            case["ways"][FSDP] = _way(1.0 * seconds) | found
        else:
            case["ways"] = {TOGETHER: {"kind": "other", "failed": "no time", "is_right": True}}
        cases.append(case)
    about = {"benchmark": "scale", "date": "2026-01-02", "machine": GPU, "is_whole": True}
    about["commit"] = {"id": "abc", "dirty": False}
    records.write(tmp_path / "x.csv", about, records.flat(cases))
    run = records.read(tmp_path / "x.csv")
    assert len(derived(run)) == len(cases)
    page = scale.page("x", run)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    two_way, sharded, dense, _, free = (row for row in rows if row[3:4] == ["2"])
    assert two_way[:5] == ["gpt3-xl", "75% two-way", "ddp", "2", "128.00 (126.72)"]
    assert two_way[7:9] == ["0.971", "1.863"] and two_way[-2:] == ["1.188", "1.000"]
    assert sharded[2] == "fsdp" and sharded[7:9] == ["0.990", "1.900"]
    assert sharded[-2:] == ["1.188", "1.020"]
    assert dense[-2] == "1.000" and free[4] == "no time"
    assert ["65,536", "234 us, 287"] in rows
    assert sum(row[:1] == ["gpt3-13b"] for row in rows) == 2
    (tmp_path / "docs.md").write_text("<!-- scale: begin --><!-- scale: end -->")
    monkeypatch.setattr(scale.pages, "BENCHMARKS", tmp_path / "docs.md")
    scale.update("x", run)
    assert (tmp_path / "docs.md").read_text().count("| gpt3-xl ") == 5
    # Of chosen cells what an earlier run alone has is kept.
    chosen = about | {"benchmark": "scale-cells"}
    monkeypatch.setattr(scale.pages, "RESULTS", tmp_path)
    for name, some in (("x-scale-cells-1.csv", cases[2:4]), ("x-scale-cells-2.csv", cases[3:])):
        records.write(tmp_path / name, chosen, records.flat(some))
    (tmp_path / "docs.md").write_text("<!-- scale-cells: begin --><!-- scale-cells: end -->")
    scale.update("x-scale-cells-2", records.read(tmp_path / name))
    text = (tmp_path / "docs.md").read_text()
    assert text.count("| two-way") == 0 and text.count("| gpt3-xl ") == 5
    assert text.index("| dense") < text.index("| 75% two-way") < text.index("x-scale-cells-1")
    assert in_short(cases[2]).startswith("gpt3-xl two-way: together 130.56 ms, alone 128.00 ms")


def _way(seconds: float) -> dict:
    return {"kind": "ours", "median_s": seconds, "min_s": 0.99 * seconds, "is_right": True}


def test_numbers_of_gpus(scale, monkeypatch):
    for visible, counts in ((0, [1]), (1, [1]), (2, [2]), (3, [2]), (8, [2, 4, 8])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert scale.counts() == counts


def test_what_was_found_before_a_process_failed_is_kept(scale, monkeypatch, capsys):
    def fails(command, env):
        (out,) = (word.removeprefix("--out=") for word in command if word.startswith("--out="))
        Path(out).write_text('{"op": "scale"}\n')
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(scale.subprocess, "run", fails)
    args = SimpleNamespace(limit_s=1.0, cells=["gpt3-xl/none"], ways=["together", "fsdp"])
    assert scale.cases_on(2, args) == ([{"op": "scale"}], 1)
    assert "bench-gpu: 2 processes ended with 1" in capsys.readouterr().err
