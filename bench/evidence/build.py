"""The corpus as a folder that can be carried: compressed rows, and a manifest of their sources.

MOST_TOKENS keeps it below 58 MB. The stream to pre-train on comes in parts of PART_TOKENS tokens,
so that it can be carried in two goes. A folder that lacks a file says which.
"""

import hashlib
import json
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsekern.files import atomic_write
from sparsekern.gpt.data import BPETokenizer, Tokenizer, tokenizer_from_state

from . import corpus, rows, tasks
from .rows import NOT_A_TARGET
from .sources import SOURCES, Source

VOCABULARY = 8192
CONTEXT = 512
HELD_OUT_TOKENS = 500_000  # of each domain
MOST_TOKENS, PART_TOKENS = 52_000_000, 26_000_000  # to train on
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
TRAINING = "training"

Tell = Callable[[str], None]


@dataclass
class Corpus:
    """`arrays`: the stream to train on, uint16 [tokens], under TRAINING, and rows of everything
    else. `id` names all of it."""

    id: str
    manifest: dict
    arrays: dict[str, np.ndarray]


def build(downloads: Path, folder: Path, tell: Tell) -> None:
    """All of it from its packages: minutes, 5 GB of memory, 0.4 GB of downloads."""
    split, paragraphs, about = corpus.Split(), corpus.Paragraphs(), []
    for source in SOURCES:
        characters = corpus.add(split, paragraphs, source.domain, source.documents(downloads))
        tell(f"{source.name} {source.version}: {characters / 1e6:.1f} MB of prose")
        about.append(describe(source, downloads) | {"characters": characters})
    about += [describe(source, downloads) for source in tasks.SOURCES]
    documents = [doc for domain in split.training.values() for doc in domain]
    documents.sort(key=lambda doc: corpus.hashed(doc[0], 2**61))
    text = corpus.joined(documents)
    tell(f"learning a vocabulary from {len(text) / 1e6:.0f} MB")
    tokenizer = BPETokenizer.train(text.replace(corpus.SEPARATOR, "\n\n"), VOCABULARY)
    tell("encoding")
    arrays = {TRAINING: encode(tokenizer, text)[:MOST_TOKENS]}
    tell(f"{len(arrays[TRAINING]):,} tokens to train on; held-out text and tasks")
    known = np.unique(corpus.windows(arrays[TRAINING]))
    held_out = {}
    for domain, docs in sorted(split.held_out.items()):
        tokens = encode(tokenizer, corpus.joined(docs))[:HELD_OUT_TOKENS]
        held_out[domain] = corpus.without_known(tokens, known)
        scored = float((held_out[domain] < NOT_A_TARGET).mean())
        tell(f"held out, {domain}: {len(tokens):,} tokens, {scored:.1%} of them scored")
    length = CONTEXT + 1
    arrays |= {f"held-out/{d}": rows.cut(tokens, length) for d, tokens in held_out.items()}
    for task in (tasks.sentiment, tasks.webnlg, tasks.code):
        arrays |= task(tokenizer, downloads, length)
    arrays |= tasks.blimp(tokenizer, downloads)
    arrays |= tasks.cloze(tokenizer, split.held_out["novels"])
    save(folder, arrays, tokenizer, {"sources": about, "characters": len(text)}, tell)


def describe(source: Source, downloads: Path) -> dict:
    names = {"kind": source.kind, "name": source.name, "version": source.version}
    return names | {"domain": source.domain, "sha256": source.sha256(downloads)}


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text).numpy().astype(np.uint16)


def save(
    folder: Path, arrays: dict[str, np.ndarray], tokenizer: Tokenizer, about: dict, tell: Tell
) -> None:
    """Write the arrays, each in files of its own, the tokenizer, and last the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, array in arrays.items():
        parts = [array]
        if name == TRAINING:
            parts = np.split(array, range(PART_TOKENS, len(array), PART_TOKENS))
        files = {}
        for i, part in enumerate(parts):
            file = f"{name.replace('/', '-')}-{i}.xz"
            packed = lzma.compress(np.ascontiguousarray(part).tobytes(), preset=6)
            write(folder / file, packed)
            files[file] = hashlib.sha256(packed).hexdigest()
            tell(f"{file}: {part.size:,} tokens in {len(packed) / 1e6:.1f} MB")
        sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        entries[name] = {"shape": list(array.shape), "sha256": sha256, "files": files}
    write(folder / TOKENIZER, json.dumps(tokenizer.state()).encode())
    text = json.dumps(about | {"vocab_size": tokenizer.vocab_size, "arrays": entries}, indent=1)
    write(folder / MANIFEST, text.encode())


def write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def load(folder: Path) -> Corpus:
    """ValueError names the file that is missing or not what the manifest says."""
    manifest = _manifest(folder)
    arrays = {}
    with ThreadPoolExecutor() as pool:  # unpacking lets go of the interpreter's lock
        parts = {
            name: [pool.submit(_unpacked, folder / f, sha256) for f, sha256 in e["files"].items()]
            for name, e in manifest["arrays"].items()
        }
        for name, entry in manifest["arrays"].items():
            whole = b"".join(part.result() for part in parts[name])
            arrays[name] = np.frombuffer(whole, np.uint16).reshape(entry["shape"])
    return Corpus(identity(folder), manifest, arrays)


def identity(folder: Path) -> str:
    """A name of all arrays together."""
    entries = _manifest(folder)["arrays"].values()
    return hashlib.sha256("".join(e["sha256"] for e in entries).encode()).hexdigest()[:12]


def training_rows(folder: Path) -> dict[str, int]:
    """Of each task."""
    arrays = _manifest(folder)["arrays"]
    return {
        name.removesuffix(f"/{TRAINING}"): entry["shape"][0]
        for name, entry in arrays.items()
        if name.endswith(f"/{TRAINING}")
    }


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; python bench/quality.py corpus makes it")
    return json.loads(path.read_text())


def _unpacked(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise ValueError(f"data: {path} is missing: carry all files that {MANIFEST} names")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != sha256:
        raise ValueError(f"data: {path} is not the file that {MANIFEST} names")
    return lzma.decompress(packed)


def load_tokenizer(folder: Path) -> Tokenizer:
    return tokenizer_from_state(json.loads((folder / TOKENIZER).read_text()))
