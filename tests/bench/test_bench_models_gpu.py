"""The page of whole models on a GPU, of small ones that a CPU ran."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_bench_train_gpu import GPU

from sparsekern.bench import records
from sparsekern.bench.rates import derived
from sparsekern.kernels.cpu import lanes
from sparsekern.models import timing

pytestmark = pytest.mark.skipif(
    lanes._C is None, reason="the C++ library, which packs, is not built"
)


@pytest.fixture
def models_gpu(monkeypatch):
    """bench/models_gpu.py with small sizes."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    models_gpu = import_module("models_gpu")
    sizes = {"PROMPTS": (8,), "BATCHES": (2,), "TEXTS": ((2, 8),), "CONTEXT": 4, "ROUNDS": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(models_gpu, name, value)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    return models_gpu


def run_of(benchmark, cases, path):
    with torch.no_grad():
        found = [run() for _, run in cases]
    about = {"benchmark": benchmark, "date": "2026-01-02", "machine": GPU, "is_whole": True}
    about |= {"commit": {"id": "abc", "dirty": False}, "left": ["others"], "failed": {"a": "why"}}
    records.write(path, about, sum(found, []))
    return records.read(path)


def test_a_page_of_small_models(models_gpu, tmp_path):
    shapes = (
        models_gpu.Shape("small", 1, 64, 4, 2, 96, 1024),
        models_gpu.Shape("encoder", 1, 64, 4, 4, 96, 1024, kind="bert"),
    )
    cases = models_gpu.cases(shapes, [0.75], torch.device("cpu"))
    half = run_of(models_gpu.PLAIN, cases, tmp_path / "models.csv")
    run = models_gpu.joined([half, records.Run(half.about, [])])
    page = models_gpu.page("name", run)
    lines = [line for line in page.splitlines() if line.startswith(("| small", "| encoder"))]
    assert len(lines) == 3 and "Not run: others, others." in page and "Failed: a (why)." in page
    assert all(r["is_right"] for r in run.records if r.get("error") is not None)
    assert len(derived(run)) == 3


def test_a_page_of_compiled_layers(models_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **settings: model)  # takes seconds
    shape = models_gpu.Shape("small", 1, 64, 4, 2, 96, 128, is_tied=False)
    cases = models_gpu.compiled_cases(shape, [0.75], torch.device("cpu"))
    run = run_of(models_gpu.COMPILED, cases, tmp_path / "models.csv")
    lines = [x for x in models_gpu.page("name", run).splitlines() if x.startswith("| small")]
    assert len(lines) == 2 and len(derived(run)) == 2
