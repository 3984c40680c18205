"""What the pages show works: their programs run, their commands parse, their links lead somewhere.

A Python block that cannot run here has a comment above it, which this file lists as skipped:

    <!-- not run: needs a GPU -->
"""

import re
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import RESULTS

from sparsekern import cli, sparsity

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs/guide").glob("*.md"))
PAGES = [README, *GUIDES]
NO_PAGES = {".git", ".venv", "build", "out", "node_modules"}
EVERY_PAGE = sorted(
    p for p in ROOT.rglob("*.md") if not NO_PAGES & set(p.relative_to(ROOT).parts[:-1])
)

REASONS = ("needs a GPU", "needs files", "needs another library", "takes long", "one part of it")
MOST_WORDS = 450  # of README before its benchmarks
MOST_NUMBERS = 8  # in 100 words
FIRST_CODE = 150  # words before it


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    not_run: str  # the reason, or ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    pattern = r"(?:<!-- not run: (?P<why>.*?) -->\n+)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$"
    found = [
        Block(page, text[: m.start("body")].count("\n") + 1, m["kind"], m["body"], m["why"] or "")
        for m in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if block.language in languages]


def prose(text: str) -> str:
    """Without code, comments and the targets of links."""
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", " ", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", " ", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "] ", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if block.not_run:
            continue
        code = "\n" * block.line + block.text  # errors name the line of the page
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize(
    "block", [b for p in PAGES for b in blocks(p, "python") if b.not_run], ids=str
)
def test_blocks_that_do_not_run_are_python_and_say_why(block):
    compile(block.text, str(block.page), "exec")
    assert block.not_run.startswith(REASONS)
    pytest.skip(block.not_run)


def command_lines(page: Path) -> list[str]:
    """Those of `python -m sparsekern`, also behind torchrun and in indented lines."""
    text = page.read_text()
    shown = [block.text for block in blocks(page, "sh", "bash", "console", "")]
    shown += re.findall(r"^    +\S.*$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    lines = "\n".join(shown).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun)\b.* -m sparsekern\b", line)]


@pytest.mark.parametrize(
    "line", sorted({line for page in EVERY_PAGE for line in command_lines(page)})
)
def test_command_lines_parse(line, monkeypatch):
    monkeypatch.setattr(cli, "guarded", lambda run: 0)
    words = shlex.split(line, comments=True)
    words = words[words.index("sparsekern") + 1 :]
    end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
    assert cli.main(words[:end]) == 0


@pytest.mark.parametrize("block", [b for p in PAGES for b in blocks(p, "yaml")], ids=str)
def test_yaml_blocks_are_read(block, tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "sparsity.yaml"
    path.write_text(block.text)
    sparsity.configure(sparsity.load_config(path))


def test_all_algorithms_have_a_block():
    text = (ROOT / "docs/guide/train.md").read_text()
    missing = [name for name in sparsity.ALGORITHMS if f"`{name}`" not in text]
    assert not missing


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: set[str] = set()
    code = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.*?) *#*$", code, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        count = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{count}" if count else slug)
    return found | set(re.findall(r'<a (?:name|id)="([^"]+)"', code))


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.is_relative_to(RESULTS) and not RESULTS.is_dir():
            continue  # a source distribution leaves them out
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in slugs(file)):
            wrong.append(target)
    assert not wrong


def test_slugs_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# What `explain` says\n## Why is it dense here?\n## A, B\n## A, B\n")
    assert slugs(page) == {"what-explain-says", "why-is-it-dense-here", "a-b", "a-b-1"}


def test_readme_is_grasped_in_two_minutes():
    text = README.read_text()
    before = re.split(r"^<!-- bench: begin -->|^## Benchmarks", text, maxsplit=1, flags=re.M)[0]
    words = prose(before).split()
    numbers = re.findall(r"(?<![\w.])\d[\d.,]*", prose(before))
    until_code = prose(re.split(r"^(?:```|    \S)", text, maxsplit=1, flags=re.M)[0]).split()
    assert len(until_code) <= FIRST_CODE
    assert len(words) <= MOST_WORDS
    assert len(numbers) <= MOST_NUMBERS * len(words) / 100
