"""The page of whole models on a GPU, of small ones that a CPU ran."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_bench_train_gpu import GPU

from sparsekern.bench import records
from sparsekern.bench.rates import derived


def test_a_page_of_small_models(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    models_gpu = import_module("models_gpu")
    sizes = {"PROMPTS": (8,), "BATCHES": (2,), "SPARSITIES": (0.75,), "TEXTS": ((2, 8),)}
    sizes |= {"CONTEXT": 4, "COMPILED": ("small",), "ROUNDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(models_gpu, name, value)
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)  # takes seconds
    shapes = (
        models_gpu.Shape("small", 1, 64, 4, 2, 96, 1024),
        models_gpu.Shape("encoder", 1, 64, 4, 4, 96, 1024, kind="bert"),
    )
    with torch.no_grad():
        found = [run() for _, run in models_gpu.cases(shapes, [0.75], torch.device("cpu"))]
    about = {"benchmark": "models", "date": "2026-01-02", "machine": GPU, "is_whole": True}
    about |= {"commit": {"id": "abc", "dirty": False}, "left": ["others"], "failed": {"a": "why"}}
    records.write(tmp_path / "models.csv", about, sum(found, []))
    half = records.read(tmp_path / "models.csv")
    run = models_gpu.joined([half, records.Run(half.about, [])])
    page = models_gpu.page("name", run)
    lines = [line for line in page.splitlines() if line.startswith(("| small", "| encoder"))]
    assert len(lines) == 5 and "Not run: others, others." in page and "Failed: a (why)." in page
    assert all(r["is_right"] for r in run.records if r.get("error") is not None)
    assert len(derived(run)) == 5
