"""python -m sparsekern prune: a run of `train`, or a model of transformers."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..gpt.checkpoint import checkpoint_file
from ..gpt.prune import PruneConfig, prune
from ..models.prune import TABLE, may_be_on_hub, prune_pretrained, refuse_path_to_nothing
from ..report import demo as demo_report

OF_MODELS = {"target": "sparsity"}  # flags of a run that say the same of a model
FOR_MODELS = ("source", "method", "family", "distribution", "calibration", "device", "dtype", "out")
FOR_MODELS += ("prune_again",)


def run_prune(**given: Any) -> None:
    try:
        _run_prune(**given)
    except ValueError as error:
        told = str(error).replace("give prune_again=True", "give --prune-again")
        raise ValueError(told) from error


def _run_prune(**given: Any) -> None:
    if is_pretrained(given.get("source", "")):
        _prune_model(**given)
        return
    rows = prune(PruneConfig(**given))
    print(f"\n{demo_report.prune_section(rows)}")


def is_pretrained(source: str) -> bool:
    """Whether it is a folder of a transformers model, or may be a name on the hub."""
    path = Path(source)
    if path.is_dir():
        return (path / "config.json").exists() and not checkpoint_file(path).exists()
    if not may_be_on_hub(source) or path.exists():
        return False
    refuse_path_to_nothing(source)
    return find_spec("transformers") is not None


def _prune_model(**given: Any) -> None:
    threads = given.pop("threads", 0)
    source = given["source"]
    is_here = Path(source).exists()
    what = "is a model" if is_here else "is no folder here, so it is taken for the name of a model"
    for name in given.keys() - {*FOR_MODELS, *OF_MODELS}:
        raise ValueError(
            f"{name}: for runs of `sparsekern train`, and {source} {what} of transformers, which "
            "is pruned at once"
        )
    if threads:
        torch.set_num_threads(threads)
    settings = {OF_MODELS.get(name, name): value for name, value in given.items()}
    settings = {"out": PruneConfig.out} | settings
    if isinstance(settings.get("calibration"), int):
        raise ValueError(
            f"calibration: a model expected a file of texts, got {settings['calibration']}"
        )
    if "sparsity" not in settings:
        raise ValueError(
            f"sparsity: {source} {what} of transformers, which expected one, as --sparsity 0.5, "
            "got none"
        )
    if not is_here:  # asking may take long
        about = "is no file here: looking for it in the cache of the hub and at huggingface.co"
        print(f"source: {source} {about}", file=sys.stderr)
    report = prune_pretrained(**settings)
    print(f"{report}\n\n{settings['out']} has the model, dense with zeros, and {TABLE}")
