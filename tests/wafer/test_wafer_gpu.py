"""GPUs beside the wafer: rooflines by hand, measured speed-ups, files of one's own."""

from dataclasses import replace

import pytest

from sparsekern.cli import main
from sparsekern.wafer import GPUS, gpt_shape, gpu, gpu_cost, machine, predict
from sparsekern.wafer.compare import compare
from sparsekern.wafer.cost import compare_with_dense
from sparsekern.wafer.gpu import DECODE, TRAINING, measured_speedup

SHAPE = gpt_shape("gpt3-xl")


def test_a_step_is_its_flops_at_the_share_of_the_peak():
    device = gpu("h200")
    found = gpu_cost(device, SHAPE, batch=4)
    assert found.step_s == pytest.approx(
        4 * 2048 * SHAPE.train_flop() / (9.89e14 * device["peak_share"])
    )
    assert found.bound == "compute" and found.fits
    assert found.joule_per_token == pytest.approx(700 * found.step_s / (4 * 2048))
    assert not gpu_cost(device, gpt_shape("cerebras-gpt-13b"), 4).fits


def test_many_gpus_on_few_tokens_wait_for_their_links():
    device = gpu("h100")
    short = replace(SHAPE, sequence=128)
    found = gpu_cost(device, short, batch=64, systems=64)
    assert found.bound == "links"
    assert found.step_s == pytest.approx(2 * 2 * short.parameters() / 4.5e11)
    assert gpu_cost(device, short, batch=64).bound == "compute"


def test_decode_reads_the_weights_and_the_cache():
    device = gpu("h100")
    read = [1 / gpu_cost(device, SHAPE, 1, context=n).decode_tokens_per_s for n in (0, 4096)]
    rate = 3.35e12 * device["memory_share"]
    assert read[0] == pytest.approx(2 * (SHAPE.linear_fma + SHAPE.head_fma) / rate)
    assert read[1] - read[0] == pytest.approx(2 * 24 * 2048 * 4096 * 2 / rate)


def case(**changed) -> dict:
    found = {"op": TRAINING, "gpu": "NVIDIA H200", "model": "gpt3-xl", "layers": 24, "width": 2048}
    found |= {"sparsity": 0.75, "mask": "random", "batch": 4, "speedup": 1.1}
    found |= {"dtype": "bfloat16"}
    return found | changed


def test_measured_speedups_are_of_the_same_gpu_sparsity_and_kind():
    others = [
        case(gpu="NVIDIA H100", speedup=9),
        case(sparsity=0.9, speedup=9),
        case(mask="two-way", speedup=9),
        case(op=DECODE, batch=16, speedup=9),
        case(dtype="float32", speedup=9),
        case(model="gpt2-small", layers=12, width=768, speedup=1.0),
    ]
    results = {"a table": [*others, case()]}
    found = measured_speedup(gpu("h200"), results, TRAINING, SHAPE, 0.75)
    assert (found.speedup, found.model, found.source) == (1.1, "gpt3-xl", "a table")
    found = measured_speedup(gpu("h200"), results, TRAINING, SHAPE, 0.75, precision="fp32")
    assert found.speedup == 9
    assert measured_speedup(gpu("h200"), results, DECODE, SHAPE, 0.75) is None
    small = measured_speedup(gpu("h200"), results, TRAINING, gpt_shape("gpt2-small"), 0.75)
    assert small.model == "gpt2-small"


def test_a_measured_gpt_has_its_heads():
    measured = case(vocabulary=50257, context=2048, M=8192, threads=0)
    (pair,) = compare(machine("wse2"), {"t": [measured]})
    full = compare_with_dense(machine("wse2"), SHAPE, 0.25, 128)  # 2048 wide: 16 heads of 128
    assert pair.full_range == full.speedup_range
    (other,) = compare(machine("wse2"), {"t": [measured | {"mask": "two-way"}]})
    assert other.what == f"{pair.what}, two-way"


def test_a_prediction_has_them_beside():
    found = predict(machine("wse2"), SHAPE, 0.25, gpus=[gpu("h200")], results={"t": [case()]})
    (beside,) = found.beside
    assert beside.training.speedup == 1.1 and beside.decode is None
    low, high = found.step.speedup_range
    assert low < found.step.speedup < high
    assert found.step_s[0] < found.step.sparse.step_s < found.step_s[1]


def test_files_of_ones_own(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    share = 'peak_share = {{value = {}, unit = "share", mark = "assumed", source = "x"}}'
    path.write_text('base = "h100"\n' + share.format(0.2))
    assert gpu(path)["peak_share"] == 0.2
    assert set(gpu(path).figures()) == set(GPUS["h100"].figures())
    assert main(["wafer", "predict", "--beside", "h100", str(path), "--batch=8"]) == 0
    out = capsys.readouterr().out
    assert "\nh100 " in out and "\nmine.toml " in out
    for text, message in (
        (share.format(2), "peak_share: expected at most 1, got 2"),
        (share.format(-1), "gpu: .*mine.toml: peak_share.value: expected a number above 0, got -1"),
        ("peak = 3", "peak: expected base or one of"),
    ):
        path.write_text('base = "h100"\n' + text)
        with pytest.raises(ValueError, match=message):
            gpu(path)
    with pytest.raises(ValueError, match="gpu: expected one of h100, h200"):
        gpu("h900")
