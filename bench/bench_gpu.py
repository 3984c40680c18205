"""A GPU's benchmark on one small W, as a smoke test: run_gpu.py measures."""

import grids
import pytest
import torch

from sparsekern.bench.rates import derived

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


@pytest.mark.runs_on(workloads=lambda quick: grids.workloads(quick, tokens=(1,)) if quick else [])
@pytest.mark.parametrize("verb", ["decode", "crossover"])
def test_quick_grid(verb, workload, tmp_path):
    import run_gpu
    import tables_gpu

    run = run_gpu.measure(verb, run_gpu.QUICK, tmp_path / "result.csv", commit=None)
    assert run.about["is_whole"] and not tables_gpu.failures(derived(run))
    for record in run.records:
        assert record["is_right"] or record["kind"] != "dense"
