"""A toy of bench/evidence: its modules, a corpus and a runner on the CPU."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekern.gpt.data import ByteTokenizer

BENCH = Path(__file__).parents[2] / "bench"
LENGTH = 17
WORDS = "the of and to in is that model weight zero mask train loss good bad film novel".split()


@pytest.fixture(scope="module")
def evidence():
    """The package bench/evidence, with toy runs of a few steps."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        import evidence.arms
        import evidence.check
        import evidence.clock
        import evidence.differences
        import evidence.page
        import evidence.period
        import evidence.study
        import evidence.worker  # noqa: F401

        small = evidence.plan.SIZES["toy"]
        small = replace(small, tokens=12 * small.shape.batch * (LENGTH - 1))
        patch.setitem(evidence.plan.SIZES, "toy", small)
        patch.setattr(evidence.masks, "UPDATE_EVERY", 3)
        yield evidence
    for name in [
        n for n in sys.modules if n.partition(".")[0] in ("evidence", "workers", "quality")
    ]:
        del sys.modules[name]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="module")
def folder(evidence, tmp_path_factory) -> Path:
    """A corpus, as build.save writes one."""
    rng, rows, build = random.Random(0), evidence.rows, evidence.build
    tokenizer = ByteTokenizer()
    documents = [(str(i), text(rng, 100)) for i in range(20)]
    arrays = {"training": build.encode(tokenizer, evidence.corpus.joined(documents))}
    for domain in ("manuals", "novels"):
        tokens = build.encode(tokenizer, text(rng, 150))
        arrays[f"held-out/{domain}"] = rows.cut(tokens, LENGTH)
    pairs = [(text(rng, 5), rng.choice([" good", " bad"])) for _ in range(24)]
    pieces = rows.items(tokenizer, pairs, LENGTH)
    for task in ("sentiment", "webnlg", "code"):
        arrays[f"{task}/training"] = rows.together(pieces[:8], LENGTH)
        arrays[f"{task}/dev"] = rows.padded(pieces[8:16], LENGTH)
        arrays[f"{task}/test"] = rows.padded(pieces[16:], LENGTH)
    pairs = [("", text(rng, 4)) for _ in range(12)]
    arrays["blimp"] = rows.padded(rows.items(tokenizer, pairs, 12), 12)
    arrays["cloze"] = rows.padded(pieces, LENGTH)
    path = tmp_path_factory.mktemp("quality")
    build.save(path, arrays, tokenizer, {"sources": []}, lambda told: None)
    return path


@pytest.fixture
def runner(evidence, folder, tmp_path):
    return evidence.worker.runner(evidence.build.load(folder), tmp_path / "work", "cpu")
