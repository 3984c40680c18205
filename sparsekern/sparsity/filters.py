"""Which layers an algorithm takes."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from .checks import shown
from .published import published_weights

Part = str | re.Pattern


def filter_parts(param_filter: Any) -> list[Part] | None:
    """The parts of a `param_filter`: globs, and patterns that are searched for."""
    if param_filter is None:
        return None
    if isinstance(param_filter, Part):
        return [param_filter]
    parts = list(param_filter) if isinstance(param_filter, (list, tuple, set)) else []
    if not parts or not all(isinstance(part, Part) for part in parts):
        raise ValueError(
            f"param_filter: expected a glob or a list of globs, got {shown(param_filter)}"
        )
    return parts


def matching(parts: Sequence[Part], layers: Iterable[str]) -> set[str]:
    """The layers whose names or whose weights' names match a part. ValueError for a part that
    matches none, and for a layer of which only some published weights match."""
    layers, found = list(layers), set()
    seen: dict[str, set[str]] = {layer: set() for layer in layers}  # published names that match
    for part in parts:
        own = {layer for layer in layers if _any(part, (layer, f"{layer}.weight"))}
        by_published = set()
        for layer in layers:
            names = {name for name in published_weights(layer) if _matches_published(part, name)}
            seen[layer] |= names
            if names:
                by_published.add(layer)
        if not own and not by_published:
            raise ValueError(
                f"param_filter: {_text(part)} matches no layer; there are: "
                f"{', '.join(layers) or 'none'}"
            )
        found |= own
    for layer, names in seen.items():
        if layer in found or not names:
            continue
        missing = [name for name in published_weights(layer) if name not in names]
        if missing:
            raise ValueError(
                f"param_filter: {layer} is {len(names) + len(missing)} published layers in one; "
                f"expected all or none of them, got none that matches {', '.join(missing)}"
            )
        found.add(layer)
    return found


def _matches_published(part: Part, name: str) -> bool:
    bare = name.removeprefix("model.")
    return _any(part, (name, bare, name.removesuffix(".weight"), bare.removesuffix(".weight")))


def _any(part: Part, names: Iterable[str]) -> bool:
    if isinstance(part, re.Pattern):
        return any(part.search(name) for name in names)
    return any(fnmatchcase(name, part) for name in names)


def _text(part: Part) -> str:
    return shown(part.pattern if isinstance(part, re.Pattern) else part)
