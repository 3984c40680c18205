"""A GPU's benchmark on one small W, as a smoke test: run_gpu.py measures."""

import argparse

import grids
import pytest
import torch

from sparsekern.bench import measure_gpu, memory_gpu, train_memory_gpu
from sparsekern.bench.rates import derived
from sparsekern.gpt.presets import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


only_quick = pytest.mark.runs_on(
    workloads=lambda quick: grids.workloads(quick, tokens=(1,)) if quick else []
)
WORKSPACE_BYTES = 2**28  # of libraries


@only_quick
@pytest.mark.parametrize("verb", ["decode", "crossover"])
def test_quick_grid(verb, workload, tmp_path):
    import run_gpu
    import tables_gpu

    run = run_gpu.measure(verb, measure_gpu.QUICK, tmp_path / "result.csv", commit=None)
    assert run.about["is_whole"] and not tables_gpu.failures(derived(run))
    for record in run.records:
        assert record["is_right"] or record["kind"] != "dense"


@only_quick
def test_quick_products_of_training(workload, tmp_path):
    import tables_gpu
    import train_gpu

    args = argparse.Namespace(verb="train-products", quick=True, commit=None, dtype="bfloat16")
    run = train_gpu.measure(args, {}, tmp_path / "result.csv")
    assert run.about["is_whole"] and not tables_gpu.failures(derived(run))


@only_quick
def test_memory_is_about_as_predicted(workload):
    config = PRESETS["gpt2-small"]
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        for case in train_memory_gpu.cases(with_largest=False, model="gpt2-small"):
            (way,) = case["ways"].values()
            mask = case["mask"] if case["sparsity"] else memory_gpu.DENSE
            parts = memory_gpu.predict(config, case["batch"], case["sparsity"], mask)
            for predicted, measured in (
                (memory_gpu.state_bytes(parts), way["state_bytes"]),
                (memory_gpu.peak_bytes(parts), way["peak_bytes"]),
            ):
                assert abs(measured - predicted) < 0.1 * predicted + WORKSPACE_BYTES
