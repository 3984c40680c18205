"""Includes of csrc go one way. Read from the sources."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

# The rooms that each room may include. bindings.cpp, which lies in no room, may include all but
# `cuda`: that is a library of its own.
ROOMS = {
    "common": set(),
    "pattern": {"common"},
    "cpu": {"common", "pattern"},
    "packing": {"common", "pattern"},
    "bench": {"common", "cpu"},
    "cuda": set(),
    "": {"common", "pattern", "cpu", "packing", "bench"},
}
OUTSIDE = {"cuda/ptx.cuh": {"emulated_ptx.h"}}  # of tests/cuda, in place of PTX
FILES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.*"))


def room(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""


def includes(path: Path) -> set[Path]:
    """The files of csrc that the file includes."""
    names = set(re.findall(r'^\s*#\s*include\s+"(.+)"', (CSRC / path).read_text(), re.MULTILINE))
    found = {(CSRC / path).parent / name for name in names - OUTSIDE.get(path.as_posix(), set())}
    return {name.resolve().relative_to(CSRC.resolve()) for name in found}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_includes_go_one_way(path):
    included = includes(path)
    assert included <= set(FILES)
    assert {room(other) for other in included} <= {room(path), *ROOMS[room(path)]}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_includes_itself_by_others(path):
    seen, ahead = set(), includes(path)
    while ahead - seen:
        seen |= ahead
        ahead = {other for file in seen for other in includes(file)}
    assert path not in seen


def test_only_what_is_compiled_for_each_instruction_set_includes_its_vectors():
    """An inline function of two instruction sets would be merged into one of them."""
    leaves = {path for path in FILES if "SK_ISA {" in (CSRC / path).read_text()}
    assert Path("cpu/simd.h") in leaves
    for path in FILES:
        if includes(path) & leaves:
            assert path in leaves, path
        if path in leaves and path.suffix == ".cpp":
            assert path.stem.endswith("_isa"), path


def test_the_reader_sees_includes():
    assert Path("pattern/csr.h") in includes(Path("packing/cover.h"))
    assert {"common", "cpu", "packing"} <= {room(path) for path in includes(Path("bindings.cpp"))}
