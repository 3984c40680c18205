"""Figures with their provenance, and the TOML files that hold them.

Marks: `read` in the named source; `second-hand`: in a text about it; `assumed`: by us, for want of
a source; `calibrated`: fitted to a published measurement, which the source names. Where sources
disagree there are two machines, told apart by what follows the `@`. A file may begin with
`base = "wse2"` and then gives only what differs from that machine.
"""

import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, TypeVar, get_args

from ..files import as_path

Mark = Literal["read", "second-hand", "assumed", "calibrated"]
ASSUMED, CALIBRATED = "assumed", "calibrated"
# Of any figure: beyond, products of them are no longer numbers.
SMALLEST, LARGEST = 1e-20, 1e20


@dataclass(frozen=True)
class Figure:
    """A number of a machine: its value, unit, mark (how it is known) and source."""

    value: float
    unit: str
    mark: Mark
    source: str

    def scaled(self, factor: float) -> "Figure":
        return replace(self, value=self.value * factor)


_Described = TypeVar("_Described")


def by_name_or_file(
    what: str,
    name_or_path: str | Path,
    known: Mapping[str, _Described],
    read: Callable[[Path, str], _Described],
) -> _Described:
    """One that is known by that name, or read(path, its file name) of a TOML file; ValueError names
    `what`."""
    path = as_path(what, name_or_path, "a name or a path")
    if name_or_path in known:
        return known[str(name_or_path)]
    if path.suffix != ".toml":
        raise ValueError(
            f"{what}: expected one of {', '.join(known)}, or a file that ends in .toml, "
            f"got {str(name_or_path)!r}"
        )
    return read(path, path.name)


def read_toml(path: Path, what: str) -> dict:
    """What a TOML file says. Errors begin with `what` and name the file."""
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{what}: {path} {wrong}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding too
        raise ValueError(f"{what}: {path} is not TOML: {error}") from None


def read_figures(
    path: Path,
    units: Mapping[str, str],
    bases: Mapping[str, Mapping[str, Figure]],
    counts: Collection[str] = (),
    may_be_zero: Collection[str] = (),
    what: str = "machine",
) -> dict[str, Figure]:
    """The figures of a file, one for each name in `units`; those it lacks come from its `base`, one
    of `bases`. `counts` are whole numbers."""
    given = read_toml(path, what)
    base = given.pop("base", None)
    if base is not None and base not in list(bases):
        raise mistake(path, "base", f"one of {', '.join(bases)}", repr(base), what)
    figures = dict(bases[base]) if base is not None else {}
    for name, found in given.items():
        if name not in units:
            expected = f"base or one of {', '.join(units)}"
            raise mistake(path, name, expected, repr(name), what)
        figures[name] = _figure(
            path, name, found, units[name], name in counts, name in may_be_zero, what
        )
    for name in units:
        if name not in figures:
            raise mistake(path, name, "a value, or a base above it", "nothing", what)
    return figures


def _figure(
    path: Path, name: str, found: object, unit: str, is_count: bool, may_be_zero: bool, what: str
) -> Figure:
    def wrong(key: str, expected: str, got: str) -> ValueError:
        return mistake(path, f"{name}.{key}" if key else name, expected, got, what)

    keys = [key.name for key in fields(Figure)]
    if not isinstance(found, dict) or set(found) != set(keys):
        got = ", ".join(found) or "none" if isinstance(found, dict) else repr(found)
        raise wrong("", f"a table of {', '.join(keys)}", got)
    figure = Figure(**found)
    is_zero = may_be_zero and figure.value == 0
    least = "at least 0" if may_be_zero else "above 0"
    if type(figure.value) not in (int, float) or not (is_zero or 0 < figure.value < math.inf):
        raise wrong("value", f"a number {least}", repr(figure.value))
    if not (is_zero or SMALLEST <= figure.value <= LARGEST):
        expected = f"a number from {SMALLEST:g} to {LARGEST:g}"
        raise wrong("value", expected, f"{figure.value!r:.40}")
    if is_count and figure.value != int(figure.value):
        raise wrong("value", "a whole number", repr(figure.value))
    if figure.unit != unit:
        raise wrong("unit", repr(unit), repr(figure.unit))
    if figure.mark not in get_args(Mark):
        raise wrong("mark", f"one of {', '.join(get_args(Mark))}", repr(figure.mark))
    if not isinstance(figure.source, str) or not figure.source.strip():
        raise wrong("source", "where the value is from", repr(figure.source))
    return figure


def check_count(name: str, value: object, least: int = 1) -> None:
    """ValueError, which names the argument, unless `value` is whole and at least `least`."""
    if not isinstance(value, Integral):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected at most {LARGEST:g}, got {value!r:.40}")


def check_number(name: str, value: object) -> None:
    """ValueError, which names the argument, unless `value` is a number."""
    if not isinstance(value, Real):
        raise ValueError(f"{name}: expected a number, got {value!r:.60}")


def check_share(name: str, value: object) -> float:
    """The share as a float; ValueError unless it is in [0, 1]."""
    check_number(name, value)
    share = float(value)  # type: ignore[arg-type]
    if not (share == 0 or SMALLEST <= share <= 1):
        raise ValueError(f"{name}: expected 0 to 1, got {share:g}")
    return share


def check_density(value: object) -> float:
    """The density as a float; ValueError unless it is in (0, 1]."""
    check_number("density", value)
    if not value:
        raise ValueError(f"density: expected 0 < density <= 1, got {value}")
    return check_share("density", value)


def check_kinds(**arguments: tuple[object, type, str]) -> None:
    """TypeError, which names the argument, for a value that is not of its type; with that, where
    such a one comes from."""
    for name, (value, kind, made_by) in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected what {made_by} gives, got {value!r:.60}")


def mistake(path: Path, name: str, expected: str, got: str, what: str = "machine") -> ValueError:
    return ValueError(f"{what}: {path}: {name}: expected {expected}, got {got}")
