"""The sections of README and docs/benchmarks.md that the benchmarks write."""

from pathlib import Path


def replace_section(page: Path, markers: tuple[str, str], text: str) -> None:
    """Put `text` between the two markers."""
    whole = page.read_text()
    if any(whole.count(marker) != 1 for marker in markers):
        raise ValueError(f"{page}: expected {' and '.join(markers)} once each")
    begin, end = markers
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def details(name: str) -> str:
    """A link to the page of a result, and its plot."""
    path = f"bench/results/{name}"
    link = f"../{path}"  # from docs/
    return (
        f"Details: [{path}.md]({link}.md).\n\n![times faster than dense, by sparsity]({link}.png)"
    )
