"""What the pages of all benchmarks share: tables by sparsity, plots, and their places in docs/."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.bench import records
from sparsekern.bench.records import Run, select, sparsities_of
from sparsekern.files import write_picture
from sparsekern.terminal import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCH = Path(__file__).parent
RESULTS = BENCH / "results"
PARTIAL = BENCH.parent / "build" / "bench"  # what is no whole result
BENCHMARKS = BENCH.parent / "docs" / "benchmarks.md"
NOT_RUN = "Not run."

Line = tuple[list, list[dict], Callable[[list[dict]], str]]  # labels, cases, their text


def by_sparsity(
    header: list[str], left: int, lines: Iterable[Line], cases: list[dict], *more: str
) -> str:
    """A table with a column for each sparsity of `cases`, between the labels of its lines, the
    first `left` of which are words, and a last column, `more`: its name, for the last label."""
    sparsities = sparsities_of(cases)
    rows = []
    for labels, chosen, text in lines:
        cells = [text(select(chosen, sparsity=s)) for s in sparsities]
        if any(cells):
            rows.append([*labels[: len(header)], *cells, *labels[len(header) :]])
    columns = [*header, *(f"{sparsity:.0%}" for sparsity in sparsities), *more]
    return table(columns, rows, left=left) if rows else ""


def publish(folder: Path, name: str, run: Run, text: str, figure: "Figure | None") -> None:
    """The table, its page, and the plot where there is one."""
    records.write(folder / f"{name}{records.SUFFIX}", run.about, run.records)
    (folder / f"{name}.md").write_text(text)
    if figure:
        write_picture(figure, folder / f"{name}.png")


def keep(
    folder: Path, name: str, about: dict, found: Sequence[dict], page: Callable[[Run], str]
) -> None:
    """The table of these records and its page, which is printed too. The folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    table_file = folder / f"{name}{records.SUFFIX}"
    records.write(table_file, about, found)
    text = page(records.read(table_file))
    (folder / f"{name}.md").write_text(text)
    print(text)


def slug(name: str) -> str:
    """A processor's name, as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def update(section: str, name: str, summary: str, about: str) -> None:
    """The section of a run in docs/benchmarks.md: its summary, and links to its page and plot."""
    path = f"bench/results/{name}"
    link = f"../{path}"  # from docs/
    details = f"Details: [{path}.md]({link}.md)."
    plot = f"![times faster than dense, by sparsity]({link}.png)"
    replace_section(BENCHMARKS, section, f"{summary}\n\n{about} {details}\n\n{plot}")


def markers(section: str) -> tuple[str, str]:
    """The lines before and after a section of a page."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def replace_section(page: Path, section: str, text: str) -> None:
    """Put `text` between its markers."""
    whole, (begin, end) = page.read_text(), markers(section)
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise ValueError(f"{page}: expected {begin} and {end} once each")
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
