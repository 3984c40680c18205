"""The settings of train and prune: each field is a command-line flag. Imports no torch."""

from dataclasses import dataclass, field

TOKENIZERS = ("bytes", "bpe")
PARALLEL = ("none", "ddp", "fsdp")
PRUNE_METHODS = ("magnitude", "wanda", "sparsegpt")
DTYPES = ("float32", "bfloat16", "float8")
FAMILIES = ("unstructured", "two-way")
PRESET_NAMES = ("gpt2-small", "gpt3-xl", "gpt3-6.7b", "llama-like")


def flag(default: object, text: str, **argument: object) -> object:
    """A field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class TrainFlags:
    data: str = flag(
        "stdlib", "shakespeare, stdlib, packages (what is installed), a file or a folder"
    )
    tokenizer: str = flag("bytes", "how text becomes tokens", choices=TOKENIZERS)
    vocab_size: int = flag(2048, "vocabulary of the bpe tokenizer")
    sparsity: float = flag(0.0, "share of zeros in the linear layers of the blocks, 0 = dense")
    algorithm: str = flag(
        "static", "how the zeros are chosen: static, gmp, set, rigl, iterative, magnitude"
    )
    init_method: str = flag(
        "random", "which weights stay at first", choices=("random", "magnitude")
    )
    distribution: str = flag(
        "uniform", "of the zeros over the layers", choices=("uniform", "erk", "global")
    )
    family: str = flag(
        "unstructured",
        "of masks: any, or at most 2 of 4 neighbours along both axes",
        choices=FAMILIES,
    )
    sparsity_config: str = flag("", "YAML or JSON file with a `sparsity` block, for all the rest")
    init_from: str = flag("", "start from the weights of this run (its folder or checkpoint.pt)")
    dense: bool = flag(False, "with --init-from: all weights dense, the absent ones from zero")
    optimizer_state: str = flag("reset", "with --init-from", choices=("reset", "keep"))
    layers: int = flag(4, "number of blocks")
    heads: int = flag(8, "attention heads")
    width: int = flag(512, "size of the residual stream")
    context: int = flag(128, "tokens that the model sees")
    batch: int = flag(8, "sequences per step, of all processes together")
    micro_batch: int = flag(
        0, "sequences at a time, whose gradients are added up, 0 = all that a process has"
    )
    steps: int = flag(200, "optimizer steps in all")
    lr: float = flag(6e-4, "highest learning rate")
    seed: int = flag(0, "fixes weights, zeros and batches")
    threads: int = flag(0, "CPU threads, 0 = torch's own choice")
    device: str = flag("cpu", "cpu or cuda")
    dtype: str = flag(
        "float32",
        "of the products; weights are float32. float8: E4M3 in the blocks, on a GPU, dense or of "
        "family two-way, the rest bfloat16",
        choices=DTYPES,
    )
    parallel: str = flag("none", "under torchrun", choices=PARALLEL)
    out: str = flag("out/train", "folder for checkpoint.pt and metrics.json")
    resume: bool = flag(
        False, "continue from OUT/checkpoint.pt; other flags come from there; more steps lengthen"
    )
    eval_every: int = flag(50, "steps between evaluations")
    eval_batches: int = flag(4, "batches of an evaluation")
    checkpoint_every: int = flag(50, "steps between checkpoints")


def percents(share: float) -> str:
    """What to ask of who gave percents for a share."""
    return f"; did you mean {share / 100:g}?" if 1 < share < 100 else ""


def check_sparsity(value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"sparsity: expected at least 0 and below 1, got {value}{percents(value)}")


def count_or_file(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdigit() else text


@dataclass(frozen=True)
class PruneFlags:
    source: str = flag(
        "",
        "what to prune: a training run (its folder or checkpoint.pt), or a model of transformers "
        "(its folder or name), which takes no flags of training",
    )
    target: float = flag(
        0.838,
        "sparsity of the blocks' linear layers after the last round",
        also=("--sparsity",),
    )
    steps: int = flag(1000, "optimizer steps of recovery, of all rounds together")
    rounds: int = flag(4, "each removes the same share of what is left; 1 is one-shot")
    targets: str = flag("", "sparsities after each round, as 0.5,0.75, in place of the last two")
    method: str = flag(
        "magnitude", "how weights are chosen", choices=PRUNE_METHODS, also=("--algorithm",)
    )
    distribution: str = flag("uniform", "over the layers", choices=("uniform", "erk", "global"))
    family: str = flag("unstructured", "of masks, as of train", choices=FAMILIES)
    lr: float = flag(2e-4, "highest learning rate of each round")
    prune_again: bool = flag(False, "prune a model of which many weights are zero already")
    rewind: str = flag("", "after pruning, weights go back to those of this dense run")
    calibration: int | str = flag(
        4,
        "for wanda and sparsegpt: batches of the run's text; for a model a file of texts, with an "
        "empty line between two",
        type=count_or_file,
    )
    data: str = flag("", "text (that of the run)")
    batch: int = flag(0, "sequences per step (that of the run)")
    micro_batch: int = flag(0, "sequences at a time (as of the run)")
    device: str = flag("", "cpu or cuda (that of the run)")
    dtype: str = flag("", "float32 or bfloat16 (that of the run; of one in float8 give another)")
    threads: int = flag(0, "CPU threads (those of the run)")
    eval_batches: int = flag(0, "batches of an evaluation (those of the run)")
    seed: int = flag(0, "fixes the batches")
    out: str = flag(
        "out/prune", "folder for the pruned model and prune.json; continues after its last round"
    )
