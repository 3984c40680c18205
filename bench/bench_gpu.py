"""A GPU's benchmark on one small W, as a smoke test: run_gpu.py measures."""

import measure
import pytest
import torch

from sparsekern.bench import work_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use"),
]


@pytest.mark.runs_on(workloads=lambda quick: measure.workloads(quick, tokens=(1,)) if quick else [])
@pytest.mark.parametrize("verb", ["decode", "crossover"])
def test_quick_grid(verb, workload, tmp_path):
    import run_gpu
    import tables_gpu

    result = run_gpu.measure(verb, run_gpu.QUICK, tmp_path / "result.json", commit=None)
    assert result["is_whole"] and not tables_gpu.failures(result["cells"])
    for cell in result["cells"]:
        dense = [way for way in cell["ways"].values() if way["kind"] == "dense"]
        assert dense and all(way["is_right"] for way in dense)


@pytest.mark.runs_on(workloads=lambda quick: measure.workloads(quick, tokens=(1,)) if quick else [])
def test_quick_work(workload):
    infos = [make()["extra_info"] for make in work_gpu.work(quick=True)]
    assert {info["op"] for info in infos} == {"spmm", "spmm_t", "sddmm", "linear", "train_step"}
    for info in infos:
        dense = [rival for rival in info["rivals"].values() if rival["kind"] == "dense"]
        assert dense and all(rival["is_right"] for rival in dense)
