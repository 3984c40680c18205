"""The state of a training run: what a checkpoint holds, and one step further."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..weights import save_weights
from . import lines
from .build import learning_rate, model_from_state
from .checkpoint import CHECKPOINT, WEIGHTS, refuse_anothers, save_checkpoint
from .config import TrainConfig
from .data import Text
from .distributed import Ranks
from .flops import dense_gradient_flops_per_token, train_flops_per_token
from .model import GPT
from .parts import Parts
from .reading import Reading
from .step import compute_gradients, evaluate


@dataclass
class History:
    """What a run has done so far, in plain values."""

    losses: list[float] = field(default_factory=list)  # of each step, before its update
    seconds: list[float] = field(default_factory=list)  # of each step
    evaluations: list[dict] = field(default_factory=list)
    flops: float = 0.0
    source: dict | None = None  # what it took to make the weights that the run began with

    @classmethod
    def of(cls, state: dict) -> "History":
        """That of a checkpoint."""
        return cls(**{part.name: state[part.name] for part in fields(cls)})

    def as_source(self) -> dict:
        """What it took to make the weights at its end."""
        spent = {"flops": self.flops, "seconds": sum(self.seconds)}
        return spent | {"steps": len(self.losses), "before": self.source}


class Run:
    """A training run between two steps. start.begin makes one.

    Where steps are captured in CUDA graphs, the loss of each is looked at when the next one is on
    its way; else at once. settle() looks at all there are. `tell` is told what a user must know.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: object,
        ranks: Ranks,
        text: Text,
        history: History,
        state: dict,
        path: Path | None = None,
    ) -> None:
        """`settings`: those of the sparsity, as config.make_algorithm takes them. `state`, from the
        file `path`: what Parts takes."""
        self.config, self.settings, self.ranks, self.text = config, settings, ranks, text
        self.history = history
        self.path = Path(config.out) / CHECKPOINT
        self._is_its_own = config.resume  # the checkpoint that is there
        self.loses_at_random = False  # trained weights, at its beginning
        self.lengthened_from = 0  # steps that it had when it was finished before
        self.tell: Callable[[str], None] = print
        self._place(state, path)

    def _place(self, state: dict, path: Path | None = None) -> None:
        config = self.config
        self.training, self.validation = self.text.batches(
            config.batch, config.context, config.seed
        )
        vocab_size = self.text.tokenizer.vocab_size
        self.parts = Parts(config, self.settings, self.ranks, vocab_size, state, path)
        self._under_way: Reading | None = None  # loss and norm of the step before its update
        self._unread: Reading | None = None  # those of the step before
        self._gradient_s = 0.0  # of the step that is under way

    def restart(self, config: TrainConfig, state: dict) -> None:
        """Begin anew on the same text, with other settings and the weights of `state`."""
        self.parts.stop_capturing()  # its graphs have the memory of a step
        self.config = config
        self.history = History(source=self.history.source)
        self._place({"model": state["model"]})

    @property
    def model(self) -> GPT:
        return self.parts.model

    @property
    def dtype(self) -> torch.dtype:
        return self.config.autocast_dtype

    @property
    def step(self) -> int:
        """Updates made so far."""
        return len(self.history.losses) + (self._unread is not None)

    @property
    def sparsity(self) -> float:
        return self.parts.sparsity

    @property
    def is_evaluated(self) -> bool:
        """Whether the weights of now have been evaluated."""
        evaluations = self.history.evaluations
        return bool(evaluations) and evaluations[-1]["step"] >= self.step

    # A step

    def compute_gradients(self) -> None:
        """The first half of a step. FloatingPointError where a loss or gradient that is looked at
        is not finite."""
        began = time.perf_counter()
        self.parts.set_learning_rate(learning_rate(self.config, self.step))
        loss, norm = self._gradients(*map(self.ranks.part, self.training.get(self.step)))
        self._under_way = Reading(loss, norm)
        self._note_last()
        if not self.parts.is_replayed:
            self._looked_at(self._under_way)
        self._gradient_s = time.perf_counter() - began

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of all ranks, and norm."""
        if captured := self.parts.captured:
            try:
                return captured.compute_gradients(x, y)
            except Exception as error:  # of a compiler, CUDA, or the step: then it comes again
                # Other ranks take it anew after a failed capture alone.
                if self.ranks.size > 1 and not captured.has_failed:
                    raise
                self.parts.stop_capturing()
                self.tell(lines.eager(error))
        how = self.dtype, self.config.micro_batch, self.parts.buckets
        loss, norm = compute_gradients(self.model, x, y, *how)
        return self.ranks.mean(loss), norm

    def update(self) -> None:
        """The other half: the optimizer's step, the algorithm's with it, and a note of the loss."""
        began = time.perf_counter()
        model, sparsity = self.model.config, self.sparsity
        flops = train_flops_per_token(model, sparsity)
        if self.parts.needs_dense_gradient:
            flops += dense_gradient_flops_per_token(model, sparsity)
        self.history.flops += self.config.batch * self.config.context * flops
        is_late = self.parts.is_replayed
        self.parts.update()
        self._unread, self._under_way = self._under_way, None
        if not is_late:
            self._note_last()
        self.history.seconds.append(self._gradient_s + time.perf_counter() - began)

    def settle(self) -> None:
        """Wait for all losses and gradient norms. FloatingPointError unless they are finite."""
        began = time.perf_counter()
        self._note_last()
        if self._under_way:
            self._looked_at(self._under_way)
            self._gradient_s += time.perf_counter() - began
        elif self.history.seconds:
            self.history.seconds[-1] += time.perf_counter() - began

    def _note_last(self) -> None:
        """The loss of the step before, where it is not there yet."""
        if self._unread:
            reading, self._unread = self._unread, None
            self.history.losses.append(self._looked_at(reading))

    def _looked_at(self, reading: Reading) -> float:
        """Its loss."""
        loss, norm = reading.wait()
        self.check_finite("loss", loss)
        self.check_finite("gradient norm", norm)
        return loss

    def evaluate(self) -> None:
        self.settle()
        config, history = self.config, self.history
        how = config.eval_batches, self.dtype, self.ranks.device, config.micro_batch
        loss = evaluate(self.model, self.validation, *how)
        self.check_finite("validation loss", loss)
        seconds = sum(history.seconds)
        history.evaluations.append(
            {"step": self.step, "seconds": seconds, "loss": loss, "sparsity": self.sparsity}
        )

    def check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f"{self.path} is the last good one" if self.path.exists() else "none was written"
            raise FloatingPointError(f"{what} is {value} at step {self.step}; checkpoint: {kept}")

    # Its files

    def state(self) -> dict:
        """The contents of a checkpoint on the first rank. All must call it together."""
        self.settle()
        return {
            "config": self.about()["config"],
            "sparsity": self.settings,
            "tokenizer": self.text.tokenizer.state(),
            **self.text.digests,
            **self.parts.state(),
            **vars(self.history),
        }

    def save(self) -> None:
        """ValueError where another run has begun to write there meanwhile."""
        state = self.state()
        if self.ranks.rank == 0:
            if not self._is_its_own:
                refuse_anothers(self.path)
            save_checkpoint(self.path, state)
            self._is_its_own = True

    def interrupted(self) -> str:
        """Where it was, and what is there to go on from."""
        if self._is_its_own and self.path.exists():
            kept = f"; --resume --out {self.config.out} goes on from its last checkpoint"
        else:
            every = f"--checkpoint-every {self.config.checkpoint_every}"
            kept = f", before the first checkpoint ({every}): nothing was written"
        return f"at step {self.step}{kept}"

    def about(self) -> dict:
        """Metadata of the exported weights: the same, whether the run was resumed or not."""
        config = asdict(replace(self.config, resume=False))
        return {"config": config, "tokenizer": self.text.tokenizer.state(), "step": self.step}

    def export(self) -> None:
        """The weights alone, for other programs."""
        if self.ranks.rank == 0 and find_spec("safetensors"):
            model = model_from_state(self.model.config, self.model.state_dict())
            save_weights(model, self.path.with_name(WEIGHTS), **self.about())
