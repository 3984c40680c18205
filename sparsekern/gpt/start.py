"""Where a run begins: at random weights, at its own checkpoint, or at the weights of another."""

from collections.abc import Callable
from pathlib import Path

from ..files import check_writable
from .build import build_model
from .checkpoint import CHECKPOINT, about, load_checkpoint
from .config import TrainConfig, check_methods
from .continued import continued
from .data import Text, tokenizer_from_state
from .distributed import Ranks
from .run import History, Run


def begin(
    config: TrainConfig,
    source: dict | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Run:
    """The run of `config`, before its next step. It begins with the weights of `source`, what the
    checkpoint of another run holds; `init_from` names such a file. `tell` is told what takes
    long."""
    path = Path(config.out) / CHECKPOINT
    saved = load_checkpoint(path) if config.resume else None
    if path.exists() and not saved and not source:
        raise ValueError(f"out: {path} exists already; resume it or choose another folder")
    if config.init_from and not saved:
        source = load_checkpoint(config.init_from)
    settings = saved["sparsity"] if saved else config.sparsity_settings()
    check_methods(settings)
    with about(path if saved else None):
        config.make_algorithm(settings)  # mistakes show before any work
    ranks = Ranks(config.parallel, config.device)
    if config.batch % ranks.size:
        raise ValueError(f"batch: expected a multiple of {ranks.size}, got {config.batch}")
    if config.micro_batch and config.batch // ranks.size % config.micro_batch:
        raise ValueError(
            f"micro_batch: expected a divisor of the {config.batch // ranks.size} sequences of "
            f"each process, got {config.micro_batch}"
        )
    if ranks.rank == 0:
        check_writable("out", path)
    text = _text(config, saved or source, tell)
    tell("making the model")
    if saved and saved["data_crc32"] != text.crc32:
        raise ValueError(f"data: {config.data} changed since {path} was written")

    vocab_size = text.tokenizer.vocab_size
    if saved:
        run = Run(config, settings, ranks, text, History.of(saved), saved, path)
        before = saved["config"]["steps"]
        run.lengthened_from = before if config.steps > before else 0
        return run
    if source:
        state, settings = continued(config, settings, source, vocab_size)
        history = History(source=History.of(source).as_source())
        return Run(config, settings, ranks, text, history, state)
    state = {"model": build_model(config, vocab_size).state_dict()}
    return Run(config, settings, ranks, text, History(), state)


def _text(config: TrainConfig, state: dict | None, tell: Callable[[str], None]) -> Text:
    """With the tokenizer of a checkpoint, where there is one."""
    tokenizer = tokenizer_from_state(state["tokenizer"]) if state else None
    return Text(config.data, tokenizer, config.tokenizer, config.vocab_size, tell)
