"""Model, optimizer and algorithm of a run: made from whole tensors, placed on its ranks."""

from pathlib import Path

from torch import Tensor
from torch.optim import AdamW

from ..nn.float8 import to_float8_
from ..sparsity import Algorithm, Group, RigL
from ..sparsity.pattern import check_same_on_all_ranks
from .buckets import Buckets
from .build import build_optimizer, model_from_state
from .captured import CapturedStep, why_eager
from .checkpoint import about
from .config import TrainConfig
from .distributed import Ranks, load_optimizer
from .flops import linear_sparsity
from .shards import ShardedAdamW, Shards
from .speed import compiled_blocks

COMPILED_STEPS = 1000  # shorter runs do not win back the time that torch.compile takes


def is_compiled(config: TrainConfig) -> bool:
    """Whether the blocks are compiled, where steps are captured in CUDA graphs."""
    return config.steps >= COMPILED_STEPS


class Parts:
    """`captured` takes the steps where it is not None, `buckets` sends the gradients of several
    processes."""

    def __init__(
        self,
        config: TrainConfig,
        settings: object,
        ranks: Ranks,
        vocab_size: int,
        state: dict,
        path: Path | None = None,
    ) -> None:
        """`state` has the model's state_dict, and may have those of the optimizer and of the
        algorithm. `path`: the file that they are from."""
        self._config, self._ranks = config, ranks
        with about(path):
            model = model_from_state(config.model(vocab_size), state["model"])
        self.model = model.to(ranks.device)
        self.algorithm = config.make_algorithm(settings)
        if self.algorithm:
            self.model = self.algorithm.apply(self.model)
        self.scaling = to_float8_(self.model) if config.dtype == "float8" else None
        if self.scaling and "float8" in state:
            with about(path):
                self.scaling.load_state_dict(state["float8"])
        kind = ShardedAdamW if config.parallel == "fsdp" else AdamW
        self.optimizer: AdamW = build_optimizer(self.model, config.lr, kind)
        if self.scaling:
            self.scaling.follow(self.optimizer)
        if "optimizer" in state:
            with about(path):
                load_optimizer(self.optimizer, state["optimizer"])
        if self.algorithm:
            self._place_algorithm(state, path)
        self.buckets = self._buckets()
        self.captured = None if why_eager(ranks) else self._captured()

    def _place_algorithm(self, state: dict, path: Path | None) -> None:
        self.algorithm.apply(self.optimizer)
        if "algorithm" in state:
            with about(path):
                self.algorithm.load_state_dict(state["algorithm"])
        check_same_on_all_ranks(self.algorithm.layers)

    def _buckets(self) -> Buckets | None:
        if isinstance(self.optimizer, ShardedAdamW):
            return Shards(self.model, self._ranks, self.optimizer, self.algorithms)
        return Buckets(self.model, self._ranks) if self._config.parallel == "ddp" else None

    def _captured(self) -> CapturedStep:
        config = self._config
        stepper = compiled_blocks(self.model) if is_compiled(config) else self.model
        parts = self.model, stepper, self.optimizer, self.algorithms
        return CapturedStep(*parts, config.autocast_dtype, config.micro_batch, self.buckets)

    @property
    def is_replayed(self) -> bool:
        """Whether the step under way is a replay, whose numbers nobody waits for."""
        return bool(self.captured and self.captured.is_replayed)

    def stop_capturing(self) -> None:
        """Take this step, from its beginning, and all that follow without CUDA graphs."""
        if self.captured:
            self.captured.drop()
        self.captured = None
        for algorithm in self.algorithms:
            algorithm._before_step()  # forgets the gradients that RigL has seen of the step

    def state(self) -> dict:
        """What `state` of a new one may be; under fsdp on the first rank alone. All must call it
        together. RuntimeError where their patterns have come apart."""
        if self.algorithm:
            check_same_on_all_ranks(self.algorithm.layers)
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])  # a tensor where steps are captured
        scales = {"float8": self.scaling.state_dict()} if self.scaling else {}
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer,
            "algorithm": self.algorithm.state_dict() if self.algorithm else {},
            **scales,
        }

    @property
    def sparsity(self) -> float:
        return linear_sparsity(self.model)

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether the next update looks at the gradients of weights that are not stored."""
        return any(isinstance(part, RigL) and part.is_due for part in self.algorithms)

    @property
    def algorithms(self) -> list[Algorithm]:
        """Those of a Group one by one."""
        if isinstance(self.algorithm, Group):
            return self.algorithm.algorithms
        return [self.algorithm] if self.algorithm else []

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def update(self) -> None:
        """The optimizer's step, and with it the algorithm's."""
        if self.captured:
            self.captured.update()
        else:
            self.optimizer.step()
