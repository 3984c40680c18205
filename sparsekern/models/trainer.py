"""Sparse training in the Trainer of transformers. It imports no transformers."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn.optimizers import KEY
from ..sparsity import Algorithm, Group


class SparsityCallback:
    """Lets an algorithm follow a Trainer: the model becomes sparse when the Trainer is made, and
    the pattern changes at its optimizer steps.

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[
            SparsityCallback(RigL(0.75, update={"freq": 100}))
        ])
        trainer.train()

    The algorithm's state is kept in the first parameter group of the optimizer, so that it is in
    every checkpoint: trainer.train(resume_from_checkpoint=...) goes on exactly.

    Args:
        algorithm: of sparsekern.sparsity, applied to the model already or not; or a Group.
    """

    def __init__(self, algorithm: Algorithm | Group) -> None:
        if not isinstance(algorithm, (Algorithm, Group)):
            got = type(algorithm).__name__
            raise TypeError(f"algorithm: expected one of sparsekern.sparsity, got {got}")
        self.algorithm = algorithm

    def __getattr__(self, name: str) -> Callable:
        """Events that it has nothing to do at."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if not self.algorithm.layers:
            self.algorithm.apply(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **_: Any
    ) -> None:
        """ValueError for another model than the algorithm's, or a checkpoint without its state."""
        if not self.algorithm.layers:
            raise ValueError(
                "model: expected one that the algorithm has made sparse, got a dense one: give the "
                "callback to Trainer(callbacks=[...]), as add_callback comes too late, or call "
                "algorithm.apply(model) before"
            )
        modules = set(model.modules())
        other = [n for n, layer in self.algorithm.layers.items() if layer not in modules]
        if other:
            raise ValueError(
                f"model: expected the one that the algorithm has made sparse, got one without its "
                f"layer {other[0]}; a Trainer with model_init makes a new one"
            )
        self.algorithm.apply(optimizer)
        saved = optimizer.param_groups[0].get(KEY)
        if saved is None and state.global_step:
            raise ValueError(
                f"checkpoint: its optimizer has no state of the algorithm at step "
                f"{state.global_step}; it was written without a SparsityCallback"
            )
        if saved is not None:
            self.algorithm.load_state_dict(saved)
        self._note(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self._note(optimizer)

    def _note(self, optimizer: Any) -> None:
        optimizer.param_groups[0][KEY] = self.algorithm.state_dict()


def _nothing(*_: Any, **__: Any) -> None:
    pass
