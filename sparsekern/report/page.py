"""The sections as one HTML page with its images inside, and as Markdown beside PNG files."""

import base64
import html
import io
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from ..files import atomic_write
from ..terminal import table
from .load import load
from .sections import NOT_YET, Part, Section, sections

TITLE = "sparsekern: measured"
DPI = 110
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
nav a { margin-right: 1rem; }
.of { color: #555; font-size: 0.9rem; overflow-wrap: anywhere; margin: 1.5rem 0 0.3rem; }
"""


def write(results: Path, out: Path) -> list[Path]:
    """report.html, report.md and its figures in the folder `out`."""
    found = sections(load(results))
    pictures = {
        name: _png(part.figure) for name, part in _named_parts(found) if part.figure is not None
    }
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files["report.html"] = as_html(found, pictures).encode()
    files["report.md"] = as_markdown(found).encode()
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content)
    return [out / name for name in ("report.html", "report.md")]


def _named_parts(found: list[Section]) -> Iterator[tuple[str, Part]]:
    for section in found:
        for i, part in enumerate(section.parts):
            yield f"{_anchor(section)}-{i + 1}", part


def _anchor(section: Section) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def as_html(found: list[Section], pictures: dict[str, bytes]) -> str:
    text = html.escape
    links = "".join(f'<a href="#{_anchor(s)}">{text(s.title)}</a>' for s in found)
    body = [f"<h1>{TITLE}</h1>", f"<p>Made on {date.today()}.</p>", f"<nav>{links}</nav>"]
    names = iter(_named_parts(found))
    for section in found:
        body.append(f'<h2 id="{_anchor(section)}">{text(section.title)}</h2>')
        body.append(f"<p>{text(section.text)}</p>")
        if not section.parts:
            body.append(f"<p><em>{NOT_YET}</em></p>")
        for part in section.parts:
            name, _ = next(names)
            body.append(f'<p class="of">{text(part.text)}</p>')
            if name in pictures:
                data = base64.b64encode(pictures[name]).decode()
                alt = text(f"{section.title}. {part.text}", quote=True)
                body.append(f'<img src="data:image/png;base64,{data}" alt="{alt}">')
            if part.rows:
                body.append(_html_table(part))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _html_table(part: Part) -> str:
    def line(cells: list[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    lines = [line(part.header, "th"), *(line(row, "td") for row in part.rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def as_markdown(found: list[Section]) -> str:
    names = iter(_named_parts(found))
    blocks = [f"# {TITLE}"]
    for section in found:
        blocks += [f"## {section.title}", section.text]
        if not section.parts:
            blocks.append(f"*{NOT_YET}*")
        for part in section.parts:
            name, _ = next(names)
            blocks.append(part.text)
            if part.figure is not None:
                blocks.append(f"![{section.title}]({name}.png)")
            if part.rows:
                blocks.append(table(part.header, part.rows))
    return "\n\n".join(blocks) + "\n"
