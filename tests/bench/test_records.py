"""The table of measurements: what is written is read again, and nothing else is taken for one."""

import pytest

from sparsekern.bench import records

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
