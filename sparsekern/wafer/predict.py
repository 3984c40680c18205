"""One prediction: a training step, inference, how sure both are, and GPUs beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from .cost import Comparison, compare_with_dense
from .figures import check_kinds
from .gpu import DECODE, TRAINING, Gpu, GpuCost, Measured, gpu_cost, measured_speedup
from .inference import InferenceCost, inference_cost
from .inputs import RANGES, Inputs
from .machine import MACHINES, Machine
from .runs import HELD_OUT, Run, published_errors
from .shapes import GPTShape
from .sweep import default_batch
from .weights import Weight, kept_share

DEFAULT_CONTEXT = 2048  # of decode, where the model's is longer


@dataclass(frozen=True)
class Beside:
    """The same model on GPUs, as many as there are wafers; measured speed-ups where they exist."""

    gpu: Gpu
    cost: GpuCost
    training: Measured | None
    decode: Measured | None


@dataclass(frozen=True)
class Prediction:
    """A training step beside its dense one, inference, and what is known of the errors.

    `dense_step_s`: seconds at both ends of the range of utilisation, which is calibrated;
    `step.speedup_range`: the speed-up at both ends of what a score may cost; `step_s`: seconds of
    the sparse step, the dense step's over the speed-up's at each end of utilisation."""

    shape: GPTShape
    sparsity: float  # of the linear layers
    step: Comparison
    dense_step_s: tuple[float, float]
    step_s: tuple[float, float]
    inference: InferenceCost
    nearest: Run  # of the held-out runs: on this kind of machine, the nearest in size
    nearest_error: float
    held_out: tuple[float, float]  # mean and worst error of the held-out runs of CS-2
    held_against: str  # the machine that these errors are of
    beside: tuple[Beside, ...]


def predict(
    machine: Machine,
    shape: GPTShape,
    density: float | Sequence[Weight] = 1.0,
    batch: int | None = None,
    systems: int = 1,
    inputs: Inputs | None = None,
    micro_batch: int | None = None,
    context: int | None = None,
    requests: int = 1,
    pipeline: int = 1,
    gpus: Sequence[Gpu] = (),
    results: dict[str, list[dict]] | None = None,
) -> Prediction:
    """What a model does on a machine; arguments as those of step_cost and inference_cost.

    `batch`: by default each system is full; `context`: tokens in the cache of each of `requests`
    requests that decode together on a `pipeline` of systems; `gpus` stand beside, with speed-ups
    from `results`: measured cases (bench/rates.py, and the `gpu` of each) by the name of their
    table; of those alike the first counts. Raises ValueError, which names the argument."""
    inputs = Inputs() if inputs is None else inputs
    check_kinds(
        machine=(machine, Machine, "machine(name)"),
        shape=(shape, GPTShape, "model_shape(name)"),
        inputs=(inputs, Inputs, "Inputs()"),
    )
    for device in gpus:
        check_kinds(gpus=(device, Gpu, "gpu(name)"))
    batch = default_batch(shape, systems) if batch is None else batch
    context = min(shape.sequence, DEFAULT_CONTEXT) if context is None else context
    kept = kept_share(shape, density)

    found = compare_with_dense(machine, shape, density, batch, systems, inputs, micro_batch)

    # Actual masks take long: their share of the time is taken to be that of random ones.
    plain = density
    if not isinstance(density, Real):
        plain = [replace(weight, mask=None) for weight in density]

    def at(utilisation: float) -> Comparison:
        given = replace(inputs, utilisation=utilisation)
        return compare_with_dense(machine, shape, plain, batch, systems, given, micro_batch)

    factor = found.sparse.step_s / at(inputs.utilisation).sparse.step_s
    span = RANGES["utilisation"]
    used = {inputs.utilisation, span.low, span.high}
    fast, slow = at(max(used)), at(min(used))
    known = _held_against(machine)
    errors = published_errors(inputs, known)
    errors = {run: error for run, error in errors.items() if run.use == HELD_OUT}
    nearest = _nearest(known, shape, list(errors))
    held_out = [abs(error) for run, error in errors.items() if run.machine == "wse2"]
    beside = [
        Beside(
            device,
            gpu_cost(device, shape, batch, systems, inputs, context),
            *(
                measured_speedup(device, results or {}, op, shape, 1 - kept, inputs.precision, n)
                for op, n in ((TRAINING, shape.sequence), (DECODE, context))
            ),
        )
        for device in gpus
    ]
    return Prediction(
        shape=shape,
        sparsity=1 - kept,
        step=found,
        dense_step_s=(fast.dense.step_s, slow.dense.step_s),
        step_s=(
            factor * fast.dense.step_s / fast.speedup_range[1],
            factor * slow.dense.step_s / slow.speedup_range[0],
        ),
        inference=inference_cost(machine, shape, kept, inputs, context, requests, pipeline),
        nearest=nearest,
        nearest_error=errors[nearest],
        held_out=(sum(held_out) / len(held_out), max(held_out)),
        held_against=known.name,
        beside=tuple(beside),
    )


def _held_against(machine: Machine) -> Machine:
    """Itself where it is one of MACHINES; of one's own no run is known."""
    if MACHINES.get(machine.name) == machine:
        return machine
    return MACHINES["wse3" if machine.name.startswith("wse3") else "wse2"]


def _nearest(known: Machine, shape: GPTShape, runs: list[Run]) -> Run:
    """WSE-3 has one run."""

    def distance(run: Run) -> float:
        return abs(math.log(run.shape.linear_fma / shape.linear_fma))

    return min((run for run in runs if run.machine == known.base), key=distance)
