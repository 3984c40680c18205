"""A trained model is pruned with calibration text, saved, read back, and writes text.

    python examples/prune_and_generate.py

prints, beside the progress of its training, something like

    dense:        loss 0.41
    75% pruned:   loss 0.44   1.75 -> 0.97 MB
    saved and read back, outputs equal: True
    99 bottles of beer...

So small a model counts badly, pruned or not.
"""

import tempfile
from pathlib import Path

import torch

from sparsekern.gpt.build import load_model
from sparsekern.gpt.config import TrainConfig
from sparsekern.gpt.data import Batches, load_tokens
from sparsekern.gpt.generate import generate
from sparsekern.gpt.model import GPT
from sparsekern.gpt.step import evaluate
from sparsekern.gpt.train import train
from sparsekern.sparsity import SparseGPT
from sparsekern.weights import load_weights, save_weights, set_weights_

with tempfile.TemporaryDirectory() as folder:
    text = Path(folder, "text.txt")
    lines = [f"{i} bottles of beer on the wall, {i} bottles of beer." for i in range(999, 0, -1)]
    text.write_text("\n".join(lines))
    shape = {"layers": 2, "heads": 4, "width": 128, "context": 64}
    train(TrainConfig(data=str(text), **shape, steps=150, lr=3e-3, out=folder))
    model, tokenizer = load_model(folder)
    _, learnt, kept_back = load_tokens(str(text), tokenizer, "bytes", 0)
    validation = Batches(kept_back, 8, 64, seed=0)
    print(f"\ndense:        loss {evaluate(model, validation):.2f}")

    # 1. Prune. SparseGPT and Wanda look at some inputs of the model; Magnitude needs none.
    batches = Batches(learnt, 8, 64, seed=0)
    before = sum(p.nbytes for p in model.parameters())
    SparseGPT(0.75, calibration=[batches.get(i)[0] for i in range(4)]).apply(model)
    after = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    loss = evaluate(model, validation)
    print(f"75% pruned:   loss {loss:.2f}   {before / 1e6:.2f} -> {after / 1e6:.2f} MB")

    # 2. Save and read back. The file holds a digest of each tensor: damage is an error.
    file = Path(folder, "pruned.safetensors")
    save_weights(model, file)
    served = set_weights_(GPT(model.config), load_weights(file)).eval()
    prompt = tokenizer.encode("99 bottles")[None].long()
    with torch.no_grad():
        same = torch.equal(served(prompt)[0], model.eval()(prompt)[0])
    print(f"saved and read back, outputs equal: {same}")

    # 3. Generate.
    print(tokenizer.decode(generate(served, prompt, 40, temperature=0)[0].tolist()))
