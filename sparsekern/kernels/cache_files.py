"""What the user's machine remembers: compiled kernels, measured crossovers."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparsekern"


def write_whole(path: Path, content: bytes) -> None:
    """Processes may write the same file at the same time; none reads a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.write_bytes(content)
        os.replace(part, path)
