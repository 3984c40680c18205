"""The vocabulary of cstorch.sparse (Cerebras Model Zoo): names of layers, older forms of a block.

A filter is written for the parameters of the published GPT models. In this project's GPT it finds:

    blocks.N.attention.qkv    model.transformer_decoder.layers.N.self_attn.proj_{q,k,v}_dense_layer
    blocks.N.attention.proj   model.transformer_decoder.layers.N.self_attn.proj_output_dense_layer
    blocks.N.mlp.up           model.transformer_decoder.layers.N.ffn.ffn.0.linear_layer
    blocks.N.mlp.down         model.transformer_decoder.layers.N.ffn.ffn.1.linear_layer

Query, key and value are one layer here: a filter names all three or none.
"""

import re
from collections.abc import Mapping
from typing import Any

from .checks import shown, whole

LAYERS = {
    "attention.qkv": tuple(f"self_attn.proj_{part}_dense_layer" for part in "qkv"),
    "attention.proj": ("self_attn.proj_output_dense_layer",),
    "mlp.up": ("ffn.ffn.0.linear_layer",),
    "mlp.down": ("ffn.ffn.1.linear_layer",),
}
_LAYER = re.compile(rf"(?:.*\.)?blocks\.(\d+)\.({'|'.join(map(re.escape, LAYERS))})")
# What a published config without a filter leaves dense, whatever the case.
DENSE_WORDS = ("embedding", "norm", "lm_head", "pe_helper")


def published_weights(layer: str) -> tuple[str, ...]:
    """The names of this layer's weights in the published GPT models; of most layers none."""
    found = _LAYER.fullmatch(layer)
    if not found:
        return ()
    block, part = found.groups()
    return tuple(f"model.transformer_decoder.layers.{block}.{name}.weight" for name in LAYERS[part])


def is_sparse_by_default(layer: str) -> bool:
    """Whether a published config without a filter makes the layer of this name sparse."""
    return not any(word in layer.lower() for word in DENSE_WORDS)


def flattened(settings: Mapping[str, Any]) -> Any:
    """The blocks of {groups: ...}: their `params` become settings of their own."""
    if len(settings) > 1:
        others = [key for key in settings if key != "groups"]
        raise ValueError(f"groups: expected no other settings beside it, got {shown(others)}")
    groups = settings["groups"]
    if isinstance(groups, Mapping):
        return _merged(groups)
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        raise ValueError(f"groups: expected a list of blocks, got {shown(groups)}")
    return [_merged(group) for group in groups]


def _merged(block: Mapping[str, Any]) -> dict[str, Any]:
    params = block.get("params", {})
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected settings, got {shown(params)}")
    if twice := [key for key in block if key != "params" and key in params]:
        raise ValueError(f"params: expected {shown(twice[0])} once, it is beside them too")
    return {key: value for key, value in block.items() if key != "params"} | dict(params)


def modern(settings: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """A block of any release in today's words; a list where its patterns have settings each."""
    block = dict(settings)
    # Only whether the sparsity is logged, which `train` does anyway.
    summaries = block.pop("add_summaries", False)
    if not isinstance(summaries, bool):
        raise ValueError(f"add_summaries: expected true or false, got {shown(summaries)}")
    _rename(block, "type", "algorithm")
    _split_schedule(block)
    if "schedule" in block and "sparsity" in block and _is_update(block["schedule"]):
        # Until release 2.1 `schedule` said when to update.
        _rename(block, "schedule", "update")
        block["update"] = _update(block["update"])
    _rename(block, "schedule", "sparsity")
    patterns = block.pop("param_name_patterns", None)
    if patterns is None:
        return block
    if "param_filter" in block:
        raise ValueError("sparsity: 'param_name_patterns' and 'param_filter', got both")
    if isinstance(patterns, Mapping):
        return [_with_pattern(block, key, value) for key, value in patterns.items()]
    listed = patterns if isinstance(patterns, list) else [patterns]
    return block | {"param_filter": [_compiled(pattern) for pattern in listed]}


def _rename(block: dict[str, Any], old: str, new: str) -> None:
    if old in block:
        if new in block:
            raise ValueError(f"sparsity: {old!r} and {new!r} are the same setting, got both")
        block[new] = block.pop(old)


def _split_schedule(block: dict[str, Any]) -> None:
    """`sparsity_schedule`, a list of [step, sparsity], as `update` and `sparsity`."""
    pairs = block.pop("sparsity_schedule", None)
    if pairs is None:
        return
    if "sparsity" in block or "update" in block:
        raise ValueError("sparsity: 'sparsity_schedule' says sparsity and update, got both")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise ValueError(f"sparsity_schedule: expected [step, sparsity] pairs, got {shown(pairs)}")
    steps = [whole("sparsity_schedule", step, 0) for step, _ in pairs]
    if steps != sorted(set(steps)):
        raise ValueError(f"sparsity_schedule: expected rising steps, got {shown(steps)}")
    block["update"] = {"steps": steps}
    block["sparsity"] = [level for _, level in pairs]


def _is_update(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(step, int) for step in value)
    if isinstance(value, Mapping):
        return "freq" in value or "steps" in value
    return isinstance(value, int) and value > 1


def _update(value: Any) -> Any:
    if isinstance(value, list):
        return {"steps": value}
    return value if isinstance(value, Mapping) else {"freq": value}


def _with_pattern(block: dict[str, Any], pattern: Any, settings: Any) -> dict[str, Any]:
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(
            f"param_name_patterns: expected settings for {shown(pattern)}, got {shown(settings)}"
        )
    own = dict(settings or {})
    _split_schedule(own)
    return block | own | {"param_filter": [_compiled(pattern)]}


def _compiled(pattern: Any) -> re.Pattern:
    if not isinstance(pattern, str):
        raise ValueError(f"param_name_patterns: expected a pattern, got {shown(pattern)}")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"param_name_patterns: {shown(pattern)} is none: {error}") from error
