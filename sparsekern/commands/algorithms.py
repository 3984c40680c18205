"""The keys of the sparsity algorithms in a YAML file, read from their classes."""

import inspect
import json
import re
import textwrap
from dataclasses import MISSING, dataclass, fields

from ..gpt.config import NEED_TEXT
from ..sparsity import ALGORITHMS, GMP, Algorithm, IterativePruning
from ..sparsity.schedules import EXAMPLE

WIDTH = 100
ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")
CODE_FILES = re.compile(r" \(\w+\.py\)|, \w+\.py")  # of no use to whoever writes YAML


@dataclass(frozen=True)
class Key:
    name: str
    default: str | None  # None where there must be a value
    text: str


def keys(kind: type[Algorithm]) -> list[Key]:
    texts = _texts(kind)
    found = []
    for part in fields(kind):
        # It takes an update from its base, and refuses it for rounds and freq.
        if not part.init or (kind is IterativePruning and part.name == "update"):
            continue
        default = None if part.default is MISSING else _yaml(part.default)
        found.append(Key(part.name, default, texts[part.name]))
    return found


def _texts(kind: type) -> dict[str, str]:
    """The parts of the docstrings that tell of arguments, those of bases included."""
    found: dict[str, list[str]] = {}
    for base in reversed(kind.__mro__):
        _, _, arguments = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        lines: list[str] = []
        for line in arguments.splitlines():
            if entry := ENTRY.fullmatch(line):
                lines = [entry[2]]
                found |= dict.fromkeys(entry[1].split(", "), lines)
            elif line.strip():
                lines.append(line.strip())
    return {name: CODE_FILES.sub("", " ".join(lines)) for name, lines in found.items()}


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def about(kind: type) -> str:
    """The first sentence of its docstring."""
    text = " ".join(inspect.cleandoc(kind.__doc__).partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def help_of(name: str) -> str:
    """A block of YAML with every key and its default, or without a name all names."""
    if not name:
        width = max(map(len, ALGORITHMS))
        rows = [f"{known:<{width}}  {about(kind)}" for known, kind in ALGORITHMS.items()]
        return "\n".join([*rows, "", "train --help-algorithm NAME shows the keys of one."])
    if name.lower() not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"help-algorithm: expected one of {known}, got {name!r}")
    name = name.lower()
    kind = ALGORITHMS[name]
    if name in NEED_TEXT:
        command = f"python -m sparsekern prune --method {name}"
        return f"{about(kind)}\nIt looks at text, which no file of settings can hold: {command}"
    lines = [*_comment(about(kind), ""), "sparsity:", f"  algorithm: {name}"]
    for key in keys(kind):
        text = key.text if key.default else f"{key.text} Must be given; as an example:"
        example = EXAMPLE if kind is GMP else "0.75"
        lines += [*_comment(text, "  "), f"  {key.name}: {key.default or example}"]
    return "\n".join(lines)


def _comment(text: str, indent: str) -> list[str]:
    text = text[0].upper() + text[1:]
    lead = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=lead)
