"""A cost model of wafer-scale machines that skip zeros: training steps and inference of GPTs.

    from sparsekern.wafer import machine, model_shape, predict

    found = predict(machine("wse2"), model_shape("gpt3-xl"), density=0.25)
    print(found.step.speedup_range, found.step_s)

No module of it imports torch, nor do the commands, but to read a checkpoint and to make the masks
of a measurement again; `import sparsekern.wafer` does, for the package around it.
docs/guide/wafer.md is the guide, docs/math.md has the derivations.
"""

from .balance import Mask
from .cost import Comparison, StepCost, compare_with_dense, step_cost
from .figures import Figure
from .gpu import GPUS, Gpu, GpuCost, gpu, gpu_cost
from .inference import InferenceCost, inference_cost
from .inputs import RANGES, Inputs
from .machine import MACHINES, Machine, machine
from .models import model_shape
from .predict import Prediction, predict
from .product import offloaded_s
from .runs import Calibration, Run, calibrate, read_runs
from .shapes import GPT_SHAPES, GPTShape, gpt_shape
from .sweep import sweep
from .weights import Weight, masked_weights, uniform_weights

__all__ = [
    "Calibration",
    "Comparison",
    "Figure",
    "GPTShape",
    "GPT_SHAPES",
    "GPUS",
    "Gpu",
    "GpuCost",
    "InferenceCost",
    "Inputs",
    "MACHINES",
    "Machine",
    "Mask",
    "Prediction",
    "RANGES",
    "Run",
    "StepCost",
    "Weight",
    "calibrate",
    "compare_with_dense",
    "gpt_shape",
    "gpu",
    "gpu_cost",
    "inference_cost",
    "machine",
    "masked_weights",
    "model_shape",
    "offloaded_s",
    "predict",
    "read_runs",
    "step_cost",
    "sweep",
    "uniform_weights",
]
