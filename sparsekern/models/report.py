"""What accelerate_ found and did, layer by layer: as text, JSON and HTML."""

import html
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from ..terminal import table

Shapes = tuple[tuple[int, ...], ...]

STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 90rem; margin: 1.5rem auto;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 0.8rem 0; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.left th:nth-child(2), .left td:nth-child(2) { text-align: left; }
"""


@dataclass
class Layer:
    """A layer with zeros that was measured, or that the example did not call.

    Times are seconds in one run of the example and of the new tokens after it, in the model; of
    what was not tried there they follow from calls of the layer alone."""

    name: str
    kind: str  # class of the module that was there
    shapes: Shapes  # [N, K] of its matrices, or [E, N, K]
    sparsity: float
    tokens: dict[int, int] = field(default_factory=dict)  # M -> calls with about so many
    kernels: dict[int, str] = field(default_factory=dict)  # M -> the row that serves it
    bytes_before: int = 0
    bytes_after: int = 0  # with what kernels derive from the pattern
    before_s: float = 0.0
    dense_s: float = 0.0  # of a plain dense layer, where before_s is of one with a mask
    sparse_s: float = 0.0
    is_sparse: bool = False
    reason: str = ""  # why it stayed dense

    @property
    def gain(self) -> float:
        """How many times as fast as the faster dense form the sparse one is; NaN of a layer that
        was never called."""
        if not self.sparse_s:
            return math.nan
        return min(self.before_s, self.dense_s) / self.sparse_s

    @property
    def after_s(self) -> float:
        return self.sparse_s if self.is_sparse else self.dense_s


@dataclass
class Skipped:
    """A module with a matrix that was not looked at further."""

    name: str
    kind: str
    shapes: Shapes
    sparsity: float
    reason: str


@dataclass
class Report:
    """What `accelerate_` did with a model.

    `before_s` and `after_s` are seconds of one run of the whole model with the example, measured
    before and after the conversion; `expected_after_s` is what the parts add up to: before_s less
    what the layers and the rest of the model gained, timed with clocks between them. The rest gains
    where fewer weights pass through the cache. `output_error` is |after - before| / |before| of the
    output, or None where nothing is sparse or `not_compared` says why there is none.
    """

    layers: list[Layer]
    skipped: list[Skipped]
    device: str
    threads: int
    new_tokens: int
    before_s: float = 0.0
    after_s: float = 0.0
    rest_gained_s: float = 0.0
    seconds: float = 0.0  # that accelerate_ itself took
    output_error: float | None = None
    not_compared: str = ""

    @property
    def sparse(self) -> list[Layer]:
        """The layers that are sparse now."""
        return [layer for layer in self.layers if layer.is_sparse]

    @property
    def gained_s(self) -> float:
        """Seconds less in all parts: of the example, and of the new tokens after it."""
        return self.rest_gained_s + sum(x.before_s - x.after_s for x in self.layers)

    @property
    def expected_after_s(self) -> float:
        return self.before_s - self.gained_s

    def summary(self) -> str:
        """Sentences on the whole."""
        total = sum(layer.before_s for layer in self.layers)
        parts = [
            f"{len(self.sparse)} of {len(self.layers)} layers with zeros are sparse now; "
            f"{len(self.skipped)} other modules with a matrix were left as they are."
        ]
        if total:
            after = sum(layer.after_s for layer in self.layers)
            small, large = (
                sum(getattr(layer, name) for layer in self.layers)
                for name in ("bytes_after", "bytes_before")
            )
            parts.append(
                f"These layers: {_ms(total)} before, {_ms(after)} after, {total / after:.2f} times "
                f"as fast; {large / 1e6:,.1f} MB before, {small / 1e6:,.1f} after."
            )
        parts.append(
            f"The whole model, measured: {_ms(self.before_s)} before, {_ms(self.after_s)} after "
            f"({self.before_s / max(self.after_s, 1e-12):.2f} times as fast); its parts add up to "
            f"{_ms(self.expected_after_s)}."
        )
        if self.output_error is not None:
            parts.append(f"Relative change of the output: {self.output_error:.1e}.")
        if self.device.startswith("cuda"):
            parts.append("A GPU has layouts for few tokens that are faster: sparsekern.nn.pack_.")
        if self.not_compared:
            parts.append(f"The output was not compared: {self.not_compared}.")
        where = f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}"
        new = f" and {self.new_tokens} new tokens, one at a time" * bool(self.new_tokens)
        parts.append(
            f"Times of the example{new} on {where}; accelerate_ took {self.seconds:.1f} s."
        )
        return " ".join(parts)

    def __str__(self) -> str:
        """The summary and a table; layers whose names differ in numbers alone share a line."""
        alike: dict[tuple, list[Layer]] = defaultdict(list)
        for layer in self.layers:
            key = _pattern(layer.name), layer.kind, layer.is_sparse, layer.reason, layer.shapes
            alike[key].append(layer)
        lines = [table(HEADER, [_row(found) for found in alike.values()])]
        left: dict[tuple, list[Skipped]] = defaultdict(list)
        for each in self.skipped:
            left[_pattern(each.name), each.kind, each.reason].append(each)
        if left:
            lines.append(table(SKIPPED_HEADER, [_skipped_row(found) for found in left.values()], 2))
        return "\n\n".join([self.summary(), *lines])

    def to_json(self) -> str:
        """All of it: a JSON object with `layers` and `skipped`, times in seconds."""
        about = asdict(self) | {"expected_after_s": self.expected_after_s}
        if self.output_error is not None and not math.isfinite(self.output_error):
            about["output_error"] = str(self.output_error)  # JSON has no such number
        for layer, own in zip(about["layers"], self.layers, strict=True):
            layer["after_s"] = own.after_s
        return json.dumps(about, indent=1)

    def to_html(self) -> str:
        """A page of its own, with a line for each layer."""
        parts = ["<h1>Layers made sparse</h1>", f"<p>{html.escape(self.summary())}</p>"]
        parts.append(_html_table(HEADER, [_row([layer]) for layer in self.layers]))
        if self.skipped:
            parts.append("<h2>Left as they are</h2>")
            left = _html_table(SKIPPED_HEADER, [_skipped_row([s]) for s in self.skipped])
            parts.append(f'<div class="left">{left}</div>')
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>sparsekern: layers made sparse</title>\n<style>{STYLE}</style>\n</head>\n"
            "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
        )


HEADER = ["layer", "N x K", "zeros", "tokens", "sparse is", "ms before", "after", "MB before"]
HEADER += ["after", "now"]
SKIPPED_HEADER = ["left as it is", "why", "N x K", "zeros"]


def seen(skipped: Iterable[Skipped]) -> str:
    """The kinds of modules there are, with their share of zeros and why none will do."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in skipped:
        found[each.kind, each.reason].append(each.sparsity)
    return "; ".join(
        f"{len(zeros)} {kind} ({_span(zeros)} zeros): {reason}"
        for (kind, reason), zeros in found.items()
    )


def _row(layers: Sequence[Layer]) -> list[object]:
    before, after = (sum(getattr(x, n) for x in layers) for n in ("before_s", "after_s"))
    bytes_before, bytes_after = (
        sum(getattr(x, n) for x in layers) for n in ("bytes_before", "bytes_after")
    )
    tokens: Counter[int] = Counter()
    for layer in layers:
        tokens.update(layer.tokens)
    names = sorted({name for layer in layers for name in layer.kernels.values()})
    now = f"sparse: {', '.join(names)}" if layers[0].is_sparse else f"dense: {layers[0].reason}"
    return [
        _name(layers[0].name, len(layers)),
        _shapes(layers[0].shapes),
        _span([layer.sparsity for layer in layers]),
        " ".join(map(str, sorted(tokens))) or "-",
        _ratios([layer.gain for layer in layers if layer.sparse_s]),
        f"{1e3 * before:.3f}" if before else "-",
        f"{1e3 * after:.3f}" if before else "-",
        f"{bytes_before / 1e6:.2f}",
        f"{bytes_after / 1e6:.2f}",
        now,
    ]


def _skipped_row(skipped: Sequence[Skipped]) -> list[object]:
    first = skipped[0]
    name = f"{_name(first.name, len(skipped))} ({first.kind})"
    zeros = _span([each.sparsity for each in skipped])
    return [name, first.reason, _shapes(first.shapes), zeros]


def _name(name: str, count: int) -> str:
    name = name if name.isprintable() else ascii(name)
    return (name or "the model itself") if count == 1 else f"{count} x {_pattern(name)}"


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _shapes(shapes: Shapes) -> str:
    found = [" x ".join(map(str, shape)) for shape in shapes[:3]]
    return ", ".join(found + ["..."] * (len(shapes) > 3)) or "-"


def _span(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low}-{high} %"


def _ratios(gains: Sequence[float]) -> str:
    if not gains:
        return "-"
    low, high = (f"{gain:.2f}" for gain in (min(gains), max(gains)))
    return f"{low} x" if low == high else f"{low}-{high} x"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if math.isfinite(seconds) else "?"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    lines = [line(header, "th"), *(line(row, "td") for row in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
