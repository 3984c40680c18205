"""The table of measurements: what is written is read again, and nothing else is taken for one."""

import pytest

from sparsekern.bench import records, runs

ABOUT = {"benchmark": "products", "date": "2026-01-02", "machine": {"cpu": "A, B"}}
CASES = [
    {
        **{"op": "spmm", "case": 'in "words", two', "M": 8, "sparsity": 0.5, "is_cold": is_cold},
        "ways": {
            "F.linear": {"kind": "dense", "median_s": 1.25e-6, "is_right": True},
            "ours": {"kind": "ours", "failed": "no such\tthing\nhere", "is_right": False},
        },
    }
    for is_cold in (True, False)
]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "a.csv"
    records.write(path, ABOUT, records.flat(CASES))
    run = records.read(path)
    assert run.about == ABOUT and records.cases(run.records) == CASES
    head, columns, first, *others = path.read_text().splitlines()
    assert '"shared": {"op": "spmm"' in head and columns.startswith("is_cold,contender,kind")
    assert first == "1,F.linear,dense,1.25e-06,1,"
    assert [line[:6] for line in others if "," in line] == ["=,ours", "0,F.li", "=,ours"]


def test_a_table_of_nothing_is_one(tmp_path):
    records.write(tmp_path / "a.csv", ABOUT, [])
    assert records.read(tmp_path / "a.csv") == records.Run(ABOUT, [])


def test_what_is_derived_is_not_written():
    (record, _) = records.flat([CASES[0] | {"speedup": 2.0}])
    assert record.keys() <= records.FIELDS.keys()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "a,b\n1,2\n", '# {"shared": {}}\nno_field\n1\n', '# {"shared": {}}\nM,N\n1\n']
    + ['# {"shared": {}}\nM,K\n=,\n', '# {"shared": {}}\nkind,note\n=\n']
    + ['# {"shared": {}}\nM\nmany\n', '# {"shared": {}}\nis_cold\nTrue\n', "# {}\nM\n1\n"],
)
def test_what_is_no_table_is_named(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="a.csv is not a table of measurements"):
        records.read(path)
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        records.read(tmp_path / "none.csv")


def test_training_runs_are_records_and_runs_again(tmp_path):
    config = {"layers": 2, "width": 8, "context": 4, "batch": 2, "steps": 10, "lr": 0.5, "seed": 0}
    made = {"config": config, "parameters": 100, "flops": 1e9, "peak_gpu_bytes": 7}
    points = [{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}]
    timed = {"step_s": 0.5, "least_s": 0.4, "most_s": 0.6, "latency_s": 0.1}
    row = {"sparsity": 0.5, "steps": 3, "loss": 1.5, "flop_ratio": 1.2, "parameters": 60}
    results = {
        "machine": {"device": "A GPU", "torch": "2", "commit": "abc", "date": "2026-01-02"},
        "data": {"pretrain": {"source": "packages", "tokens": [9, 1]}},
        "failed": {"sweep 0.0 lr 2.0": "RuntimeError"},
        "times": {"times": {"0.75": timed | {"dense_latency_s": 0.2}}},
        "pretrain 0.75 seed 0": made | {"evaluations": points, "loss": 1.0},
        "sweep 0.0 lr 0.5": {"loss": None, "diverged": "loss is nan"},
        "prune once 0.5": {"rows": [row]},
        "prune control": made | {"evaluations": points[1:], "loss": 1.0},
    }
    run = runs.flat(results)
    records.write(tmp_path / "a.csv", run.about, run.records)
    again = runs.nested(records.read(tmp_path / "a.csv"))
    assert again.keys() == results.keys()
    for name in ("machine", "data", "failed", "times", "sweep 0.0 lr 0.5", "prune control"):
        assert again[name] == results[name]
    assert again["prune once 0.5"]["rows"][0].items() >= row.items()
    pretrained = again["pretrain 0.75 seed 0"]
    assert pretrained["steps_s"] == 5 and pretrained["tokens_per_s"] == 16
    assert [e["seconds"] for e in pretrained["evaluations"]] == [0, 5]
