"""The sparsity block of a file: one of our own, or a whole published training config."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..extras import require
from ..files import as_path
from .checks import nearest, shown
from .config import ALGORITHMS
from .schedules import SCHEDULES

# Sections of published training configs, new and old. A file that has them is no block itself.
SECTIONS = frozenset(
    "trainer model optimizer runconfig train_input eval_input inference_input wandb".split()
)
# Where such a file may have the block.
PATHS = (
    ("trainer", "init", "sparsity"),
    ("sparsity",),
    ("model", "sparsity"),
    ("optimizer", "sparsity"),
)
_RECIPE = re.compile(r"\b\w*(Pruning|SparseGPT|Wanda|Quantization|GPTQ|EpochRange)\w*Modifier\b")
_RECIPE_KEYS = frozenset(
    "sparsity_config quantization_config compression_config modifiers pruning_modifiers "
    "training_modifiers oneshot_modifiers sparsity_stage oneshot_stage test_stage".split()
)


def load_config(path: str | Path) -> Any:
    """The settings in a .json or YAML file, for `configure`: all of it, or the block where
    published training configs have it. None where such a file has no block: a dense model."""
    path = as_path("path", path)
    if not path.is_file():
        wrong = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"sparsity config: {path} {wrong}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"sparsity config: {path} is not text in UTF-8: {error}") from error
    _refuse_recipe(path, text)
    settings = _parsed(path, text)
    if settings is None:
        raise ValueError(f"sparsity config: {path} is empty")
    if isinstance(settings, Mapping) and _RECIPE_KEYS & settings.keys():
        _raise_recipe(path, shown(sorted(_RECIPE_KEYS & settings.keys())))
    return _block(path, settings)


def _parsed(path: Path, text: str) -> Any:
    kind = "JSON" if path.suffix == ".json" else "YAML"
    parse = _json if kind == "JSON" else _yaml
    try:
        return parse(text)
    except RecursionError:
        raise ValueError(f"sparsity config: {path} is nested too deep") from None
    except ValueError as error:
        where = f"sparsity config: {path} is not {kind}"
        raise ValueError(f"{where}: {_shortened(str(error))}") from error


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _yaml(text: str) -> Any:
    yaml: Any = require("yaml", "gpt")

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML would take the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = (key for key, _ in node.value if key.tag == "tag:yaml.org,2002:str")
            _once([(key.value, None) for key in keys])
            return node

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # What yaml itself raises for values such as `!!int ""`.
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {shown(key)} stands twice")
        seen[key] = value
    return seen


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _refuse_recipe(path: Path, text: str) -> None:
    found = _RECIPE.search(re.sub("#.*", "", text))
    if found:
        _raise_recipe(path, found.group())


def _raise_recipe(path: Path, what: str) -> None:
    raise ValueError(
        f"sparsity config: {path} is a recipe or config of SparseML, llm-compressor or "
        f"compressed-tensors ({what}), which are not read; expected a block such as "
        "{algorithm: gmp, sparsity: {type: cubic, init: 0.0, final: 0.75, steps: 1000}, "
        "update: {freq: 100}}, or use `sparsekern prune` for a trained model"
    )


def _block(path: Path, settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    is_file = bool(SECTIONS & settings.keys())
    found = {}
    for keys in PATHS:
        is_there, block = _at(path, settings, keys)
        if is_there and (is_file or not _is_level(block)):
            found[".".join(keys)] = block
    if len(found) > 1:
        raise ValueError(
            f"sparsity config: {path}: expected one block, there are {' and '.join(found)}"
        )
    if found and not is_file and (stray := [key for key in settings if _is_setting(key)]):
        raise ValueError(
            f"sparsity config: {path}: {shown(stray[0])} stands beside the block 'sparsity', "
            "expected it inside of it"
        )
    return next(iter(found.values()), None if is_file else settings)


def _is_setting(key: Any) -> bool:
    """Whether a key beside the block was meant to be inside of it; others hold anchors."""
    known = {"algorithm", "type", "groups", "schedule", "param_name_patterns"}
    known |= {part.name for kind in ALGORITHMS.values() for part in fields(kind) if part.init}
    return key != "sparsity" and (key in known or bool(nearest(key, known, 0.85)))


def _at(path: Path, settings: Mapping, keys: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether there is something at these keys, and what. ValueError for a misspelt `sparsity`."""
    part: Any = settings
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth]) or "the file"
        if not isinstance(part, Mapping):
            if keys[0] != "trainer":
                return False, None
            raise ValueError(
                f"sparsity config: {path}: expected settings in {where}, got {shown(part)}"
            )
        if key not in part:
            for near in part if key == "sparsity" and SECTIONS & settings.keys() else ():
                if meant := nearest(near, [key], 0.85):
                    raise ValueError(f"sparsity config: {path} has {shown(near)} in {where}{meant}")
            return False, None
        part = part[key]
    return True, part


def _is_level(value: Any) -> bool:
    """Whether it is a sparsity or a schedule of one, and no block."""
    if isinstance(value, list):
        return not any(isinstance(part, (Mapping, list)) for part in value)
    if not isinstance(value, Mapping):
        return True
    kind = value.get("type")
    return isinstance(kind, str) and kind.lower() in SCHEDULES
