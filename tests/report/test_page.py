"""The page of all results: what it says of each kind of file, and what it begins with."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsekern.bench import records
from sparsekern.cli import main
from sparsekern.commands import BENCH_OUT
from sparsekern.report import curves, load, measured, nearest, page, plots, products
from sparsekern.report.sections import sections
from sparsekern.report.summary import picture, sentences
from sparsekern.report.view import View

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


def cpu_cases() -> list[dict]:
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
            "few_tokens": {"kind": "ours", "median_s": ours_s, **right},
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


@pytest.fixture
def folder(tmp_path) -> Path:
    """A table of each kind, and one that has no section."""
    gpu = {"gpu": "NVIDIA H200"}
    limits = {"ceilings": {"cuda": GPU_LIMITS}}
    call = {"op": "call", "case": "matmul", "ways": {"ours": {"kind": "ours", "min_s": 1e-6}}}
    files = {
        "a-cpu": (about("products", **A_CPU, ceilings={"1": LIMITS}), cpu_cases()),
        "h200-decode-bfloat16": (about("decode", **gpu, **limits), cells()),
        "generate-gpt3-6.7b": (about("generate", **gpu), generation()),
        "calls": (about("calls", **A_CPU), [call]),
    }
    for name, (head, cases) in files.items():
        records.write(tmp_path / "results" / f"{name}.csv", head, records.flat(cases))
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


HERE = measured.Processor("A CPU", 2, "avx2")


def view(folder: Path, here: measured.Processor = HERE) -> View:
    results = load.load(folder)
    return View(results, nearest.choose(results, here))


def titles(found: View) -> list[str]:
    return [section.title for section in sections(found)]


def test_the_page_has_its_figures(folder, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["report", f"--results={folder}", f"--out={out}"]) == 0
    assert "report.html" in capsys.readouterr().out
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    images = Images(html).sources
    assert all(source.startswith("data:image/png;base64,") for source in images)
    pictures = {path.name for path in out.glob("*.png")}
    assert len(images) == len(pictures) == len(set(images))
    assert all(f"]({name})" in markdown for name in pictures)
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    assert "NVIDIA H200, gpt3-6.7b, torch 2.11.0, 2026-01-02, commit 0123456789" in markdown
    assert "quality is in <code>docs/quality.md</code>." in html and page.QUALITY in markdown


def test_every_figure_names_its_files(folder):
    found = view(folder)
    panels = [picture(found), *(p for section in sections(found) for p in section.panels)]
    assert all(panel.files for panel in panels)
    assert all(files for _, files in sentences(found))
    markdown = page.as_markdown(found, sections(found), picture(found))
    assert markdown.count("](") == len(panels)
    # One for each figure, one for each sentence, and the list of all of them.
    assert markdown.count("a-cpu.csv") > 5


def test_the_summary_is_of_four_sentences_losses_among_them(folder):
    found = sentences(view(folder))
    assert len(found) == 4
    training, token, gpu, losses = (text for text, _ in found)
    assert training.startswith("On a CPU a training step of the demo's GPT is ")
    assert "times as fast at 75% zeros and " in token
    assert "its first token takes 20 ms instead of 20" in gpu
    assert losses.startswith("It loses too: 64 tokens on a GPU reach ")


def test_titles_say_what_is_seen(folder):
    found = titles(view(folder))
    assert (
        found[0].startswith("On a CPU all products gain from ") and "times dense at 90%" in found[0]
    )
    assert any("1 token reaches 4.0 times dense" in title for title in found)
    assert any(title.startswith("A whole model writes ") for title in found)


def test_each_file_is_read_as_what_it_is(folder):
    results = {result.path.name: result for result in load.load(folder)}
    assert {name: result.kind for name, result in results.items()} == {
        "a-cpu.csv": load.PRODUCTS,
        "h200-decode-bfloat16.csv": load.CELLS,
        "generate-gpt3-6.7b.csv": load.GENERATION,
    }
    # A kernel that is wrong is nobody's best.
    assert {record["kernel"] for record in results["h200-decode-bfloat16.csv"].records} == {
        "few_tokens"
    }


def test_the_page_begins_with_this_machine(tmp_path):
    """Else with the one of the same instruction set, then of the most like number of cores."""
    others = {"slow": ("avx2", 2), "near": ("avx512", 4), "far": ("avx512", 16)}
    for name, (isa, cores) in others.items():
        machine = A_CPU | {"cpu": name, "isa": isa, "cores": cores}
        head = about("products", **machine)
        records.write(tmp_path / f"{name}.csv", head, records.flat(cpu_cases()))
    found = view(tmp_path, measured.Processor("mine", 2, "avx512"))
    assert found.cpu.result.path.stem == "near" and not found.cpu.is_here
    assert "This machine: mine, 2 cores, avx512. It has no results of its own" in found.words()
    assert "nearest machine that was measured: near, 4 cores, avx512" in found.words()
    found = view(tmp_path, measured.Processor("far", 16, "avx512"))
    assert found.cpu.is_here and found.words().endswith("The CPU figures were measured here.")
    (line,) = sections(found)[1].panels
    assert len({tuple(file.path.name for file in line.files)}) == 1 and len(line.files) == 3


def test_own_results_come_first(folder, tmp_path, monkeypatch):
    """What `bench` has just written here stands before a richer table of the same machine."""
    monkeypatch.chdir(tmp_path)
    here = nearest.this()
    machine = {"cpu": here.name, "cores": here.cores, "isa": here.isa}
    rich = tmp_path / "results" / "rich.csv"
    records.write(rich, about("products", **machine), records.flat(cpu_cases()))
    few = [case for case in cpu_cases() if case["op"] == "spmm"]
    records.write(BENCH_OUT, about("products", **machine), records.flat(few))
    assert main(["report", f"--results={folder}", f"--out={tmp_path}"]) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert "The CPU figures were measured here." in markdown
    first, second, *_ = markdown.split("\n## ")[1:]
    assert "bench.csv" in first and "rich.csv" not in first and "rich.csv" in second


def test_one_token_and_64_stand_apart(folder):
    section = products.few_tokens_on_a_gpu(view(folder))
    mean, one, many = section.panels
    labels = {text.get_text() for text in mean.figure.axes[0].texts}
    assert {"1 token", "8 tokens", "16 tokens", "32 tokens", "64 tokens"} <= labels
    assert one.title.startswith("By shape of W, 1 token: ") and "64 tokens" in many.title


def test_the_wait_stands_beside_the_speed(folder):
    (section,) = [s for s in sections(view(folder)) if s.title.startswith("A whole model writes")]
    rows = {row[0]: row[1:] for row in section.rows}
    assert rows["gpt3-6.7b, H200, 75%, batch 1"] == ["200", "300", "1.50", "20.0", "20.0", "0.31"]
    assert rows["gpt2-small, CPU, 75%, batch 4"][3:] == ["-", "-", "-"]


def test_speed_ups_share_their_axes(folder):
    found = sections(view(folder))
    axes = [panel.figure.axes[0] for section in found for panel in section.panels]
    alike = [each for each in axes if each.get_ylabel() == "times dense"]
    assert len(alike) > 4
    assert len({(each.get_xlim(), each.get_ylim()) for each in alike}) == 1
    assert alike[0].get_ylim() == plots.TIMES


def test_what_is_not_measured_is_left_out(tmp_path):
    records.write(tmp_path / "a-cpu.csv", about("products", **A_CPU), records.flat(cpu_cases()))
    found = titles(view(tmp_path))
    assert len(found) == 4  # products, writing, training, wafer
    assert not any("GPU" in title or "ceilings" in title for title in found)
    nothing = View([], nearest.choose([], HERE))
    assert "Nothing was measured on any CPU" in nothing.words()
    assert page.NOTHING in page.as_markdown(nothing, sections(nothing), picture(nothing))
    assert page.NOTHING in page.as_html(nothing, [], None, {})


def test_means_are_of_the_same_shapes(tmp_path):
    """A shape that was run at one sparsity alone is in no curve."""
    cases = [*cpu_cases(), product("spmm", 256, 0.75, 1, N=8192, speedup=1e6)]
    records.write(tmp_path / "a-cpu.csv", about("products", **A_CPU), records.flat(cases))
    (only,) = load.load(tmp_path)
    assert all(record["N"] == 768 for record in curves.common(curves.plain(only.records)))


@pytest.mark.parametrize(
    ("found", "at"),
    [
        ({0.5: 0.5, 0.75: 2.0}, 1 - 2**-1.5),  # halfway in halvings of the density
        ({0.5: 1.5, 0.75: 2.0}, 0.5),
        ({0.5: 0.5, 0.75: 0.9}, None),
        ({0.0: 0.5, 0.5: 1.0}, 0.5),
        ({}, None),
    ],
)
def test_a_curve_crosses_dense_where_it_stays_above(found, at):
    assert curves.crossing(found) == (at and pytest.approx(at))


def test_labels_move_apart_around_where_they_belong():
    assert plots.apart([0.2, 0.5], 0.1, 0, 1) == [0.2, 0.5]
    assert plots.apart([0.5, 0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.4, 0.5, 0.6])
    assert plots.apart([0.99, 1.0], 0.1, 0, 0.97) == pytest.approx([0.87, 0.97])
    assert plots.apart([0.0, 0.01], 0.1, 0.03, 1) == pytest.approx([0.03, 0.13])


def test_mistakes_are_named(tmp_path, capsys):
    assert main(["report", f"--results={tmp_path / 'none'}", f"--out={tmp_path}"]) == 2
    assert "none does not exist" in capsys.readouterr().err
    (tmp_path / "a.txt").touch()
    assert main(["report", f"--results={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}"]) == 2
    assert f"results: expected a folder, {tmp_path / 'a.txt'} is none" in capsys.readouterr().err
    (tmp_path / "bad.csv").write_text("{")
    assert main(["report", f"--results={tmp_path}", f"--out={tmp_path}"]) == 2
    assert "bad.csv is damaged" in capsys.readouterr().err
