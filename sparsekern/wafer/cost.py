"""Time of a training step by weight streaming: what overlaps counts once, the rest adds.

forward   max(products + attention + head on the wafer,  weights in)
backward  max(input and weight gradients (+ recompute) on the wafer,  weights in,  gradients out)
boundary  between two steps nothing hides the way of the first layer's gradient out, its optimizer
          step and its weights' way in
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .figures import check_count, check_kinds
from .inputs import RANGES, Inputs
from .machine import Machine
from .memory import ActivationPlan, plan_activations
from .mesh import MeshCycles
from .product import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, product_cycles, stream_bytes
from .shapes import GPTShape
from .weights import Weight, kept_share, weights_of


@dataclass(frozen=True)
class Phase:
    """Forward or backward, of all layers: seconds."""

    linear_s: float  # sparse products
    attention_s: float  # multiply-adds and scores
    elementwise_s: float  # norms, activations, sums
    head_s: float
    recompute_s: float  # of all but the head
    io_in_s: float
    io_out_s: float

    @property
    def wafer_s(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the wafer's work by its kind."""
        return {
            "linear layers": self.linear_s,
            "attention": self.attention_s,
            "norms, activations": self.elementwise_s,
            "head": self.head_s,
            "recompute": self.recompute_s,
        }

    @property
    def total_s(self) -> float:
        return max(self.wafer_s, self.io_in_s, self.io_out_s)


@dataclass(frozen=True)
class LayerCost:
    """One product of one block (or the head): seconds of each term, before overlap."""

    matrix: str
    product: str  # forward, input gradient, weight gradient
    layers: int  # that are alike; experts count
    density: float
    cycles: MeshCycles
    seconds: float  # of one layer


@dataclass(frozen=True)
class MicroStep:
    """What a system does with `sequences` of its share at a time, `count` times alike."""

    count: int
    sequences: int
    forward: Phase
    backward: Phase
    activations: ActivationPlan
    layers: tuple[LayerCost, ...]
    score_cycle_s: float  # forward, of one cycle for each score

    @property
    def phases(self) -> tuple[Phase, Phase]:
        return self.forward, self.backward

    @property
    def total_s(self) -> float:
        return self.count * sum(phase.total_s for phase in self.phases)

    def with_added_score_cycles(self, added: float) -> "MicroStep":
        added_s = added * self.score_cycle_s

        def changed(phase: Phase, passes: int) -> Phase:
            recompute_s = phase.recompute_s + (added_s if phase.recompute_s else 0)
            attention_s = phase.attention_s + passes * added_s
            return replace(phase, attention_s=attention_s, recompute_s=recompute_s)

        return replace(self, forward=changed(self.forward, 1), backward=changed(self.backward, 2))


@dataclass(frozen=True)
class StepCost:
    """A training step of a model on one machine or several: its phases, parts, energy and bound."""

    micro: tuple[MicroStep, ...]  # whole ones, and the last where fewer sequences are left for it
    boundary_s: float
    tokens: int  # of the whole batch, all systems
    systems: int
    flop: float  # useful, of the whole batch: nonzeros only
    machine: Machine
    inputs: Inputs

    @property
    def forward(self) -> Phase:
        """Of a whole micro-step, as backward, activations and layers."""
        return self.micro[0].forward

    @property
    def backward(self) -> Phase:
        return self.micro[0].backward

    @property
    def activations(self) -> ActivationPlan:
        return self.micro[0].activations

    @property
    def layers(self) -> tuple[LayerCost, ...]:
        return self.micro[0].layers

    @property
    def micro_steps(self) -> int:
        return sum(micro.count for micro in self.micro)

    @property
    def step_s(self) -> float:
        return sum(micro.total_s for micro in self.micro) + self.boundary_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def peak_share(self) -> float:
        """Useful FLOPs over those of the dense peak of all cores."""
        peak = self.systems * self.machine.peak_flop_per_s(self.inputs.precision)
        return self.flop / self.step_s / peak

    @property
    def time_parts(self) -> dict[str, float]:
        """Seconds of a step by what the wafer does, waiting included."""
        parts = {
            name: sum(m.count * phase.parts[name] for m in self.micro for phase in m.phases)
            for name in self.forward.parts
        }
        return parts | {"waiting for I/O": self.io_share * self.step_s}

    @property
    def energy_parts_j(self) -> dict[str, float]:
        """Joules of a step and all systems: idle power all the time, and what work adds to it."""
        idle_w, busy_w = self.machine.power_w(0), self.machine.power_w(1) - self.machine.power_w(0)
        parts = {"idle": self.systems * idle_w * self.step_s}
        for name, seconds in self.time_parts.items():
            if name != "waiting for I/O":
                parts[name] = self.systems * busy_w * seconds
        return parts

    @property
    def energy_j(self) -> float:
        return sum(self.energy_parts_j.values())

    @property
    def io_share(self) -> float:
        """The time that waits for I/O, of the step's."""
        waits = sum(m.count * (p.total_s - p.wafer_s) for m in self.micro for p in m.phases)
        return (waits + self.boundary_s) / self.step_s

    def with_score_cycles(self, score_cycles: float) -> "StepCost":
        """The same step where a score costs so many cycles."""
        added = score_cycles - self.inputs.score_cycles
        return replace(
            self,
            micro=tuple(micro.with_added_score_cycles(added) for micro in self.micro),
            inputs=replace(self.inputs, score_cycles=score_cycles),
        )

    @property
    def bound(self) -> str:
        """What takes the largest part of the time. `compute`, `reduction` and `arrival` are of the
        linear layers."""
        parts = self.time_parts
        terms = {name: parts[name] for name in ("attention", "head", "norms, activations")}
        if self.io_share > 0.5:
            return "I/O"
        for micro in self.micro:
            for layer in micro.layers:
                name, seconds = layer.cycles.bound, micro.count * layer.layers * layer.seconds
                if layer.matrix != "head":
                    terms[name] = terms.get(name, 0.0) + seconds
        return max(terms, key=terms.__getitem__)


def step_cost(
    machine: Machine,
    shape: GPTShape,
    density: float | Sequence[Weight],
    batch: int,
    systems: int = 1,
    inputs: Inputs | None = None,
    micro_batch: int | None = None,
) -> StepCost:
    """The cost of one training step on `batch` sequences, which `systems` systems share.

    `density`: of every linear layer, or the weights themselves; `micro_batch`: sequences on a
    system at a time, default all of its share; the last ones may be fewer. Raises ValueError, which
    names the argument."""
    inputs = Inputs() if inputs is None else inputs
    check_kinds(
        machine=(machine, Machine, "machine(name)"),
        shape=(shape, GPTShape, "model_shape(name)"),
        inputs=(inputs, Inputs, "Inputs()"),
    )
    for name, value in (("systems", systems), ("batch", batch)):
        check_count(name, value)
    share = -(-batch // systems)  # of the system that has most
    if micro_batch is not None:
        check_count("micro_batch", micro_batch)
    micro_batch = min(micro_batch or share, share)
    whole, rest = divmod(share, micro_batch)
    weights = weights_of(shape, density)
    return StepCost(
        micro=tuple(
            _micro_step(machine, inputs, shape, weights, count, sequences)
            for count, sequences in ((whole, micro_batch), (1, rest))
            if sequences
        ),
        boundary_s=_boundary_s(machine, inputs, shape, weights),
        tokens=batch * shape.sequence,
        systems=systems,
        flop=batch * shape.sequence * shape.train_flop(kept_share(shape, weights)),
        machine=machine,
        inputs=inputs,
    )


def _micro_step(
    machine: Machine,
    inputs: Inputs,
    shape: GPTShape,
    weights: Sequence[Weight],
    count: int,
    sequences: int,
) -> MicroStep:
    tokens = sequences * shape.sequence
    plan = plan_activations(machine, inputs, shape, tokens)
    head = Weight("head", shape.vocabulary, shape.width, 1.0, 1)
    costs = [
        cost
        for weight in (*weights, head)
        if weight.density  # no nonzeros, no products
        for cost in _layer_costs(machine, inputs, tokens, weight)
    ]

    def total(product: str, is_head: bool) -> float:
        return sum(
            cost.layers * cost.seconds
            for cost in costs
            if cost.product == product and (cost.matrix == "head") == is_head
        )

    # A PE does scores and elements one at a time, all PEs at once.
    pe_s = tokens / machine["clock_hz"] / (machine.grid_pes * inputs.utilisation)
    score_cycle_s = shape.scores * pe_s
    attention_s = _attention_fma_s(machine, inputs, shape, tokens)
    attention_s += inputs.score_cycles * score_cycle_s
    elementwise_s = inputs.element_cycles * shape.elements * pe_s

    io_bytes_per_s = machine["io_bytes_per_s"]
    in_bytes = sum(w.layers * stream_bytes(inputs, w.n, w.k, w.density) for w in weights)
    head_bytes = stream_bytes(inputs, head.n, head.k, 1.0)
    out_bytes = sum(w.layers * w.n * w.k * w.density * inputs.gradient_bytes for w in weights)
    out_bytes += head.n * head.k * inputs.gradient_bytes
    is_recomputed = plan.stride > 0
    forward_s = total(FORWARD, False)
    forward = Phase(
        linear_s=forward_s,
        attention_s=attention_s,
        elementwise_s=elementwise_s,
        head_s=total(FORWARD, True),
        recompute_s=0.0,
        io_in_s=(in_bytes + head_bytes) / io_bytes_per_s,
        io_out_s=plan.spilled_bytes / io_bytes_per_s,
    )
    backward = Phase(
        linear_s=total(INPUT_GRADIENT, False) + total(WEIGHT_GRADIENT, False),
        attention_s=2 * attention_s,
        elementwise_s=2 * elementwise_s,
        head_s=total(INPUT_GRADIENT, True) + total(WEIGHT_GRADIENT, True),
        recompute_s=forward_s + attention_s + elementwise_s if is_recomputed else 0.0,
        io_in_s=(in_bytes * (2 if is_recomputed else 1) + head_bytes + plan.spilled_bytes)
        / io_bytes_per_s,
        io_out_s=out_bytes / io_bytes_per_s,
    )
    return MicroStep(count, sequences, forward, backward, plan, tuple(costs), score_cycle_s)


def _attention_fma_s(machine: Machine, inputs: Inputs, shape: GPTShape, tokens: int) -> float:
    """Of its multiply-adds, forward: as fast as a dense d x d product does them."""
    d = shape.width
    square = product_cycles(machine, inputs, tokens, d, d, 1.0)
    cycles_per_fma = square.compute / (tokens * d * d) / inputs.attention_efficiency
    return tokens * shape.attention_fma * cycles_per_fma / machine["clock_hz"]


def _boundary_s(
    machine: Machine, inputs: Inputs, shape: GPTShape, weights: Sequence[Weight]
) -> float:
    """From step to step, by the way of the first layer's gradient and weights."""
    first = next(weight for weight in weights if weight.matrix == shape.block[0].name)
    nnz = first.n * first.k * first.density
    moved_bytes = stream_bytes(inputs, first.n, first.k, first.density)
    moved_bytes += nnz * inputs.gradient_bytes
    moved_s = moved_bytes / machine["io_bytes_per_s"]
    return machine["stream_latency_s"] + moved_s + nnz / machine["optimizer_params_per_s"]


def _layer_costs(machine: Machine, inputs: Inputs, tokens: int, weight: Weight) -> list[LayerCost]:
    pattern = weight.density if weight.mask is None else weight.mask
    costs, seen = [], math.ceil(tokens * weight.share)
    for product in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT):
        cycles = product_cycles(machine, inputs, seen, weight.n, weight.k, pattern, product)
        seconds = cycles.total / machine["clock_hz"]
        costs.append(
            LayerCost(weight.name, product, weight.layers, weight.density, cycles, seconds)
        )
    return costs


@dataclass(frozen=True)
class Comparison:
    """A sparse step beside the dense step of the same model, batch and machine."""

    dense: StepCost
    sparse: StepCost
    flop_ratio: float
    flop_cap: float  # the FLOP ratio with nothing left in the linear layers
    # If the linear layers took their density of their dense time, all else as is, where a score
    # costs least: no speed-up of the range is above it.
    amdahl_cap: float

    @property
    def speedup(self) -> float:
        return self.dense.step_s / self.sparse.step_s

    @property
    def speedup_range(self) -> tuple[float, float]:
        """The speed-up at both ends of what a score may cost: at RANGES' high end attention, which
        stays dense, weighs most. Public step times ask for one end, the vendor's words of sparse
        speed-ups for the other; no sparse step was measured."""
        span = RANGES["score_cycles"]
        ends = (span.low, self.sparse.inputs.score_cycles, span.high)
        found = [
            self.dense.with_score_cycles(cycles).step_s
            / self.sparse.with_score_cycles(cycles).step_s
            for cycles in ends
        ]
        return min(found), max(found)


def compare_with_dense(
    machine: Machine,
    shape: GPTShape,
    density: float | Sequence[Weight],
    batch: int,
    systems: int = 1,
    inputs: Inputs | None = None,
    micro_batch: int | None = None,
) -> Comparison:
    """A sparse step beside the dense one; arguments as those of step_cost."""
    dense = step_cost(machine, shape, 1.0, batch, systems, inputs, micro_batch)
    sparse = step_cost(machine, shape, density, batch, systems, inputs, micro_batch)
    flop_ratio = shape.flop_ratio(kept_share(shape, density))
    least = min(RANGES["score_cycles"].low, dense.inputs.score_cycles)
    cap = _amdahl_cap(dense.with_score_cycles(least), weights_of(shape, density))
    return Comparison(dense, sparse, flop_ratio, shape.flop_cap, cap)


def _amdahl_cap(dense: StepCost, weights: Sequence[Weight]) -> float:
    """Every matrix takes its own density of its dense time."""
    layers, kept = Counter[str](), Counter[str]()
    for weight in weights:
        layers[weight.matrix] += weight.layers
        kept[weight.matrix] += weight.layers * weight.density
    left_s = 0.0
    for micro in dense.micro:
        left_s += micro.count * sum(phase.wafer_s for phase in micro.phases)
        passes = {FORWARD: 2 if micro.activations.stride else 1}
        for layer in micro.layers:
            if layer.matrix != "head":
                seconds = micro.count * passes.get(layer.product, 1) * layer.layers * layer.seconds
                left_s -= (1 - kept[layer.matrix] / layers[layer.matrix]) * seconds
    return dense.step_s / left_s
