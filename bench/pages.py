"""What the pages of all benchmarks share: tables by sparsity, plots, and their places in docs/."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekern.bench import records
from sparsekern.bench.records import Run, select, sparsities_of
from sparsekern.files import write_picture
from sparsekern.terminal import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
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


def update(page: Path, markers: tuple[str, str], name: str, summary: str, about: str) -> None:
    """The section in docs/ of a run: its summary, and links to its page and plot."""
    path = f"bench/results/{name}"
    link = f"../{path}"  # from docs/
    details = f"Details: [{path}.md]({link}.md)."
    plot = f"![times faster than dense, by sparsity]({link}.png)"
    replace_section(page, markers, f"{summary}\n\n{about} {details}\n\n{plot}")


def replace_section(page: Path, markers: tuple[str, str], text: str) -> None:
    """Put `text` between the two markers."""
    whole = page.read_text()
    if any(whole.count(marker) != 1 for marker in markers):
        raise ValueError(f"{page}: expected {' and '.join(markers)} once each")
    begin, end = markers
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
