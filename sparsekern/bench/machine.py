"""The machine of a measurement: processor, versions, commit, clocks."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy
import torch

from .. import __version__
from ..kernels.cpu import panel

ROOT = Path(__file__).parents[2]  # of a checkout
PACKAGES = ("triton", "cupy-cuda13x", "cupy-cuda12x", "scipy")
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def processor() -> str:
    """The processor's name as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def cores() -> list[int]:
    """Cores that this process may run on, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def isa() -> str:
    """The instruction set of sparsekern's kernels."""
    return panel._C.isa() if panel._C else "none"


def about_cpu() -> dict[str, object]:
    return {
        "cpu": processor(),
        "cores": len(cores()),
        "isa": isa(),
        "isa_of_torch": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "sparsekern": __version__,
        "packages": {name: installed(name) for name in PACKAGES},
    }


def about_gpu() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def gpu_under_load() -> dict[str, str]:
    """Driver, clocks, power and temperature while the GPU copies."""
    source = torch.empty(2**28, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    for _ in range(1000):  # about a second
        target.copy_(source)
    query = f"--query-gpu={','.join(SMI_FIELDS)}"
    # CUDA_VISIBLE_DEVICES renumbers torch's GPUs, and not nvidia-smi's.
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", query, "--format=csv,noheader", "-i", uuid]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    finally:
        torch.cuda.synchronize()
    return dict(zip(SMI_FIELDS, map(str.strip, text.split(",")), strict=True))


def git(*arguments: str) -> str:
    """Empty where this is no checkout of the repository."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> dict[str, object]:
    return {
        "id": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def about_run(benchmark: str, machine: dict, commit_id: str | None = None) -> dict:
    """What a table of measurements says of its run (records.py). `commit_id`: where there is no
    repository."""
    return {
        "benchmark": benchmark,
        "date": date.today().isoformat(),
        "commit": {"id": commit_id, "dirty": False} if commit_id else commit(),
        "machine": machine,
    }


def source(about: dict) -> str:
    """GPU, torch, day and commit of a run, for files of what was measured."""
    m, commit = about["machine"], about["commit"]["id"][:10]
    return f"{m['gpu']}, torch {m['torch']}, {about['date']}, commit {commit}"


def in_words(about: dict, dtype: str) -> str:
    """Machine, versions, clocks, day and commit of a run (sparsekern/bench/records.py)."""
    m, commit = about["machine"], about["commit"]
    if "gpu" in m:
        parts = [f"{m['gpu']} ({m['capability']}, {m['multiprocessors']} multiprocessors)", dtype]
        parts += [f"torch {m['torch']}", f"CUDA {m['cuda']}"]
        parts += [f"{name.replace('.', ' ')} {value}" for name, value in m["under_load"].items()]
        if "parts" in about:
            parts.append(f"each W on one of {about['parts']} such GPUs")
    else:
        parts = [m["cpu"], f"{m['cores']} cores", m["isa"]]
        parts += [f"torch {m['torch']} ({m['isa_of_torch']})", f"{dtype} unless said"]
    changed = " with local changes" if commit["dirty"] else ""
    return ", ".join([*parts, about["date"], f"commit {commit['id'][:10]}{changed}."])
