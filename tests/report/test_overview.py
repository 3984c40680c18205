"""The page of all results: every kind of file in one folder, and what has no file yet."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsekern.bench import records, runs
from sparsekern.cli import main
from sparsekern.report import load, page
from sparsekern.report.sections import NOT_YET, sections

pytest.importorskip("matplotlib")

COMMIT = {"id": "0123456789abcdef", "dirty": False}
LIMITS = {
    "flop_per_s": 2e11,
    "bytes_per_s": {"l1": 3e11, "l2": 1.6e11, "l3": 3e10, "memory": 1.6e10},
}


def product(op: str, M: int, sparsity: float, threads: int, N: int = 768, **fields) -> dict:
    """A loss at 50 %, a gain from 75 % on, and larger with M."""
    dense_s = 1e-8 * M * N
    speedup = fields.pop("speedup", 0.4 * (1 + 0.1 * M**0.25) / (1 - sparsity))
    right = {"error": 1e-7, "is_right": True}
    ways = {
        "sparsekern": {"kind": "ours", "median_s": dense_s / speedup, **right},
        "F.linear": {"kind": "dense", "median_s": dense_s, **right},
    }
    if op != "linear":
        ways["scipy CSR"] = {"kind": "sparse", "median_s": dense_s / (0.7 * speedup), **right}
    case = {"op": op, "device": "cpu", "M": M, "sparsity": sparsity, "threads": threads}
    case |= {"dtype": "float32", "mask": "random", "is_cold": M == 1, "ways": ways}
    if "model" not in fields:
        case |= {"N": N, "K": 768, "nnz": round(N * 768 * (1 - sparsity))}
    return case | fields


def about(benchmark: str, **machine) -> dict:
    head = {"benchmark": benchmark, "date": "2026-01-02", "commit": COMMIT}
    return head | {"machine": {"torch": "2.11.0"} | machine}


def products() -> list[dict]:
    grid = [(op, M) for op in ("spmm", "spmm_t", "sddmm") for M in (256, 1024)]
    grid += [("spmm", 1), ("spmm", 16), ("linear", 1024)]
    cases = [product(op, M, s, 1) for op, M in grid for s in (0.5, 0.75, 0.9, 0.95)]
    gpt = {"layers": 2, "width": 768, "vocabulary": 256, "batch": 8, "context": 128}
    cases += [
        product("train_step", 1024, s, 1, model="demo", **gpt) for s in (0.5, 0.75, 0.9, 0.95)
    ]
    return [
        *cases,
        product("generate", 4, 0.75, 1, model="gpt2-small", batch=4, tokens=32),
        {"op": "memory", "ways": {"bound": {"bytes": 1}}},
    ]


A_CPU = {"cpu": "A CPU", "cores": 2, "isa": "avx2", "torch": "2.13.0"}


def cells() -> list[dict]:
    def cell(M: int, sparsity: float, N: int) -> dict:
        ours_s = 1e-5 * (1 - sparsity) * M**0.25
        right = {"is_right": True, "error": 1e-3, "bytes": 1000}
        ways = {
            "F.linear cublas": {"kind": "dense", "median_s": 4e-6, **right},
            "stream": {"kind": "ours", "median_s": ours_s, **right},
            "hasty": {"kind": "ours", "median_s": 1e-9, **right, "is_right": False},
        }
        case = {"op": "spmm", "device": "cuda", "M": M, "N": N, "K": 2048, "sparsity": sparsity}
        case |= {"nnz": 1000, "mask": "random", "dtype": "bfloat16", "threads": 0}
        return case | {"is_cold": True, "ways": ways}

    grid = [(M, s, N) for N in (2048, 8192) for s in (0.5, 0.7, 0.9) for M in (1, 8, 16, 32, 64)]
    return [cell(*each) for each in grid]


GPU_LIMITS = {"flop_per_s": 8e14, "bytes_per_s": {"l2": 9e12, "memory": 4e12}}


def generation() -> list[dict]:
    def side(kind: str, tokens_per_s: float, nbytes: int) -> dict:
        right = {"error": 1e-3, "is_right": True, "bytes": nbytes, "first_token_s": 0.02}
        return {"kind": kind, "median_s": 1 / tokens_per_s, **right}

    return [
        {
            **{"op": "generate", "device": "cuda", "model": "gpt3-6.7b", "batch": batch},
            **{"tokens": 1, "sparsity": sparsity, "threads": 0},
            "ways": {
                "dense, CUDA graph": side("dense", 200.0, 1000),
                "sparse, CUDA graph": side("ours", 150 + 200 * sparsity, 310),
            },
        }
        for sparsity in (0.5, 0.75, 0.9)
        for batch in (1, 16)
    ]


def experiments() -> dict:
    def config(lr: float) -> dict:
        sizes = {"layers": 2, "width": 8, "context": 512, "batch": 64}
        return sizes | {"steps": 2000, "lr": lr, "seed": 0}

    def run(sparsity: float, lr: float = 1.0) -> dict:
        points = [
            {"step": step, "loss": 4 + sparsity / 4 - step / 1000} for step in range(0, 2001, 250)
        ]
        return {
            "config": config(lr),
            "evaluations": points,
            "loss": points[-1]["loss"],
            "parameters": 100,
            "flops": 1e15 * (1 - sparsity),
            "peak_gpu_bytes": 1,
        }

    def tuned(lr: float) -> dict:
        return run(0.75, lr) | {"evaluations": [{"step": 2000, "loss": 3 * lr}]}

    def timed(sparsity: float) -> dict:
        step_s = 0.1 * (1 - 0.5 * sparsity)
        return dict.fromkeys(("step_s", "least_s", "most_s", "latency_s"), step_s) | {
            "dense_latency_s": 0.1
        }

    machine = {"device": "NVIDIA H200", "torch": "2.11.0", "date": "2026-01-02", "commit": "abc"}
    times = {str(s): timed(s) for s in (0.0, 0.5, 0.75, 0.9)} | {"finetune": timed(0)}
    arms = {f"pretrain {s} seed 0": run(s) for s in (0.9, 0.0, 0.5, 0.75)}
    diverged = {"loss": None, "diverged": "loss is nan at step 3"}
    finetuned = {f"finetune 0.75 seed 0 lr {lr}": tuned(lr) for lr in (2, 1)}
    finetuned |= {"finetune 0.75 seed 0 lr 3": diverged, "pretrain 0.95 seed 0": diverged}
    others = {"sweep 0.0 lr 0.001": run(0.0), "pretrain 0.75 seed 1": run(0.75)}
    return {"machine": machine, "times": {"times": times}, **others, **arms, **finetuned}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A table of each kind, and one that has no section."""
    trained = runs.flat(experiments())
    gpu = {"gpu": "NVIDIA H200"}
    limits = {"ceilings": {"cuda": GPU_LIMITS}}
    call = {"op": "call", "case": "matmul", "ways": {"ours": {"kind": "ours", "min_s": 1e-6}}}
    files = {
        "a-cpu": (about("products", **A_CPU, ceilings={"1": LIMITS}), products()),
        "h200-decode-bfloat16": (about("decode", **gpu, **limits), cells()),
        "generate-gpt3-6.7b": (about("generate", **gpu), generation()),
        "calls": (about("calls", **A_CPU), [call]),
    }
    for name, (head, cases) in files.items():
        records.write(tmp_path / "results" / f"{name}.csv", head, records.flat(cases))
    path = tmp_path / "results" / "h200" / "experiments.csv"
    records.write(path, trained.about, trained.records)
    return tmp_path / "results"


class Images(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "img":
            found = dict(attributes)
            assert found["alt"]
            self.sources.append(found["src"])
        assert tag not in ("script", "link")


def test_every_section_has_its_figures(folder, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", f"--results={folder}", f"--out={out}"]) == 0
    assert "report.html" in capsys.readouterr().out
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert NOT_YET not in html and NOT_YET not in markdown
    images = Images(html).sources
    assert all(source.startswith("data:image/png;base64,") for source in images)
    pictures = {path.name for path in out.glob("*.png")}
    assert len(images) == len(pictures)
    assert all(f"]({name})" in markdown for name in pictures)
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    assert "NVIDIA H200, gpt3-6.7b, torch 2.11.0, 2026-01-02, commit 0123456789." in markdown


def test_each_file_is_read_as_what_it_is(folder):
    results = {result.path.name: result for result in load.load(folder)}
    assert {name: result.kind for name, result in results.items()} == {
        "a-cpu.csv": load.PRODUCTS,
        "h200-decode-bfloat16.csv": load.CELLS,
        "generate-gpt3-6.7b.csv": load.GENERATION,
        "experiments.csv": load.EXPERIMENTS,
    }
    assert results["experiments.csv"].title == "h200"
    # A kernel that is wrong is nobody's best.
    assert {record["kernel"] for record in results["h200-decode-bfloat16.csv"].records} == {
        "stream"
    }


def test_arms_of_experiments_stand_beside_dense(folder):
    (result,) = [r for r in load.load(folder) if r.kind == load.EXPERIMENTS]
    found = {section.title: section.parts for section in sections([result])}
    ((speeds,), (losses,)) = found["Training"], found["Loss against wall-clock"]
    assert [row[-1] for row in speeds.rows] == ["1.33", "1.60", "1.82"]
    assert losses.rows == [
        ["dense", "2.0000", "1.00x", "200.0", "-"],
        ["50% sparse", "2.1250", "2.00x", "150.0", "-"],
        ["75% sparse", "2.1875", "4.00x", "125.0", "3.0000"],
        ["90% sparse", "2.2250", "10.00x", "110.0", "-"],
    ]


def test_what_is_not_measured_says_so(tmp_path):
    records.write(tmp_path / "a-cpu.csv", about("products", **A_CPU), records.flat(products()))
    found = {section.title: section.parts for section in sections(load.load(tmp_path))}
    assert not found["Roofline"] and not found["Loss against wall-clock"]
    assert found["Speed-up against sparsity"] and found["Crossover map"] and found["Training"]
    assert page.as_markdown(sections([])).count(NOT_YET) == len(found)


def test_means_are_of_the_same_shapes(tmp_path):
    """A shape that was run at one sparsity alone is in no curve."""
    cases = [*products(), product("spmm", 256, 0.75, 1, N=8192, speedup=1e6)]
    records.write(tmp_path / "a-cpu.csv", about("products", **A_CPU), records.flat(cases))
    (only,) = load.load(tmp_path)
    from sparsekern.report.sections import by_pass

    ((_, passes),) = by_pass(only)
    assert all(record["N"] == 768 for record in passes["forward"])


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["report", f"--results={tmp_path / 'none'}", f"--out={tmp_path}"]) == 2
    assert "none does not exist" in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text("{")
    assert main(["report", f"--results={tmp_path}", f"--out={tmp_path}"]) == 2
    assert "bad.csv is damaged" in capsys.readouterr().err
