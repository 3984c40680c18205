"""Run by torchrun from test_distributed.py: the configs of a JSON file, one after the other, in one
process group. Writes what each rank holds, so that the test can compare them."""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from test_captured import Replayed
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

from sparsekern import SparseLinear, Static, densify_, sparsify_
from sparsekern.bench import scale_gpu
from sparsekern.bench.turns import on_host
from sparsekern.gpt import buckets, captured, distributed, lines, parts, train
from sparsekern.gpt.config import config_from, resumed_config
from sparsekern.gpt.model import GPTConfig
from sparsekern.gpt.shards import Shards
from sparsekern.gpt.start import begin
from sparsekern.nn import pack_
from sparsekern.sparsity import SET, Magnitude, RigL, Wanda, check_same_patterns, pattern
from sparsekern.sparsity.pattern import check_same_on_all_ranks, places_of
from sparsekern.weights import save_weights

folder = Path(sys.argv[1])
rank = os.environ["RANK"]
checks = []
check = parts.check_same_on_all_ranks


def hashes(layers):
    checks.append(pattern.hashes_of(layers.values()))
    check_same_on_all_ranks(layers)


parts.check_same_on_all_ranks = hashes
sys.modules["sparsekern.sparsity.algorithm"].check_same_on_all_ranks = hashes


def count_bytes(buckets, gradients):
    sent.append(sum(g.nbytes for g in gradients))
    send(buckets, gradients)


def say_eager(error):
    eager.append(str(error))
    return f"eager: {error}"


def count_gathered(shards, tensors):
    gathered.append(sum(4 * shards._left(len(t)).start for t in tensors))
    return gather(shards, tensors)


def note_state(shards):
    states = [s for part in shards._parts for s in part.optimizer.state.values()]
    held.append(sum(t.nbytes for state in states for t in state.values() if t.ndim))
    return whole_state(shards)


sent, gathered, held = [], [], []  # bytes that are reduced, that are gathered, of the state
eager = []  # why steps of several ranks were not captured
send, buckets.Buckets._send = buckets.Buckets._send, count_bytes
gather, Shards._gather = Shards._gather, count_gathered
whole_state, Shards.whole_state = Shards.whole_state, note_state
lines.eager = say_eager


def fails_on_one(graph: type) -> type:
    class Fails(graph):
        def __init__(self, *args):
            super().__init__(*args)
            if rank == "1":
                raise torch.OutOfMemoryError("no memory on 1")

    return Fails


def stand_in() -> None:
    """Steps are captured on the CPU, too."""
    captured.CudaGraph, captured.Aside = Replayed, lambda device: nullcontext
    parts.why_eager = lambda ranks: None


results = {}
why_eager, CudaGraph, Aside = parts.why_eager, captured.CudaGraph, captured.Aside
for name, settings in json.loads((folder / "configs.json").read_text()).items():
    for each in (checks, sent, gathered, held, eager, Replayed.made):
        each.clear()
    resume = settings.pop("resume", False)
    config = resumed_config(settings) if resume else config_from(settings)
    if config.device == "cpu" and name.startswith("captured"):
        stand_in()
    if "failing" in name:
        captured.CudaGraph = fails_on_one(captured.CudaGraph)
    result = train.train(config)
    captured.CudaGraph, captured.Aside, parts.why_eager = CudaGraph, Aside, why_eager
    results[name] = {name: result[name] for name in ("losses", "sent_bytes")} | {
        "checks": list(checks),
        "sent": sum(sent),
        "gathered": sum(gathered),
        "held": held[-1:],
        "eager": list(eager),
        "replays": sum(each.replays for each in Replayed.made),
    }

# The check itself: one rank changes a pattern behind the others' backs.
linear = torch.nn.Linear(4, 4)
layer = SparseLinear.from_linear(linear, torch.eye(4, dtype=torch.bool)).to(config.device)
check_same_on_all_ranks({"a": layer})
if rank == "1":
    pattern.set_pattern(layer, places_of(layer)[:2])
try:
    check_same_on_all_ranks({"a": layer})
except RuntimeError as error:
    results["error"] = str(error)


def message(call, *arguments) -> str | None:
    try:
        call(*arguments)
    except (RuntimeError, ValueError) as error:  # NotImplementedError too
        return str(error)
    return None


# Runs that differ from rank to rank: at their beginning, and later on.
other = replace(config, parallel="fsdp", resume=False, out=str(folder / "other"))
for name, value in (("seed", int(rank)), ("parallel", ("ddp", "fsdp")[int(rank)])):
    results[f"other {name}"] = message(begin, replace(other, **{name: value}))
data = folder / f"data-{rank}.txt"
data.write_text(f"text of {rank} " * 200)
results["other data"] = message(begin, replace(other, data=str(data)))
run = begin(other)
if rank == "1":
    layer = next(iter(run.parts.algorithm.layers.values()))
    pattern.set_pattern(layer, places_of(layer)[1:])
results["other at last"] = message(run.save)
results["other was written"] = run.path.exists()


def net(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    layers = torch.nn.Linear(16, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)
    return torch.nn.Sequential(*layers).to(config.device)


def step(model, optimizer, seed: int) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)).to(config.device)
    optimizer.zero_grad()
    model(x[4 * int(rank) : 4 * int(rank) + 4]).square().mean().backward()
    optimizer.step()


# FSDP2 keeps the patterns that each rank has: with other weights, the largest are elsewhere.
for name, seed in (("same", 0), ("other", int(rank))):
    algorithm = Static(0.5, init_method="magnitude")
    model = fully_shard(algorithm.apply(net(seed)))
    optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
    results[f"fsdp {name}"] = message(step, model, optimizer, 0)
    results[f"fsdp {name}, no algorithm"] = message(check_same_patterns, model)

# What would be written to weights that FSDP2 has cut up, and has put together for a forward pass.
algorithm = SET(0.5, update={"freq": 2}, param_filter="*")
model = fully_shard(algorithm.apply(net(0)))
optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
step(model, optimizer, 0)
first = places_of(model[0]).tolist()
model(x := torch.ones(2, 16, device=config.device)).sum().backward()
with torch.no_grad():
    model(x)
results["whole"] = message(optimizer.step)
results["cut up"] = [
    message(Magnitude(0.6, param_filter="*").apply, model),
    message(Wanda(0.6, param_filter="*", calibration=[x]).apply, model),
    *(message(call, model) for call in (densify_, pack_)),
    message(save_weights, model, folder / f"{rank}.safetensors"),
    message(sparsify_, fully_shard(net(0)), Static(0.5), lambda module, name: True),
]
model.reshard()
results["cut up"].append(message(densify_, model[0]))
results["kept"] = message(sparsify_, model, Static(0.5), lambda module, name: True)
beside = fully_shard(torch.nn.Linear(16, 16, device=config.device))
both = torch.nn.ModuleDict({"net": net(0).bfloat16(), "beside": beside})  # a GPU packs no float32
prune, move = (kind(0.5, param_filter="net*").apply for kind in (Magnitude, SET))
move_again = partial(move, prune_again=True)
results["beside"] = [message(call, both) for call in (prune, densify_, move_again, pack_)]
same = places_of(model[0]).tolist() == first and model[0].values.shape == (len(first),)
optimizer.step()
check_same_patterns(model)
results["whole stayed"] = same and places_of(model[0]).tolist() != first

# As the stages of a pipeline: RigL would add up the gradients of different layers.
algorithm = RigL(0.5, param_filter="*")
model = algorithm.apply(torch.nn.ModuleDict({rank: net(0)}))
optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
results["stages"] = message(step, model[rank], optimizer, 0)

# DDP gives all ranks those of the first, which an average follows.
algorithm = RigL(0.5, init_method="magnitude", update={"freq": 1})
model = algorithm.apply(net(int(rank)))
first = places_of(model[0]).tolist()
optimizer = algorithm.apply(torch.optim.SGD(model.parameters(), 0.1))
parallel = torch.nn.parallel.DistributedDataParallel(model)
average = AveragedModel(parallel)
for seed in range(3):
    step(parallel, optimizer, seed)
    average.update_parameters(parallel)
check_same_patterns(average)
results["ddp"] = [places_of(layer).tolist() for layer in (model[0], model[2])]
results["average"] = [places_of(average.module.module[i]).tolist() for i in (0, 2)]
results["first"] = first

# The benchmark of several GPUs, of a model that takes no time.
stand_in()
if config.device == "cpu":
    scale_gpu.compiled_twin, scale_gpu.REDUCED, scale_gpu.ROUNDS = lambda model: model, (2**16,), 1
    ranks = distributed.Ranks("ddp", "cpu")
    tiny = scale_gpu.Model("tiny", GPTConfig(1, 2, 32, 16, 64), 2)
    cells = [(tiny, mask) for mask in tiny.masks]
    results["links"] = list(scale_gpu.all_reduces(ranks, on_host))
    results["scale"] = [
        *scale_gpu.cases(ranks, 100.0, cells[:1], on_host),
        *scale_gpu.cases(ranks, 100.0, cells[1:], on_host, scale_gpu.SENT),
    ]
    results["not begun"] = list(scale_gpu.cases(ranks, -1.0, cells, on_host))

(folder / f"results-{rank}.json").write_text(json.dumps(results))
del algorithm, model, optimizer, parallel, average, run, layer
distributed.finish()
# FSDP2 holds the group, and so gloo's threads, which may abort where the interpreter ends.
sys.stdout.flush()
os._exit(0)
