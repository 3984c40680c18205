"""The page of whole models on a GPU, of a small one that a CPU ran."""

from importlib import import_module
from pathlib import Path

import torch
from test_bench_train_gpu import GPU

from sparsekern.bench import records
from sparsekern.bench.rates import derived


def test_a_page_of_a_small_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    models_gpu = import_module("models_gpu")
    for name, value in {"PROMPTS": (8,), "BATCHES": (2,), "SPARSITIES": (0.75,)}.items():
        monkeypatch.setattr(models_gpu, name, value)
    monkeypatch.setattr(models_gpu, "CONTEXT", 4)
    shape = models_gpu.Shape("small", 2, 64, 4, 96, 1024)
    with torch.no_grad():
        found = [run() for _, run in models_gpu.cases((shape,), torch.device("cpu"))]
    about = {"benchmark": "models", "date": "2026-01-02", "machine": GPU, "is_whole": True}
    about |= {"commit": {"id": "abc", "dirty": False}, "left": ["others"]}
    records.write(tmp_path / "models.csv", about, sum(found, []))
    run = records.read(tmp_path / "models.csv")
    page = models_gpu.page("name", run)
    lines = [line for line in page.splitlines() if line.startswith("| small")]
    assert len(lines) == 2 and "Not run: others." in page
    assert all(r["is_right"] for r in run.records if r.get("error") is not None)
    assert len(derived(run)) == 2
