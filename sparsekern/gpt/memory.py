"""The memory of this process."""

import resource
import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most that was ever resident."""
    # Linux keeps ru_maxrss over exec, so a small child reports its large parent; VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
