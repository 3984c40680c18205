"""The text of a corpus in the tokens of another model: decoded, and encoded anew.

Such a model has more tokens than rows.py has room for beside its mark, so what is scored is a bool.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsekern.files import atomic_write
from sparsekern.gpt.data import Tokenizer

from .build import TRAINING, Corpus
from .corpus import is_known, windows
from .rows import IDS, NOT_A_TARGET, SEPARATOR, cut

AT_ONCE = 256  # texts that are encoded: what comes of them takes ten times as much memory
Encode = Callable[[list[str]], Sequence[Sequence[int]]]


class Rows(NamedTuple):
    """As of rows.py: ids uint16 [rows, L], and whether each of them is scored, bool [rows, L]."""

    ids: np.ndarray
    is_target: np.ndarray

    def __getitem__(self, at):  # of rows, not of the two
        return Rows(self.ids[at], self.is_target[at])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Text:
    """`training`: uint16 [tokens], a separator before each document; `rows` of everything that is
    scored, by the names of the corpus."""

    training: np.ndarray
    rows: dict[str, Rows]


def kept(path: Path, make: Callable[[], Text]) -> Text:
    """What make() gives, from a file once it was made."""
    if not path.exists():
        text = make()
        parts = {
            f"{part}/{n}": getattr(rows, part)
            for n, rows in text.rows.items()
            for part in Rows._fields
        }
        with atomic_write(path) as file:
            np.savez(file, training=text.training, **parts)
    with np.load(path) as file:
        names = [name.partition("/")[2] for name in file if name.startswith("ids/")]
        rows = {n: Rows(*(file[f"{part}/{n}"] for part in Rows._fields)) for n in names}
        return Text(file["training"], rows)


def retold(corpus: Corpus, tokenizer: Tokenizer, encode: Encode, separator: int) -> Text:
    """`tokenizer`: that of the corpus; `encode`: texts to tokens of the other one, below 65536,
    without any that it adds by itself; `separator`: its token between documents."""

    def pieces(texts: list[str]) -> list[np.ndarray]:
        return [
            np.array([separator, *ids], np.uint16)
            for i in range(0, len(texts), AT_ONCE)
            for ids in encode(texts[i : i + AT_ONCE])
        ]

    def stream(documents: list[str]) -> np.ndarray:
        return np.concatenate([*pieces(documents), np.empty(0, np.uint16)])

    length = corpus.arrays["code/training"].shape[1]
    training = stream(documents_of(corpus.arrays[TRAINING], tokenizer))
    known = np.unique(windows(training))
    found = {}
    for name, rows in corpus.arrays.items():
        if name.startswith("held-out/") or name in ("code/dev", "code/test"):
            ids = stream(documents_of(_joined(rows), tokenizer))
            is_new = ~is_known(ids, known) if name.startswith("held-out/") else ids == ids
            found[name] = Rows(cut(ids, length), cut(is_new, length))
    texts = [tokenizer.decode((row[row < NOT_A_TARGET]).tolist()) for row in corpus.arrays["blimp"]]
    found["blimp"] = padded(pieces(texts))
    return Text(training, found)


def documents_of(stream: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """Of a stream with a separator before each; before the first there may be none."""
    ids, separator = stream & IDS, int(tokenizer.encode(SEPARATOR)[0])
    parts = np.split(ids, np.flatnonzero(ids == separator))
    return [tokenizer.decode(part[part != separator].tolist()) for part in parts if len(part) > 1]


def _joined(rows: np.ndarray) -> np.ndarray:
    """The stream that was cut into rows."""
    return np.concatenate([rows[:, :-1].ravel(), rows[-1:, -1]])


def padded(pieces: Sequence[np.ndarray]) -> Rows:
    """A row for each; all but its first token are scored."""
    length = max(map(len, pieces), default=1)
    ids, is_target = np.zeros((2, len(pieces), length), np.uint16)
    for row, scored, piece in zip(ids, is_target, pieces, strict=True):
        row[: len(piece)], scored[1 : len(piece)] = piece, 1
    return Rows(ids, is_target.astype(bool))
