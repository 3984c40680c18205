"""The sections of README that the benchmarks write."""

from pathlib import Path


def replace_section(readme: Path, markers: tuple[str, str], text: str) -> None:
    """Put `text` between the two markers."""
    whole = readme.read_text()
    if any(whole.count(marker) != 1 for marker in markers):
        raise ValueError(f"{readme}: expected {' and '.join(markers)} once each")
    begin, end = markers
    before, rest = whole.split(begin)
    readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def details(name: str) -> str:
    """A link to the page of a result, and its plot."""
    path = f"bench/results/{name}"
    return (
        f"Details: [{path}.md]({path}.md).\n\n![times faster than dense, by sparsity]({path}.png)"
    )
