"""A GPU's benchmark on one small W, as a smoke test: run_gpu.py measures."""

import grids
import pytest
import torch

from sparsekern.bench import records, work_gpu
from sparsekern.bench.rates import derive

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
    assert run.about["is_whole"] and not tables_gpu.failures(records.cases(run.records))
    for record in run.records:
        assert record["is_right"] or record["kind"] != "dense"


@pytest.mark.runs_on(workloads=lambda quick: grids.workloads(quick, tokens=(1,)) if quick else [])
def test_quick_work(workload):
    cases = [derive(make()) for make in work_gpu.work(quick=True)]
    assert {case["op"] for case in cases} == {"spmm", "spmm_t", "sddmm", "linear", "train_step"}
    assert all(case["speedup"] > 0 for case in cases)
