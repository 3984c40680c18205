"""Real models before and after accelerate_: what its report expects, and other engines beside.

    python bench/accelerated.py [--model minilm|smollm2|resnet50] [--out FOLDER]

Weights are those of bench/models.py, of ResNet-50 random ones, pruned by magnitude, evenly in each
layer: only times are looked at. Each model is accelerated ROUNDS times anew. Then all ways to run
it take turns: torch, what accelerate_ made of it, both compiled too, and those of bench/engines.py
(pip install onnx onnxscript onnxruntime openvino). A language model is not compiled: its many
blocks take minutes. Its token is run with dense layers in torch's oneDNN, and in bfloat16 with
packed weights, too. One thread.
"""

import argparse
import copy
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import engines
import models
import pages
import torch
from torch import Tensor, nn
from torch.utils.mkldnn import to_mkldnn

from sparsekern import accelerate_
from sparsekern.bench import records
from sparsekern.bench.machine import about_cpu, about_run
from sparsekern.bench.records import DENSE, OURS
from sparsekern.bench.turns import in_turns, on_host
from sparsekern.models.prune import prune_
from sparsekern.nn import pack_
from sparsekern.sparsity import Magnitude, Static
from sparsekern.terminal import table

SPARSITIES = (0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Input:
    shape: tuple[int, ...]  # texts x tokens, images x channels x height x width
    new_tokens: int = 0  # generated after it

    def __str__(self) -> str:
        return " x ".join(map(str, self.shape)) + f" + {self.new_tokens}" * bool(self.new_tokens)


INPUTS = {
    "minilm": (Input((1, 128)), Input((32, 128))),
    "smollm2": (Input((1, 256)), Input((1, 256), new_tokens=32)),
    "resnet50": (Input((1, 3, 224, 224)), Input((8, 3, 224, 224))),
}
NAMES = models.NAMES | {"resnet50": "ResNet-50"}
ROUNDS = 2
COMPILED, ONEDNN = ", compiled", ", oneDNN"
RACE_ROUNDS, ENOUGH_S = 15, 2.0  # of all ways in turn; no more of one that took so long
REPORT, RACE = "accelerate", "engines"  # ops: what the report says, and the race


def cases(name: str) -> list[dict]:
    dense = load(name)
    about = {"model": NAMES[name], "device": "cpu", "threads": torch.get_num_threads()}
    found = []
    for given in INPUTS[name]:
        is_text = len(given.shape) == 2
        x = torch.randint(1000, 20000, given.shape) if is_text else torch.randn(given.shape)
        case = about | {"case": str(given)}
        pruned, ours = dense, []
        for sparsity in SPARSITIES:
            pruned = copy.deepcopy(dense)
            if is_text:
                prune_(pruned, Magnitude(sparsity))
            else:
                prune_convolutions_(pruned, sparsity)
            this = case | {"sparsity": sparsity}
            rows, made = reports(pruned, x, given.new_tokens, this)
            found += rows
            ours.append((sparsity, "accelerate_", made))
            if given.new_tokens:
                ours.append((sparsity, f"accelerate_{ONEDNN}", with_head_in_onednn(made)))
                ours.append((sparsity, "pack_", packed(pruned, sparsity)))
        if given.new_tokens:
            case |= {"case": f"1 token after {given.shape[1]}"}
        ways = ways_of(pruned, ours, x, bool(given.new_tokens))
        found += race(ways, case)
    return found


def load(name: str) -> nn.Module:
    if name != "resnet50":
        return {"minilm": models.minilm, "smollm2": models.smollm2}[name]()[0]
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig()).eval().to(memory_format=torch.channels_last)  # type: ignore


@torch.no_grad()
def prune_convolutions_(model: nn.Module, sparsity: float) -> None:
    """The smallest weights of each, by torch alone: no algorithm takes convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            size = module.weight.abs()
            module.weight *= size > size.flatten().kthvalue(int(sparsity * size.numel())).values


def reports(
    pruned: nn.Module, x: Tensor, new_tokens: int, case: dict
) -> tuple[list[dict], nn.Module]:
    """Records of ROUNDS calls of accelerate_, and what the last one made. Generation is timed as a
    whole."""
    found = []
    case = case | {"op": REPORT, "dtype": "float32"}
    for i in range(ROUNDS):
        model = copy.deepcopy(pruned)
        example = {model.main_input_name: x} | ({} if new_tokens else engines.settings_of(model))
        began = time.process_time()
        report = accelerate_(model, example, new_tokens=new_tokens)
        took = time.process_time() - began
        before_s, after_s = report.before_s, report.after_s
        if new_tokens:
            before_s, after_s = (generate_s(m, x, new_tokens) for m in (pruned, model))
        ways = (
            ("dense", DENSE, before_s),
            ("accelerate_", OURS, after_s),
            ("expected", OURS, report.expected_after_s),
            ("the call of accelerate_", OURS, took),
        )
        rows = [
            case | {"step": i + 1, "contender": way, "kind": kind, "median_s": seconds}
            for way, kind, seconds in ways
        ]
        rows[1]["error"] = report.output_error or 0.0  # None: nothing was exchanged
        found += rows
        print(case["case"], case["sparsity"], [round(s, 4) for *_, s in ways], flush=True)
    return found, model


def generate_s(model: Any, x: Tensor, new_tokens: int) -> float:
    """Seconds of generate()."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    began = time.process_time()
    model.generate(x, attention_mask=torch.ones_like(x), pad_token_id=0, **settings)
    return time.process_time() - began


def packed(pruned: nn.Module, sparsity: float) -> nn.Module:
    """In bfloat16, all layers with zeros."""
    model = copy.deepcopy(pruned).bfloat16()
    Static(sparsity, init_method="from_zeros").apply(model)
    return pack_(model)


def with_head_in_onednn(model: Any) -> nn.Module:
    """The same modules but for the head."""
    other = copy.copy(model)
    other._modules = model._modules | {"lm_head": to_mkldnn(model.lm_head)}
    return other


Ways = dict[tuple[float | None, str, str], engines.Engine]  # by zeros, name and type


def ways_of(
    pruned: nn.Module, ours: list[tuple[float, str, nn.Module]], x: Tensor, is_token: bool
) -> Ways:
    """All ways to run the model. Only ours depend on the zeros."""
    prompt = x if is_token else None
    x = x[:, -1:] if is_token else x
    found: Ways = {}

    def add(sparsity: float | None, way: engines.Engine) -> None:
        found[sparsity, way.name, way.dtype] = way

    add(None, engines.torch_way("torch", DENSE, pruned, x, prompt))
    for way in engines.others(pruned, x, prompt):
        add(None, way)
    for sparsity, name, model in ours:
        add(sparsity, engines.torch_way(name, OURS, model, x, prompt))
    if is_token:
        model = to_mkldnn(copy.deepcopy(pruned))
        add(None, engines.torch_way(f"torch{ONEDNN}", DENSE, model, x, prompt))
    if not hasattr(pruned, "generate"):
        torch.compiler.reset()  # code for another input would be looked through in each call
        add(None, engines.torch_way(f"torch{COMPILED}", DENSE, torch.compile(pruned), x))
        for sparsity, name, model in ours:
            add(sparsity, engines.torch_way(name + COMPILED, OURS, torch.compile(model), x))
    return found


def race(ways: Ways, case: dict) -> list[dict]:
    """Records of all ways, in turn. Errors are those of the model with most zeros."""
    turns = {str(key): on_host(way.run, clock=time.process_time) for key, way in ways.items()}
    taken = in_turns(
        turns,
        RACE_ROUNDS,
        warm_up=2,
        is_enough=lambda name, times: sum(seconds() for seconds in times) > ENOUGH_S,
    )
    first, *_ = ways.values()
    want = first.output(first.run()).double()
    last = max(sparsity for sparsity, *_ in ways if sparsity)  # whose zeros the dense ones have
    found = []
    for (sparsity, name, dtype), way in ways.items():
        seconds = taken[str((sparsity, name, dtype))]
        row = case | {"op": RACE, "contender": name, "kind": way.kind, "dtype": dtype}
        row |= {"median_s": torch.tensor(seconds).median().item(), "min_s": min(seconds)}
        if sparsity is not None:
            row["sparsity"] = sparsity
        if sparsity in (None, last):
            got = way.output(way.run()).double()
            row["error"] = ((got - want).norm() / want.norm()).item()
        found.append(row)
        print(row["case"], name, dtype, sparsity, row["median_s"], row.get("error"), flush=True)
    return found


def page(name: str, run: records.Run) -> str:
    reported = [r for r in run.records if r["op"] == REPORT]
    raced = [r for r in run.records if r["op"] == RACE]
    header = ["input, round", "zeros", "dense ms", "after ms", "times dense"]
    header += ["expected ms", "expected / after", "the call, s"]
    rows, ratios, calls = [], [], []
    for (case, sparsity, step), group in records.groups(
        reported, lambda r: r["case"], lambda r: r["sparsity"], lambda r: r["step"]
    ).items():
        dense, after, expected, call = (r["median_s"] for r in group)
        times = [f"{1e3 * dense:.1f}", f"{1e3 * after:.1f}", f"{dense / after:.2f}"]
        times += [f"{1e3 * expected:.1f}", f"{expected / after:.2f}", f"{call:.1f}"]
        rows.append([f"{case}, {step}", f"{sparsity:.0%}", *times])
        ratios.append(expected / after)
        calls.append(call)
    error = max(r["error"] for r in reported if "error" in r)
    near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    about = f"commit {run.about['commit']['id'][:7]}, {run.about['machine']['cpu']}"
    missing = [] if any(r["contender"] == "OpenVINO" for r in raced) else ["ONNX Runtime, OpenVINO"]
    return "\n".join(
        [
            f"# {NAMES[name]} before and after accelerate_",
            "",
            f"`python bench/accelerated.py --model {name}`, {about}, float32 but where another "
            f"type is named, one thread. Pruned by magnitude, evenly; {ROUNDS} rounds, each of a "
            "fresh copy. `expected`: what the parts in the report add up to, within 10 % of the "
            f"whole in {near} of {len(ratios)} runs. The longest call ran for {max(calls):.1f} s. "
            "All seconds are those that the process ran: other work on the machine does not count. "
            + "A prompt gives the logits of its last token. Of generation (prompt + new tokens) "
            "`dense` and `after` are those of generate(). "
            * any("+" in r["case"] for r in reported)
            + "The "
            f"outputs of both, relative to their norm, differ by {error:.0e} at most.",
            "",
            table(header, rows),
            "",
            "## Other engines",
            "",
            "All in turn, one thread each, medians. Only accelerate_ and pack_ make use of zeros: "
            "pack_ of all layers that have some. Compiled: by torch.compile, which is not timed. "
            "oneDNN: torch.utils.mkldnn.to_mkldnn of the dense layers, of accelerate_ of the head. "
            "Bold: an engine that is faster than accelerate_ at 75 % zeros. Error: of the output, "
            "relative to the norm of that of torch in float32."
            + " Not installed: ONNX Runtime, OpenVINO."
            * bool(missing),
            "",
            engines_table(raced),
            "",
        ]
    )


def engines_table(raced: list[dict]) -> str:
    header = ["input", "engine", "type", "zeros", "ms", "times torch float32", "error"]
    rows = []
    for (case,), group in records.groups(raced, lambda r: r["case"]).items():
        ours = next(r["median_s"] for r in group if r.get("sparsity") == 0.75)
        for r in group:
            zeros = f"{r['sparsity']:.0%}" if r.get("sparsity") is not None else "-"
            ms = f"{1e3 * r['median_s']:.1f}"
            is_faster = r["kind"] != OURS and r["median_s"] < ours
            error = f"{r['error']:.0e}" if r.get("error") is not None else "-"
            times = f"{group[0]['median_s'] / r['median_s']:.2f}"
            cells = [case, r["contender"], r["dtype"], zeros, f"**{ms}**" if is_faster else ms]
            rows.append([*cells, times, error])
    return table(header, rows, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=INPUTS, default="minilm")
    parser.add_argument("--out", type=Path, default=pages.RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if absent := engines.missing():
        print(f"not installed, so without ONNX Runtime and OpenVINO: {', '.join(absent)}")
    found = cases(given.model)
    name = f"{given.model}-accelerated-{date.today()}"
    about = about_run("accelerate", about_cpu())
    pages.keep(given.out, name, about, found, partial(page, given.model))


if __name__ == "__main__":
    main()
