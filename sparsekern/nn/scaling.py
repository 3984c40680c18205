"""The scales of layers that train in E4M3 (float8.py), by the recipe of kernels/float8.py."""

import warnings
import weakref

import torch
from torch import Tensor

from ..kernels.cuda import float8
from ..kernels.float8 import HISTORY, next_scale

# Floats of a layer in what all layers share: so its views begin on multiples of 16 bytes. cuBLAS
# takes scales from there alone, and torch.compile reads and writes results of an op in vectors only
# where all of its operands do.
EACH = 4
SLACK = 3  # powers of two by which W's scale is smaller than need be, when exponents are chosen
FIRST_STEPS = 3  # at most: layers that begin at 0, or a rate that does, take as many to show values


class Scaling:
    """The scales of all layers of a model, and what was largest in the last steps.

    They stay for all micro-batches of a step; advance() after the optimizer's step, which follow()
    sees to, makes the next ones. In the first step each tensor has a scale of its own, and nothing
    may be compiled: float8_step() around forward and backward keeps torch.compile away. Where some
    tensor was 0 all through it, the next step is a first one, too, up to FIRST_STEPS.

    cuSPARSELt takes a factor from the host alone. So after the first steps the scales of x and W of
    a two-way layer are 2^exponent together: W's is smaller than need be and gives way to x. Where
    it cannot any more, settle() finds other exponents. `wanted` are the scales without that rule: a
    tensor that is always 0 keeps its own, whatever the other has to give way to.

    A CUDA graph keeps the exponents that it was captured with. So then advance() leaves them alone
    and warns, and settle(), which changes them, says that it has."""

    STATE = "scales", "wanted", "noted", "history"

    def __init__(self, layers: int, device: torch.device | str, is_two_way: bool = False):
        self.scales = torch.ones(EACH * layers, device=device)
        self.wanted = torch.ones(EACH * layers, device=device)
        self.inverses = torch.ones(EACH * layers, EACH, device=device)
        self.noted = torch.zeros(EACH * layers, device=device)
        self.history = torch.zeros(HISTORY, EACH * layers, device=device)
        self.has_begun = False  # the first steps are over
        self._first_steps = 0  # that were taken
        self.is_two_way = is_two_way
        self.exponents = torch.zeros(layers, dtype=torch.int32, device="cpu")
        self._products = torch.ones(layers, device=device)  # 2^exponent
        self._is_off = torch.zeros(1, dtype=torch.bool, device=device)
        self._begin()

    def __setstate__(self, state: dict) -> None:
        """Also of models that versions before have pickled, which had no `wanted`."""
        if "exponents" not in state:
            raise ValueError(
                "float8: expected a model with exponents, this one was pickled by a version "
                "that had none: load it with that version, and its state_dict and that of its "
                "Scaling with this one"
            )
        if "wanted" not in state:
            state = state | {"wanted": next_scale(state["scales"], state["history"])}
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._notes = [noted.data_ptr() for noted in self.noted.split(EACH)]  # where layers note
        self._tell()
        weakref.finalize(self, float8.forget_exponents, self._notes)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Advance after each of its steps. A replay of a CUDA graph is none."""
        optimizer.register_step_post_hook(lambda *_: self.advance())

    def advance(self) -> None:
        """From the scales of one step to those of the next. Waits for the GPU in the first steps,
        and of two-way layers in each that no CUDA graph takes."""
        largest = torch.where(self.noted.isfinite(), self.noted, 0.0)
        self.history.copy_(torch.cat([largest.unsqueeze(0), self.history[:-1]]))
        self.noted.zero_()
        if not self.has_begun:
            self._first_steps += 1
            is_last = self._first_steps == FIRST_STEPS
            self.has_begun = is_last or bool(_of_tensors(self.history).any(0).all())
        self._choose()
        if not self.is_two_way or torch.cuda.is_current_stream_capturing():
            return
        if float8.captured.isdisjoint(self._notes):
            self.settle()
        elif self._is_off.item():
            warnings.warn(
                "float8: scales have outgrown the factors of products, which a CUDA graph was "
                "captured with: call settle() of the Scaling and capture anew, or "
                "sparsekern.nn.forget_graphs_(model) where no graph is replayed any more",
                stacklevel=2,
            )

    def settle(self) -> bool:
        """Whether exponents had to change: then graphs that were captured before are to be captured
        anew. For the time between two steps; after every few, as it waits for the GPU."""
        if not (self.has_begun and self._is_off.item()):
            return False
        float8.captured.difference_update(self._notes)
        of_x, of_w, _ = _of_tensors(self.wanted).unbind(1)
        self._take((of_x.log2() + of_w.log2() - SLACK).round().int().cpu())
        self._choose()
        return True

    def _choose(self) -> None:
        """The scales of the next step."""
        self.wanted.copy_(next_scale(self.wanted, self.history))
        scales = self.wanted.clone()
        if self.is_two_way and self.has_begun:
            of_x, of_w, _ = _of_tensors(scales).unbind(1)
            slack = of_x * of_w / self._products
            self._is_off.copy_(((slack < 2) | (slack > 4.0**SLACK)).any())
            of_w.copy_(torch.minimum(self._products / of_x, of_w))
            of_x.copy_(self._products / of_w)
        self.scales.copy_(scales)
        self._invert()

    def _invert(self) -> None:
        self.inverses.copy_(self.scales.reciprocal().unsqueeze(1))

    def _take(self, exponents: Tensor) -> None:
        self.exponents.copy_(exponents)
        self._products.copy_(torch.exp2(self.exponents.float()))
        self._tell()

    def _tell(self) -> None:
        """Whoever multiplies finds the exponents by these addresses."""
        float8.exponents.update(zip(self._notes, self.exponents.tolist(), strict=True))

    def _parts(self) -> dict[str, Tensor]:
        """[..., layers, 3] of each part of the state."""
        return {name: _of_tensors(getattr(self, name)) for name in self.STATE}

    def state_dict(self) -> dict[str, Tensor | int]:
        state: dict[str, Tensor | int]
        state = {name: t.flatten(-2).to("cpu", copy=True) for name, t in self._parts().items()}
        if self.is_two_way:
            state["exponents"] = self.exponents.clone()
        return state | {"has_begun": self.has_begun, "first_steps": self._first_steps}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for the state of another model, RuntimeError for other exponents than those of
        a CUDA graph; the scales are as they were then. Versions before wrote no `wanted`, and
        exponents, of 0, for dense layers too."""
        own = self._parts()
        if is_earlier := "wanted" not in state:
            del own["wanted"]
        shapes = {name: tuple(t.flatten(-2).shape) for name, t in own.items()}
        if "exponents" in state:
            shapes["exponents"] = tuple(self.exponents.shape)
        for name, shape in shapes.items():
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != shape:
                got = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ValueError(
                    f"float8: {name}: expected the state of a model with "
                    f"{len(self.exponents)} such layers, {shape}, got {got}"
                )
        exponents = state.get("exponents")  # a dense run has none
        if is_earlier and exponents is not None and not exponents.any():
            exponents = None
        is_same = exponents is not None and torch.equal(exponents.cpu(), self.exponents)
        if float8.captured.intersection(self._notes) and not is_same:
            raise RuntimeError(
                "float8: a CUDA graph was captured with the factors of this model, which would not "
                "see others: say with sparsekern.nn.forget_graphs_(model) that it is replayed no "
                "more, load the state, and capture anew"
            )
        for name, t in own.items():
            t.copy_(state[name].view(t.shape))
        if is_earlier:
            self.wanted.copy_(next_scale(self.scales, self.history))
        self._invert()
        self.has_begun = bool(state.get("has_begun"))
        self._first_steps = int(state.get("first_steps", 0))
        if exponents is not None:
            self._take(exponents)
        else:
            self._is_off.fill_(self.is_two_way)
            self.settle()


def _of_tensors(t: Tensor) -> Tensor:
    """[..., layers, 3] of what all layers share, [..., EACH * layers]."""
    return t.unflatten(-1, (-1, EACH))[..., :3]
