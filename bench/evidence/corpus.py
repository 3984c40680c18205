"""The text to pre-train on: paragraphs of prose, each once, in documents, some of them held out.

A paragraph is prose with MIN_CHARACTERS and MIN_WORDS at least, LETTERS of it letters and spaces,
FUNCTION_WORDS of its words among the most common English ones. One whose first letters stood in
another paragraph before is dropped. Every HELD_OUT-th document, by a hash of its name, is held out.
What is held out is scored but where WINDOW of its tokens in a row stand in the training text too.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .rows import NOT_A_TARGET, SEPARATOR
from .sources import Documents

MIN_CHARACTERS, MIN_WORDS, LETTERS, FUNCTION_WORDS = 80, 12, 0.8, 0.15
KEY_LETTERS = 200  # that two paragraphs have in common
HELD_OUT = {"novels": 16, "reference": 20, "news": 20, "manuals": 40, "interfaces": 40}
WINDOW = 13
COMMON = frozenset(
    "the of and to in a is that for it as be with by on not this are or his from at which but have "
    "an had they you were their one all we can her has there been if more when will would who so "
    "no she he i was him my me what them its into than then these may such other use used".split()
)


@dataclass
class Split:
    """Documents by domain, (name, text) each."""

    training: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    held_out: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def is_prose(paragraph: str) -> bool:
    if len(paragraph) < MIN_CHARACTERS:
        return False
    words = paragraph.lower().split()
    if len(words) < MIN_WORDS:
        return False
    common = sum(word in COMMON for word in words)
    if common < FUNCTION_WORDS * len(words):
        return False
    letters = len(re.sub(r"[^A-Za-z ]", "", paragraph))
    return letters >= LETTERS * len(paragraph)


def key(paragraph: str) -> bytes:
    """The same for paragraphs that begin with the same letters."""
    letters = re.sub(r"[^a-z]", "", paragraph.lower())[:KEY_LETTERS]
    return hashlib.blake2b(letters.encode(), digest_size=8).digest()


def hashed(name: str, among: int) -> int:
    """A number of range(among) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % among


class Paragraphs:
    """Prose that was not seen before, and how much there was."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def of(self, text: str) -> Iterator[str]:
        for raw in re.split(r"\n\s*\n", text.replace("\xa0", " ").replace("\r", "")):
            paragraph = " ".join(raw.split())
            if is_prose(paragraph):
                known = key(paragraph)
                if known not in self._seen:
                    self._seen.add(known)
                    yield paragraph


def add(split: Split, paragraphs: Paragraphs, domain: str, documents: Documents) -> int:
    """Sort the documents of a source into the split -> characters of prose."""
    characters = 0
    for name, raw in documents:
        text = "\n\n".join(paragraphs.of(raw))
        if text:
            characters += len(text)
            side = split.training if hashed(name, HELD_OUT[domain]) else split.held_out
            side.setdefault(domain, []).append((name, text))
    return characters


def joined(documents: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{SEPARATOR}{text}" for _, text in documents)


def windows(tokens: np.ndarray) -> np.ndarray:
    """A hash of each WINDOW tokens in a row: uint64 [tokens - WINDOW + 1]."""
    count = max(0, len(tokens) - WINDOW + 1)
    found = np.zeros(count, dtype=np.uint64)
    for i in range(WINDOW):
        found *= np.uint64(0x9E3779B97F4A7C15)
        found += tokens[i : i + count].astype(np.uint64) + np.uint64(1)
        found ^= found >> np.uint64(29)
    return found


def is_known(held_out: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Whether tokens uint16 [n] stand in a window of `known` (sorted hashes of the training text):
    bool [n]."""
    found = windows(held_out)
    at = np.minimum(np.searchsorted(known, found), max(0, len(known) - 1))
    starts = np.flatnonzero(known[at] == found) if len(known) else np.empty(0, np.int64)
    open_windows = np.zeros(len(held_out) + 1, dtype=np.int32)
    np.add.at(open_windows, starts, 1)
    np.add.at(open_windows, np.minimum(starts + WINDOW, len(held_out)), -1)
    return np.cumsum(open_windows)[:-1] > 0


def without_known(held_out: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The tokens, with those that is_known() marked as no targets."""
    marked = held_out.copy()
    marked[is_known(held_out, known)] |= NOT_A_TARGET
    return marked
