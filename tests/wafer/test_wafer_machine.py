"""Machines as TOML files: those that ship, one's own, and what a wrong file says."""

from dataclasses import replace

import pytest

from sparsekern.wafer.cost import compare_with_dense
from sparsekern.wafer.machine import (
    MACHINE_FILES,
    MACHINES,
    UNITS,
    WSE2,
    WSE3,
    Figure,
    machine,
)
from sparsekern.wafer.render import as_toml
from sparsekern.wafer.shapes import gpt_shape

CLOCK = 'clock_hz = {value = 2e9, unit = "Hz", mark = "assumed", source = "a guess"}'


@pytest.fixture
def own(tmp_path):
    def write(text: str):
        path = tmp_path / "own.toml"
        path.write_text(text)
        return path

    return write


def test_the_stock_machines():
    assert list(MACHINES) == [
        "wse2",
        "wse2@0.85GHz",
        "wse2@narrow-sram",
        "wse3",
        "wse3@0.875GHz",
        "wse3@24B-axpy",
    ]
    assert (WSE2, WSE3) == (machine("wse2"), machine("wse3"))
    assert all(list(wafer.figures()) == list(UNITS) for wafer in MACHINES.values())
    assert WSE2.clock_hz.value == 1.1e9 and WSE2.clock_hz.mark == "read"
    assert WSE3.clock_hz.value == 1.1e9 and WSE3.clock_hz.mark == "assumed"
    assert machine("wse3@24B-axpy")["cache_bytes"] == 0


def test_a_copied_file_is_the_same_machine(own):
    for name in ("wse2", "wse3"):
        path = own((MACHINE_FILES / f"{name}.toml").read_text())
        copied = machine(path)
        assert copied.name == "own.toml" and machine(str(path)) == copied
        assert replace(copied, name=name) == machine(name)


def test_a_base_gives_what_is_not_in_the_file(own):
    found = machine(own(f'base = "wse2@narrow-sram"\n{CLOCK}'))
    assert found.clock_hz == Figure(2e9, "Hz", "assumed", "a guess")
    changed = {"name": found.name, "clock_hz": found.clock_hz}
    assert found == replace(machine("wse2@narrow-sram"), **changed)


def test_what_is_printed_is_a_file_again(own):
    source = 'it\'s "as quoted", C:\\folder\n'
    found = replace(WSE2, clock_hz=Figure(2e9, "Hz", "read", source))
    again = machine(own(as_toml("any", found.figures())))
    assert replace(again, name=found.name) == found


def test_a_small_grid_is_predicted(own):
    """Fewer columns than the most groups of columns that are tried."""
    grid = "\n".join(
        f'grid_{side} = {{value = 20, unit = "PEs", mark = "assumed", source = "small"}}'
        for side in ("rows", "cols")
    )
    small = machine(own(f'base = "wse2"\n{grid}'))
    shape = gpt_shape("gpt2-small")
    steps = [compare_with_dense(wafer, shape, 0.25, 8).sparse.step_s for wafer in (small, WSE2)]
    assert steps[0] > 10 * steps[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CLOCK, "own.toml: cores: expected a value, or a base above it, got nothing"),
        ("clock_hz = ", "own.toml is not TOML: "),
        (f'base = "wse9"\n{CLOCK}', "own.toml: base: expected one of wse2, .*, got 'wse9'"),
        ("base = [1]", r"own.toml: base: expected one of wse2, .*, got \[1\]"),
        ('base = "wse2"\nclock = 1', "own.toml: clock: expected base or one of .*, got 'clock'"),
        (
            'base = "wse2"\nclock_hz = 1e9',
            "own.toml: clock_hz: expected a table of value, unit, mark, source, got 1000000000.0",
        ),
        (
            'base = "wse2"\n[clock_hz]\nvalue = 1e9',
            "own.toml: clock_hz: expected a table of value, unit, mark, source, got value",
        ),
        ("2e9|0", "own.toml: clock_hz.value: expected a number above 0, got 0"),
        ("2e9|inf", "own.toml: clock_hz.value: expected a number above 0, got inf"),
        (
            "2e9|1e-300",
            r"clock_hz.value: expected a number from 1e-20 to 1e\+20, got 1e-300",
        ),
        ("2e9|1" + "0" * 400, r"clock_hz.value: expected a number from 1e-20 to 1e\+20, got 1000"),
        ("2e9|nan", "own.toml: clock_hz.value: expected a number above 0, got nan"),
        ("2e9|true", "own.toml: clock_hz.value: expected a number above 0, got True"),
        ('2e9|"fast"', "own.toml: clock_hz.value: expected a number above 0, got 'fast'"),
        ('"Hz"|"GHz"', "own.toml: clock_hz.unit: expected 'Hz', got 'GHz'"),
        ('"assumed"|"sure"', "own.toml: clock_hz.mark: expected one of read, .*, got 'sure'"),
        ('"assumed"|[]', r"own.toml: clock_hz.mark: expected one of read, .*, got \[\]"),
        ('"a guess"|" "', "own.toml: clock_hz.source: expected where the value is from, got ' '"),
        (
            'base = "wse2"\ngrid_rows = {value = 9.5, unit = "PEs", mark = "read", source = "x"}',
            "own.toml: grid_rows.value: expected a whole number, got 9.5",
        ),
        (
            'base = "wse2"\ncores = {value = 9, unit = "cores", mark = "read", source = "x"}',
            "own.toml: cores: expected at least the 745,500 PEs of the grid, got 9",
        ),
        ("2e9|-2e9", r"own.toml: clock_hz.value: expected a number above 0, got -2000000000.0"),
        (
            'base = "wse2"\ncache_bytes = {value=-1, unit="bytes", mark="read", source="x"}',
            "own.toml: cache_bytes.value: expected a number at least 0, got -1",
        ),
        (
            'base = "wse2"\npower_idle_w = {value = 3e4, unit = "W", mark = "read", source = "x"}',
            "own.toml: power_idle_w: expected at most power_peak_w, 22,900.0, got 30,000.0",
        ),
    ],
)
def test_a_wrong_file_names_file_and_field(own, text, message):
    if "|" in text:
        old, new = text.split("|")
        text = 'base = "wse2"\n' + CLOCK.replace(old, new)
    with pytest.raises(ValueError, match=message):
        machine(own(text))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="machine: none.toml does not exist"):
        machine("none.toml")
    with pytest.raises(ValueError, match="or a file that ends in .toml, got 'wse9'"):
        machine("wse9")
    (tmp_path / "own.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="own.toml is not TOML"):
        machine(tmp_path / "own.toml")
