"""Shapes of models from files: the `config.json` of a Hugging Face model.

What a config does not say follows from its `model_type`: whether the MLP is gated, whether q, k and
v are one matrix. A model type that is not known is refused.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import as_path
from .shapes import GPT_SHAPES, GPTShape, gpt_shape


@dataclass(frozen=True)
class Family:
    """What the model types of a family have in common."""

    is_gated: bool
    is_qkv_one_matrix: bool
    is_rotary: bool
    is_tied: bool  # where the config does not say


PLAIN = Family(is_gated=False, is_qkv_one_matrix=True, is_rotary=False, is_tied=True)
GATED = Family(is_gated=True, is_qkv_one_matrix=False, is_rotary=True, is_tied=False)
ROTARY = Family(is_gated=False, is_qkv_one_matrix=False, is_rotary=True, is_tied=False)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), PLAIN),
    "opt": replace(PLAIN, is_qkv_one_matrix=False),
    "gptj": ROTARY,
    "gpt_neox": replace(ROTARY, is_qkv_one_matrix=True),
    **dict.fromkeys(("phi", "starcoder2"), ROTARY),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"), GATED),
    **dict.fromkeys(("olmo", "olmo2", "olmoe", "stablelm"), GATED),
    **dict.fromkeys(("gemma", "gemma2"), replace(GATED, is_tied=True)),
    "phi3": replace(GATED, is_qkv_one_matrix=True),
}
# The names that a size has in configs.
LAYERS = ("num_hidden_layers", "n_layer")
WIDTH = ("hidden_size", "n_embd")
HEADS = ("num_attention_heads", "n_head")
FFN = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
SEQUENCE = ("max_position_embeddings", "n_positions")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
EXPERTS = ("num_local_experts", "num_experts")
# Keys that change the shape in ways that are not modelled.
REFUSED = ("n_routed_experts", "kv_lora_rank", "shared_expert_intermediate_size", "text_config")


def model_shape(name_or_path: str | Path, sequence: int | None = None) -> GPTShape:
    """A shape by its name, one of GPT_SHAPES, or from a config.json or the folder of one.

    `sequence`: tokens of a training sequence in place of the model's. Raises ValueError, which
    names the key, and FileNotFoundError."""
    path = as_path("model", name_or_path, "a name or a path")
    if str(name_or_path) in GPT_SHAPES:
        shape = gpt_shape(str(name_or_path))
    elif path.suffix == ".json" or path.is_dir():
        shape = _from_config(path / "config.json" if path.is_dir() else path)
    else:
        raise ValueError(
            f"model: expected one of {', '.join(GPT_SHAPES)}, or the config.json of a Hugging Face "
            f"model, got {str(name_or_path)!r}"
        )
    return shape if sequence is None else replace(shape, sequence=sequence)


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"model: {path} does not exist")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"model: {path}: expected an object, got {type(config).__name__}")
    return config


def _from_config(path: Path) -> GPTShape:
    config = _read(path)

    def wrong(key: str, expected: str, got: object) -> ValueError:
        return ValueError(f"model: {path}: {key}: expected {expected}, got {got!r}")

    def size(keys: tuple[str, ...], default: int | None = None) -> int:
        key = next((key for key in keys if config.get(key) is not None), None)
        if key is None:
            if default is None:
                raise wrong(" or ".join(keys), "a number", None)
            return default
        if type(config[key]) is not int or config[key] < 1:
            raise wrong(key, "a whole number above 0", config[key])
        return config[key]

    for key in REFUSED:
        if config.get(key):
            raise wrong(key, "none (such layers are not modelled)", config[key])
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise wrong("model_type", f"one of {', '.join(sorted(FAMILIES))}", kind)
    family, width, heads = FAMILIES[kind], size(WIDTH), size(HEADS)
    experts = size(EXPERTS, 1)
    if experts > 1 and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise wrong("decoder_sparse_step", "1 and no mlp_only_layers: experts in every layer", kind)
    ffn_names = ("moe_intermediate_size", *FFN) if experts > 1 else FFN
    is_multi_query = kind == "gpt_bigcode" and config.get("multi_query", True)
    is_tied = config.get("tie_word_embeddings")
    if is_tied not in (None, True, False):
        raise wrong("tie_word_embeddings", "true or false", is_tied)
    if config.get("word_embed_proj_dim", width) != width:
        found = config["word_embed_proj_dim"]
        raise wrong("word_embed_proj_dim", f"the hidden_size of {width}", found)
    folder = path.resolve().parent.name
    given = {
        "name": folder if path.name == "config.json" else path.stem,
        "layers": size(LAYERS),
        "width": width,
        "heads": heads,
        "ffn": size(ffn_names, None if family.is_gated else 4 * width),
        "vocabulary": size(("vocab_size",)),
        "sequence": size(SEQUENCE),
        "kv_heads": size(KV_HEADS, 1 if is_multi_query else heads),
        "head_size": size(("head_dim",), 0),
        "experts": experts,
        "experts_per_token": size(("num_experts_per_tok",)) if experts > 1 else 1,
        "is_tied": family.is_tied if is_tied is None else is_tied,
    }
    try:
        return GPTShape(
            **given,
            is_gated=family.is_gated,
            is_qkv_one_matrix=family.is_qkv_one_matrix,
            is_rotary=family.is_rotary,
        )
    except ValueError as error:  # sizes that do not go together
        raise ValueError(f"model: {path}: {error}") from None
