"""Makes docs/api.md from docstrings: python tools/api.py [--check]

griffe reads the sources and imports nothing. With --check nothing is written; the exit status says
whether docs/api.md is what the docstrings make of it.
"""

import argparse
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

# The public surface. None stands for what the module's __all__ names.
MODULES: dict[str, tuple[str, ...] | None] = {
    "sparsekern": None,
    "sparsekern.models": None,
    "sparsekern.nn": None,
    "sparsekern.sparsity": None,
    "sparsekern.weights": None,
    "sparsekern.gpt.config": ("TrainConfig",),
    "sparsekern.gpt.train": ("train",),
    "sparsekern.gpt.prune": ("PruneConfig", "prune"),
    "sparsekern.gpt.model": ("GPTConfig", "GPT"),
    "sparsekern.gpt.generate": ("generate",),
    "sparsekern.wafer": None,
    "sparsekern.wafer.sensitivity": ("sensitivity",),
}
HEAD = """\
# API

Made from the docstrings by `make docs`; do not edit. A name that is not on
this page may change without notice.
Letters: `y[M, N] = x[M, K] @ W[N, K].T`, M tokens, N out_features, K in_features.
"""


def documentation(thing: griffe.Object) -> list[str]:
    """The docstring, with sections such as `Args:` as lists."""
    if not thing.docstring:
        return []
    lines = []
    for section in thing.docstring.parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            lines += [section.value, ""]
        elif section.kind is griffe.DocstringSectionKind.admonition:
            lines += [f"{section.title}: {section.value.description}", ""]
        else:
            lines += [f"{section.title or section.kind.value.capitalize()}:", ""]
            lines += [f"- {entry(each)}" for each in section.value] + [""]
    return lines


def entry(each: griffe.DocstringElement) -> str:
    name = getattr(each, "name", "") or str(each.annotation or "")
    text = " ".join(each.description.split())
    return f"`{name}`: {text}" if name else text


def signature(thing: griffe.Object) -> str:
    if thing.is_attribute:  # a property
        return f"{thing.name}: {thing.annotation}"
    return str(thing.signature())


def members(cls: griffe.Class) -> list[griffe.Object]:
    """Its public methods and properties that have something to say, and those of a base that has
    none itself, as a class in two files has."""
    roots = [base for base in cls.resolved_bases if base.is_class and not base.bases]
    there = [m for part in (*roots, cls) for m in part.members.values()]
    found = [m for m in there if not m.name.startswith("_") and not m.is_alias]
    return [m for m in found if m.docstring and (m.is_function or "property" in m.labels)]


def section(name: str, thing: griffe.Object) -> list[str]:
    lines = [f"### {name}", ""]
    if not thing.is_attribute:
        lines += ["```python", signature(thing), "```", ""]
    lines += documentation(thing)
    if thing.is_class:
        for member in members(thing):
            text = documentation(member)
            lines += [f"**`{signature(member)}`**", "", *text]
    return lines


def page() -> str:
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    package = loader.load("sparsekern")
    loader.resolve_aliases()
    lines, seen = [HEAD], {}
    for path, names in MODULES.items():
        module = package if path == "sparsekern" else package[path.removeprefix("sparsekern.")]
        lines += [f"## {path}", "", *documentation(module)]
        for name in names or [str(export) for export in module.exports]:
            thing = module[name]
            if thing.is_module:  # a function has the name of its file
                thing = thing[name]
            thing = thing.final_target if thing.is_alias else thing
            if thing.path in seen:
                lines += [f"`{name}`: see {seen[thing.path]}.", ""]
            else:
                seen[thing.path] = f"`{path}.{name}`"
                lines += section(name, thing)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    if not parser.parse_args().check:
        PAGE.write_text(page())
        return 0
    if PAGE.read_text() == page():
        return 0
    print("docs/api.md is not what the docstrings make of it: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
