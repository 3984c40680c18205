"""Prunes a folder or a name of a transformers model, and saves what every other tool reads."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from ..extras import require
from ..files import as_path, check_writable
from ..nn import densify_, replace_modules
from ..nn.checks import check_model
from ..nn.heads import heads
from ..nn.kinds import refuse_made_anew
from ..sparsity import Magnitude, SparseGPT, Wanda
from ..sparsity.checks import share
from ..sparsity.pruned import PruneReport
from .as_linears import as_linears

METHODS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}
TABLE = "prune.json"
DTYPES = ("float32", "bfloat16", "float16")
ON_THE_HUB = re.compile(r"\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?")
# What belongs to a model beside its weights and what transformers writes itself.
BESIDE = (".json", ".txt", ".md", ".jinja", ".model")


def prune_pretrained(
    source: str | Path,
    out: str | Path,
    sparsity: float,
    *,
    method: str = "magnitude",
    family: str = "unstructured",
    distribution: str = "uniform",
    calibration: str | Path | list[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    prune_again: bool = False,
) -> PruneReport:
    """Prune a model of transformers, and write it and its tokenizer to the folder `out`: dense with
    zeros, as every tool reads it; `sparsekern.accelerate_` takes the zeros.

    Args:
        source: its folder, or its name on the hub: owner/name, where no folder `owner` is here.
        sparsity: share of zeros in the linear layers of its blocks, above 0 and below 1.
        method: "magnitude", "wanda" or "sparsegpt".
        calibration: for the last two: texts, or a file of them with empty lines between (without
            empty lines, one a line).
        dtype: of the weights, by default as in the file.
        prune_again: that weights of which many are zero already may lose more.

    In `out` also prune.json: what was done to each layer. ValueError for a folder `out` that has
    something in it; where anything fails nothing is written.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < share("sparsity", sparsity) < 1:
        raise ValueError(f"sparsity: expected a number above 0 and below 1, got {sparsity}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, this torch sees no GPU, got {device}")
    if distribution == "global" and method != "magnitude":
        raise ValueError(f"distribution: {method} expected uniform or erk, got global")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if (method == "magnitude") != (calibration is None):
        wanted = "none" if method == "magnitude" else "texts, or a file of them"
        raise ValueError(f"calibration: {method} expected {wanted}, got {calibration!r}")
    as_path("source", source, "a folder or a name on the hub")
    target = as_path("out", out).resolve()  # the folder that a link stands for
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"out: expected a new or an empty folder, got {out}")
    check_writable("out", target / TABLE)
    texts = read_texts(calibration) if isinstance(calibration, (str, Path)) else calibration
    model, tokenizer = load(source, dtype, needs_tokenizer=texts is not None)
    settings: dict[str, Any] = {"family": family, "distribution": distribution}
    if texts is not None:
        settings |= {"calibration": texts, "tokenizer": tokenizer, "progress": True}
    algorithm = METHODS[method](sparsity, **settings)
    report = prune_(model.to(device), algorithm, prune_again=prune_again)
    about = {"source": str(source), "method": method, "target": sparsity, "family": family}
    about |= {"distribution": distribution, "texts": texts and len(texts)}
    _save(model, tokenizer, Path(source), target, about | report.to_dict())
    return report


def prune_(model: nn.Module, algorithm: Magnitude, *, prune_again: bool = False) -> PruneReport:
    """Put zeros into the dense weights of a model, whose modules and Parameters stay: also into the
    Conv1D of GPT-2 and the experts of mixtures in transformers, each with the tokens that come to
    it.

    Args:
        algorithm: Magnitude, Wanda or SparseGPT; its `param_filter` may name experts, as in
            "*experts.gate_up_proj*".
        prune_again: that weights of which many are zero already may lose more. These zeros stay.

    The model is as it was where it fails. ValueError for weights that torch.nn.utils.prune masks.
    """
    if not isinstance(algorithm, Magnitude):
        got = type(algorithm).__name__
        raise TypeError(f"algorithm: expected Magnitude, Wanda or SparseGPT, got {got}")
    check_model(model)
    refuse_made_anew(dict(model.named_modules()))
    with as_linears(model):
        linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
        algorithm.apply(model, prune_again=prune_again)
        made = {name: m for name, m in algorithm.layers.items() if name in linears}
        # The others are in no model, and no optimizer shall hold them.
        algorithm.layers = {n: m for n, m in algorithm.layers.items() if n not in made}
        try:
            for name, layer in made.items():
                linears[name].weight.data.copy_(layer.weight.detach().to_dense())
        finally:
            replace_modules(model, lambda name, m: linears[name] if name in made else None)
    layers = algorithm.report.layers  # zeros that were there already count too
    for i, row in enumerate(layers):
        if row.name in made:
            nnz = int(linears[row.name].weight.count_nonzero())
            layers[i] = dataclasses.replace(row, nnz=nnz)
    return algorithm.report


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: with an empty line between two, or else one a line."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"calibration: expected a file of texts in UTF-8, got {path} ({error})"
        ) from error
    parts = text.split("\n\n") if "\n\n" in text.strip() else text.split("\n")
    texts = [part.strip() for part in parts if part.strip()]
    if not texts:
        raise ValueError(f"calibration: expected text, {path} has none")
    return texts


def may_be_on_hub(source: str | Path) -> bool:
    """Whether it has the form of a name there: `name` or `owner/name`, neither with a dot or a dash
    at its ends, as a path has that begins with ./ or ../ ."""
    return isinstance(source, str) and bool(ON_THE_HUB.fullmatch(source))


def refuse_path_to_nothing(source: str | Path) -> None:
    """FileNotFoundError for what is not there and can be no name on the hub, by its form or because
    it begins with a folder that is there."""
    if Path(source).exists():
        return
    if not may_be_on_hub(source):
        raise FileNotFoundError(f"source: {source} does not exist")
    owner, _, name = str(source).rpartition("/")
    if owner and Path(owner).is_dir():
        raise FileNotFoundError(
            f"source: {source} does not exist: there is a folder {owner} here, without {name}; for "
            "a model of this name on the hub start from another folder"
        )


def load(
    source: str | Path, dtype: str | None = None, needs_tokenizer: bool = False
) -> tuple[nn.Module, Any]:
    """The model, dense, of the class that its config names, and its tokenizer (None if it has
    none). ValueError where its file lacks matrices that are no head's, or where transformers has no
    such class and another one would lose some."""
    refuse_path_to_nothing(source)
    transformers = require("transformers", "hf")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source: expected a folder or a name of a transformers model, got {source} ({error})"
        ) from error
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "sparsekern":
        import_module("sparsekern.hf")  # it reads sparse files, and needs a newer transformers
    names = getattr(config, "architectures", None) or ["none"]
    kind = getattr(transformers, names[0], transformers.AutoModel)
    kind_of = getattr(torch, dtype) if dtype else "auto"
    damage = OSError, EOFError, UnpicklingError, import_module("safetensors").SafetensorError
    try:
        model, found = kind.from_pretrained(source, dtype=kind_of, output_loading_info=True)
    except damage as error:
        raise ValueError(f"source: cannot read the weights of {source} ({error})") from error
    if kind is transformers.AutoModel and (lost := sorted(found["unexpected_keys"])):
        raise ValueError(
            f"source: architectures in the config.json of {source} expected a class of this "
            f"transformers, got {names[0]}; {type(model).__name__}, by its model_type, has no "
            f"place for {lost[0]}{', ...' if lost[1:] else ''}"
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # it would be saved without its weights
        raise ValueError(
            f"source: {source} has an adapter of peft beside its model: merge it, and save the "
            "model alone, first"
        )
    outputs, matrices = heads(model), {n for n, p in model.named_parameters() if p.ndim > 1}
    missing = sorted(
        n for n in matrices & set(found["missing_keys"]) if n.rpartition(".")[0] not in outputs
    )
    if missing:
        raise ValueError(
            f"source: {source} lacks {len(missing)} weights, which would be random: {missing[0]}"
            + (", ..." if missing[1:] else "")
        )
    model = densify_(model.eval())
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        if needs_tokenizer:
            raise ValueError(f"tokenizer: {source} has none for the texts ({error})") from error
        tokenizer = None
    return model, tokenizer


def _save(model: Any, tokenizer: Any, source: Path, out: Path, about: dict) -> None:
    """All of it, or nothing: in a folder beside, which then gets the name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        if source.is_dir():
            _copy_beside(source, made)
        model.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        (made / TABLE).write_text(json.dumps(about, indent=1), "utf-8")
        mask = _umask()
        for path in made.rglob("*"):  # safetensors writes for its owner alone
            if path.is_file():
                path.chmod(0o666 & ~mask)
        made.chmod(0o777 & ~mask)
        if out.exists():
            out.rmdir()
        made.replace(out)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _copy_beside(source: Path, made: Path) -> None:
    """Settings of other tools, such as the pooling of sentence-transformers, and all of the layers
    that it has after the model."""
    whole = _after_the_model(source)
    for path in list(source.rglob("*")):
        is_wanted = path.suffix in BESIDE and not path.name.endswith(".index.json")
        if path.is_file() and (is_wanted or not whole.isdisjoint(path.parents)):
            copied = made / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)


def _after_the_model(source: Path) -> set[Path]:
    """Folders of what sentence-transformers runs after the model, which has the folder itself."""
    try:
        rows = json.loads((source / "modules.json").read_text("utf-8"))
        return {source / row["path"] for row in rows} - {source}
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or one of another tool
        return set()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
