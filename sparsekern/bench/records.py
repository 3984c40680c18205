"""The one format of measurements: a flat record for each contender of each case, in a CSV file.

A file begins with `# ` and a JSON object about the run: machine, versions, commit, date, and under
`shared` the fields that all records have in common. Then a table with the other fields: first those
of the case, which stand in its first row alone; below it, a row that begins with `=` is of the same
case. A field that a record does not have is empty.

In memory the records of a case are often wanted together: cases() nests them, flat() undoes it.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import atomic_write

# Kinds of contenders.
DENSE = "dense"  # a call whose fastest is what all are held against
PACKED = "packed dense"  # a dense engine that lays out W beforehand: shown, not held against
SPARSE = "sparse"  # another sparse library
OURS = "ours"
OTHER = "other"  # of other operands or other work, for comparison

# Fields of the case: what was to be done.
CASE: dict[str, type] = {
    "op": str,  # spmm, spmm_t, sddmm, linear, train_step, generate, memory, call, ...
    "case": str,  # in words, where the sizes do not say it
    "device": str,
    "model": str,
    "layers": int,
    "width": int,
    "vocabulary": int,
    "context": int,
    "batch": int,
    "micro_batch": int,  # of these, where gradients are added up
    "tokens": int,  # that median_s makes of each text
    "M": int,
    "N": int,
    "K": int,
    "sparsity": float,
    "nnz": int,
    "mask": str,
    "dtype": str,
    "threads": int,  # 0: on a GPU
    "is_cold": bool,
    "useful_flop": float,  # of a whole model; products have theirs by their sizes
    "dense_flop": float,
    "linear_share": float,  # of the dense step's time
    "cap": float,  # of the speed-up, by that share
    "seed": int,
    "lr": float,
    "steps": int,  # of a training run
    "gpus": int,  # that work together
    "is_noisy": bool,  # nothing is concluded from it
}
# Fields of a contender: who did it, and what was found.
FOUND: dict[str, type] = {
    "contender": str,
    "kind": str,
    "kernel": str,
    "median_s": float,
    "min_s": float,
    "spread": float,  # noise.py
    "error": float,
    "is_right": bool,
    "rounding": float,  # error that operands of fewer bits make
    "bytes": int,
    "weight_bytes": int,
    "built_bytes": int,  # of a model: after it was made,
    "state_bytes": int,  # with gradients and optimizer,
    "peak_bytes": int,  # and the most in a step
    "pool_bytes": int,  # that a CUDA graph keeps
    "sent_bytes": int,  # of gradients, to the other GPUs
    "first_token_s": float,
    "step": int,  # the round, or the step that the loss is of
    "loss": float,
    "note": str,
    "failed": str,  # why there are no numbers
}
FIELDS = CASE | FOUND
DIGITS = {"median_s": 7, "loss": 9, "spread": 4, "error": 4, "rounding": 4}  # 6 elsewhere
MARK, SAME_CASE, SUFFIX = "# ", "=", ".csv"


@dataclass
class Run:
    about: dict
    records: list[dict]


def write(path: Path, about: dict, records: Sequence[dict]) -> None:
    first = records[0] if records else {}
    same = {name: first.get(name) for name in FIELDS if name != "contender"}
    for record in records:
        same = {name: value for name, value in same.items() if record.get(name) == value}
    columns = [name for name in FIELDS if name not in same]
    shared = {name: value for name, value in same.items() if value is not None}
    text = io.StringIO()
    text.write(MARK + json.dumps(about | {"shared": shared}) + "\n")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    width, above = _case_columns(columns), None
    for record in records:
        row = [_text(name, record.get(name)) for name in columns]
        case = row[:width]
        if case and case == above:
            row[:width] = [SAME_CASE, *[""] * (width - 1)]
        above = case
        table.writerow(row)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _case_columns(columns: Sequence[str]) -> int:
    """How many there are: they come first."""
    return sum(name in CASE for name in columns)


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DIGITS.get(name, 6)}g}"
    return str(int(value) if isinstance(value, bool) else value)


def read(path: Path) -> Run:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        head, _, lines = path.read_text("utf-8").partition("\n")
        about = json.loads(head.removeprefix(MARK))
        shared = about.pop("shared")
        columns, *rows = csv.reader(io.StringIO(lines))
        types = [_read_bool if FIELDS[name] is bool else FIELDS[name] for name in columns]
        width, above = _case_columns(columns), []
        for row in rows:
            if width and row[:1] == [SAME_CASE]:
                row[:width] = above
            above = row[:width]
        records = [
            shared
            | {
                name: kind(cell)
                for name, kind, cell in zip(columns, types, row, strict=True)
                if cell
            }
            for row in rows
        ]
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of measurements ({type(error).__name__}: {error})"
        ) from error
    return Run(about, records)


def damaged(path: Path, error: Exception) -> ValueError:
    """What is raised where a table lacks what is looked for, or has it of another kind."""
    return ValueError(f"results: {path} is damaged ({type(error).__name__}: {error})")


def _read_bool(cell: str) -> bool:
    return {"0": False, "1": True}[cell]


def cases(records: Iterable[dict]) -> list[dict]:
    """The fields of each case, and under `ways` those of each contender by its name."""
    found: dict[tuple, dict] = {}
    for record in records:
        case = {name: record[name] for name in CASE if name in record}
        way = {name: record[name] for name in FOUND if name in record}
        ways = found.setdefault(tuple(case.items()), case | {"ways": {}})["ways"]
        ways[way.pop("contender")] = way
    return list(found.values())


def flat(cases: Iterable[dict]) -> list[dict]:
    """A record for each contender, without the rounds and what can be derived from other fields."""
    return [
        {name: case[name] for name in CASE if name in case and not _follows(name, case)}
        | {"contender": contender}
        | {name: way[name] for name in FOUND if name in way}
        for case in cases
        for contender, way in case["ways"].items()
    ]


def _follows(name: str, case: dict) -> bool:
    """Whether a product has this by its sizes (rates.py)."""
    return name in ("useful_flop", "dense_flop") and "model" not in case and "nnz" in case


def select(records: Iterable[dict], **wanted) -> list[dict]:
    """Records with these fields; a tuple lists the values that will do."""

    def fits(record: dict) -> bool:
        return all(
            record.get(name) in (value if isinstance(value, tuple) else (value,))
            for name, value in wanted.items()
        )

    return [record for record in records if fits(record)]


def groups(records: Iterable[dict], *keys: Callable[[dict], object]) -> dict[tuple, list[dict]]:
    """Together what has the same keys, in the order of first appearance."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(key(record) for key in keys), []).append(record)
    return found


def sparsities_of(records: Iterable[dict]) -> list[float]:
    return sorted({record["sparsity"] for record in records})
