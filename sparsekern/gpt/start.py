"""Where a run begins: at random weights, at its own checkpoint, or at the weights of another."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .build import build_model
from .checkpoint import CHECKPOINT, about, load_checkpoint, refuse_weights
from .config import TrainConfig, check_methods
from .continued import continued, loses_at_random
from .data import Text, tokenizer_from_state
from .distributed import Ranks
from .run import History, Run

OF_A_PROCESS = ("data", "init_from", "out", "sparsity_config", "threads")  # of a config


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
    refuse_weights(path)
    if config.init_from and not saved:
        source = load_checkpoint(config.init_from, "init_from")
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
    text = _text(config, saved or source, tell)
    tell("making the model")
    if saved and not text.is_of(saved):
        raise ValueError(
            f"data: {config.data} is another text, or changed since {path} was written"
        )

    vocab_size = text.tokenizer.vocab_size
    history = History.of(saved) if saved else History()
    if source and not saved:
        history.source = History.of(source).as_source()
    ranks.check_same(_same_everywhere(config, settings, text, history))
    if saved:
        run = Run(config, settings, ranks, text, history, saved, path)
        before = saved["config"]["steps"]
        run.lengthened_from = before if config.steps > before else 0
        return run
    if source:
        is_random = loses_at_random(config, settings, source)
        state, settings = continued(config, settings, source, vocab_size)
        run = Run(config, settings, ranks, text, history, state)
        run.loses_at_random = is_random
        return run
    state = {"model": build_model(config, vocab_size).state_dict()}
    return Run(config, settings, ranks, text, history, state)


def _same_everywhere(
    config: TrainConfig, settings: object, text: Text, history: History
) -> dict[str, object]:
    """What must be the same in all processes. Paths may differ, what they lead to may not."""
    mine = {name: value for name, value in asdict(config).items() if name not in OF_A_PROCESS}
    return mine | {
        "sparsity_config": settings,
        "data (CRC-32)": tuple(text.digests.values()),
        "checkpoint (steps, last loss)": (len(history.losses), history.losses[-1:]),
        "init_from (its cost)": history.source,
    }


def _text(config: TrainConfig, state: dict | None, tell: Callable[[str], None]) -> Text:
    """With the tokenizer of a checkpoint, where there is one."""
    tokenizer = tokenizer_from_state(state["tokenizer"]) if state else None
    return Text(config.data, tokenizer, config.tokenizer, config.vocab_size, tell)
