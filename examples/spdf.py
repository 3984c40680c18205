"""Sparse pre-training, then dense fine-tuning (SPDF, arXiv 2303.10464), in small.

    python examples/spdf.py

prints, beside its progress, something like

    pre-trained with 75% zeros: loss 1.03
    fine-tuned dense on other text: loss 4.80 -> 1.55
    training FLOPs of the sparse half: 2.8x fewer than dense

So short a run says nothing about quality: it shows the way. `python -m sparsekern train` takes
the same settings as flags, and bench/quality.py is the experiment at a size that tells more.
"""

import tempfile
from pathlib import Path

from sparsekern.gpt.config import TrainConfig, config_from
from sparsekern.gpt.train import train

with tempfile.TemporaryDirectory() as folder:
    # Any text will do; these two are made here, so that nothing needs to be downloaded.
    lines = [f"{i} bottles of beer on the wall, {i} bottles of beer." for i in range(400)]
    Path(folder, "general.txt").write_text("\n".join(lines))
    lines = [f"The square of {i} is {i * i}, its cube is {i**3}." for i in range(400)]
    Path(folder, "task.txt").write_text("\n".join(lines))

    shape = {"layers": 2, "heads": 4, "width": 128, "context": 64, "batch": 8}
    pretrain = TrainConfig(
        data=f"{folder}/general.txt",
        sparsity=0.75,  # of the linear layers of the blocks; head and embeddings stay dense
        steps=60,
        lr=2e-3,
        out=f"{folder}/sparse",
        **shape,
    )
    sparse = train(pretrain)

    # The same weights, now dense: places that had no weight begin at zero, so the loss goes on
    # where it was.
    finetune = config_from(
        {
            "init_from": pretrain.out,
            "dense": True,
            "data": f"{folder}/task.txt",
            "batch": 8,
            "steps": 40,
            "lr": 1e-3,
            "out": f"{folder}/dense",
        }
    )
    dense = train(finetune)

first, last = dense["evaluations"][0]["loss"], dense["evaluations"][-1]["loss"]
loss, zeros = sparse["evaluations"][-1]["loss"], sparse["sparsity"]
print(f"\npre-trained with {zeros:.0%} zeros: loss {loss:.2f}")
print(f"fine-tuned dense on other text: loss {first:.2f} -> {last:.2f}")
print(f"training FLOPs of the sparse half: {sparse['flop_ratio']:.1f}x fewer than dense")
