"""The page of all results: HTML with its images inside, and Markdown beside PNG files."""

import base64
import html
import io
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from ..files import atomic_write
from ..terminal import table
from .load import Result, load, read
from .nearest import choose, this
from .sections import sections
from .summary import picture, sentences
from .view import Panel, Section, View

TITLE = "sparsekern: where sparse weights are faster"
NOTHING = "No results were found."
QUALITY = "Zeros are not free: what they cost in quality is in `docs/quality.md`."
DPI = 200
STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 0.5rem; }
p, li { max-width: 46rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
          gap: 1.2rem 1.6rem; align-items: end; margin: 1rem 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
        gap: 0 2.5rem; }
figure { margin: 0; max-width: 30rem; }
figcaption { font-weight: 600; line-height: 1.3; margin-bottom: 0.3rem; }
img { width: 100%; height: auto; }
.of { color: #595959; font-size: 0.8rem; overflow-wrap: anywhere; }
p.of { margin: 0.2rem 0 0.6rem; line-height: 1.35; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
.sources td, .sources th { text-align: left; overflow-wrap: anywhere; }
"""


def write(folder: Path, own: Path, out: Path) -> list[Path]:
    """report.html, report.md and its figures in the folder `out`: of the results in `folder`, and
    of `own` where it exists, which were measured on this machine."""
    results = load(folder)
    mine = read(own) if own.exists() else None
    results += [mine] if mine else []
    view = View(results, choose(results, this(), mine))
    found, first = sections(view), picture(view)
    pictures = {name: _png(panel.figure) for name, panel in _named(found, first)}
    files = {f"{name}.png": content for name, content in pictures.items()}
    files["report.html"] = as_html(view, found, first, pictures).encode()
    files["report.md"] = as_markdown(view, found, first).encode()
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content)
    return [out / name for name in ("report.html", "report.md")]


def _named(found: Sequence[Section], first: Panel | None) -> Iterator[tuple[str, Panel]]:
    if first:
        yield "summary", first
    for i, section in enumerate(found):
        for j, panel in enumerate(section.panels):
            yield f"section-{i + 1}-{j + 1}", panel


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _files(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(result.path.name for result in results))
    return f"File{'s' * (len(names) > 1)}: {', '.join(names)}"


def _shared(section: Section) -> Sequence[Result]:
    """The files of all its panels, where they have the same; then they are named once."""
    first, *others = [panel.files for panel in section.panels]
    return first if all(_files(files) == _files(first) for files in others) else []


def _sources(results: Sequence[Result]) -> list[list[object]]:
    return [[i, result.path.name, result.about] for i, result in enumerate(results, 1)]


SOURCES = "Every figure is of one of these files"
SOURCES_HEADER = ["", "file", "measured on"]


def as_html(
    view: View, found: Sequence[Section], first: Panel | None, pictures: dict[str, bytes]
) -> str:
    names = iter(_named(found, first))

    def figure(panel: Panel, section: str = "", with_files: bool = True) -> str:
        name, _ = next(names)
        data = base64.b64encode(pictures[name]).decode()
        of = _text(_files(panel.files))
        caption = f"<figcaption>{_text(panel.title)}</figcaption>" if panel.title else ""
        alt = f"{_text(panel.title or section)}. {of}"
        return (
            f'<figure>{caption}<img src="data:image/png;base64,{data}" alt="{alt}">'
            + (f'<p class="of">{of}</p>' if with_files else "")
            + "</figure>"
        )

    body = [f"<h1>{TITLE}</h1>", f"<p>{_text(view.words())} Made on {date.today()}.</p>"]
    numbers = {result.path.name: i for i, result in enumerate(view.results, 1)}
    points = "".join(
        f"<li>{_text(text)} <span class='of'>{', '.join(_links(files, numbers))}</span></li>"
        for text, files in sentences(view)
    )
    points = f"<div><ol>{points}</ol><p>{_text(QUALITY)}</p></div>"
    body.append(f'<div class="pair">{points}{figure(first) if first else ""}</div>')
    if not found:
        body.append(f"<p>{NOTHING}</p>")
    for i, section in enumerate(found):
        body.append(f'<h2 id="section-{i + 1}">{_text(section.title)}</h2>')
        shared = _shared(section)
        text = f"<p>{_text(section.text)}</p>"
        rows = _html_table(section.header, section.rows) if section.rows else ""
        if len(section.panels) == 1:
            panel = figure(section.panels[0], section.title)
            body += [f'<div class="pair"><div>{text}</div>{panel}</div>', rows]
            continue
        body.append(text)
        if shared:
            body.append(f'<p class="of">{_text(_files(shared))}</p>')
        panels = "".join(figure(panel, section.title, not shared) for panel in section.panels)
        body += [f'<div class="panels">{panels}</div>', rows]
    body.append(f"<h2>{SOURCES}</h2>")
    body.append(_html_table(SOURCES_HEADER, _sources(view.results), "sources"))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _links(files: Sequence[Result], numbers: dict[str, int]) -> list[str]:
    """'[3]', with the name on a pointer, to its line in the table of files."""
    names = dict.fromkeys(result.path.name for result in files)
    return [
        f'<a href="#file-{numbers[name]}" title="{_text(name)}">[{numbers[name]}]</a>'
        for name in names
    ]


def _text(text: str) -> str:
    """As HTML; what stands in backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text, quote=True))


def _html_table(header: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        at = f' id="file-{cells[0]}"' if kind and cells[0] else ""
        return f"<tr{at}>{inside}</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"


def as_markdown(view: View, found: Sequence[Section], first: Panel | None) -> str:
    names = iter(_named(found, first))

    def figure(panel: Panel) -> str:
        name, _ = next(names)
        title = f"**{panel.title}.** " if panel.title else ""
        return f"{title}{_files(panel.files)}\n\n![{panel.title}]({name}.png)"

    blocks = [f"# {TITLE}", f"{view.words()} Made on {date.today()}."]
    points = [f"{i}. {text} ({_files(of)})" for i, (text, of) in enumerate(sentences(view), 1)]
    blocks += ["\n".join(points)] * bool(points) + [QUALITY]
    blocks += [figure(first)] if first else []
    blocks += [] if found else [NOTHING]
    for section in found:
        blocks += [f"## {section.title}", section.text, *map(figure, section.panels)]
        if section.rows:
            blocks.append(table(section.header, section.rows))
    blocks.append(f"## {SOURCES}")
    blocks.append(table(SOURCES_HEADER, _sources(view.results), left=3))
    return "\n\n".join(blocks) + "\n"
