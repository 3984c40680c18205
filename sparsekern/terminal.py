"""Results and progress as text."""

import sys
import threading
import time
from importlib.util import find_spec
from typing import TextIO

from .extras import require

SILENCE_S = 5.0  # without a bar: a line of progress after so long without one


def table(header: list[str], rows: list[list[object]], left: int = 1) -> str:
    """A Markdown table whose columns also line up as plain text; the first `left` columns are
    left-aligned, the others right-aligned."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: list[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, cells[1:])])


class Progress:
    """Results as lines on stdout, and on stderr how many units are done: a tqdm bar on a terminal,
    a line now and then elsewhere. For a with statement."""

    def __init__(
        self, total: int | None, done: int = 0, unit: str = "step", is_shown: bool = True
    ) -> None:
        """`total`: None where nobody knows."""
        self._total, self._done, self._unit, self._is_shown = total, done, unit, is_shown
        self._bar = None
        self._timer: threading.Timer | None = None
        self._said = time.perf_counter()
        if is_shown and sys.stderr.isatty() and find_spec("tqdm"):
            tqdm = require("tqdm", "gpt").tqdm
            self._bar = tqdm(total=total, initial=done, unit=unit, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._forget()
        if self._bar:
            self._bar.close()

    def advance(self, what: str = "") -> None:
        """One more is done."""
        self._forget()
        self._done += 1
        if self._bar:
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update()
        elif self._is_shown and time.perf_counter() - self._said > SILENCE_S:
            of = "" if self._total is None else f"/{self._total}"
            self._say(f"{self._unit} {self._done}{of}{what and ': '}{what}", sys.stderr)

    def about(self, text: str) -> None:
        """What comes next. It is told where that takes long."""
        self._forget()
        if self._bar:
            self._bar.set_postfix_str(text)
        elif self._is_shown:
            self._timer = threading.Timer(SILENCE_S, self._say, (text, sys.stderr))
            self._timer.daemon = True
            self._timer.start()

    def _forget(self) -> None:
        if self._timer:
            self._timer.cancel()

    def line(self, text: str) -> None:
        self._forget()
        if self._bar:
            self._bar.write(text)
        elif self._is_shown:
            self._say(text, sys.stdout)

    def _say(self, text: str, file: TextIO) -> None:
        print(text, file=file, flush=True)
        self._said = time.perf_counter()
