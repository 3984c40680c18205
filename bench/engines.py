"""Other ways to run a dense model of transformers, each behind one function that is timed.

torch in bfloat16, ONNX Runtime (a graph of torch.onnx, in float32) and OpenVINO (the same graph, in
float32 and bfloat16), each with the threads of torch. Export and compilation are not timed. An
engine that is not installed says so in `missing`.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.bench.records import OTHER, PACKED

NEEDS = ("onnx", "onnxscript", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Engine:
    name: str
    kind: str
    dtype: str
    run: Callable[[], Any]
    output: Callable[[Any], Tensor]


def settings_of(model: nn.Module) -> dict[str, Any]:
    """For a language model: as generate() reads a prompt, for the logits of its last token, but
    without a cache of keys and values."""
    return {"use_cache": False, "logits_to_keep": 1} if hasattr(model, "generate") else {}


class First(nn.Module):
    """The first output of a model of transformers for its main input, token numbers or pixels."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.model.main_input_name: x}, **settings_of(self.model))[0]


class Token(nn.Module):
    """The logits of a language model for one token after a prompt, whose keys and values it has."""

    def __init__(self, model: nn.Module, prompt: Tensor):
        super().__init__()
        from transformers import DynamicCache

        self.model, self.past = model, DynamicCache(config=model.config)
        with torch.inference_mode():
            model(prompt, past_key_values=self.past, use_cache=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x, past_key_values=self.past, use_cache=True)[0]
        self.past.crop(-1)
        return y


class ExportedToken(nn.Module):
    """The same, with keys and values that a graph holds as constants."""

    def __init__(self, token: Token):
        super().__init__()
        self.model, self.layers = token.model, len(token.past.layers)
        for i, layer in enumerate(token.past.layers):
            self.register_buffer(f"keys_{i}", layer.keys.clone())
            self.register_buffer(f"values_{i}", layer.values.clone())

    def forward(self, x: Tensor) -> Tensor:
        from transformers import DynamicCache

        past = DynamicCache(config=self.model.config)
        for i in range(self.layers):
            past.update(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}"), i)
        return self.model(x, past_key_values=past, use_cache=True)[0]


def missing() -> list[str]:
    """The packages that are not there."""
    return [name for name in NEEDS if find_spec(name) is None]


def torch_way(
    name: str, kind: str, model: nn.Module, x: Tensor, prompt: Tensor | None = None
) -> Engine:
    """With a prompt: of the token x after it."""
    first = (First(model) if prompt is None else Token(model, prompt)).eval()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")

    def run() -> Tensor:
        with torch.inference_mode():
            return first(
                x if x.dtype == torch.long else x.to(next(model.parameters()).dtype)
            ).float()

    return Engine(name, kind, dtype, run, lambda y: y)


def others(model: nn.Module, x: Tensor, prompt: Tensor | None = None) -> list[Engine]:
    """Those that are installed."""
    found = [torch_way("torch", OTHER, copy.deepcopy(model).bfloat16(), x, prompt)]
    if not missing():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with torch.no_grad():
                first = First(model) if prompt is None else ExportedToken(Token(model, prompt))
                program = torch.onnx.export(first.eval(), (x,), dynamo=True, verbose=False)
            program.save(path)
            found += [_onnxruntime(path, x)]
            found += [_openvino(path, x, dtype) for dtype in ("float32", "bfloat16")]
    return found


def onnxruntime_call(model: Path | bytes, x: Tensor) -> Callable[[], Any]:
    """The first output of an ONNX model of one input for x, by ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after their work would slow down whoever runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _onnxruntime(path: Path, x: Tensor) -> Engine:
    run = onnxruntime_call(path, x)
    return Engine("ONNX Runtime", PACKED, "float32", run, torch.from_numpy)


def _openvino(path: Path, x: Tensor, dtype: str) -> Engine:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    settings |= {"PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    kind = PACKED if dtype == "float32" else OTHER
    return Engine("OpenVINO", kind, dtype, lambda: request.infer(feed)[0], torch.from_numpy)
