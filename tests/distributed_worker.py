"""Run by torchrun from test_distributed.py: the configs of a JSON file, one after the other, in one
process group. Writes what each rank holds, so that the test can compare them."""

import json
import os
import sys
from pathlib import Path

import torch

from sparsekern import SparseLinear
from sparsekern.gpt import distributed, train
from sparsekern.sparsity import pattern
from sparsekern.sparsity.pattern import check_same_on_all_ranks, places_of

folder = Path(sys.argv[1])
rank = os.environ["RANK"]
checks = []
check = train.check_same_on_all_ranks


def hashes(layers):
    checks.append([pattern._crc(layer) for layer in layers.values()])
    check_same_on_all_ranks(layers)


train.check_same_on_all_ranks = hashes
sys.modules["sparsekern.sparsity.algorithm"].check_same_on_all_ranks = hashes

results = {}
for name, settings in json.loads((folder / "configs.json").read_text()).items():
    checks.clear()
    resume = settings.pop("resume", False)
    config = train.resumed_config(settings) if resume else train.config_from(settings)
    result = train.train(config)
    results[name] = {"losses": result["losses"], "checks": list(checks)}

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
(folder / f"results-{rank}.json").write_text(json.dumps(results))
distributed.finish()
