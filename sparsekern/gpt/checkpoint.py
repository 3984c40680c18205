"""The file from which a run goes on: written whole or not at all, and checked when it is read.

It holds a digest of each tensor and of all the rest, so that a flipped bit is found. Files of the
format before have none and are taken without.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..files import atomic_write
from ..weights.digests import changed, digests
from ..weights.pickles import has_its_elements, is_out_of_memory, read_pickle

FORMAT = "sparsekern-gpt-3"
FORMATS = ("sparsekern-gpt-2", FORMAT)
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.safetensors"
REST = "all the rest"  # the name of the digest of what is no tensor

KEYS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "sparsity": object,
    "tokenizer": dict,
    "data_crc32": int,
    "model": dict,
    "optimizer": dict,
    "algorithm": dict,
    "losses": list,
    "seconds": list,
    "evaluations": list,
    "flops": (int, float),
    "source": (dict, type(None)),
}
EVALUATION = ("step", "seconds", "loss", "sparsity")
SHAPE = ("layers", "heads", "width", "context", "steps")


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint of a run, from its folder or from itself."""
    path = Path(path)
    return path / CHECKPOINT if path.is_dir() else path


def save_checkpoint(path: Path, state: dict) -> None:
    found = digests(_tensors(state)) | {REST: _digest_of_rest(state)}
    with atomic_write(path) as file:
        torch.save({**state, "format": FORMAT, "digests": found}, file)


def refuse_anothers(path: Path) -> None:
    """ValueError where a run that began without a checkpoint finds one there at its first."""
    if path.exists():
        raise ValueError(
            f"out: {path} was written by another run while this one was at work; choose another "
            "folder"
        )


def refuse_weights(path: Path) -> None:
    """ValueError where a run without a checkpoint yet would write over weights, which may be all
    that was kept of another one."""
    weights = path.with_name(WEIGHTS)
    if not path.exists() and weights.exists():
        raise ValueError(
            f"out: {weights} exists already and would be written over; choose another folder"
        )


def load_checkpoint(path: str | Path, name: str = "checkpoint") -> dict:
    """Read what `save_checkpoint` wrote; ValueError names what is wrong with anything else. `name`:
    the setting that led to the file, for where nothing is there."""
    path = checkpoint_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {path} does not exist")
    if path.suffix == ".safetensors":
        raise ValueError(
            f"checkpoint: expected the folder of a run or its {CHECKPOINT}, got {path}, which "
            "holds weights alone"
        )
    state = read_pickle(path, "checkpoint")
    if not isinstance(state, dict) or state.get("format") not in FORMATS:
        raise ValueError(f"checkpoint: {path} was not written by sparsekern's training")
    with about(path):
        expected = state.pop("digests", None)
        for name, t in _tensors(state).items():
            if not has_its_elements(t):
                raise ValueError(f"{name}: expected a tensor with all its elements")
        if expected is not None or state["format"] == FORMAT:
            _check_digests(state, expected)
        _check_state(state)
    return state


@contextmanager
def about(path: Path | None) -> Iterator[None]:
    """Errors about what a file holds become a ValueError that names the file. None: no file."""
    try:
        yield
    except NotImplementedError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if path is None or str(path) in str(e) or is_out_of_memory(e):
            raise
        text = f"no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())
        raise ValueError(f"checkpoint: {path}: {text}") from e


# What a file holds


def _tensors(value: object, name: str = "") -> dict[str, Tensor]:
    """All tensors in nested dicts, lists and tuples, by their place."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return {}
    prefix = f"{name}." if name else ""
    found: dict[str, Tensor] = {}
    for key, item in items:
        found |= _tensors(item, f"{prefix}{key}")
    return found


def _digest_of_rest(state: dict) -> str:
    def plain(value: object) -> object:
        if isinstance(value, Tensor):
            return "tensor"
        if isinstance(value, dict):
            return [(key, plain(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    rest = {key: item for key, item in state.items() if key != "format"}
    return hashlib.sha256(repr(plain(rest)).encode()).hexdigest()


def _check_digests(state: dict, expected: object) -> None:
    if not isinstance(expected, dict):
        raise ValueError("it has no digests")
    if expected.get(REST) != _digest_of_rest(state):
        raise ValueError("it is damaged, what is beside its tensors does not have its digest")
    of_tensors = {name: of for name, of in expected.items() if name != REST}
    if name := changed(_tensors(state), of_tensors):
        raise ValueError(f"{name} is damaged, it does not have its digest")


def _check_state(state: dict) -> None:
    for name, kind in KEYS.items():
        if name not in state:
            raise ValueError(f"it has no {name}")
        _check(isinstance(state[name], kind), name, _named(kind), state[name])
    config, losses, seconds = state["config"], state["losses"], state["seconds"]
    for name in SHAPE:
        value = config.get(name)
        _check(type(value) is int and value > 0, f"config: {name}", "a number above 0", value)
    for name in ("losses", "seconds"):
        wrong = [v for v in state[name] if not _is_finite(v)]
        _check(not wrong, name, "finite numbers", wrong[:1])
    _check(_is_finite(state["flops"]), "flops", "a finite number", state["flops"])
    _check(len(losses) == len(seconds), "seconds", f"one for each of {len(losses)} losses", seconds)
    _check(
        len(losses) <= config["steps"],
        "losses",
        f"at most {config['steps']}, one a step",
        f"{len(losses)} of them",
    )
    for e in state["evaluations"]:
        is_one = isinstance(e, dict) and all(_is_finite(e.get(name)) for name in EVALUATION)
        _check(is_one, "evaluations", f"numbers for {', '.join(EVALUATION)}", e)
    for name, t in state["model"].items():
        _check(isinstance(name, str) and isinstance(t, Tensor), f"model: {name}", "a tensor", t)
    check_shapes(config, {name: tuple(t.shape) for name, t in state["model"].items()})
    for part in ("model", "optimizer"):
        for name, t in _tensors(state[part], part).items():
            if t.is_floating_point() and not t.isfinite().all():
                count = int((~t.isfinite()).sum())
                raise ValueError(f"{name}: expected finite numbers, {count} are not")


def check_shapes(config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """ValueError unless these tensors are a model of that config: before anything of that size is
    made."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    wanted = {str(i) for i in range(min(config["layers"], len(blocks) + 1))}
    if blocks != wanted:
        raise ValueError(
            f"config: layers: expected the {len(blocks)} of its tensors, got {config['layers']}"
        )
    for name, rows in (("wte.weight", None), ("wpe.weight", config["context"])):
        shape = shapes.get(name, ())
        if len(shape) != 2 or shape[1] != config["width"] or rows not in (None, shape[0]):
            wanted = f"[{'vocabulary' if rows is None else rows}, {config['width']}]"
            raise ValueError(
                f"{name}: expected shape {wanted} by its context and width, got {list(shape)}"
            )


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {str(got)[:80]}")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
