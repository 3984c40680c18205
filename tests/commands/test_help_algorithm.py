"""`train --help-algorithm`: YAML that works, and the tables of the guide say the same."""

import re
from pathlib import Path

import pytest

from sparsekern.cli import main
from sparsekern.commands.algorithms import keys
from sparsekern.gpt.config import NEED_TEXT
from sparsekern.sparsity import ALGORITHMS, configure, load_config

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "train.md"
IN_FILES = [name for name in ALGORITHMS if name not in NEED_TEXT]


def shown(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert main(["train", "--help-algorithm", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", IN_FILES)
def test_what_it_prints_makes_the_algorithm_with_its_defaults(capsys, tmp_path, name):
    pytest.importorskip("yaml")
    path = tmp_path / "block.yaml"
    path.write_text(shown(capsys, name.upper()))
    settings = load_config(path)
    plain = {key: settings[key] for key in ("algorithm", "sparsity")}
    made = configure(settings)
    assert type(made) is ALGORITHMS[name] and made == configure(plain)
    assert list(settings) == ["algorithm", *(key.name for key in keys(ALGORITHMS[name]))]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_has_its_text(name):
    assert all(len(key.text) > 10 for key in keys(ALGORITHMS[name]))


def test_all_names_and_those_that_need_text(capsys):
    out = shown(capsys)
    assert all(re.search(f"^{name} .*[a-z]", out, re.MULTILINE) for name in ALGORITHMS)
    assert "prune --method wanda" in shown(capsys, "wanda")
    assert main(["train", "--help-algorithm", "rigged"]) == 2
    assert "expected one of static, gmp" in capsys.readouterr().err


def rows_of_the_guide() -> dict[str, tuple[list[str], str]]:
    """key -> the algorithms that have it, and the cell with its default."""
    text = GUIDE.read_text()
    of_all = text.partition("Keys of every algorithm:\n")[2].partition("\n\nKeys of some:")
    of_some = of_all[2].partition("\n\n#")[0]
    found = {}
    for line in of_all[0].splitlines()[3:]:
        key, default, _ = line.strip("| ").split(" | ", 2)
        found[key.strip("`")] = IN_FILES, default
    for line in of_some.strip().splitlines()[2:]:
        names, of, default, _ = line.strip("| ").split(" | ", 3)
        for key in names.split(", "):
            found[key.strip("`")] = of.split(", "), default
    return found


def test_the_guide_has_every_key_and_its_default():
    rows = rows_of_the_guide()
    rows.pop("algorithm")
    for name in IN_FILES:
        here = {key: default for key, (of, default) in rows.items() if name in of}
        found = {key.name: key.default for key in keys(ALGORITHMS[name])}
        assert here.keys() == found.keys(), name
        for key, default in found.items():
            wanted = default or "must be there"
            assert re.search(rf"(^|\W){re.escape(wanted)}\b", here[key]), (name, key)
