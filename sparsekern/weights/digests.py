"""Digests of tensors, by which a file of weights tells that a bit of it has changed.

SHA-256 of the dtype, the shape and the bytes: about 2 GB/s on a core with SHA instructions, as many
tensors at a time as there are cores.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

MOST_THREADS = 8
MANY_BYTES = 2**20  # worth the start of threads


def digest(t: Tensor) -> str:
    whole = t.detach().cpu().contiguous()
    # A single element is contiguous whatever its stride, which view() would not take.
    flat = whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)
    found = hashlib.sha256(f"{t.dtype} {tuple(t.shape)}".encode())
    found.update(flat.numpy().data)  # without the interpreter's lock
    return found.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor."""
    if sum(t.nbytes for t in tensors.values()) < MANY_BYTES:
        return {name: digest(t) for name, t in tensors.items()}
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def digest_of_json(value: object) -> str:
    """Digest of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def changed(tensors: Mapping[str, Tensor], expected: object) -> str | None:
    """The name of a tensor that is not as its digest says, or is there without one, or not there;
    None where all are."""
    if not isinstance(expected, dict):
        return "the list of digests"
    if different := sorted(map(str, expected.keys() ^ tensors.keys())):
        return different[0]
    return next((name for name, of in digests(tensors).items() if of != expected[name]), None)
