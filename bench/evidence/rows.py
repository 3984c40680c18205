"""Tokens in rows of one length, as models are trained and scored on them.

A row is uint16 [L]: L - 1 inputs and, one later, their targets. The bit NOT_A_TARGET marks a token
that is read and not scored: a prompt, padding, a target that the training text gives away.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from sparsekern.gpt.data import Tokenizer

SEPARATOR = "\0"  # before each document: no text has it, so it is a token of its own
NOT_A_TARGET = np.uint16(1 << 14)
IDS = NOT_A_TARGET - 1  # a token is & IDS

Item = tuple[str, str]  # a prompt, and what is scored


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, uint16."""
    if not texts:
        return []
    # One call for all: a separator is one token, and stands nowhere else.
    ids = tokenizer.encode(SEPARATOR.join(texts)).numpy().astype(np.uint16)
    separator = int(tokenizer.encode(SEPARATOR)[0])
    first, *others = np.split(ids, np.flatnonzero(ids == separator))
    return [first, *(piece[1:] for piece in others)]


def items(tokenizer: Tokenizer, pairs: Sequence[Item], most: int) -> list[np.ndarray]:
    """Separator, prompt and answer of each pair, the answer alone to be scored. Of a prompt that
    is too long the end is kept; an answer is cut at its end."""
    separator = tokenizer.encode(SEPARATOR).numpy().astype(np.uint16)
    prompts = encode(tokenizer, [prompt for prompt, _ in pairs])
    answers = encode(tokenizer, [answer for _, answer in pairs])
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        answer = answer[: most - 2]
        room = most - 1 - len(answer)
        prompt = prompt[max(0, len(prompt) - room) :]
        found.append(np.concatenate([separator | NOT_A_TARGET, prompt | NOT_A_TARGET, answer]))
    return found


def padded(pieces: Iterable[np.ndarray], length: int) -> np.ndarray:
    """A row for each piece: uint16 [pieces, length]."""
    rows = []
    for piece in pieces:
        row = np.full(length, NOT_A_TARGET, dtype=np.uint16)
        row[: len(piece)] = piece
        rows.append(row)
    return np.stack(rows) if rows else np.empty((0, length), np.uint16)


def together(pieces: Iterable[np.ndarray], length: int) -> np.ndarray:
    """As many pieces in a row as it has room for, in their order: uint16 [rows, length]."""
    rows: list[np.ndarray] = []
    row: list[np.ndarray] = []
    used = 0
    for piece in pieces:
        if used + len(piece) > length:
            rows.append(np.concatenate(row))
            row, used = [], 0
        row.append(piece)
        used += len(piece)
    if row:
        rows.append(np.concatenate(row))
    return padded(rows, length)


def cut(tokens: np.ndarray, length: int) -> np.ndarray:
    """A stream in rows that overlap by one token, so that each one is a target once."""
    count = (len(tokens) - 1) // (length - 1)
    starts = np.arange(count)[:, None] * (length - 1)
    return tokens[starts + np.arange(length)]
